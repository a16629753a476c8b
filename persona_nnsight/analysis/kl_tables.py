"""Results as tidy tables: one row per observation, and their summaries over cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from persona_nnsight.analysis.bootstrap import Floats, drawn_medians, interval
from persona_nnsight.analysis.columns import CELL, COLUMN, SITE, records, wide_by_edit
from persona_nnsight.method.conditions import HOST, STEER

if TYPE_CHECKING:
    from persona_nnsight.plan.events import Scored
    from persona_nnsight.plan.plan import Plan

#: KLs below this, in nats, are rounding: a share of them means nothing and is left empty.
KL_FLOOR = 1e-5


#: How `contrasts` calls a steering without Δ_X (α = 0).
NO_PERSONA = "alpha_0"


def kl_table(plan: Plan, scores: Iterable[Scored]) -> pd.DataFrame:
    """One row per cell and edit, in the plan's order: KL in nats, summed over ``n_tokens``.

    ``alpha`` and ``beta`` are there for a steering alone. Runs into the BY host add
    ``gap_closed`` = 1 - KL / KL of the unedited host, cell by cell (empty where the host's KL is
    below `KL_FLOOR`: there is no gap).
    """
    found = sorted(scores, key=lambda score: (score.cell, score.edit))
    described = [edit.columns for edit in plan.edits]
    edits = [edit for edit in plan.edits if edit.scored]
    named = {name for edit in edits for name in edit.columns}
    # By column: a dictionary per row would take more memory than all else of a large grid.
    table = pd.DataFrame(
        {
            "persona": [plan.cells[score.cell].persona for score in found],
            "task": [plan.cells[score.cell].task for score in found],
            **{
                name: [described[score.edit].get(name) for score in found]
                for name in COLUMN
                if name in named
            },
            "kl": [score.kl for score in found],
            "n_tokens": [score.n_tokens for score in found],
        }
    )
    if any(edit.host == "BY" for edit in edits):
        host = table[table["condition"] == HOST].set_index(CELL)["kl"].rename("of")
        table["gap_closed"] = _share(table["kl"], table.join(host, on=CELL)["of"])
    return table


def kl_summary(table: pd.DataFrame) -> pd.DataFrame:
    """KL over cells, one row per edit: median with its interval, quartiles, extremes.

    ``n`` counts the cells that have a window at all; ``median_lo`` and ``median_hi`` are the
    bootstrap 95 % interval of the median (`bootstrap`), empty below five cells.
    A substitution's ``recovered`` is 1 - median KL / median KL of condition ``bb`` at the same
    site; empty without that condition, where an interrupted run has it in other cells, or where
    its median is below `KL_FLOOR`: there is nothing to recover. An injection's ``gap_closed`` is
    the median over cells. Both with intervals.
    """
    summary, (wide,) = wide_by_edit(table, "kl")
    draws = drawn_medians(wide.to_numpy())
    summary["median"] = wide.median().to_numpy()
    summary["median_lo"], summary["median_hi"] = interval(draws)
    summary["q25"], summary["q75"] = wide.quantile([0.25, 0.75]).to_numpy()
    summary["min"], summary["max"] = wide.min().to_numpy(), wide.max().to_numpy()
    summary["n"] = wide.count().to_numpy()
    if "gap_closed" in table:
        _, (closed,) = wide_by_edit(table, "gap_closed")
        summary["gap_closed"] = closed.median().to_numpy()
        ends = interval(drawn_medians(closed.to_numpy()))
        summary["gap_closed_lo"], summary["gap_closed_hi"] = ends
    if (summary["host"] == "XY").any():
        neither, n = _control_columns(summary, "bb"), summary["n"].tolist()
        summary["recovered"] = _recovered(summary["median"].to_numpy()[None], neither, n)[0]
        ends = interval(_recovered(draws, neither, n))
        summary["recovered_lo"], summary["recovered_hi"] = ends
    return summary


def contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """The difference that a condition makes from its controls, paired by cell.

    At every site of XY ``additive`` is set against every other condition but ``clean`` and
    ``steer`` against ``bb``; in BY everything is set against the unedited ``host``. A ``steer`` is
    also set against α = 0 with the same β, under the name ``alpha_0``. ``difference``
    is the median over cells of KL(condition) - KL(control), in nats, ``lo`` and ``hi`` its
    bootstrap 95 % interval, ``lower`` the number of the ``n`` cells in which the condition's KL is
    below the control's by more than `KL_FLOOR`.
    """
    edits, (wide,) = wide_by_edit(table, "kl")
    kl = wide.to_numpy()
    rows = records(edits)
    pairs = [
        (i, j)
        for i, subject in enumerate(rows)
        for j, control in enumerate(rows)
        if _are_contrasted(subject, control)
    ]
    subjects, controls = ([pair[side] for pair in pairs] for side in (0, 1))
    differences = kl[:, subjects] - kl[:, controls]
    found = edits.loc[subjects, [name for name in edits if name != "condition"]].reset_index(
        drop=True
    )
    found["condition"] = edits["condition"].to_numpy()[subjects]
    names = edits["condition"].where(edits["condition"] != STEER, NO_PERSONA)
    found["control"] = names.to_numpy()[controls]
    frame = pd.DataFrame(differences)
    found["n"] = frame.count().to_numpy()
    found["difference"] = frame.median().to_numpy()
    found["lo"], found["hi"] = interval(drawn_medians(differences))
    found["lower"] = (frame < -KL_FLOOR).sum().to_numpy()
    return found


def _control_columns(edits: pd.DataFrame, control: str) -> list[int | None]:
    """For every edit of XY, which edit is the control at the same site; None without one."""
    place = {
        tuple(site): index
        for index, (name, *site) in enumerate(edits[["condition", *SITE]].itertuples(index=False))
        if name == control
    }
    sites = edits[SITE].itertuples(index=False)
    return [place.get(tuple(site)) if site.host == "XY" else None for site in sites]


def _recovered(medians: Floats, neither: Sequence[int | None], n: Sequence[int]) -> Floats:
    """1 - median / median of the control, [draws, edits]; empty where they have other cells."""
    shares = np.full_like(medians, np.nan)
    for column, control in enumerate(neither):
        if control is not None and n[column] == n[control]:
            of = medians[:, control]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = 1 - medians[:, column] / of
            shares[:, column] = np.where(of >= KL_FLOOR, share, np.nan)
    return shares


def _are_contrasted(subject: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Whether one edit is set against another; see `contrasts`."""
    if subject["host"] != control["host"]:
        return False
    at_one_site = all(bool(subject[name] == control[name]) for name in SITE)
    pair = (subject["condition"], control["condition"])
    if pair == (STEER, STEER):
        leaves_x_out = subject["alpha"] != 0 and control["alpha"] == 0
        return at_one_site and leaves_x_out and bool(subject["beta"] == control["beta"])
    if pair[0] == pair[1]:
        return False
    if subject["host"] == "BY":
        return bool(pair[1] == HOST)
    if pair[0] == STEER:
        return at_one_site and bool(pair[1] == "bb")
    return at_one_site and bool(pair[0] == "additive" and pair[1] != "clean")


def _share(kl: pd.Series[float], of: pd.Series[float]) -> pd.Series[float]:
    """1 - kl / of, empty where `of` is too small to be divided by."""
    return 1 - kl / of.where(of >= KL_FLOOR)
