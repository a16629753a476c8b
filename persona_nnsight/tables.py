"""Results as tidy tables: one row per observation, and their summaries over cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from persona_nnsight.geometry import decompose
from persona_nnsight.sites import format_layers

if TYPE_CHECKING:
    from torch import Tensor

    from persona_nnsight.engine import Scored
    from persona_nnsight.plan import Plan

#: How an edit of no layers (the unedited host of an injection) is written in the layers column.
NO_LAYERS = "none"

#: KLs below this, in nats, are rounding: a share of them means nothing and is left empty.
KL_FLOOR = 1e-5

_SITE = ["condition", "position", "layers"]


def geometry_table(
    plan: Plan, cells: Sequence[int], residuals: Mapping[str, Tensor]
) -> pd.DataFrame:
    """One row per cell and site: the columns of `persona_nnsight.geometry.decompose`.

    Args:
        plan: the plan that was run.
        cells: which of the plan's cells the residuals belong to.
        residuals: float32 [cells, positions, layers, d_model] by residual key.
    """
    measures = {name: value.tolist() for name, value in decompose(residuals).items()}
    rows = [
        {
            "persona": plan.cells[cell].persona,
            "task": plan.cells[cell].task,
            "position": position,
            "layer": layer,
            **{name: values[i][j][k] for name, values in measures.items()},
        }
        for i, cell in enumerate(cells)
        for j, position in enumerate(plan.positions)
        for k, layer in enumerate(plan.layers)
    ]
    return pd.DataFrame(rows)


def geometry_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over cells of the three reported ratios, one row per site, with ``n`` cells."""
    grouped = table.groupby(["position", "layer"], sort=False)
    summary = grouped[["cos_xy_sum", "cos_x_y", "inter_over_xy"]].median()
    summary["n"] = grouped["cos_xy_sum"].count()
    return summary.reset_index()


def kl_table(plan: Plan, scores: Sequence[Scored]) -> pd.DataFrame:
    """One row per cell and edit, in the plan's order: KL in nats, summed over ``n_tokens``.

    A run into the BY host adds ``gap_closed`` = 1 - KL / KL of the unedited host, cell by cell
    (empty where the host's KL is below `KL_FLOOR`: there is no gap).
    """
    rows = []
    for score in sorted(scores, key=lambda score: (score.cell, score.edit)):
        cell, edit = plan.cells[score.cell], plan.edits[score.edit]
        rows.append(
            {
                "persona": cell.persona,
                "task": cell.task,
                "condition": edit.condition,
                "position": edit.position,
                "layers": format_layers(edit.layers) or NO_LAYERS,
                "kl": score.kl,
                "n_tokens": score.n_tokens,
            }
        )
    columns = ["persona", "task", *_SITE, "kl", "n_tokens"]
    table = pd.DataFrame(rows, columns=columns)
    if plan.host == "BY":
        cell_keys = ["persona", "task"]
        host = table[table["condition"] == "host"].set_index(cell_keys)["kl"].rename("host")
        table["gap_closed"] = _share(table["kl"], table.join(host, on=cell_keys)["host"])
    return table


def kl_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Median, quartiles and extremes of KL over cells, one row per edit.

    ``n`` counts the cells that have a window at all. A substitution's ``recovered`` is
    1 - median KL / median KL of condition ``bb`` at the same site (empty without that condition,
    or where its median is below `KL_FLOOR`: there is nothing to recover); an
    injection's ``gap_closed`` is the median over cells.
    """
    grouped = table.groupby(_SITE, sort=False)
    kl = grouped["kl"]
    summary = pd.DataFrame(
        {
            "median": kl.median(),
            "q25": kl.quantile(0.25),
            "q75": kl.quantile(0.75),
            "min": kl.min(),
            "max": kl.max(),
            "n": kl.count(),
        }
    ).reset_index()
    if "gap_closed" in table:
        return summary.join(grouped["gap_closed"].median(), on=_SITE)
    site = ["position", "layers"]
    neither = summary[summary["condition"] == "bb"].set_index(site)["median"].rename("bb")
    summary["recovered"] = _share(summary["median"], summary.join(neither, on=site)["bb"])
    return summary


def _share(kl: pd.Series[float], of: pd.Series[float]) -> pd.Series[float]:
    """1 - kl / of, empty where `of` is too small to be divided by."""
    return 1 - kl / of.where(of >= KL_FLOOR)
