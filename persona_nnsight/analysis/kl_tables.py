"""Results as tidy tables: one row per observation, and their summaries over cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from persona_nnsight.analysis.columns import (
    CELL,
    COLUMN,
    MARGIN,
    SITE,
    cells_of,
    interval_of,
    records,
    wide_by_edit,
)
from persona_nnsight.analysis.resampling import Crossed, Draws, Floats, combined
from persona_nnsight.analysis.verdicts import (
    NO_VERDICT,
    UNDECIDED,
    interval,
    simultaneous,
    verdicts,
)
from persona_nnsight.method.conditions import BASELINE, CONTROLS, FLOORS, STEER
from persona_nnsight.method.sites import NO_LAYERS

if TYPE_CHECKING:
    from persona_nnsight.plan.events import Scored
    from persona_nnsight.plan.plan import Plan

#: KLs below this, in nats, are rounding in any dtype: a share of them means nothing.
KL_FLOOR = 1e-5
#: A KL that is clearly above the floor is this many times as large.
CLEARLY = 10

#: How `contrasts` calls a steering without Δ_X (α = 0).
NO_PERSONA = "alpha_0"


def kl_table(plan: Plan, scores: Iterable[Scored]) -> pd.DataFrame:
    """One row per cell and edit, in the plan's order: KL in nats, summed over ``n_tokens``.

    ``alpha`` and ``beta`` are there for a steering alone. Runs into the BY host add
    ``gap_closed``, the share of the cell (see `kl_summary`).
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
        table["gap_closed"] = _by_row(table, 1 - _Wide(table).ratios) if len(table) else np.nan
    return table


def kl_summary(table: pd.DataFrame) -> pd.DataFrame:
    """KL over cells, one row per edit: median with its interval, quartiles, extremes.

    ``n`` counts the cells that have a window at all; ``…_lo`` and ``…_hi`` are the 95 % interval
    of a number by itself (`verdicts.interval`), empty below five cells. ``floor`` is the median KL
    of ``clean`` at the same site, or of the unedited XY run where the host is BY; in few bits that
    of ``rounded``, where that is larger.

    A share is 1 - KL / KL of the control: ``recovered``, of ``bb`` at the same site, in runs of
    XY, ``gap_closed``, of the unedited host, in runs of BY. It is the median over cells of the
    shares in them, and ``…_pooled`` is the ratio of the sums over these cells. Cells in which the
    control's KL is not clearly above the floor are left out (below `KL_FLOOR` or `CLEARLY` times
    the floor: there is nothing to share), and the whole row is empty where its median is not.
    """
    wide = _Wide(table)
    summary, frame = wide.edits.copy(), pd.DataFrame(wide.kl)
    summary["median"] = wide.medians
    low, high = interval(wide.crossed.medians(wide.kl), positive=True)
    # Rounding may make a KL negative.
    summary["median_lo"], summary["median_hi"] = np.minimum(low, wide.medians), high
    summary["q25"], summary["q75"] = frame.quantile([0.25, 0.75]).to_numpy()
    summary["min"], summary["max"] = frame.min().to_numpy(), frame.max().to_numpy()
    summary["n"] = frame.count().to_numpy()
    summary["floor"] = wide.floors
    ratios = wide.crossed.medians(wide.ratios)
    # Of the ratio, which is never below 0: a share is never above 1.
    low, high = interval(ratios, positive=True)
    low = np.minimum(low, ratios.estimate)
    name = share_of(table)
    summary[name] = 1 - ratios.estimate
    summary[interval_of(name)[0]], summary[interval_of(name)[1]] = 1 - high, 1 - low
    summary[f"{name}_pooled"] = wide.pooled
    return summary


def share_of(table: pd.DataFrame) -> str:
    """The share that a run has: ``gap_closed`` where BY is the host, else ``recovered``."""
    into_by = "gap_closed" in table or (table["host"] == "BY").any()
    return "gap_closed" if into_by else "recovered"


def drawn_kls(table: pd.DataFrame) -> tuple[pd.DataFrame, Draws, Draws]:
    """The edits of a KL table, and over cells their median KLs and median shares, drawn."""
    wide = _Wide(table)
    shares = combined(lambda ratio: 1 - ratio, wide.crossed.medians(wide.ratios))
    return wide.edits, wide.crossed.medians(wide.kl), shares


def contrasts(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """The difference that a condition makes from its controls, paired by cell.

    At every site of XY ``additive`` is set against every other condition but ``clean`` and
    ``steer`` against ``bb``; in BY everything is set against the unedited ``host``. A ``steer`` is
    also set against α = 0 with the same β, under the name ``alpha_0``. ``difference``
    is the median over cells of KL(condition) - KL(control), in nats, ``lo`` and ``hi`` its 95 %
    interval, which holds for all rows at once (`verdicts.simultaneous`), ``lower`` the number of
    the ``n`` cells in which the condition's KL is below the control's by more than rounding.
    ``verdict`` is what the interval decides (`verdicts.verdicts`) with ``margin``, in nats; it is
    ``undecided`` where the control's KL is not clearly above the floor (`kl_summary`).

    Args:
        table: of `kl_table`.
        margin: the differences that do not matter, as a share of the median KL of ``bb`` at the
            same site, in BY of the host.
    """
    wide = _Wide(table)
    rows = records(wide.edits)
    pairs = [
        (i, j)
        for i, subject in enumerate(rows)
        for j, control in enumerate(rows)
        if _are_contrasted(subject, control)
    ]
    subjects, controls = ([pair[side] for pair in pairs] for side in (0, 1))
    differences = wide.kl[:, subjects] - wide.kl[:, controls]
    found = wide.edits.loc[
        subjects, [name for name in wide.edits if name != "condition"]
    ].reset_index(drop=True)
    names = wide.edits["condition"]
    found["condition"] = names.to_numpy()[subjects]
    found["control"] = names.where(names != STEER, NO_PERSONA).to_numpy()[controls]
    rounding = np.fmax(wide.floors[subjects], KL_FLOOR)
    frame = pd.DataFrame(differences)
    found["n"] = frame.count().to_numpy()
    found["difference"] = frame.median().to_numpy()
    low, high = simultaneous(wide.crossed.medians(differences))
    found["lo"], found["hi"] = low, high
    found["margin"] = margin * wide.shared_medians[subjects]
    words = verdicts(low, high, margin=found["margin"].to_numpy(), floor=rounding)
    too_small = ~(wide.medians[controls] >= wide.least[subjects])
    found["verdict"] = np.where(too_small & (words != NO_VERDICT), UNDECIDED, words)
    found["lower"] = (frame < -rounding).sum().to_numpy()
    return found


@dataclass(frozen=True)
class _Wide:
    """A KL table with cells down and edits across.

    Attributes:
        table: of `kl_table`.
    """

    table: pd.DataFrame

    @cached_property
    def _both(self) -> tuple[pd.DataFrame, Floats]:
        edits, (wide,) = wide_by_edit(self.table, "kl")
        return edits, wide.to_numpy(dtype=float)

    @property
    def edits(self) -> pd.DataFrame:
        """What the columns are."""
        return self._both[0]

    @property
    def kl(self) -> Floats:
        """In nats, float64 [cells, edits]; NaN where a cell has none."""
        return self._both[1]

    @cached_property
    def crossed(self) -> Crossed:
        """The draws of the cells."""
        return Crossed(cells_of(self.table))

    @cached_property
    def medians(self) -> Floats:
        """Over cells, float64 [edits]."""
        return pd.DataFrame(self.kl).median().to_numpy()

    @cached_property
    def floors(self) -> Floats:
        """The median KL of `clean` at the site of every edit, float64 [edits]; NaN without.

        Where `rounded` was run, its own if that is larger: beside an edit of BY the largest at the
        position.
        """

        def is_floor(floor: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
            if floor["condition"] not in FLOORS or floor["host"] != "XY":
                return False
            at_one_layer = floor["layers"] == row["layers"] or row["host"] == "BY"
            return bool(floor["position"] == row["position"]) and at_one_layer

        of = [[i for i, floor in enumerate(self._rows) if is_floor(floor, r)] for r in self._rows]
        return np.array([self.medians[chosen].max() if chosen else np.nan for chosen in of])

    @property
    def least(self) -> Floats:
        """The KL that is clearly above the floor, float64 [edits]."""
        return np.fmax(CLEARLY * self.floors, KL_FLOOR)

    @cached_property
    def ratios(self) -> Floats:
        """KL / KL of the control in the cell, float64 [cells, edits]; see `kl_summary`."""
        of = self._shared
        usable = (of >= self.least) & (self.shared_medians >= self.least)
        with np.errstate(invalid="ignore"):
            ratios: Floats = self.kl / np.where(usable, of, np.nan)
        return ratios

    @property
    def pooled(self) -> Floats:
        """1 - ΣKL / ΣKL of the control over the cells of `ratios`, float64 [edits]."""
        counted = np.isfinite(self.ratios)
        mine, of = (np.where(counted, kl, 0).sum(axis=0) for kl in (self.kl, self._shared))
        shares: Floats = 1 - mine / np.where(counted.any(axis=0), of, np.nan)
        return shares

    @cached_property
    def shared_medians(self) -> Floats:
        """The median KL of what a share is of, where it is clearly above the floor, [edits]."""
        medians = self._medians_at(self._controls)
        return np.where(medians >= self.least, medians, np.nan)

    @cached_property
    def _shared(self) -> Floats:
        """The KL of what a share is of, [cells, edits]."""
        of = np.full_like(self.kl, np.nan)
        for column, site in enumerate(self._controls):
            if site in self._places:
                of[:, column] = self.kl[:, self._places[site]]
        return of

    @cached_property
    def _controls(self) -> list[tuple[str, ...]]:
        """What the shares of every edit are of."""
        by_runs = share_of(self.table) == "gap_closed"
        return [
            (BASELINE["BY"], "BY", row["position"], NO_LAYERS)
            if row["host"] == "BY"
            else ("",)  # the clean run beside runs of BY has no share
            if by_runs
            else (BASELINE["XY"], "XY", row["position"], row["layers"])
            for row in self._rows
        ]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return records(self.edits)

    @cached_property
    def _places(self) -> dict[tuple[str, ...], int]:
        return {
            (row["condition"], *(row[name] for name in SITE)): index
            for index, row in enumerate(self._rows)
        }

    def _medians_at(self, places: list[tuple[str, ...]]) -> Floats:
        found = [self._places.get(place) for place in places]
        return np.array([np.nan if at is None else self.medians[at] for at in found], dtype=float)


def _by_row(table: pd.DataFrame, wide: Floats) -> Floats:
    """Values [cells, edits] in the rows of the table that they were made from."""
    edit = [name for name in ("condition", *SITE, "alpha", "beta") if name in table]
    across = table.groupby(edit, sort=False, dropna=False).ngroup()
    down = table.groupby(CELL, sort=False).ngroup()
    values: Floats = wide[down.to_numpy(), across.to_numpy()]
    return values


def _are_contrasted(subject: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
    """Whether one edit is set against another; see `contrasts`."""
    if subject["host"] != control["host"]:
        return False
    at_one_site = all(bool(subject[name] == control[name]) for name in SITE)
    pair = (subject["condition"], control["condition"])
    if pair == (STEER, STEER):
        leaves_x_out = subject["alpha"] != 0 and control["alpha"] == 0
        return at_one_site and leaves_x_out and bool(subject["beta"] == control["beta"])
    if subject["host"] == "BY":
        return bool(pair[0] != pair[1] == BASELINE["BY"])
    return at_one_site and pair[1] in CONTROLS.get(pair[0], ())
