"""The embedded model end to end: published medians, the oracle, and the numerical floor."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from cells import cell_prompts, decode, lookup, reference_of, steered_kl
from reference import vector
from rounding import PROMISED_KL

from persona_nnsight import (
    EditResult,
    Grid,
    Model,
    capture,
    inject,
    markers,
    read_table,
    steer,
    substitute,
)
from persona_nnsight.analysis.kl_tables import KL_FLOOR

pytestmark = pytest.mark.smollm2

LAYERS = (8, 12, 16, 21, 26)

EOS = (2,)
"""``<|im_end|>``."""

#: Median KL of the additive vector at p_last on the built-in short grid, float32, measured with
#: the published procedure (one sequence and one full forward per number).
ADDITIVE_AT_P_LAST = {"8": 0.001, "12": 0.003, "16": 0.045, "21": 0.060, "26": 0.170}


@pytest.fixture(scope="module")
def short_run(smollm2: Model) -> EditResult:
    """The short grid at the default layers: the paper's vector and three controls."""
    conditions = ["additive", "bb", "other_x", "clean"]
    return substitute(smollm2, Grid.load("short"), conditions=conditions)


def test_additive_medians(short_run: EditResult) -> None:
    assert short_run.plan.layers == LAYERS
    summary = short_run.summary().set_index(["condition", "position", "layers"])
    medians = {
        layer: float(summary.loc[("additive", "p_last", layer), "median"])  # type: ignore[arg-type]
        for layer in ADDITIVE_AT_P_LAST
    }
    # The published procedure's are given to three digits.
    assert medians == pytest.approx(ADDITIVE_AT_P_LAST, abs=0.0005 + PROMISED_KL)


def test_clean_is_the_numerical_floor(short_run: EditResult) -> None:
    table = short_run.frame()
    clean = table.loc[table["condition"] == "clean", "kl"]
    assert len(clean) == 12 * 3 * 5
    assert clean.abs().max() < KL_FLOOR


def test_every_row_is_there_once(short_run: EditResult) -> None:
    table = short_run.frame()
    keys = ["persona", "task", "condition", "position", "layers"]
    assert len(table) == 12 * 4 * 3 * 5
    assert not table.duplicated(keys).any()
    assert (table["n_tokens"] == 10).all()


@pytest.mark.parametrize(("persona", "task"), [("buffett", "policy"), ("yoda", "haiku")])
def test_substitution_matches_reference(
    smollm2: Model, short_run: EditResult, persona: str, task: str
) -> None:
    reference = reference_of(smollm2, EOS)
    found = lookup(short_run)
    grid = Grid.load("short")
    (cell,) = grid.select([persona], [task]).cells
    prompts = cell_prompts(grid, cell)
    continuation = reference.continuation(prompts, ["g2"])
    index = grid.cells.index(cell)
    assert list(short_run.continuations[index]) == continuation
    for position, layer in (("p_last", 8), ("p_last", 26), ("g1", 21), ("g2", 16)):
        for condition in ("additive", "bb", "other_x"):
            expected = reference.substitution_kl(prompts, position, layer, condition, continuation)
            value, n_tokens = found[(persona, task, condition, position, str(layer))]
            assert n_tokens == expected.n_tokens
            assert value == pytest.approx(expected.kl, abs=PROMISED_KL), (
                position,
                layer,
                condition,
            )


def test_injection_matches_reference(smollm2: Model) -> None:
    reference = reference_of(smollm2, EOS)
    grid = Grid.load("short").select(["marx"], ["recommend"])
    found = lookup(inject(smollm2, grid, layers="10-18:4", each=True))
    prompts = cell_prompts(grid, grid.cells[0])
    continuation = reference.continuation(prompts, ["p_last"])
    for condition, layers in (
        ("host", ()),
        ("oracle", (10, 14, 18)),
        ("cached", (10, 14, 18)),
        ("cached", (14,)),
    ):
        expected = reference.injection_kl(prompts, layers, condition, continuation)
        row = ("marx", "recommend", condition, "p_last", "+".join(map(str, layers)) or "none")
        assert found[row][0] == pytest.approx(expected.kl, abs=PROMISED_KL), row


def test_texts_match_reference(smollm2: Model) -> None:
    """Text under the paper's edits, and what the markers make of it."""
    reference = reference_of(smollm2, EOS)
    grid = Grid.load("long").select(["chef"], ["plan"])
    texts = {t.condition: t.text for t in markers(smollm2, grid, layers="21", tokens=12).texts}
    prompts = cell_prompts(grid, grid.cells[0])
    ids = reference.ids(prompts["XY"])
    h = reference.cell_residuals(prompts, "p_last", 21, [])
    expected = {
        "clean": reference.greedy(ids, 12),
        "additive": reference.greedy(ids, 12, {21: {len(ids) - 1: vector("additive", h)}}),
        "remove_x": reference.greedy(ids, 12, {21: {len(ids) - 1: vector("remove_x", h)}}),
        "bare": reference.greedy(reference.ids(grid.cells[0].task.text), 12),
    }
    assert texts == {name: decode(smollm2, tokens) for name, tokens in expected.items()}


def test_steering_matches_reference(smollm2: Model) -> None:
    reference = reference_of(smollm2, EOS)
    grid = Grid.load("short").select(["marx"], ["recommend"])
    table = steer(smollm2, grid, layers=(10, 16), positions="p_last,g1", alpha="0.5,2").frame()
    prompts = cell_prompts(grid, grid.cells[0])
    for row in table[table["condition"] == "steer"].to_dict("records"):
        sites = ("p_last", "g1"), (10, 16)
        expected = steered_kl(reference, prompts, "XY", *sites, row["alpha"], row["beta"])
        assert row["kl"] == pytest.approx(expected, abs=PROMISED_KL)


def test_the_committed_example_is_what_the_program_makes(short_run: EditResult) -> None:
    """outputs/example, table 1, against a run of now."""
    example = Path(__file__).parents[2] / "outputs" / "example"
    cell = ["persona", "task", "condition", "position", "layers"]
    committed = read_table(example / "table1" / "kl.csv").set_index(cell)["kl"]
    now = short_run.frame().set_index(cell)["kl"]
    both = committed.index.intersection(now.index)
    assert len(both) == 12 * 4 * 3 * 5  # additive, bb, other_x and clean at three positions
    assert now[both].to_numpy() == pytest.approx(committed[both].to_numpy(), abs=PROMISED_KL)
    assert list(example.rglob("*.safetensors")) == []


def test_capture_matches_reference(smollm2: Model) -> None:
    reference = reference_of(smollm2, EOS)
    grid = Grid.load("short").select(["angelou"], ["policy"])
    positions = ("p_user_last", "p_last", "g2")
    result = capture(smollm2, grid, layers=(0, 14, 29), positions=positions)
    prompts = cell_prompts(grid, grid.cells[0])
    continuation = reference.continuation(prompts, positions)
    for p, position in enumerate(positions):
        for j, layer in enumerate((0, 14, 29)):
            expected = reference.cell_residuals(prompts, position, layer, continuation)
            for key in ("BB", "XB", "BY", "XY"):
                difference = (result.residuals[key][0, p, j] - expected[key]).abs().max()
                # The residual stream of this model reaches 10^4 in its massive activations.
                assert difference < 1e-5 * expected[key].abs().max() + 1e-4, (position, layer, key)


def test_one_cell_equals_the_grid(smollm2: Model, short_run: EditResult) -> None:
    one = substitute(
        smollm2,
        Grid.load("short").select(["yoda"], ["policy"]),
        layers=(12, 21),
        conditions=["additive", "other_x"],
    )
    whole = lookup(short_run)
    for row, (value, _) in lookup(one).items():
        assert value == pytest.approx(whole[row][0], abs=PROMISED_KL), row


def test_summary_is_the_table_over_cells(short_run: EditResult) -> None:
    """Recomputed with the standard library: no pandas in the expected values."""
    from statistics import median, quantiles

    rows = short_run.frame().to_dict("records")
    for line in short_run.summary().to_dict("records"):
        values = [
            row["kl"]
            for row in rows
            if all(row[key] == line[key] for key in ("condition", "position", "layers"))
        ]
        low, _, high = quantiles(values, n=4, method="inclusive")
        neither, clean = (
            [
                row["kl"]
                for row in rows
                if row["condition"] == condition
                and (row["position"], row["layers"]) == (line["position"], line["layers"])
            ]
            for condition in ("bb", "clean")
        )
        # In float32 every KL of bb is clearly above the floor.
        assert min(neither) > max(KL_FLOOR, 10 * median(clean))
        pairs = list(zip(values, neither, strict=True))
        expected = {
            "median": median(values),
            "q25": low,
            "q75": high,
            "min": min(values),
            "max": max(values),
            "n": 12,
            "floor": median(clean),
            "recovered": median(1 - kl / of for kl, of in pairs),
            "recovered_pooled": 1 - sum(values) / sum(neither),
        }
        assert {key: line[key] for key in expected} == pytest.approx(expected)
    assert isinstance(short_run.summary(), pd.DataFrame)
