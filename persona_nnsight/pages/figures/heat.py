"""A panel of a small table: each number in a cell that is the darker the larger it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from persona_nnsight.pages.figures.canvas import (
    BLUE,
    INK,
    ORANGE,
    PAGE,
    RULE,
    WIDTH,
    Panel,
    text_width,
)
from persona_nnsight.pages.figures.lines import KL_LINEAR
from persona_nnsight.pages.numbers import fixed, short_kl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: The strongest tint: words on it stay readable in both colour schemes.
_STRONGEST = 0.5
#: Inches: beside the cells, without the names of the rows; and across a number.
_MARGINS = 0.55
_NUMBER = 0.32
#: Letters of a row's name that leave room for two columns; a longer one is cut in the drawing.
_MOST_LETTERS = 30


def columns_beside(rows: Sequence[str]) -> int:
    """How many columns with a number have room beside rows of these names; at least two."""
    return max(2, int((WIDTH - _MARGINS - _longest(rows)) / _NUMBER))


def _longest(rows: Sequence[str]) -> float:
    return max((text_width(_cut(row)) for row in rows), default=0.0)


def _cut(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"


def heat_panel(
    title: str,
    values: Mapping[tuple[str, str], float],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    percent: bool = False,
    largest: float | None = None,
) -> Panel:
    """Draw a table of numbers by (row, column).

    KLs are tinted by their logarithm, from `KL_LINEAR` to `largest` (of the panels of one figure;
    None for the largest of this one); shares (`percent`) by their
    size, with another colour and a minus sign below zero. A missing number is a dash.
    """
    each = max(0.15, min(0.27, 9 / max(len(rows), 1)))
    if largest is None:
        largest = max((value for value in values.values() if math.isfinite(value)), default=0.0)
    end = largest

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        axes.set_title(title, x=0)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [_cut(row) for row in rows])
        axes.set_xlabel(column_label)
        axes.set_ylabel(row_label)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                value = values.get((row, column), math.nan)
                colour, strength = _tint(value, end, percent)
                axes.add_patch(
                    Rectangle((j, i), 1, 1, facecolor=colour, alpha=strength, linewidth=0)
                )
                axes.text(
                    j + 0.5, i + 0.5, _text(value, percent), ha="center", va="center", color=INK
                )
        for i in range(len(rows) + 1):
            axes.axhline(i, color=PAGE, linewidth=1.2)
        for j in range(len(columns) + 1):
            axes.axvline(j, color=PAGE, linewidth=1.2)

    words = _in_words(values, rows, columns, percent)
    return Panel(
        label=f"{title}, by {column_label}. {words}",
        draw=draw,
        height=0.34 + 0.5 + each * max(len(rows), 2),
        left=_MARGINS - 0.1 + _longest(rows),
        right=0.1,
        bottom=0.5,
    )


def _tint(value: float, largest: float, percent: bool) -> tuple[str, float]:
    if not math.isfinite(value):
        return RULE, 0.5
    if percent:
        return (BLUE if value >= 0 else ORANGE), _STRONGEST * min(abs(value), 1)
    if value <= KL_LINEAR or largest <= KL_LINEAR:
        return BLUE, 0.02
    depth = math.log(value / KL_LINEAR) / math.log(largest / KL_LINEAR)
    return BLUE, _STRONGEST * min(max(depth, 0.04), 1)


def _text(value: float, percent: bool) -> str:
    return fixed(100 * value, 0) if percent else short_kl(value)


def _in_words(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    percent: bool,
) -> str:
    parts = []
    for row in rows[:12]:
        cells = (
            f"{column} {_text(values.get((row, column), math.nan), percent)}" for column in columns
        )
        parts.append(f"{row}: {', '.join(cells)}.")
    return " ".join(parts)
