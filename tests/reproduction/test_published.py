"""The embedded figures against the paper's, typed in by hand at the precision it prints."""

from __future__ import annotations

import pandas as pd
import pytest

from persona_nnsight import PersonaError
from persona_nnsight.reproduction.published import (
    PAPER_MODELS,
    REFERENCE_MODEL,
    paper_model,
    published,
)

GEMMA = "google/gemma-2-2b-it"
QWEN_1_5B = "Qwen/Qwen2.5-1.5B-Instruct"
QWEN_3B = "Qwen/Qwen2.5-3B-Instruct"

KEY = ["position", "layers", "condition", "persona", "task", "measure"]
SHORT = ["p_user_last", "p_last", "g1", "g2"]
LONG = ["p_last", "g1", "g2"]
GEOMETRY = {"cos_xy_sum", "cos_x_y", "inter_over_xy"}
PERSONAS = ["engineer", "counselor", "founder", "teacher"]
PERSONAS += ["journalist", "doctor", "lawyer", "chef"]
TASKS = ["arch", "plan", "proposal", "policy", "haiku", "recommend"]


def _values(rows: pd.DataFrame, **where: str) -> list[float]:
    """Values of the rows over all personas and tasks whose columns are as asked."""
    for column, value in {"persona": "", "task": "", **where}.items():
        rows = rows[rows[column] == value]
    return [float(value) for value in rows["value"]]


def _all_rows() -> pd.DataFrame:
    return pd.concat(
        [published(f"table{k}", model) for k in (1, 2, 3, 4) for model in PAPER_MODELS]
    )


def _assert_printed(values: list[float], printed: list[str]) -> None:
    """Each value rounds to what is printed, at as many decimals as are printed."""
    digits = [len(text.partition(".")[2]) for text in printed]
    rounded = [f"{value:.{n}f}" for value, n in zip(values, digits, strict=True)]
    assert [text.removeprefix("0") for text in rounded] == printed


@pytest.mark.parametrize(
    ("model", "position", "layers", "medians"),
    [
        (GEMMA, "p_last", "6 10 14", ".0004 .033 .371"),
        (GEMMA, "g1", "6 10 14", ".002 .005 .049"),
        (GEMMA, "g2", "6 10 14", ".001 .013 .060"),
        (QWEN_1_5B, "p_last", "7 11 15", ".022 .026 .065"),
        (QWEN_1_5B, "g1", "7 11 15", ".027 .050 .118"),
        (QWEN_1_5B, "g2", "7 11 15", ".016 .023 .034"),
        (QWEN_3B, "p_last", "9 14 20", ".031 .030 .074"),
        (QWEN_3B, "g1", "9 14 20", ".021 .045 .104"),
        (QWEN_3B, "g2", "9 14 20", ".021 .026 .040"),
    ],
)
def test_table1(model: str, position: str, layers: str, medians: str) -> None:
    rows = published("table1", model)
    site = {"condition": "additive", "measure": "kl", "position": position}
    found = [_values(rows, **site, layers=layer) for layer in layers.split()]
    assert [len(values) for values in found] == [1, 1, 1]
    _assert_printed([value for (value,) in found], medians.split())


@pytest.mark.parametrize(
    ("position", "cosine"), [("p_last", ".874"), ("g1", ".935"), ("g2", ".898")]
)
def test_table1_cosines(position: str, cosine: str) -> None:
    rows = published("table1", GEMMA)
    values = _values(rows, condition="", measure="cos_xy_sum", position=position, layers="14")
    _assert_printed(values, [cosine])


@pytest.mark.parametrize(
    ("model", "position", "layers", "medians"),
    [
        (GEMMA, "p_last", "10 14 18", ".072 .229 .518"),
        (GEMMA, "g1", "10 14 18", ".017 .056 .157"),
        (GEMMA, "g2", "10 14 18", ".012 .056 .138"),
        (QWEN_1_5B, "p_last", "7 15 20", ".030 .112 .198"),
        (QWEN_1_5B, "g1", "7 15 20", ".018 .095 .231"),
        (QWEN_1_5B, "g2", "7 15 20", ".014 .097 .279"),
    ],
)
def test_table2(model: str, position: str, layers: str, medians: str) -> None:
    rows = published("table2", model)
    site = {"condition": "additive", "measure": "kl", "position": position}
    found = [_values(rows, **site, layers=layer) for layer in layers.split()]
    assert [len(values) for values in found] == [1, 1, 1]
    _assert_printed([value for (value,) in found], medians.split())


@pytest.mark.parametrize(
    ("condition", "position", "layers", "any_marker", "distinct"),
    [
        ("clean", "", "", 16, "1.21"),
        ("additive", "p_last", "14", 14, ".92"),
        ("remove_x", "p_last", "14", 15, ".96"),
        ("bare", "", "", 1, ".08"),
    ],
)
def test_table3(condition: str, position: str, layers: str, any_marker: int, distinct: str) -> None:
    rows = published("table3", GEMMA)
    site = {"condition": condition, "position": position, "layers": layers}
    assert _values(rows, **site, measure="any") == [any_marker]
    _assert_printed(_values(rows, **site, measure="distinct"), [distinct])


@pytest.mark.parametrize(
    ("condition", "layers", "median"),
    [
        ("host", "none", "3.05"),
        ("oracle", "14", "2.64"),
        ("cached", "14", "2.84"),
        ("cached", "10+12+14", "2.81"),
        ("cached", "10+12+14+16+18", "2.82"),
        ("cached", "10+12+14+16+18+20+22", "3.04"),
        ("cached", "6+8+10+12+14+16+18+20+22", "3.01"),
    ],
)
def test_table4(condition: str, layers: str, median: str) -> None:
    rows = published("table4", GEMMA)
    site = {"position": "p_last", "condition": condition, "layers": layers}
    _assert_printed(_values(rows, **site, measure="kl"), [median])


@pytest.mark.parametrize(
    ("table", "model", "positions", "layers", "n"),
    [
        ("table1", GEMMA, SHORT, "6 10 14 18 22", 12),
        ("table1", QWEN_1_5B, SHORT, "7 11 15 20 24", 12),
        ("table1", QWEN_3B, SHORT, "9 14 20 25 31", 12),
        ("table2", GEMMA, LONG, "10 14 18", 48),
        ("table2", QWEN_1_5B, LONG, "7 15 20", 48),
    ],
)
def test_every_site_of_a_grid(
    table: str, model: str, positions: list[str], layers: str, n: int
) -> None:
    rows = published(table, model)
    cells = rows[(rows["persona"] == "") & (rows["task"] == "")]
    assert set(cells["n"]) == {n}
    asked = [(position, layer) for position in positions for layer in layers.split()]
    for measure in {"kl", *GEOMETRY}:
        found = cells[cells["measure"] == measure]
        assert list(zip(found["position"], found["layers"], strict=True)) == asked
        assert set(found["condition"]) == {"additive" if measure == "kl" else ""}
    parts = rows.drop(cells.index)
    by_persona, by_task = parts[parts["persona"] != ""], parts[parts["task"] != ""]
    if table == "table1":
        assert parts.empty
    else:
        assert set(parts["measure"]) == {"kl"}
        assert by_persona["persona"].tolist() == PERSONAS * 9
        assert set(by_persona["task"]) == {""}
        assert set(by_persona["n"]) == {6}
        assert by_task["task"].tolist() == TASKS * 9
        assert set(by_task["persona"]) == {""}
        assert set(by_task["n"]) == {8}
        # The median of all cells lies among the medians of their parts.
        site = ["position", "layers"]
        whole = cells[cells["measure"] == "kl"].set_index(site)["value"]
        for part in (by_persona, by_task):
            medians = part.groupby(site, sort=False)["value"]
            assert (medians.min() <= whole).all()
            assert (whole <= medians.max()).all()


def test_which_tables_a_model_has() -> None:
    sizes = {
        model: [len(published(f"table{k}", model)) for k in (1, 2, 3, 4)] for model in PAPER_MODELS
    }
    assert sizes == {
        GEMMA: [4 * 5 * 4, 3 * 3 * (4 + 8 + 6), 4 * 2, 7],
        QWEN_1_5B: [4 * 5 * 4, 3 * 3 * (4 + 8 + 6), 0, 0],
        QWEN_3B: [4 * 5 * 4, 0, 0, 0],
    }
    assert REFERENCE_MODEL == GEMMA
    assert published("table1", "HuggingFaceTB/SmolLM2-135M-Instruct").empty
    assert list(published("table4", QWEN_3B)) == list(published("table4", GEMMA))


def test_columns() -> None:
    rows = _all_rows()
    assert not rows.duplicated(["table", "model", *KEY]).any()
    assert set(map(type, rows[["table", "model", "dtype", *KEY]].to_numpy().flat)) == {str}
    assert rows["value"].notna().all()
    assert (rows["n"] > 0).all()
    assert (rows[rows["model"] == GEMMA]["dtype"] == "float32").all()
    assert (rows[rows["model"] != GEMMA]["dtype"] == "bfloat16").all()


def test_quartiles_lie_around_the_median() -> None:
    rows = _all_rows()
    counted = rows["measure"].isin(["any", "distinct"])
    assert rows[counted][["q25", "q75"]].isna().to_numpy().all()
    spread = rows[~counted]
    assert (spread["q25"] < spread["value"]).all()
    assert (spread["value"] < spread["q75"]).all()
    assert (spread[spread["measure"] == "kl"]["q25"] > 0).all()
    assert (spread[spread["measure"].str.startswith("cos")]["q75"] <= 1).all()


def test_a_caller_cannot_change_the_figures() -> None:
    rows = published("table4", GEMMA)
    rows.loc[:, "value"] = 0.0
    assert (published("table4", GEMMA)["value"] > 0).all()


def test_paper_model() -> None:
    assert [paper_model(model.upper()) for model in PAPER_MODELS] == list(PAPER_MODELS)
    assert paper_model("google/gemma-2-2b") is None
    assert paper_model("") is None
    assert len(published("table4", "Google/Gemma-2-2B-it")) == 7


def test_no_such_table() -> None:
    with pytest.raises(PersonaError, match=r"'table5'.*table1, table2, table3, table4"):
        published("table5", GEMMA)
