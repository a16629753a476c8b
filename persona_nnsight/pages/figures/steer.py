"""The figure of a run that scales the two effects: h_BB + α Δ_X + β Δ_Y."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import records
from persona_nnsight.pages.figures.canvas import Figure, Panel
from persona_nnsight.pages.figures.lines import EQUALS, Line, line_panel, spread, top_of
from persona_nnsight.pages.figures.table_values import KL_LABEL, Records, distinct
from persona_nnsight.pages.numbers import plain

if TYPE_CHECKING:
    import pandas as pd

_SYMBOLS = {"alpha": "α", "beta": "β"}
_EFFECTS = {"alpha": "the persona's effect", "beta": "the task's effect"}
#: Column of the summary: title and label of its panel.
_MEASURES = {
    "median": ("Median KL", KL_LABEL),
    "recovered": ("Recovered", "share of what bb loses"),
    "gap_closed": ("Gap closed", "share of the host's KL"),
    "any": ("Cells with a marker", "share of cells"),
}


def steering_curves(summary: pd.DataFrame, markers: pd.DataFrame | None = None) -> Figure | None:
    """KL, recovered or gap closed, and marker cells, by strength; None without any strength.

    The strengths are those of the persona's effect, with a line per strength of the task's; the
    other way round where only the task's varies.

    Args:
        summary: of the run.
        markers: its ``markers.csv``, if texts were generated and the grid has markers.
    """
    # The floor would stretch the axis.
    rows = [row for row in records(summary) if row["condition"] != "clean"]
    steered = [row for row in rows if _is_steered(row)]
    if not steered:
        return None
    across, other = "alpha", "beta"
    if len(distinct(steered, "alpha")) == 1:
        across, other = other, across
    panels = [
        _panel(rows, measure, across, other)
        for measure in ("median", "recovered", "gap_closed")
        if any(math.isfinite(row.get(measure, math.nan)) for row in steered)
    ]
    shares = _marker_shares(records(markers)) if markers is not None and "alpha" in markers else []
    if any(map(_is_steered, shares)):
        panels.append(_panel(shares, "any", across, other))
    several = len(distinct(steered, other)) > 1
    caption = f"Written at {_sites(steered)}. {_SYMBOLS[across]} scales {_EFFECTS[across]}"
    caption += f", a line per factor {_SYMBOLS[other]} of {_EFFECTS[other]}." if several else "."
    unsteered = [row for row in (*rows, *shares) if not _is_steered(row)]
    if unsteered:
        caption += f" Dashed: {' and '.join(distinct(unsteered, 'condition'))}, without steering."
    if not several:
        caption += " Band: the middle half of the cells."
    return Figure(name="steering", caption=caption, panels=panels)


def _is_steered(row: Mapping[str, Any]) -> bool:
    return math.isfinite(row.get("alpha", math.nan))


def _sites(rows: Records) -> str:
    sites = dict.fromkeys((row["position"], row["layers"]) for row in rows)
    return "; ".join(
        f"{position}, layer{'s' if '+' in layers else ''} {layers}" for position, layers in sites
    )


def _marker_shares(rows: Records) -> Records:
    """The share of cells with a marker, one row per edit."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        # A control has no strengths; NaN would not be equal to itself.
        strengths = (row["alpha"], row["beta"]) if _is_steered(row) else None
        groups.setdefault((row["condition"], strengths), []).append(row["any"])
    return [
        {
            "condition": condition,
            "alpha": strengths[0] if strengths else math.nan,
            "beta": strengths[1] if strengths else math.nan,
            "any": sum(found) / len(found),
        }
        for (condition, strengths), found in groups.items()
    ]


def _panel(rows: Records, measure: str, across: str, other: str) -> Panel:
    steered = [row for row in rows if _is_steered(row)]
    is_kl = measure == "median"
    strengths = sorted(distinct(steered, across))
    others = sorted(distinct(steered, other))
    others = [others[i] for i in spread(len(others), len(EQUALS))]
    lines = []
    for look, factor in zip(EQUALS, others, strict=False):
        mine = sorted((r for r in steered if r[other] == factor), key=lambda row: row[across])
        band = is_kl and len(others) == 1
        lines.append(
            Line(
                f"{_SYMBOLS[other]} = {plain(factor)}",
                look,
                x=[row[across] for row in mine],
                y=[row[measure] for row in mine],
                low=[row["q25"] for row in mine] if band else (),
                high=[row["q75"] for row in mine] if band else (),
            )
        )
    # The share of itself that a control recovers is 0 by definition.
    levels = {
        row["condition"]: row[measure]
        for row in rows
        if measure in ("median", "any") and not _is_steered(row) and math.isfinite(row[measure])
    }
    title, y_label = _MEASURES[measure]
    return line_panel(
        title,
        lines,
        x_label=_SYMBOLS[across],
        y_label=y_label,
        ticks=[(strengths[i], plain(strengths[i])) for i in spread(len(strengths), 7)],
        kl_top=top_of(kl for row in rows for kl in (row["median"], row["q75"])) if is_kl else None,
        percent=not is_kl,
        limits=None if is_kl else (0, 1),
        levels=list(levels.items()),
        guide=0,
    )
