"""Figures of runs that write into the BY host: is the gap to the persona's prompt closed?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import records
from persona_nnsight.method.conditions import HOST
from persona_nnsight.pages.figures.canvas import Figure
from persona_nnsight.pages.figures.rows import Row, row_panel
from persona_nnsight.pages.figures.table_values import KL_LABEL, distinct, edit_name, finite

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd


def injection_bars(summary: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Median KL and share of the gap closed, a bar per edit, a panel per position."""
    rows, single = records(summary), records(cells)
    positions = distinct([r for r in rows if r["condition"] != HOST], "position")
    kls, gaps = [], []
    for position in positions or distinct(rows, "position"):
        # The host is one run, whatever position the others write at.
        here = [r for r in rows if r["position"] == position or r["condition"] == HOST]
        bars, closed = [], []
        for row in here:
            mine = [c for c in single if _edit(c) == _edit(row)]
            bars.append(
                Row(
                    name=edit_name(row),
                    middle=row["median"],
                    low=row.get("median_lo", math.nan),
                    high=row.get("median_hi", math.nan),
                    cells=finite(cell["kl"] for cell in mine),
                    main=row["condition"] == "cached",
                )
            )
            if row["condition"] != HOST and math.isfinite(row.get("gap_closed", math.nan)):
                closed.append(
                    Row(
                        name=edit_name(row),
                        middle=row["gap_closed"],
                        low=row.get("gap_closed_lo", math.nan),
                        high=row.get("gap_closed_hi", math.nan),
                        cells=finite(cell.get("gap_closed", math.nan) for cell in mine),
                        main=row["condition"] == "cached",
                    )
                )
        kls.append(row_panel(f"KL to the XY run, {position}", bars, x_label=KL_LABEL, bars=True))
        if closed:
            gaps.append(
                row_panel(
                    f"Gap closed, {position}",
                    closed,
                    x_label="1 − KL / KL of the host",
                    bars=True,
                    percent=True,
                )
            )
    caption = (
        "KL from the run with the persona, for the prompt without it. Each dot is a cell, the bar "
        "the median, written at the right, the dark line its 95 % interval. At KL 0 the "
        "edit would do what naming the persona does."
    )
    if gaps:
        caption += (
            " Gap closed: how much of the host's KL an edit takes away. 100 %: as if the persona "
            "were named; below 0 %: worse than no edit."
        )
    return Figure(name="injection", caption=caption, panels=[*kls, *gaps])


def _edit(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["condition"], row["position"], row["layers"]
