"""The embedded model end to end: published medians, the oracle, and the numerical floor."""

from __future__ import annotations

import pandas as pd
import pytest
from conftest import reference_of
from test_engine import cell_prompts, lookup

from persona_nnsight import EditResult, Grid, Model, capture, inject, substitute

pytestmark = pytest.mark.smollm2

LAYERS = (8, 12, 16, 21, 26)

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
        layer: round(float(summary.loc[("additive", "p_last", layer), "median"]), 3)  # type: ignore[arg-type]
        for layer in ADDITIVE_AT_P_LAST
    }
    assert medians == ADDITIVE_AT_P_LAST


def test_clean_is_the_numerical_floor(short_run: EditResult) -> None:
    table = short_run.frame()
    clean = table.loc[table["condition"] == "clean", "kl"]
    assert len(clean) == 12 * 3 * 5
    assert clean.abs().max() < 2e-6


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
    reference = reference_of(smollm2)
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
            assert value == pytest.approx(expected.kl, abs=1e-4), (position, layer, condition)


def test_injection_matches_reference(smollm2: Model) -> None:
    reference = reference_of(smollm2)
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
        assert found[row][0] == pytest.approx(expected.kl, abs=1e-4), row


def test_capture_matches_reference(smollm2: Model) -> None:
    reference = reference_of(smollm2)
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
        assert value == pytest.approx(whole[row][0], abs=1e-4), row


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
        neither = median(
            row["kl"]
            for row in rows
            if row["condition"] == "bb"
            and (row["position"], row["layers"]) == (line["position"], line["layers"])
        )
        expected = {
            "median": median(values),
            "q25": low,
            "q75": high,
            "min": min(values),
            "max": max(values),
            "n": 12,
            "recovered": 1 - median(values) / neither,
        }
        assert {key: line[key] for key in expected} == pytest.approx(expected)
    assert isinstance(short_run.summary(), pd.DataFrame)
