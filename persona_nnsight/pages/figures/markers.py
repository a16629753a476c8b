"""Figures of runs that look for the persona's markers in generated text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from persona_nnsight.analysis.columns import records
from persona_nnsight.pages.figures.canvas import Figure
from persona_nnsight.pages.figures.rows import Row, row_panel
from persona_nnsight.pages.figures.table_values import edit_name

if TYPE_CHECKING:
    import pandas as pd


def marker_bars(summary: pd.DataFrame) -> Figure:
    """Cells with any marker, and the mean number of distinct markers, a bar per condition."""
    rows = records(summary)
    most = max((row["n"] for row in rows), default=0)
    panels = [
        row_panel(
            title,
            [
                Row(
                    name=edit_name(row),
                    middle=row[name],
                    low=row.get(f"{name}_lo", math.nan),
                    high=row.get(f"{name}_hi", math.nan),
                    main=row["condition"] == "additive",
                )
                for row in rows
            ],
            x_label=label,
            bars=True,
            limits=(0, most) if name == "any" else (0, 1),
        )
        for name, title, label in (
            ("any", "Cells with any marker", f"cells, of {most:g}"),
            ("distinct", "Distinct markers", "mean per cell"),
        )
    ]
    return Figure(
        name="markers",
        caption="How often the persona's marker words appear in the generated texts, with "
        "95 % intervals.",
        panels=panels,
    )
