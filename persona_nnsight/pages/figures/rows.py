"""A panel of named rows: the cells as dots, the median with its interval, with or without a bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.pages.figures.canvas import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAGE,
    Panel,
    text_width,
)
from persona_nnsight.pages.figures.lines import KL_GUIDE, scale_kl
from persona_nnsight.pages.numbers import share, short_kl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW = 0.27  # inches
#: Names longer than this stand above their row, not left of it, and leave the width to the data.
_LONG_NAME = 14


@dataclass(frozen=True)
class Row:
    """One condition or layer set; `low` and `high` bound the middle value, NaN where unknown."""

    name: str
    middle: float
    low: float = math.nan
    high: float = math.nan
    cells: Sequence[float] = ()
    main: bool = False


def row_panel(
    title: str,
    rows: Sequence[Row],
    *,
    x_label: str,
    bars: bool,
    kl_top: float | None = None,
    limits: tuple[float, float] | None = None,
    percent: bool = False,
    value_text: bool = True,
) -> Panel:
    """Draw rows from top to bottom.

    Args:
        title: above the panel.
        rows: what to draw; the `main` ones in colour.
        x_label: below the panel.
        bars: draw a bar from 0 to the middle value.
        kl_top: upper end of a symlog x axis for KL in nats (`top_of`), with a guide at `KL_GUIDE`;
            a linear axis if left out.
        limits: of a linear x axis, widened where values lie outside.
        percent: label a linear x axis in percent.
        value_text: write the middle value beside each row.
    """
    longest = max((row.name for row in rows), key=len, default="")
    above = len(longest) > _LONG_NAME

    def draw(axes: Axes) -> None:
        axes.set_title(title, x=0)
        axes.set_xlabel(x_label)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _name_rows(axes, rows, above)
        axes.grid(axis="x")
        if kl_top is not None:
            scale_kl(axes, kl_top, "x")
            axes.axvline(KL_GUIDE, color=ORANGE, linewidth=0.9, zorder=1)
        else:
            _linear(axes, _shown(rows), limits, percent)
        for at, row in enumerate(rows):
            _draw_row(axes, at, row, bars)
            if value_text:
                _write_value(axes, at, row, percent)

    words = "; ".join(f"{row.name} {_in_words(row, percent)}" for row in rows)
    return Panel(
        label=f"{title}. {x_label}: {words}.",
        draw=draw,
        height=0.34 + 0.46 + (1.6 if above else 1) * _ROW * max(len(rows), 2),
        left=0.2 if above else 0.22 + text_width(longest),
        right=0.62 if value_text else 0.2,
    )


def _name_rows(axes: Axes, rows: Sequence[Row], above: bool) -> None:
    axes.tick_params(axis="y", length=0)
    axes.set_yticks([] if above else range(len(rows)), [] if above else [r.name for r in rows])
    if above:
        axes.set_ylim(len(rows) - 0.5, -0.75)
        for at, row in enumerate(rows):
            axes.annotate(
                row.name,
                (0, at - 0.31),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="bottom",
                zorder=1.4,
                bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.5},
                **_name_style(row),
            )
    for tick, row in zip(axes.get_yticklabels(), rows, strict=False):
        tick.set(**_name_style(row))


def _name_style(row: Row) -> dict[str, Any]:
    return {"color": BLUE, "fontweight": "bold"} if row.main else {"color": INK}


def _shown(rows: Sequence[Row]) -> list[float]:
    values = [v for row in rows for v in (row.middle, row.low, row.high, *row.cells)]
    return [value for value in values if math.isfinite(value)]


def _linear(
    axes: Axes, shown: Sequence[float], limits: tuple[float, float] | None, percent: bool
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = limits or (0.0, 0.0)
    low, high = min([low, *shown]), max([high, *shown])
    room = (high - low) * 0.03 or 0.5
    axes.set_xlim(low - (room if low < 0 else 0), high + room)
    whole = limits is not None and limits[1] > 4
    axes.xaxis.set_major_locator(MaxNLocator(3 if percent else 4, integer=whole))
    axes.axvline(0, color=INK, linewidth=0.7, zorder=1)
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: share(value)))


def _draw_row(axes: Axes, at: int, row: Row, bars: bool) -> None:
    colour = BLUE if row.main else MUTED
    if bars and math.isfinite(row.middle):
        axes.barh(at, row.middle, height=0.52, color=colour, alpha=0.3, linewidth=0, zorder=1.5)
    if row.cells:
        # The golden ratio keeps neighbours apart without chance.
        heights = [at + ((0.5 + 0.618034 * i) % 1 - 0.5) * 0.48 for i in range(len(row.cells))]
        axes.plot(
            row.cells,
            heights,
            linestyle="none",
            marker="o",
            markersize=3,
            color=colour,
            alpha=0.6,
            markeredgewidth=0,
            clip_on=False,
            zorder=2,
        )
    if math.isfinite(row.low) and math.isfinite(row.high):
        axes.plot([row.low, row.high], [at, at], color=INK, linewidth=1.6, zorder=3)
    if math.isfinite(row.middle):
        axes.plot(
            row.middle,
            at,
            marker="D" if row.main else "o",
            markersize=5,
            color=INK,
            markeredgecolor=PAGE,
            markeredgewidth=0.7,
            clip_on=False,
            zorder=4,
        )


def _write_value(axes: Axes, at: int, row: Row, percent: bool) -> None:
    if not math.isfinite(row.middle):
        return
    axes.annotate(
        _number(row.middle, percent),
        (1, at),
        xycoords=("axes fraction", "data"),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        annotation_clip=False,
    )


def _number(value: float, percent: bool) -> str:
    if percent:
        return share(value)
    return f"{value:g}" if value == int(value) else short_kl(value)


def _in_words(row: Row, percent: bool) -> str:
    if not math.isfinite(row.middle):
        return "not known"
    text = _number(row.middle, percent)
    if math.isfinite(row.low) and math.isfinite(row.high):
        text += f" ({_number(row.low, percent)} to {_number(row.high, percent)})"
    return text
