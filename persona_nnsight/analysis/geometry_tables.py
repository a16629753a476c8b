"""Geometry of the effects as tidy tables: per cell and site, and over cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from persona_nnsight.analysis.columns import CELL, cells_of
from persona_nnsight.analysis.resampling import Crossed
from persona_nnsight.analysis.verdicts import interval

if TYPE_CHECKING:
    from torch import Tensor

    from persona_nnsight.plan.plan import Plan


#: The measures of geometry that are summarised.
RATIOS = ("cos_xy_sum", "cos_x_y", "inter_over_xy", "inter_over_xy_normed")


def geometry_table(
    plan: Plan, cells: Sequence[int], measures: Mapping[str, Tensor]
) -> pd.DataFrame:
    """One row per cell and site: the columns of `persona_nnsight.method.geometry.decompose`.

    ``inter_over_xy_normed`` is ``inter_over_xy`` after the layer's input norm; the column is
    missing for architectures without one.

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
