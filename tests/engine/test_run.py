"""Every number of the engine against the oracle, on every family of architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from cells import TINY_GRID, cell_prompts, decode, lookup, reference_of
from reference import Reference, decomposition, generated_index, kl, vector
from rounding import KL32, KL64, assert_close, assert_same_table
from tiny import DEMANDING, EARLY_EOS_IDS, FAMILIES, Tiny

from persona_nnsight import Grid, capture, inject, substitute
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.engine.self_check import find_path
from persona_nnsight.method.conditions import ROUNDED, SUBSTITUTE_CONDITIONS
from persona_nnsight.method.edit_vectors import seeded_noise
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.plan import Plan

#: Those that run where nobody chooses.
FLOAT32_CONDITIONS = [name for name in SUBSTITUTE_CONDITIONS if name != ROUNDED]
#: Every family as it runs, and some whose rows need not be whole, with whole ones.
WAYS = [
    *((family, "auto") for family in [*FAMILIES, *DEMANDING]),
    *((family, "whole") for family in ("llama", "gemma2", "gemma3_vlm", "mistral", "gpt2")),
]
#: Of the demanding families, those whose text an edit changes.
TALKATIVE = [family for family in DEMANDING if family not in ("mpt", "openai_gpt")]
LAYERS = (2, 4)
POSITIONS = ("p_user_last", "p_last", "g1", "g3")


def in_small_pieces(self: LocalBackend, plan: Plan) -> Limits:
    """Batch sizes that cut a plan in many pieces, on the path that the model takes."""
    return Limits(cells=2, rows=5, path=find_path(self.model.lm, self.model.tree, plan))


def random_kl(
    reference: Reference,
    prompts: Mapping[str, str],
    position: str,
    layer: int,
    continuation: list[int],
    seed: int,
) -> float:
    """The oracle's KL of the `random` control, from the same noise."""
    h = reference.cell_residuals(prompts, position, layer, continuation)
    noise = seeded_noise(seed, position, layer, len(h["BB"]))
    written = h["BB"] + noise * ((h["XY"] - h["BB"]).norm() / noise.norm())
    prompt = reference.ids(prompts["XY"])
    site = reference.positions(prompts["XY"], position, continuation)
    start = len(prompt) + generated_index(position)
    sequence = [*prompt, *continuation]
    clean = reference.logprobs(sequence, start, 10)
    return kl(clean, reference.logprobs(sequence, start, 10, {layer: {site: written}}))


@pytest.mark.parametrize(("family", "path"), WAYS)
def test_capture_matches_reference(tiny64: Tiny, family: str, path: str) -> None:
    model = replace(tiny64(family), path=path)
    reference = reference_of(model)
    result = capture(model, TINY_GRID, layers=(0, 2, 4), positions=POSITIONS)
    for index, cell in list(enumerate(TINY_GRID.cells))[::5]:
        prompts = cell_prompts(TINY_GRID, cell)
        continuation = reference.continuation(prompts, POSITIONS)
        assert list(result.continuations[index]) == continuation
        for p, position in enumerate(POSITIONS):
            for j, layer in enumerate((0, 2, 4)):
                for key in ("BB", "XB", "BY", "XY"):
                    text = prompts[key]
                    expected = reference.residual(
                        [*reference.ids(text), *continuation],
                        layer,
                        reference.positions(text, position, continuation),
                    )
                    assert_close(result.residuals[key][index, p, j], expected)


@pytest.mark.parametrize(("family", "path"), WAYS)
def test_substitution_matches_reference(tiny64: Tiny, family: str, path: str) -> None:
    model = replace(tiny64(family), path=path)
    reference = reference_of(model)
    result = substitute(model, TINY_GRID, layers=(0, 2, 4), positions=POSITIONS)
    found = lookup(result)
    largest = 0.0
    # Two cells at different layers: the oracle takes seven full forwards for every number.
    for (index, cell), layers in zip(
        list(enumerate(TINY_GRID.cells))[::5], ((2,), (0, 4)), strict=True
    ):
        prompts = cell_prompts(TINY_GRID, cell)
        continuation = reference.continuation(prompts, POSITIONS)
        for position in POSITIONS:
            for layer in layers if position != "p_user_last" else layers[-1:]:
                for condition in FLOAT32_CONDITIONS:
                    row = (cell.persona.key, cell.task.key, condition, position, str(layer))
                    value, n_tokens = found[row]
                    if condition == "random":
                        seed = result.plan.cells[index].seed
                        expected = random_kl(
                            reference, prompts, position, layer, continuation, seed
                        )
                    else:
                        expected = reference.substitution_kl(
                            prompts, position, layer, condition, continuation
                        ).kl
                    assert value == pytest.approx(expected, abs=KL64), row
                    assert n_tokens == 10
                    largest = max(largest, expected)
    assert largest > 1e-2, "no edit mattered: the comparison above compared nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_differs_by_rounding(tiny: Tiny, tiny64: Tiny, family: str) -> None:
    """Float32, the dtype that users compute in, gives what the oracle agrees with in float64."""
    sites: dict[str, Any] = {"layers": (2, 4), "positions": POSITIONS}
    # In float64 `random` draws other numbers.
    conditions = [name for name in FLOAT32_CONDITIONS if name != "random"]
    kl, kl64 = (
        substitute(build(family), TINY_GRID, conditions=conditions, **sites)
        for build in (tiny, tiny64)
    )
    assert kl.continuations == kl64.continuations
    assert_same_table(kl.frame(), kl64.frame(), KL32)


@pytest.mark.parametrize(("family", "path"), WAYS)
def test_injection_matches_reference(tiny64: Tiny, family: str, path: str) -> None:
    model = replace(tiny64(family), path=path)
    reference = reference_of(model)
    result = inject(model, TINY_GRID, layers="1-3", each=True)
    found = lookup(result)
    for cell in TINY_GRID.cells[::5]:
        prompts = cell_prompts(TINY_GRID, cell)
        continuation = reference.continuation(prompts, ["p_last"])
        key = (cell.persona.key, cell.task.key)
        host = reference.injection_kl(prompts, (), "host", continuation)
        assert found[(*key, "host", "p_last", "none")] == pytest.approx(
            (host.kl, host.n_tokens), abs=KL64
        )
        for condition in ("oracle", "cached"):
            for layers in ((1, 2, 3), (1,), (2,), (3,)):
                expected = reference.injection_kl(prompts, layers, condition, continuation)
                row = (*key, condition, "p_last", "+".join(map(str, layers)))
                assert found[row][0] == pytest.approx(expected.kl, abs=KL64), row
        assert found[(*key, "clean", "p_last", "none")] == pytest.approx(
            (0.0, host.n_tokens), abs=KL64
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2"])
def test_geometry_and_its_controls_match_reference(tiny64: Tiny, family: str) -> None:
    """Also of an injection, none of whose edits reads another persona's residual."""
    model = tiny64(family)
    reference = reference_of(model)
    grid = TINY_GRID.select(["chef"], ["haiku", "review"])
    tables = [
        capture(model, grid, layers=(2, 4), positions="p_user_last,p_last,g2").geometry,
        inject(model, grid, layers=(3,), window=2).geometry,
    ]
    compared = 0
    for table in tables:
        for row in table.to_dict("records"):
            (cell,) = (cell for cell in grid.cells if cell.task.key == row["task"])
            prompts = cell_prompts(TINY_GRID, cell)
            continuation = reference.continuation(prompts, ["g2"])
            h = reference.cell_residuals(prompts, row["position"], row["layer"], continuation)
            expected = decomposition(h)
            assert set(expected) <= set(row)
            # Where an effect is rounding, so are its angles.
            if min(float((h[key] - h["BB"]).norm()) for key in ("XB", "BY", "XY", "X'B")) > 1e-6:
                compared += 1
                for name, value in expected.items():
                    assert row[name] == pytest.approx(value, abs=1e-6), (row["position"], name)
    assert compared > 5


def test_geometry_of_a_grid_without_another_persona(tiny: Tiny) -> None:
    data: dict[str, Any] = {**TINY_GRID.to_dict(), "personas": {"yoda": "Yoda"}}
    table = capture(
        tiny("llama"), Grid.from_dict(data), layers=(2,), positions="p_last,g1"
    ).geometry
    assert {"cos_xy_y", "cos_xy_x", "rest_y", "rest_x"} <= set(table)
    assert not {"cos_xy_other", "rest_other"} & set(table)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        *((family, "auto") for family in ("llama", "gemma3_vlm", "mistral", "gpt2", *TALKATIVE)),
        *(("llama", "whole"), ("gemma3_vlm", "whole")),
    ],
)
def test_generated_text_matches_reference(tiny64: Tiny, family: str, path: str) -> None:
    """Greedy text under an edit, at prompt and generated positions, in XY and in the BY host."""
    model = replace(tiny64(family), path=path)
    reference = reference_of(model)
    grid = TINY_GRID.select(["marx"], ["haiku", "review"])
    options = {"layers": (2,), "positions": "p_user_last,p_last,g2", "generate": 8}
    texts = substitute(model, grid, conditions=["bb", "clean"], **options).texts  # type: ignore[arg-type]
    assert {text.condition for text in texts} == {"clean", "bb"}
    changed = 0
    for cell in grid.cells:
        prompts = cell_prompts(grid, cell)
        mine = {t.position: t.text for t in texts if t.task == cell.task.key}
        ids = reference.ids(prompts["XY"])
        continuation = reference.greedy(ids, 12)
        assert mine[None] == decode(model, continuation[:8])
        for position in ("p_user_last", "p_last", "g2"):
            h = reference.cell_residuals(prompts, position, 2, continuation)
            site = reference.positions(prompts["XY"], position, continuation)
            expected = reference.greedy(ids, 8, {2: {site: vector("bb", h)}})
            assert mine[position] == decode(model, expected)
            changed += expected != continuation[:8]
    assert changed, "no edit changed the text: the comparison above compared nothing"

    injected = inject(model, grid, layers=(1, 3), generate=8).texts
    prompts = cell_prompts(grid, grid.cells[0])
    by_condition = {t.condition: t.text for t in injected if t.task == grid.cells[0].task.key}
    host_ids = reference.ids(prompts["BY"])
    assert by_condition["host"] == decode(model, reference.greedy(host_ids, 8))
    edits = {
        layer: {
            len(host_ids) - 1: vector(
                "clean", reference.cell_residuals(prompts, "p_last", layer, [])
            )
        }
        for layer in (1, 3)
    }
    assert by_condition["oracle"] == decode(model, reference.greedy(host_ids, 8, edits))


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama", "auto"),
        ("llama", "whole"),
        ("gemma2", "auto"),
        ("longrope", "auto"),
    ],
)
def test_a_cell_does_not_depend_on_its_neighbours(
    tiny64: Tiny, family: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(tiny64(family), path=path)
    options: dict[str, Any] = {"layers": LAYERS, "positions": POSITIONS, "generate": 6}
    run = substitute(model, TINY_GRID, **options)
    whole = lookup(run)
    one = TINY_GRID.select(["marx"], ["review"])
    alone = lookup(substitute(model, one, layers=LAYERS, positions=POSITIONS))
    assert len(alone) == len(FLOAT32_CONDITIONS) * len(LAYERS) * len(POSITIONS)
    for row, value in alone.items():
        assert value == pytest.approx(whole[row], abs=KL64), row

    monkeypatch.setattr(LocalBackend, "limits", in_small_pieces)
    in_pieces = substitute(model, TINY_GRID, **options)
    cut = lookup(in_pieces)
    for row, value in whole.items():
        assert cut[row] == pytest.approx(value, abs=KL64), row
    texts = {
        (text.persona, text.task, text.condition, text.position, text.layers): text.text
        for text in run.texts
    }
    assert len(in_pieces.texts) == len(texts) == len(run.texts)
    for text in in_pieces.texts:
        site = (text.persona, text.task, text.condition, text.position, text.layers)
        assert text.text == texts[site], site

    # Batches that hold unedited rows alone, as the first of an injection may.
    injected = inject(model, TINY_GRID, layers=(2,), generate=6)
    monkeypatch.undo()
    expected = {(t.persona, t.task, t.condition): t.text for t in injected.texts}
    for text in inject(model, TINY_GRID, layers=(2,), generate=6).texts:
        assert text.text == expected[text.persona, text.task, text.condition]


@pytest.mark.parametrize(
    ("family", "path"),
    [*((family, "auto") for family in ("llama", "qwen2", "phi3", "longrope")), ("qwen2", "whole")],
)
def test_a_continuation_that_ends_early_shortens_the_window(
    tiny64: Tiny, family: str, path: str
) -> None:
    model = replace(tiny64(family, eos_early=True), path=path)
    reference = reference_of(model, EARLY_EOS_IDS)
    result = substitute(
        model,
        TINY_GRID,
        layers=(2,),
        positions="p_last,g1,g2",
        conditions=["additive", "bb"],
        generate=9,
    )
    clean_texts = {(t.persona, t.task): t for t in result.texts if t.condition == "clean"}
    captured = capture(model, TINY_GRID, layers=(2,), positions="p_last,g1,g2")
    found = lookup(result)
    lengths = set()
    for index, cell in enumerate(TINY_GRID.cells):
        prompts = cell_prompts(TINY_GRID, cell)
        continuation = reference.continuation(prompts, ["g2"])
        lengths.add(len(continuation))
        assert list(result.continuations[index]) == continuation
        text = clean_texts[cell.persona.key, cell.task.key]
        assert text.n_tokens == min(len(continuation), 9)
        assert text.text == decode(model, continuation[:9])
        for k, position in enumerate(("p_last", "g1", "g2")):
            value, n_tokens = found[(cell.persona.key, cell.task.key, "additive", position, "2")]
            missing = k > len(continuation)
            assert captured.residuals["XY"][index, k].isnan().all() == missing
            if missing:
                assert (math.isnan(value), n_tokens) == (True, 0)
                continue
            expected = reference.substitution_kl(prompts, position, 2, "additive", continuation)
            assert n_tokens == expected.n_tokens
            assert value == pytest.approx(expected.kl, nan_ok=True, abs=KL64)
    assert min(lengths) < 12, "no continuation ended early: nothing was tested"


@pytest.mark.parametrize("window", [1, 3])
def test_other_windows(tiny64: Tiny, window: int) -> None:
    model = tiny64("llama")
    reference = reference_of(model)
    found = lookup(
        substitute(model, TINY_GRID, layers=(2,), positions="g2", conditions=["by"], window=window)
    )
    cell = TINY_GRID.cells[3]
    prompts = cell_prompts(TINY_GRID, cell)
    continuation = reference.continuation(prompts, ["g2"], window)
    expected = reference.substitution_kl(prompts, "g2", 2, "by", continuation, window)
    row = (cell.persona.key, cell.task.key, "by", "g2", "2")
    assert found[row] == pytest.approx((expected.kl, window), abs=KL64)
