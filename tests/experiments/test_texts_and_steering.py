"""markers, steer and what was given to them, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import MARKED, TINY_GRID, cell_prompts, decode, reference_of, steered_kl
from reference import vector
from rounding import KL32, KL64, assert_close
from tiny import FAMILIES, Tiny

from persona_nnsight import PersonaError, capture, inject, steer, substitute
from persona_nnsight.experiments.markers import Markers, markers
from persona_nnsight.experiments.steer import Steer, parse_factors
from persona_nnsight.storage.vectors import Vectors


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_match_reference(tiny64: Tiny, family: str) -> None:
    model = tiny64(family)
    reference = reference_of(model)
    result = markers(model, MARKED, layers="2,4", tokens=7)
    found = {(t.persona, t.task, t.condition, t.layers): t.text for t in result.texts}
    assert len(found) == len(result.texts) == 4 * (1 + 2 * 2 + 1)
    changed = 0
    for cell in MARKED.cells[::3]:
        key = (cell.persona.key, cell.task.key)
        prompts = cell_prompts(MARKED, cell)
        ids = reference.ids(prompts["XY"])
        clean = reference.greedy(ids, 7)
        assert found[(*key, "clean", None)] == decode(model, clean)
        alone = reference.ids(cell.task.text)
        assert found[(*key, "bare", None)] == decode(model, reference.greedy(alone, 7))
        for layer in (2, 4):
            h = reference.cell_residuals(prompts, "p_last", layer, [])
            for condition in ("additive", "remove_x"):
                edits = {layer: {len(ids) - 1: vector(condition, h)}}
                expected = reference.greedy(ids, 7, edits)
                assert found[(*key, condition, str(layer))] == decode(model, expected)
                changed += expected != clean
    assert changed, "no edit changed a text: the comparison above compared nothing"


@pytest.mark.parametrize("host", ["xy", "by"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_vlm", "mistral", "gpt2", "phi3"])
def test_steering_matches_reference(tiny64: Tiny, family: str, host: str) -> None:
    model = tiny64(family)
    reference = reference_of(model)
    grid = TINY_GRID.select(["marx"], ["haiku", "review"])
    positions, layers = ("p_last", "g2"), (1, 3)
    result = steer(
        model, grid, layers=layers, positions=positions, alpha="0,2.5", beta=(1, -0.5), host=host
    )
    table = result.frame()
    assert set(table["position"]) == {"p_last+g2"}
    assert len(table) == 2 * (1 + 4 + 1)
    # Beside runs of BY it is the XY run as it is.
    clean = table[table["condition"] == "clean"]
    assert set(clean["host"]) == {"XY"}
    assert set(clean["layers"]) == {"1+3" if host == "xy" else "none"}
    assert clean["kl"].abs().max() < KL64
    floors = result.summary().set_index("condition")["floor"]
    assert (floors == clean["kl"].median()).all()
    largest = 0.0
    for cell in grid.cells:
        prompts = cell_prompts(grid, cell)
        rows = table[(table["task"] == cell.task.key) & (table["condition"] == "steer")]
        for row in rows.to_dict("records"):
            expected = steered_kl(
                reference, prompts, host.upper(), positions, layers, row["alpha"], row["beta"]
            )
            assert row["kl"] == pytest.approx(expected, abs=KL64), row
            largest = max(largest, expected)
    assert largest > 1e-2


def test_steering_writes_text_under_all_its_edits(tiny64: Tiny) -> None:
    model = tiny64("llama")
    reference = reference_of(model)
    grid = MARKED.select(["marx"], ["review"])
    result = steer(model, grid, layers=(1, 3), positions="p_last,g1", alpha=3.0, beta=0, generate=8)
    prompts = cell_prompts(grid, grid.cells[0])
    ids = reference.ids(prompts["XY"])
    continuation = reference.continuation(prompts, ["g1"])
    edits: dict[int, dict[int, torch.Tensor]] = {}
    for layer in (1, 3):
        for position in ("p_last", "g1"):
            h = reference.cell_residuals(prompts, position, layer, continuation)
            site = reference.positions(prompts["XY"], position, continuation)
            edits.setdefault(layer, {})[site] = h["BB"] + 3 * (h["XB"] - h["BB"])
    texts = {text.condition: text for text in result.texts}
    assert texts["clean"].text == decode(model, continuation[:8])
    expected = reference.greedy(ids, 8, edits)
    assert expected != continuation[:8], "the edit changed nothing"
    assert texts["steer"].text == decode(model, expected)
    assert (texts["steer"].alpha, texts["steer"].beta) == (3.0, 0.0)
    assert texts["bb"].alpha is None
    assert list(result.tables["markers"]["condition"]) == ["bb", "steer", "clean"]


@pytest.mark.parametrize(("positions", "window"), [("p_last,g1", 1), ("g1,g4", 3)])
def test_sites_beyond_the_window_change_no_kl(tiny64: Tiny, positions: str, window: int) -> None:
    """Their logits come after the window; a text is written under them all the same."""
    options: dict[str, Any] = {"layers": (1, 3), "alpha": (0.0, 2.0), "window": window}
    grid = MARKED.select(["marx"])
    both = steer(tiny64("llama"), grid, positions=positions, generate=6, **options)
    first = steer(tiny64("llama"), grid, positions=positions.split(",")[0], generate=6, **options)
    assert both.frame()["kl"].to_numpy() == pytest.approx(first.frame()["kl"].to_numpy(), abs=KL64)
    assert [text.text for text in both.texts] != [text.text for text in first.texts]


def test_steering_meets_the_fixed_conditions(tiny64: Tiny) -> None:
    """α = β = 1 is additive, 0, 1 by, 1, 0 xb and 0, 0 bb; in the BY host, 0, 1 is the host."""
    model = tiny64("qwen2")
    fixed = substitute(model, TINY_GRID, layers=[3], positions="g1").frame()
    named = {
        name: rows.set_index(["persona", "task"])["kl"] for name, rows in fixed.groupby("condition")
    }
    table = steer(model, TINY_GRID, layers=[3], positions="g1", alpha="0,1", beta="0,1").frame()
    steered = table[table["condition"] == "steer"]
    for (alpha, beta), rows in steered.groupby(["alpha", "beta"]):
        same = {"1 1": "additive", "0 1": "by", "1 0": "xb", "0 0": "bb"}
        expected = named[same[f"{alpha:g} {beta:g}"]]
        assert rows.set_index(["persona", "task"])["kl"].to_numpy() == pytest.approx(
            expected.to_numpy(), abs=KL64
        )
    into_host = steer(model, TINY_GRID, layers=[3], alpha=0, beta=1, host="by").frame()
    host = into_host[into_host["condition"] == "host"]["kl"].to_numpy()
    nothing = into_host[into_host["condition"] == "steer"]["kl"].to_numpy()
    assert nothing == pytest.approx(host, abs=KL64)
    injected = inject(model, TINY_GRID, layers=[3]).frame()
    assert host == pytest.approx(injected[injected["condition"] == "host"]["kl"].to_numpy())


def test_saved_effects_are_those_of_the_run_they_replace(tiny: Tiny) -> None:
    """The persona from one task's file, written into another task: the paper's cached case."""
    model = tiny("llama")
    options: dict[str, Any] = {"layers": (2, 4), "alpha": (1.0, 2.0), "host": "by", "generate": 5}
    saved = capture(
        model, TINY_GRID.select(None, ["haiku"]), layers=(1, 2, 4), positions="p_user_last,p_last"
    ).vectors()
    other = TINY_GRID.select(["yoda", "chef"], ["review"])
    given = steer(model, other, vectors=saved, **options)
    own = steer(model, other, **options)
    assert "XB" not in given.plan.cells[0].prompts
    assert given.frame()["kl"].to_numpy() == pytest.approx(own.frame()["kl"].to_numpy(), abs=KL32)
    assert [text.text for text in given.texts] == [text.text for text in own.texts]
    assert given.geometry.empty
    assert not own.geometry.empty
    # Other effects are really used: twice the persona is what α = 2 was.
    doubled = Vectors(
        **{
            **vars(saved),
            "delta_x": {key: 2 * value for key, value in saved.delta_x.items()},
        }
    )
    twice = steer(model, other, vectors=doubled, **{**options, "alpha": (0.5, 1.0)})
    assert twice.frame()["kl"].to_numpy() == pytest.approx(own.frame()["kl"].to_numpy(), abs=KL32)


def test_effects_are_differences_of_residuals(tiny: Tiny) -> None:
    model = tiny("gemma2")
    result = capture(model, TINY_GRID, layers=(0, 3), positions="p_last,g1")
    saved = result.vectors()
    assert saved.positions == ("p_last",)
    h = {key: value[:, :1] for key, value in result.residuals.items()}
    assert_close(saved.base, h["BB"][0])
    for row, cell in enumerate(TINY_GRID.cells):
        for effect, key, name in (
            (saved.delta_x, "XB", cell.persona.key),
            (saved.delta_y, "BY", cell.task.key),
        ):
            expected = h[key][row] - h["BB"][row]
            assert_close(effect[name], expected)
    with pytest.raises(PersonaError, match="p_last and p_user_last only"):
        capture(model, TINY_GRID, layers=(0,), positions="g1").vectors()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_norm(tiny64: Tiny, family: str) -> None:
    """‖Inter‖/‖Δ_XY‖ after the norm that a decoder layer begins with, by a hook on that norm."""
    model = tiny64(family)
    reference = reference_of(model)
    grid = TINY_GRID.select(["marx"], ["review"])
    table = capture(model, grid, layers=(2, 4), positions="p_last,g1").geometry
    if family == "olmo2":  # normalises after the block: there is no such norm
        assert "inter_over_xy_normed" not in table
        return
    prompts = cell_prompts(grid, grid.cells[0])
    continuation = reference.continuation(prompts, ["g1"])
    # A short sliding window leaves some sites the same for all prompts: nothing over nothing.
    table = table[table["norm_dxy"] > 1e-2]
    assert len(table)
    for row in table.to_dict("records"):
        layer = reference.layers[row["layer"]]
        norm = getattr(layer, "ln_1" if hasattr(layer, "ln_1") else "input_layernorm")
        h = {}
        for key in ("BB", "XB", "BY", "XY"):
            ids = reference.ids(prompts[key])
            seen: list[torch.Tensor] = []
            handle = norm.register_forward_hook(lambda *args, seen=seen: seen.append(args[2]))
            reference._logits([*ids, *continuation])
            handle.remove()
            at = reference.positions(prompts[key], row["position"], continuation)
            h[key] = seen[0][0, at].float()
        inter = h["XY"] - h["XB"] - h["BY"] + h["BB"]
        expected = float(inter.norm() / ((h["XY"] - h["BB"]).norm() + 1e-9))
        assert row["inter_over_xy_normed"] == pytest.approx(expected, rel=1e-9)
        assert row["inter_over_xy_normed"] != pytest.approx(row["inter_over_xy"], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", (1.0,)),
        ("0,0.5, 2", (0.0, 0.5, 2.0)),
        ("0:2:0.5", (0.0, 0.5, 1.0, 1.5, 2.0)),
        ("-1:1:1", (-1.0, 0.0, 1.0)),
        ("0:1:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("0:0.3:0.1", (0.0, 0.1, 0.2, 0.3)),
        ("1,0:1:0.5", (1.0, 0.0, 0.5)),
        (2, (2.0,)),
        ([0, 1.5], (0.0, 1.5)),
    ],
)
def test_factors(text: Any, expected: tuple[float, ...]) -> None:
    assert parse_factors(text, "--alpha") == expected


@pytest.mark.parametrize(
    "text", ["", "x", "1,,2", "0:1", "1:0:0.5", "0:1:0", "0:1000:0.1", "nan", "inf", "1..2:3:1", []]
)
def test_bad_factors(text: Any) -> None:
    with pytest.raises(PersonaError, match="--alpha"):
        parse_factors(text, "--alpha")


def test_bad_steering(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(PersonaError, match="Host 'BB' does not exist"):
        Steer(host="BB").plan(model, TINY_GRID)
    other = capture(tiny("gpt2"), TINY_GRID, layers=(2,), positions="p_last").vectors()
    with pytest.raises(PersonaError, match="of other weights"):
        Steer(layers=(2,), vectors=other).plan(model, TINY_GRID)
    saved = capture(model, TINY_GRID.select(["yoda"]), layers=(2,), positions="p_last").vectors()
    with pytest.raises(PersonaError, match="marx"):
        Steer(layers=(2,), vectors=saved).plan(model, TINY_GRID)
    with pytest.raises(PersonaError, match="3"):
        Steer(layers=(3,), vectors=saved).plan(model, TINY_GRID.select(["yoda"]))
    with pytest.raises(PersonaError, match="g1"):
        Steer(layers=(2,), positions="g1", vectors=saved).plan(model, TINY_GRID.select(["yoda"]))


def test_bad_markers(tiny: Tiny) -> None:
    with pytest.raises(PersonaError, match="'yoda' of grid 'tiny' has no markers"):
        Markers().plan(tiny("llama"), TINY_GRID)
    with pytest.raises(PersonaError, match="0 tokens"):
        Markers(tokens=0).plan(tiny("llama"), MARKED)
