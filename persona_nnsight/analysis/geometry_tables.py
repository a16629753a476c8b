"""Geometry of the effects as tidy tables: per cell and site, and over cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from persona_nnsight.analysis.columns import CELL, cells_of
from persona_nnsight.analysis.resampling import Crossed, Floats
from persona_nnsight.analysis.verdicts import NO_VERDICT, interval, simultaneous, verdicts

if TYPE_CHECKING:
    from torch import Tensor

    from persona_nnsight.plan.plan import Plan


#: Cosines of Δ_XY with the sum and with its controls, and of the two effects.
COSINES = ("cos_xy_sum", "cos_xy_y", "cos_xy_x", "cos_xy_other", "cos_x_y")
#: What the sum and its controls leave of Δ_XY, as shares of its length.
RESTS = ("inter_over_xy", "rest_y", "rest_x", "rest_other", "inter_over_xy_normed")
#: The measures of geometry that are summarised; a table may be without some of them.
RATIOS = (*COSINES, *RESTS)

#: Differences of cosines and of shares up to this are rounding of float32.
ROUNDING = 1e-5


def geometry_table(
    plan: Plan, cells: Sequence[int], measures: Mapping[str, Tensor]
) -> pd.DataFrame:
    """One row per cell and site: the columns of `persona_nnsight.method.geometry.decompose`.

    ``inter_over_xy_normed`` is ``inter_over_xy`` after the layer's input norm; the column is
    missing for architectures without one, those of another persona's Δ_X where there is none.

    Args:
        plan: the plan that was run.
        cells: which of the plan's cells the measures belong to.
        measures: by name, float32 [cells, positions, layers].
    """
    shape = (len(cells), len(plan.positions), len(plan.layers))
    if not measures:
        return pd.DataFrame(columns=[*CELL, "position", "layer"])
    cell, position, layer = (index.ravel() for index in np.indices(shape))
    return pd.DataFrame(
        {
            "persona": [plan.cells[cells[i]].persona for i in cell],
            "task": [plan.cells[cells[i]].task for i in cell],
            "position": [plan.positions[i] for i in position],
            "layer": np.asarray(plan.layers)[layer],
            **{name: value.numpy().ravel().astype(float) for name, value in measures.items()},
        }
    )


def geometry_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over cells of the `RATIOS`, one row per site, with ``n`` cells.

    ``…_lo`` and ``…_hi`` are 95 % intervals of the medians, each by itself (`verdicts`).
    """
    ratios = [name for name in RATIOS if name in table]
    site = table.groupby(["position", "layer"], sort=False)
    cell = table.groupby(CELL, sort=False).ngroup()
    summary = table[["position", "layer"]].drop_duplicates(ignore_index=True)
    crossed = Crossed(cells_of(table))
    for name in ratios:
        wide = table[name].set_axis([cell, site.ngroup()]).unstack()
        summary[name] = wide.median().to_numpy()
        draws = crossed.medians(wide.to_numpy(dtype=float))
        ends = interval(draws, positive=name.startswith("inter"))  # a ratio of lengths
        summary[f"{name}_lo"], summary[f"{name}_hi"] = ends
    summary["n"] = site["cos_xy_sum"].count().to_numpy()
    return summary


@dataclass(frozen=True)
class Change:
    """How much one measure of geometry is above another, cell by cell, at every site.

    Attributes:
        medians: over cells of the differences, one per site.
        words: for each site which side of 0 they are on (`persona_nnsight.analysis.verdicts`), by
            95 % intervals that hold for all sites at once; empty words with too few cells.
    """

    medians: Floats
    words: NDArray[np.str_]

    @property
    def is_told(self) -> bool:
        """Whether any site has an interval."""
        return bool((self.words != NO_VERDICT).any())

    def sites(self, word: str) -> int:
        """At how many sites the interval says so."""
        return int((self.words == word).sum())


def change(table: pd.DataFrame, name: str, plain: str) -> Change | None:
    """By how much the measure `name` is above `plain`; None where a table lacks one of them.

    Sites at which no cell has both are left out.
    """
    if not {name, plain} <= set(table):
        return None
    differences = (table[name] - table[plain]).set_axis(
        pd.MultiIndex.from_frame(table[[*CELL, "position", "layer"]])
    )
    wide = differences.unstack(["position", "layer"]).dropna(axis=1, how="all")
    if not wide.shape[1]:
        return None
    draws = Crossed(wide.index).medians(wide.to_numpy(dtype=float))
    return Change(draws.estimate, verdicts(*simultaneous(draws), floor=ROUNDING))
