"""Figures of the residuals themselves: do the two effects add up, layer by layer?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import records
from persona_nnsight.pages.figures.canvas import Figure
from persona_nnsight.pages.figures.lines import EQUALS, Line, line_panel, spread
from persona_nnsight.pages.figures.table_values import Records, distinct

if TYPE_CHECKING:
    import pandas as pd


#: Columns and what their lines are called; the first of them are in every table.
_COSINES = {
    "cos_xy_sum": "Δ_XY, sum",
    "cos_x_y": "Δ_X, Δ_Y",
    "cos_xy_y": "Δ_XY, Δ_Y",
    "cos_xy_x": "Δ_XY, Δ_X",
    "cos_xy_other": "Δ_XY, Δ_X′+Δ_Y",
}
#: Without that of Δ_X alone, which is around 1 and would press the others together.
_RESTS = {
    "inter_over_xy": "sum",
    "inter_over_xy_normed": "sum, after norm",
    "rest_y": "Δ_Y alone",
    "rest_other": "Δ_X′+Δ_Y",
}
_PLAIN = ("cos_xy_sum", "cos_x_y", "inter_over_xy")


def geometry_by_layer(table: pd.DataFrame) -> list[Figure]:
    """The cosines, and what the sum and its controls leave, by layer.

    No figures where there is a single layer: the table says it all.
    """
    rows = records(table)
    if len(distinct(rows, "layer")) < 2:
        return []
    cosines = _measured(rows, _COSINES)
    caption = (
        "Cosine of the joint effect Δ_XY with the sum Δ_X + Δ_Y (1: the joint effect points where "
        "the sum points), and of Δ_X with Δ_Y (0: the two effects are orthogonal)."
    )
    if "cos_xy_y" in cosines:
        caption += (
            " The controls are its cosines with either effect alone and with the sum in which the "
            "persona's effect is another persona's Δ_X′: the sum says something about Δ_X only "
            "where it is above them."
        )
    figures = [
        Figure(
            name="cosines",
            caption=f"{caption} Medians over cells; band: the middle half of the cells.",
            panels=_panels(rows, cosines, "cosine"),
        )
    ]
    names = _measured(rows, _RESTS)
    caption = (
        "Length of the interaction Δ_XY − Δ_X − Δ_Y as a share of the length of Δ_XY: how much of "
        "the joint effect is missed by the sum."
    )
    if "rest_y" in names:
        caption += " Beside it, as controls, what Δ_Y alone and the sum with Δ_X′ miss."
    if "inter_over_xy_normed" in names:
        caption += (
            " The layer reads the residual after its input norm, which divides every residual by "
            "its own length and weighs the directions, so both are shown."
        )
    figures.append(
        Figure(
            name="interaction",
            caption=f"{caption} Medians over cells; band: the middle half of the cells.",
            panels=_panels(rows, names, "share of ‖Δ_XY‖"),
        )
    )
    return figures


def _measured(rows: Records, names: Mapping[str, str]) -> dict[str, str]:
    """Those of the columns that have a number: runs of earlier versions lack the controls."""
    return {
        name: label
        for name, label in names.items()
        if name in _PLAIN or any(math.isfinite(row.get(name, math.nan)) for row in rows)
    }


def _panels(rows: Records, names: Mapping[str, str], y_label: str) -> list[Any]:
    # All panels of a figure have one axis.
    lowest = min((r[name] for r in rows for name in names if math.isfinite(r[name])), default=0)
    limits = (min(0.0, lowest), 1.0)
    panels = []
    for position in distinct(rows, "position"):
        here = [row for row in rows if row["position"] == position]
        layers = sorted(distinct(here, "layer"))
        panels.append(
            line_panel(
                position,
                [
                    _line(label, EQUALS[i], column, here, layers)
                    for i, (column, label) in enumerate(names.items())
                ],
                x_label="layer",
                y_label=y_label,
                ticks=[(layers[i], f"{layers[i]:g}") for i in spread(len(layers), 8)],
                limits=limits,
                guide=0,
            )
        )
    return panels


def _line(label: str, look: Any, column: str, rows: Records, layers: Sequence[float]) -> Line:
    quartiles = [
        _quartiles([r[column] for r in rows if r["layer"] == layer and math.isfinite(r[column])])
        for layer in layers
    ]
    return Line(
        label,
        look,
        x=layers,
        y=[middle for _, middle, _ in quartiles],
        low=[low for low, _, _ in quartiles],
        high=[high for _, _, high in quartiles],
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    import numpy as np

    if not values:
        return math.nan, math.nan, math.nan
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)
