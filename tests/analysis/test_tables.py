"""The tables over cells, on numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from persona_nnsight.analysis.geometry_tables import geometry_summary, geometry_table
from persona_nnsight.analysis.kl_tables import contrasts, kl_summary, kl_table
from persona_nnsight.analysis.marker_tables import (
    Text,
    marker_contrasts,
    marker_summary,
    marker_table,
)
from persona_nnsight.analysis.resampling import Crossed
from persona_nnsight.analysis.verdicts import interval, verdicts
from persona_nnsight.plan.events import Scored
from persona_nnsight.plan.interventions import Unedited, Write
from persona_nnsight.plan.plan import CellPlan, Edit, Plan
from persona_nnsight.prompts.grids import Grid

NAN = math.nan
FLOOR = 1e-5
EditKey = tuple[str, str, str, str]
"""Condition, host, position, layers."""


def plan(*edits: Edit, cells: int = 2) -> Plan:
    """Nothing but what tables read: cells (p0, t), (p1, t), … and edits."""
    return Plan(
        command="substitute",
        prompts=(),
        cells=tuple(CellPlan(f"p{i}", "t", {}, seed=i) for i in range(cells)),
        layers=(8, 14),
        positions=("p_last", "g1"),
        window=10,
        edits=edits,
        keeps_residuals=False,
        eos_ids=(),
        pad_id=0,
        seed=0,
    )


def kl_frame(kls: Mapping[EditKey, Sequence[float]], **columns: Sequence[float]) -> pd.DataFrame:
    """A KL table with as many cells as every edit has numbers; `columns` are by edit."""
    rows = [
        {
            "persona": f"p{cell}",
            "task": "t",
            **dict(zip(("condition", "host", "position", "layers"), edit, strict=True)),
            **{name: by_edit[number] for name, by_edit in columns.items()},
            "kl": by_cell[cell],
            "n_tokens": 10,
        }
        for cell in range(len(next(iter(kls.values()))))
        for number, (edit, by_cell) in enumerate(kls.items())
    ]
    table = pd.DataFrame(rows)
    if "BY" in set(table["host"]):
        of = table[table["condition"] == "host"].set_index("persona")["kl"]
        table["gap_closed"] = 1 - table["kl"] / table["persona"].map(of)
    return table


def at(condition: str, position: str = "p_last", layers: str = "8", host: str = "XY") -> EditKey:
    return (condition, host, position, layers)


def into_by(condition: str, layers: str = "8") -> EditKey:
    return at(condition, layers="none" if condition == "host" else layers, host="BY")


def row_of(table: pd.DataFrame, **wanted: object) -> dict[str, Any]:
    """The one row with these values."""
    found = table
    for name, value in wanted.items():
        found = found[found[name] == value]
    assert len(found) == 1, (wanted, found)
    return {str(name): value for name, value in found.iloc[0].items()}


def values(table: pd.DataFrame, row: int, *names: str) -> list[float]:
    return [float(table[name].iloc[row]) for name in names]


def approx(*numbers: float) -> Any:
    return pytest.approx(list(numbers), nan_ok=True)


# --- kl_table


def test_kl_table_of_a_substitution() -> None:
    edits = (
        Edit(Write("additive", ("p_last",), (8,))),
        Edit(Write("additive", ("g1",), (14,))),
        Edit(Write("bb", ("p_last",), (8,))),
        # Texts alone leave neither rows nor columns.
        Edit(Unedited("clean", ("p_last",)), scored=False, generate=5),
        Edit(Write("steer", ("p_last",), (8,)), host="BY", scored=False, generate=5),
    )
    scores = [
        *(Scored(1, 2, 0.6, 10), Scored(0, 1, NAN, 0), Scored(0, 2, 0.5, 10)),
        *(Scored(1, 0, 0.2, 9), Scored(0, 0, 0.1, 10), Scored(1, 1, 0.3, 8)),
    ]
    expected = pd.DataFrame(
        [
            ("p0", "t", "additive", "XY", "p_last", "8", 0.1, 10),
            ("p0", "t", "additive", "XY", "g1", "14", NAN, 0),
            ("p0", "t", "bb", "XY", "p_last", "8", 0.5, 10),
            ("p1", "t", "additive", "XY", "p_last", "8", 0.2, 9),
            ("p1", "t", "additive", "XY", "g1", "14", 0.3, 8),
            ("p1", "t", "bb", "XY", "p_last", "8", 0.6, 10),
        ],
        columns=["persona", "task", "condition", "host", "position", "layers", "kl", "n_tokens"],
    )
    pd.testing.assert_frame_equal(kl_table(plan(*edits), scores), expected)


def test_kl_table_of_an_injection_has_the_gap_closed_cell_by_cell() -> None:
    edits = (
        Edit(Unedited("host", ("p_last",)), host="BY"),
        Edit(Write("oracle", ("p_last",), (8,)), host="BY"),
        Edit(Write("cached", ("p_last",), (8, 14)), host="BY"),
    )
    kls = [
        (2.0, 1.5, 2.5),
        (4.0, 4.0, 0.0),
        (FLOOR, 0.5 * FLOOR, FLOOR),  # at the floor there is still a gap
        (0.9 * FLOOR, 0.0, 3.0),
        (NAN, NAN, NAN),
    ]
    scores = [
        Scored(cell, edit, kl, 10) for cell, row in enumerate(kls) for edit, kl in enumerate(row)
    ]
    scores.append(Scored(5, 1, 1.0, 10))  # interrupted: this cell has no host yet
    table = kl_table(plan(*edits, cells=6), scores)
    assert list(table.columns) == [
        *("persona", "task", "condition", "host", "position", "layers"),
        *("kl", "n_tokens", "gap_closed"),
    ]
    assert table["condition"].tolist() == ["host", "oracle", "cached"] * 5 + ["oracle"]
    assert table["layers"].tolist() == ["none", "8", "8+14"] * 5 + ["8"]
    assert set(table["host"]) == {"BY"}
    assert set(table["position"]) == {"p_last"}
    assert table["gap_closed"].tolist() == approx(
        *(0.0, 0.25, -0.25),
        *(0.0, 0.0, 1.0),
        *(0.0, 0.5, 0.0),
        *[NAN] * 7,
    )


@pytest.mark.parametrize("host", ["XY", "BY"])
def test_kl_table_of_a_steering_has_the_factors(host: str) -> None:
    both = ("p_last", "g1")
    control = Write("bb", both, (8,)) if host == "XY" else Unedited("host", both)
    edits = (
        Edit(control, host=host),
        Edit(Write("steer", both, (8,), alpha=2.0, beta=0.5), host=host),
        Edit(Write("steer", both, (8,), alpha=-1.0, beta=1.0), host=host),
    )
    table = kl_table(plan(*edits), [Scored(0, edit, kl, 10) for edit, kl in enumerate((4, 1, 3))])
    gap = ["gap_closed"] if host == "BY" else []
    assert list(table.columns) == [
        *("persona", "task", "condition", "host", "position", "layers", "alpha", "beta"),
        *("kl", "n_tokens", *gap),
    ]
    assert table["alpha"].tolist() == approx(NAN, 2.0, -1.0)
    assert table["beta"].tolist() == approx(NAN, 0.5, 1.0)
    assert table["position"].tolist() == ["p_last+g1"] * 3
    assert table["layers"].tolist() == ["8" if host == "XY" else "none", "8", "8"]
    if gap:
        assert table["gap_closed"].tolist() == approx(0.0, 0.75, 0.25)


# --- kl_summary


def test_summary_over_cells() -> None:
    table = kl_frame({at("additive"): [10.0, 1.0, NAN, 4.0, 2.0], at("xb"): [NAN] * 5})
    found = kl_summary(table)
    assert found["condition"].tolist() == ["additive", "xb"]
    statistics = ["median", "q25", "q75", "min", "max", "n"]
    # Linear quartiles of 1, 2, 4, 10 lie at ranks 0.75 and 2.25.
    assert values(found, 0, *statistics) == approx(3.0, 1.75, 5.5, 1.0, 10.0, 4)
    assert values(found, 1, *statistics) == approx(*[NAN] * 5, 0)
    # Four of the five cells have a window: too few.
    assert found[["median_lo", "median_hi"]].isna().all(axis=None)


def test_edits_keep_the_order_of_the_table() -> None:
    edits = [at("steer"), at("bb"), at("steer", layers="none"), at("steer", "g1")]
    table = kl_frame(
        {edit: [float(i), float(i)] for i, edit in enumerate(edits)}, alpha=[2.0, NAN, 0.0, 1.0]
    )
    found = kl_summary(table)
    assert found["median"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert found["alpha"].tolist() == approx(2.0, NAN, 0.0, 1.0)
    assert found["position"].tolist() == ["p_last", "p_last", "p_last", "g1"]


def test_recovered_is_the_median_of_the_shares_of_cells_at_the_same_site() -> None:
    found = kl_summary(
        kl_frame(
            {
                at("additive"): [0.3, 0.1, 0.2],
                at("additive", "g1"): [1.0, 1.0, 1.0],
                at("additive", "p_last", "14"): [6.0, 6.0, 0.0],
                at("additive", "g1", "14"): [1.0, 1.0, 1.0],
                at("bb"): [1.0, 2.0, 4.0],
                at("bb", "g1"): [10.0, 9.0, 1.0],
                at("bb", "p_last", "14"): [4.0, 3.0, 4.0],
            }
        )
    )
    # Not the ratio of the medians, which leaves 0.9 in the first row. In it the cells share 0.7,
    # 0.95, 0.95, in the third -0.5, -1, 1.
    assert found["recovered"].tolist() == approx(0.95, 1 - 1 / 9, -0.5, NAN, 0, 0, 0)
    # 1 - 0.6 / 7, 1 - 3 / 20, 1 - 12 / 11
    pooled = (1 - 0.6 / 7, 0.85, -1 / 11, NAN, 0, 0, 0)
    assert found["recovered_pooled"].tolist() == approx(*pooled)
    assert "gap_closed" not in found


def test_cells_without_much_to_recover_are_left_out_of_both_shares() -> None:
    """The floor of the site is 0.001: a cell's share needs a KL of `bb` of 0.01."""
    found = kl_summary(
        kl_frame(
            {
                at("additive"): [0.005, 0.3, 0.1, 9.0],
                at("bb"): [0.01, 1.0, 2.0, 0.009],
                at("clean"): [0.001, 0.0, 0.001, 0.002],
                at("additive", "g1"): [0.005, 0.3, 0.1, 9.0],
                at("bb", "g1"): [0.01, 1.0, 2.0, 0.009],
            }
        )
    )
    assert found["floor"].tolist() == approx(0.001, 0.001, 0.001, NAN, NAN)
    # 0.5, 0.7, 0.95; without a floor -999 too.
    assert found["recovered"].tolist() == approx(0.7, 0, 0.9995, 0.6, 0)
    assert values(found, 0, "recovered_pooled") == approx(1 - 0.405 / 3.01)
    assert values(found, 3, "recovered_pooled") == approx(1 - 9.405 / 3.019)


def test_shares_are_withheld_where_the_control_is_not_clearly_above_the_floor() -> None:
    kls = {
        at("additive"): [0.5] * 6,
        at("bb"): [0.99] * 3 + [1.01, 2.0, 3.0],
        at("clean"): [0.1] * 6,
    }
    shares = ["recovered", "recovered_lo", "recovered_hi", "recovered_pooled"]
    known = kl_summary(kl_frame(kls))
    assert known["floor"].tolist() == [0.1] * 3
    # The median of bb is 1, ten times the floor.
    assert known.loc[0, shares].notna()[["recovered", "recovered_pooled"]].all()
    assert values(known, 0, "recovered") == approx(1 - 0.5 / 2.0)
    kls[at("bb")] = [0.99] * 4 + [2.0, 3.0]
    assert kl_summary(kl_frame(kls))[shares].isna().all(axis=None)


def test_the_floor_in_few_bits_is_what_rounding_costs() -> None:
    rounded = at("rounded", layers="2")
    kls = {
        at("additive", layers="2"): [0.1, 0.2, 0.3],
        at("clean", layers="2"): [0.0, 0.001, 0.0],
        rounded: [0.004, 0.006, 0.005],
        into_by("host"): [1.0, 2.0, 4.0],
    }
    assert kl_summary(kl_frame(kls))["floor"].tolist() == [0.005] * 4
    kls[at("clean", layers="2")] = [0.007] * 3
    assert kl_summary(kl_frame(kls))["floor"].tolist() == [0.007] * 4
    # It is a control of none of the others.
    assert "rounded" not in set(contrasts(kl_frame(kls))["control"])


def test_the_floor_of_runs_of_by_is_the_clean_run_beside_them() -> None:
    clean = at("clean", layers="none")
    kls = {
        into_by("host"): [1.0, 2.0, 4.0],
        into_by("cached"): [0.9, 1.0, 3.6],
        clean: [0.001, 0.002, 0.003],
    }
    found = kl_summary(kl_frame(kls))
    assert found["floor"].tolist() == [0.002] * 3
    assert found["gap_closed"].tolist() == approx(0, 0.1, NAN)
    assert "recovered" not in found
    kls[clean] = [0.3] * 3
    assert kl_summary(kl_frame(kls))["gap_closed"].isna().all()


def test_nothing_is_recovered_without_bb_or_below_the_floor() -> None:
    at_floor, below = [FLOOR] * 5, [0.9 * FLOOR] * 5
    shares = ["recovered", "recovered_lo", "recovered_hi"]
    without = kl_summary(kl_frame({at("additive"): at_floor, at("by"): at_floor}))
    assert without[shares].isna().all(axis=None)
    too_low = kl_summary(kl_frame({at("additive"): at_floor, at("bb"): below}))
    assert too_low[shares].isna().all(axis=None)
    enough = kl_summary(kl_frame({at("additive"): below, at("bb"): at_floor}))
    assert values(enough, 0, *shares) == approx(0.1, 0.1, 0.1)


def test_the_gap_closed_is_the_median_of_the_shares_of_cells() -> None:
    found = kl_summary(
        kl_frame({into_by("host"): [1.0, 2.0, 4.0], into_by("cached"): [0.9, 1.0, 3.6]})
    )
    # Shares 0.1, 0.5, 0.1; the ratio of the medians would give 0.5.
    assert row_of(found, condition="cached")["gap_closed"] == pytest.approx(0.1)
    assert row_of(found, condition="host")["gap_closed"] == 0
    assert found[["gap_closed_lo", "gap_closed_hi"]].isna().all(axis=None)
    assert "recovered" not in found


SEVEN = [5.0, 2.0, 7.0, 1.0, 6.0, 3.0, 4.0]


def drawn(numbers: Sequence[float], *, positive: bool = True) -> tuple[float, float]:
    """The interval of a median by itself, of cells (p0, t), (p1, t), …; see `test_verdicts`."""
    crossed = Crossed([(f"p{cell}", "t") for cell in range(len(numbers))])
    low, high = interval(crossed.medians(np.array(numbers)[:, None]), positive=positive)
    return float(low[0]), float(high[0])


def test_the_intervals_of_seven_cells() -> None:
    table = kl_frame({at("additive"): SEVEN, at("bb"): [10.0] * 7})
    found = row_of(kl_summary(table), condition="additive")
    low, high = drawn(SEVEN)
    assert 0 < low < 2
    assert high > 6
    assert [found[f"median{end}"] for end in ("_lo", "", "_hi")] == approx(low, 4, high)
    shares = [found[f"recovered{end}"] for end in ("_lo", "", "_hi")]
    assert shares == approx(1 - high / 10, 0.6, 1 - low / 10)


def test_the_interval_of_the_gap_closed() -> None:
    table = kl_frame({into_by("host"): [10.0] * 7, into_by("cached"): SEVEN})
    found = row_of(kl_summary(table), condition="cached")
    ends = [found[f"gap_closed{end}"] for end in ("_lo", "", "_hi")]
    low, high = drawn(SEVEN)
    assert ends == approx(1 - high / 10, 0.6, 1 - low / 10)


def test_personas_and_tasks_are_both_drawn() -> None:
    """Where the task decides all, as many personas as there are make an interval no narrower."""
    rows = [
        {
            **{"persona": f"p{i}", "task": f"t{j}", "condition": "additive", "host": "XY"},
            **{"position": "p_last", "layers": "8", "kl": 1.0 + j, "n_tokens": 10},
        }
        for i in range(12)
        for j in range(5)
    ]
    many = kl_summary(pd.DataFrame(rows))
    few = kl_summary(pd.DataFrame(rows[:10]))
    for found in (many, few):
        low, high = values(found, 0, "median_lo", "median_hi")
        assert low < 1.5
        assert high > 5


def test_shares_are_drawn_together_with_their_control() -> None:
    """Where a condition costs a quarter of `bb` in every cell, every draw recovers 75 %."""
    found = kl_summary(kl_frame({at("additive"): [kl / 4 for kl in SEVEN], at("bb"): SEVEN}))
    shares = found[["recovered_lo", "recovered", "recovered_hi"]]
    assert values(shares, 0, *shares) == [0.75] * 3
    assert values(shares, 1, *shares) == [0.0] * 3  # bb itself
    low, high = values(found, 0, "median_lo", "median_hi")
    assert low < high


def test_a_kl_that_rounding_made_negative_is_within_its_interval() -> None:
    clean = [-3e-7, -2e-7, 1e-7, -1e-7, 2e-7, -4e-7]
    summary = kl_summary(kl_frame({at("clean"): clean, at("bb"): SEVEN[:6]}))
    found = row_of(summary, condition="clean")
    assert found["median_lo"] <= found["median"] < 0 <= found["median_hi"]
    assert found["recovered_lo"] < 1 < found["recovered"] <= found["recovered_hi"]


def test_cells_that_agree_leave_no_width() -> None:
    found = row_of(kl_summary(kl_frame({at("additive"): [0.3] * 6})), condition="additive")
    assert found["median_lo"] == found["median_hi"] == 0.3


def test_intervals_hang_on_nothing_but_their_own_numbers() -> None:
    rng = np.random.default_rng(5)
    kls = {
        at(condition, position): list(rng.exponential(size=12))
        for condition in ("additive", "bb", "by")
        for position in ("p_last", "g1")
    }
    table = kl_frame(kls)
    whole = kl_summary(table)
    pd.testing.assert_frame_equal(kl_summary(table), whole)
    assert (whole["median_lo"] < whole["median"]).all()
    assert (whole["median"] < whole["median_hi"]).all()
    here = table[table["position"] == "g1"]
    expected = whole[whole["position"] == "g1"].reset_index(drop=True)
    pd.testing.assert_frame_equal(kl_summary(here), expected)
    alone = kl_summary(table[table["condition"] == "by"])
    medians = ["median", "median_lo", "median_hi"]
    expected = whole[whole["condition"] == "by"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone[medians], expected[medians])


# --- contrasts


def pairs(table: pd.DataFrame, *names: str) -> list[tuple[object, ...]]:
    columns = ["condition", "control", *names]
    return [tuple(row) for row in contrasts(table)[columns].itertuples(index=False)]


def test_additive_is_set_against_every_control_at_its_site() -> None:
    conditions = ["additive", "remove_x", "bb", "by", "other_x", "clean"]
    kls = {at(name, *site): [1.0] for name in conditions for site in (("p_last", "8"), ("g1", "8"))}
    kls[at("by", "p_last", "14")] = [1.0]  # no additive there
    found = pairs(kl_frame(kls), "host", "position", "layers")
    assert sorted(found) == sorted(
        ("additive", control, "XY", position, "8")
        for control in ("remove_x", "bb", "by", "other_x")
        for position in ("p_last", "g1")
    )


def test_every_injection_is_set_against_the_host() -> None:
    edits = [into_by("host"), into_by("oracle"), into_by("cached"), into_by("cached", "8+14")]
    assert pairs(kl_frame({edit: [1.0] for edit in edits}), "host", "position", "layers") == [
        ("oracle", "host", "BY", "p_last", "8"),
        ("cached", "host", "BY", "p_last", "8"),
        ("cached", "host", "BY", "p_last", "8+14"),
    ]


@pytest.mark.parametrize("host", ["XY", "BY"])
def test_every_steering_is_set_against_what_has_no_factor(host: str) -> None:
    table = pd.concat(
        kl_frame({edit: [1.0]}, alpha=[alpha], beta=[beta])
        for edit, alpha, beta in (
            (at("bb") if host == "XY" else into_by("host"), NAN, NAN),
            (at("steer", host=host), 0.0, 1.0),
            (at("steer", host=host), 2.0, 1.0),
            (at("steer", host=host), 2.0, 0.0),
        )
    )
    control = "bb" if host == "XY" else "host"
    assert pairs(table, "host", "layers", "alpha", "beta") == [
        ("steer", control, host, "8", 0.0, 1.0),
        ("steer", control, host, "8", 2.0, 1.0),
        ("steer", "alpha_0", host, "8", 2.0, 1.0),  # not with β = 0: α = 0 is not in that sweep
        ("steer", control, host, "8", 2.0, 0.0),
    ]


def test_the_difference_is_the_median_of_paired_differences() -> None:
    table = kl_frame(
        {
            at("additive"): [1.0, 2.0, 10.0, NAN, 5.0],
            at("bb"): [2.0, 10.0, 1.0, 0.0, NAN],
            at("by"): [0.0, 0.0, 10.0, 0.0, 0.5],
        }
    )
    found = contrasts(table)
    # -1, -8, 9: the medians themselves are 3.5 and 1.5.
    against_bb = row_of(found, control="bb")
    assert (against_bb["difference"], against_bb["n"], against_bb["lower"]) == (-1.0, 3, 2)
    # 1, 2, 0, 4.5: the condition costs more, and a tie is not lower.
    against_by = row_of(found, control="by")
    assert (against_by["difference"], against_by["n"], against_by["lower"]) == (1.5, 4, 0)
    assert found[["lo", "hi"]].isna().all(axis=None)


def test_a_difference_that_is_rounding_is_not_lower() -> None:
    kls = {at("additive"): [1.0, 1.0, 1.0], at("bb"): [1 + 0.9 * FLOOR, 1 + 1.1 * FLOOR, 1.0]}
    assert row_of(contrasts(kl_frame(kls)), control="bb")["lower"] == 1


def test_the_interval_of_a_difference() -> None:
    control = [40.0, 10.0, 80.0, 20.0, 50.0, 30.0, 60.0]
    table = kl_frame(
        {
            at("additive"): [kl + 0.5 for kl in control],
            at("bb"): control,
            at("by"): [kl + 0.5 - own for kl, own in zip(control, SEVEN, strict=True)],
        }
    )
    found = contrasts(table)
    shifted = row_of(found, control="bb")
    assert [shifted[name] for name in ("lo", "difference", "hi", "lower")] == [0.5, 0.5, 0.5, 0]
    by = row_of(found, control="by")
    low, high = drawn(SEVEN, positive=False)
    # No more than one of the two varies, so that both together are no more than each by itself.
    ends = [by[name] for name in ("lo", "difference", "hi")]
    assert ends == pytest.approx([low, 4.0, high], rel=0.05)


def crossed_frame(edits: Sequence[EditKey], seed: int = 3) -> pd.DataFrame:
    """KLs of eight personas at six tasks, far apart from edit to edit."""
    rng = np.random.default_rng(seed)
    cells = [(f"p{i}", f"t{j}") for i in range(8) for j in range(6)]
    return pd.DataFrame(
        [
            {
                **{"persona": persona, "task": task},
                **dict(zip(("condition", "host", "position", "layers"), edit, strict=True)),
                "kl": (1 + number) * rng.lognormal(sigma=0.3),
                "n_tokens": 10,
            }
            for persona, task in cells
            for number, edit in enumerate(edits)
        ]
    )


def test_the_intervals_of_contrasts_hold_all_at_once() -> None:
    """They are wider than those of each contrast by itself, and so are those of more contrasts."""
    names = ["additive", "remove_x", "bb", "by", "xb"]
    table = crossed_frame([at(name, layers=layer) for name in names for layer in ("8", "14", "20")])
    found = contrasts(table)
    assert len(found) == 12
    for row in found.to_dict("records"):
        kls = table[table["layers"] == row["layers"]].pivot(
            index=["persona", "task"], columns="condition", values="kl"
        )
        pair = (kls["additive"] - kls[row["control"]]).to_numpy()[:, None]
        draws = Crossed(kls.index).medians(pair)
        (low,), (high,) = interval(draws)
        assert row["lo"] < low < row["difference"] < high < row["hi"]
    alone = contrasts(table[table["condition"].isin(["additive", "bb"])])
    bb = found[found["control"] == "bb"]
    widths = [(each["hi"] - each["lo"]).to_numpy() for each in (alone, bb)]
    assert (widths[0] < widths[1]).all()


def test_a_verdict_needs_an_interval_beyond_zero_or_within_the_margin() -> None:
    table = kl_frame(
        {
            at("additive"): [kl + 1.0 for kl in SEVEN],
            at("remove_x"): [kl + 1.1 for kl in SEVEN],
            at("bb"): [kl + 36 for kl in SEVEN],
            at("by"): SEVEN,
            at("xb"): [
                kl + 0.5 - own for kl, own in zip(SEVEN, SEVEN[1:] + SEVEN[:1], strict=True)
            ],
            at("additive", "g1"): SEVEN,
            at("by", "g1"): [kl + 0.1 for kl in SEVEN],
        }
    )
    # bb's median is 40.
    found = contrasts(table, margin=1 / 50).set_index(["position", "control"])
    margins = found["margin"].to_dict()
    assert [margins["p_last", name] for name in ("remove_x", "bb", "by", "xb")] == approx(
        *[40 / 50] * 4
    )
    assert found["verdict"].to_dict() == {
        ("p_last", "remove_x"): "equivalent",
        ("p_last", "bb"): "lower",
        ("p_last", "by"): "higher",
        ("p_last", "xb"): "undecided",
        # Without bb there is no margin.
        ("g1", "by"): "lower",
    }
    assert math.isnan(margins["g1", "by"])
    wider = contrasts(table, margin=1 / 39).set_index(["position", "control"])["verdict"]
    assert wider["p_last", "by"] == "equivalent"
    none = contrasts(table, margin=0.0).set_index(["position", "control"])["verdict"]
    assert none["p_last", "remove_x"] == "lower"
    assert set(contrasts(table.head(7 * 4))["verdict"]) == {""}  # four cells have no interval


def test_the_margin_of_runs_of_by_is_a_share_of_the_hosts_kl() -> None:
    table = kl_frame({into_by("host"): SEVEN, into_by("cached"): [kl + 0.3 for kl in SEVEN]})
    (row,) = contrasts(table).to_dict("records")
    assert (row["margin"], row["verdict"]) == (pytest.approx(0.4), "equivalent")


def test_verdicts_are_withheld_below_the_floor() -> None:
    """bb's and by's KL are 1: clearly above a floor of 0.1 and not above one of 0.11."""
    kls = {
        at("additive"): [0.3] * 7,
        at("bb"): [1.0] * 7,
        at("by"): [1.0] * 7,
        at("xb"): [0.45] * 7,
        at("clean"): [0.1] * 7,
    }
    found = contrasts(kl_frame(kls)).set_index("control")
    assert found["verdict"].to_dict() == {"bb": "lower", "by": "lower", "xb": "undecided"}
    assert found["margin"].tolist() == approx(0.1, 0.1, 0.1)
    kls[at("clean")] = [0.11] * 7
    found = contrasts(kl_frame(kls))
    assert set(found["verdict"]) == {"undecided"}
    assert found["margin"].isna().all()
    assert found["lower"].tolist() == [7, 7, 7]
    # A difference that is below the floor itself is no difference.
    kls[at("clean")] = [0.04] * 7
    kls[at("xb")] = [0.33] * 7
    found = contrasts(kl_frame(kls), margin=0.0).set_index("control")
    assert found["verdict"].to_dict() == {"bb": "lower", "by": "lower", "xb": "undecided"}
    assert found["lower"].to_dict() == {"bb": 7, "by": 7, "xb": 0}


def test_a_table_without_pairs_has_no_contrasts() -> None:
    found = contrasts(kl_frame({at("additive"): [1.0] * 6, at("clean"): [0.0] * 6}))
    assert len(found) == 0
    assert {"condition", "control", "difference", "lo", "hi", "lower", "n"} <= set(found)


# --- an interrupted run: the last cells lack some edits


def test_an_interrupted_run_is_summarised_over_what_it_has() -> None:
    table = kl_frame({at("additive"): [*SEVEN, 9.0], at("bb"): [*SEVEN, 8.0]})
    unfinished = table[~((table["condition"] == "bb") & table["persona"].isin(["p4", "p5", "p7"]))]
    found = kl_summary(unfinished)
    # bb has 1, 2, 4, 5, 7
    bb = row_of(found, condition="bb")
    assert (bb["median"], bb["n"]) == (4.0, 5)
    assert 0 < bb["median_lo"] < 2
    assert bb["median_hi"] > 7
    assert row_of(found, condition="additive")["n"] == 8
    (contrast,) = contrasts(unfinished).to_dict("records")
    assert (contrast["n"], contrast["difference"], contrast["lo"]) == (5, 0.0, 0.0)


# --- markers

GRID = Grid.from_dict(
    {
        "name": "m",
        "personas": {
            "yoda": {"text": "Yoda", "markers": ["The Force", "jedi", "padawan"]},
            "nobody": "someone",
            "chef": {"text": "a chef", "markers": ["simmer"]},
        },
        "tasks": {f"t{i}": f"Task {i}." for i in range(10)},
    }
)


def text(
    words: str,
    condition: str = "clean",
    layers: str | None = None,
    *,
    persona: str = "yoda",
    task: str = "t0",
    alpha: float | None = None,
) -> Text:
    return Text(
        persona=persona,
        task=task,
        condition=condition,
        position=layers and "p_last",
        layers=layers,
        alpha=alpha,
        beta=None if alpha is None else 1.0,
        text=words,
        n_tokens=3,
    )


def test_marker_table() -> None:
    table = marker_table(
        GRID,
        [
            text("A Jedi uses the force. Jedi!"),
            text("Simmer, jedi.", persona="nobody"),
            text("Simmer.", "additive", "8", persona="chef"),
            text("jedis", "bare"),
        ],
    )
    expected = pd.DataFrame(
        [
            ("yoda", "t0", "clean", "none", "none", True, 2, "the force; jedi"),
            ("chef", "t0", "additive", "p_last", "8", True, 1, "simmer"),
            ("yoda", "t0", "bare", "none", "none", False, 0, ""),
        ],
        columns=[
            *("persona", "task", "condition", "position", "layers"),
            *("any", "distinct", "hits"),
        ],
    )
    pd.testing.assert_frame_equal(table, expected)


def test_marker_table_of_a_steering_has_the_factors() -> None:
    table = marker_table(GRID, [text("a", "bb", "8"), text("b", "steer", "8", alpha=0.5)])
    assert table["alpha"].tolist() == approx(NAN, 0.5)
    assert table["beta"].tolist() == approx(NAN, 1.0)


def test_marker_table_without_markers_is_empty() -> None:
    table = marker_table(GRID, [text("jedi", persona="nobody")])
    assert len(table) == 0
    assert len(marker_table(GRID, [])) == 0


#: Distinct markers of ten cells under each edit.
COUNTS: dict[tuple[str, str | None], list[int]] = {
    ("clean", None): [3, 2, 1, 1, 1, 0, 0, 0, 0, 0],
    ("additive", "8"): [2, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    ("additive", "14"): [3, 2, 1, 1, 1, 0, 0, 0, 0, 0],
    ("remove_x", "8"): [0] * 10,
    ("remove_x", "14"): [3, 3, 2, 2, 2, 1, 1, 1, 1, 1],
    ("bare", None): [0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
}


def texts(cells: int, *edits: tuple[str, str | None]) -> list[Text]:
    words = ["", "jedi", "jedi padawan", "jedi padawan the force"]
    return [
        text(words[COUNTS[edit][cell]], *edit, task=f"t{cell}")
        for cell in range(cells)
        for edit in edits or COUNTS
    ]


def test_marker_summary() -> None:
    found = marker_summary(marker_table(GRID, texts(10)))
    assert [tuple(edit) for edit in found[["condition", "layers"]].to_numpy()] == [
        (condition, layers or "none") for condition, layers in COUNTS
    ]
    assert found["n"].tolist() == [10] * 6
    assert found["any"].tolist() == [5, 3, 5, 0, 10, 1]
    assert found["distinct"].tolist() == approx(0.8, 0.4, 0.8, 0.0, 1.7, 0.1)
    ends = found[["any_lo", "any_hi", "distinct_lo", "distinct_hi"]]
    # The share of five in ten has a standard error of √(0.25 / 9), and Student's t with nine
    # degrees of freedom is 2.26.
    half = 10 * 2.262 * math.sqrt(0.25 / 9)
    assert values(ends, 0, "any_lo", "any_hi") == pytest.approx([5 - half, 5 + half], abs=0.4)
    # One in ten: no fewer than none.
    assert values(ends, 5, "any_lo") == [0.0]
    # Nothing varies where no text, or every text, has a marker: no certainty, but no interval.
    assert ends.loc[3].isna().all()
    assert ends.loc[4, ["any_lo", "any_hi"]].isna().all()
    varying = found["distinct_lo"].notna()
    assert varying.sum() == 5
    assert (ends["distinct_lo"] <= found["distinct"])[varying].all()
    assert (ends["distinct_hi"] >= found["distinct"])[varying].all()
    low, high = values(ends, 4, "distinct_lo", "distinct_hi")
    # A standard error of √(0.61 / 9) is 15.3 % of the mean, and the interval is of the logarithm.
    half = math.exp(2.262 * 0.153)
    assert [low, high] == pytest.approx([1.7 / half, 1.7 * half], abs=0.1)


def test_marker_summary_of_few_cells_has_no_intervals() -> None:
    found = marker_summary(marker_table(GRID, texts(4, ("clean", None))))
    assert values(found, 0, "any", "distinct", "n") == approx(4, 7 / 4, 4)
    ends = found[["any_lo", "any_hi", "distinct_lo", "distinct_hi"]]
    assert ends.isna().all(axis=None)


def test_marker_summary_of_an_interrupted_run() -> None:
    """Edits are carried out one after the other, so that the last may lack cells."""
    found = marker_summary(
        marker_table(GRID, [*texts(6, ("clean", None)), *texts(4, ("additive", "8"))])
    )
    assert found["n"].tolist() == [6, 4]
    assert found["any"].tolist() == [5, 2]
    assert found["distinct"].tolist() == approx(8 / 6, 0.75)
    ends = found[["any_lo", "any_hi", "distinct_lo", "distinct_hi"]]
    assert ends.loc[0].notna().all()
    assert ends.loc[1].isna().all(), "an interval of four cells"


def test_marker_summary_draws_from_the_cells_that_an_edit_has() -> None:
    made = [*texts(10, ("clean", None)), *texts(5, ("remove_x", "14"))]
    found = marker_summary(marker_table(GRID, made))
    assert found["n"].tolist() == [10, 5]
    assert found.loc[1, ["any_lo", "any_hi"]].isna().all()  # all five texts have a marker
    ends = values(found, 1, "any_lo", "any_hi", "distinct_lo", "distinct_hi")
    # 3, 3, 2, 2, 2: a standard error of √(0.24 / 4) and Student's t with four degrees of freedom.
    half = math.exp(2.776 * math.sqrt(0.24 / 4) / 2.4)
    assert ends[2:] == pytest.approx([2.4 / half, 2.4 * half], abs=0.1)


def test_marker_contrasts() -> None:
    found = marker_contrasts(marker_table(GRID, texts(10)))
    assert list(found.columns) == [
        *("condition", "position", "layers", "control"),
        *("measure", "n", "difference", "lo", "hi", "verdict"),
    ]
    names = ["condition", "layers", "control", "measure"]
    assert set(found[names].itertuples(index=False, name=None)) == {
        (*pair, measure)
        for pair in (
            ("additive", "8", "clean"),
            ("additive", "14", "clean"),
            ("remove_x", "8", "clean"),
            ("remove_x", "14", "clean"),
            ("remove_x", "8", "additive"),
            ("remove_x", "14", "additive"),
            ("bare", "none", "clean"),
        )
        for measure in ("any", "distinct")
    }
    assert len(found) == 14
    assert found["n"].tolist() == [10] * 14

    def difference(condition: str, layers: str, control: str, measure: str) -> Any:
        wanted = dict(zip(names, (condition, layers, control, measure), strict=True))
        row = row_of(found, **wanted)
        return [row[name] for name in ("lo", "difference", "hi")]

    assert difference("additive", "8", "clean", "any")[1] == pytest.approx(-0.2)
    assert difference("additive", "8", "clean", "distinct")[1] == pytest.approx(-0.4)
    # One marker more in every cell but the first, which has all three already.
    assert difference("remove_x", "14", "clean", "distinct")[1] == pytest.approx(0.9)
    assert difference("additive", "14", "clean", "distinct") == [0.0] * 3
    # Five cells lose their marker: wider than by itself, as all hold at once.
    half = 2.262 * math.sqrt(0.25 / 9)
    low, middle, high = difference("remove_x", "8", "clean", "any")
    assert middle == pytest.approx(-0.5)
    assert -1 <= low < -0.5 - 1.1 * half
    assert -0.5 + 1.1 * half < high
    told = found.set_index(names)["verdict"]
    assert told["remove_x", "14", "clean", "distinct"] == "higher"
    assert told["additive", "14", "clean", "distinct"] == "undecided"
    assert (told == verdicts(found["lo"].to_numpy(), found["hi"].to_numpy())).all()
    everything = [
        [mine - other for mine, other in zip(COUNTS[edit], COUNTS[control], strict=True)]
        for edit, control in ((("additive", "8"), ("clean", None)),)
    ]
    alone = interval(Crossed([("yoda", f"t{i}") for i in range(10)]).means(np.array(everything).T))
    low, _, high = difference("additive", "8", "clean", "distinct")
    assert low < alone[0][0] < alone[1][0] < high
    assert difference("remove_x", "8", "additive", "any")[1] == pytest.approx(-0.3)
    assert difference("bare", "none", "clean", "any")[1] == pytest.approx(-0.4)


def test_marker_contrasts_pair_the_cells_that_both_have() -> None:
    made = [*texts(10, ("clean", None)), *texts(5, ("additive", "8"))]
    found = marker_contrasts(marker_table(GRID, made))
    assert found["n"].tolist() == [5, 5]
    # 3, 2, 1, 1, 1 against 2, 1, 0, 0, 0
    assert found["difference"].tolist() == approx(-0.6, -1.0)
    assert values(found, 1, "lo", "hi") == [-1.0, -1.0]
    few = marker_contrasts(
        marker_table(GRID, [*texts(10, ("clean", None)), *texts(4, ("additive", "8"))])
    )
    assert few[["lo", "hi"]].isna().all(axis=None)


def test_marker_contrasts_without_pairs_keep_their_columns() -> None:
    """As a run that was interrupted during the clean texts leaves them."""
    found = marker_contrasts(marker_table(GRID, texts(10, ("clean", None))))
    assert len(found) == 0
    assert {"condition", "control", "measure", "n", "difference", "lo", "hi"} <= set(found)


# --- geometry


def test_geometry_table_names_every_site() -> None:
    cosines = torch.arange(8.0).reshape(2, 2, 2)
    table = geometry_table(plan(cells=3), [0, 2], {"cos_xy_sum": cosines})
    expected = pd.DataFrame(
        [
            (persona, "t", position, layer, 4.0 * i + 2 * j + k)
            for i, persona in enumerate(["p0", "p2"])
            for j, position in enumerate(["p_last", "g1"])
            for k, layer in enumerate([8, 14])
        ],
        columns=["persona", "task", "position", "layer", "cos_xy_sum"],
    )
    pd.testing.assert_frame_equal(table, expected)
    assert len(geometry_table(plan(), [0], {})) == 0


def test_geometry_summary_takes_medians_over_cells() -> None:
    measures = {
        "cos_xy_sum": torch.tensor([[[0.5, 0.25]], [[1.0, NAN]], [[0.0, 0.75]]]),
        "cos_x_y": torch.tensor([[[0.0, 0.25]], [[-1.0, NAN]], [[-0.5, 0.75]]]),
        "inter_over_xy": torch.tensor([[[1.0, 2.0]], [[1.0, NAN]], [[1.5, 3.0]]]),
        "norm_dx": torch.ones(3, 1, 2),
    }
    made = Plan(**{**vars(plan(cells=3)), "positions": ("g1",)})
    found = geometry_summary(geometry_table(made, [0, 1, 2], measures))
    expected = pd.DataFrame(
        [("g1", 8, 0.5, -0.5, 1.0, 3), ("g1", 14, 0.5, 0.5, 2.5, 2)],
        columns=["position", "layer", "cos_xy_sum", "cos_x_y", "inter_over_xy", "n"],
    )
    pd.testing.assert_frame_equal(found[list(expected)], expected)
    assert found.filter(regex="_(lo|hi)$").isna().all(axis=None)  # three cells are too few


def test_geometry_summary_has_intervals_of_its_medians() -> None:
    cosines = torch.linspace(0.1, 0.9, 9)[:, None, None]
    measures = {"cos_xy_sum": cosines, "inter_over_xy": torch.full((9, 1, 1), 0.5)}
    made = Plan(**{**vars(plan(cells=9)), "positions": ("g1",), "layers": (8,)})
    (row,) = geometry_summary(geometry_table(made, range(9), measures)).to_dict("records")
    draws = Crossed([(f"p{i}", "t") for i in range(9)])
    low, high = interval(draws.medians(cosines.numpy().reshape(9, 1).astype(float)))
    assert (row["cos_xy_sum_lo"], row["cos_xy_sum_hi"]) == pytest.approx((low[0], high[0]))
    assert low[0] < row["cos_xy_sum"] < high[0]
    assert (row["inter_over_xy_lo"], row["inter_over_xy_hi"]) == (0.5, 0.5)
