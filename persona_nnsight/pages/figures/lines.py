"""A panel of lines over a few numbers (layers, strengths), each named where it ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_nnsight.pages.figures.canvas import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAGE,
    PURPLE,
    WIDTH,
    Panel,
    text_width,
)
from persona_nnsight.pages.numbers import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: KL from which on an edit is worth talking about, drawn as a line in the paper's Figure 1.
KL_GUIDE = 0.1
#: Markers along a line at most: more of them would hide the dashes.
_MOST_MARKERS = 10
#: KLs below this are drawn on a linear scale, above on a logarithmic one.
KL_LINEAR = 0.001


@dataclass(frozen=True)
class Look:
    """Colour, dashes and marker of a line: no two lines of a panel share two of the three."""

    colour: str
    dashes: Any
    marker: str
    main: bool = True


ADDITIVE = Look(BLUE, "-", "o")
CONTROLS = {
    "bb": Look(MUTED, (0, (5, 2)), "s", main=False),
    "by": Look(INK, (0, (1, 1.6)), "^", main=False),
}
#: Looks of lines that stand beside each other as equals.
EQUALS = (
    ADDITIVE,
    Look(ORANGE, (0, (5, 1.5)), "D"),
    Look(GREEN, (0, (4, 1.5, 1, 1.5)), "v"),
    Look(PURPLE, (0, (1, 1.4)), "s"),
    Look(INK, (0, (7, 2)), "P"),
    Look(MUTED, (0, (2, 1)), "X"),
)


@dataclass(frozen=True)
class Line:
    """Values by x, with a band around them where `low` and `high` are given."""

    name: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_panel(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    ticks: Sequence[tuple[float, str]],
    kl_top: float | None = None,
    percent: bool = False,
    limits: tuple[float, float] | None = None,
    levels: Sequence[tuple[str, float]] = (),
    guide: float | None = None,
) -> Panel:
    """Draw lines, later ones in front.

    Args:
        title: above the panel.
        lines: what to draw.
        x_label, y_label: below and beside the panel.
        ticks: the x values that get a label, and the labels.
        kl_top: upper end of a symlog y axis for KL in nats (`top_of`), with a guide at `KL_GUIDE`;
            a linear axis if left out.
        percent: label a linear y axis in percent.
        limits: of a linear y axis, widened where values lie outside.
        levels: named horizontal lines.
        guide: y of a thin line without a name on a linear axis, such as 0.
    """
    names = [line.name for line in lines] + [name for name, _ in levels]
    right = 0.2 + text_width(max(names, key=len, default=""))
    labelled = _with_room(ticks, WIDTH - Panel.left - right)

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        shown = [value for _, value in levels]
        shown += [v for line in lines for v in (*line.y, *line.low, *line.high)]
        shown = [value for value in shown if math.isfinite(value)]
        if kl_top is not None:
            scale_kl(axes, kl_top, "y")
            axes.axhline(KL_GUIDE, color=ORANGE, linewidth=0.9, zorder=1)
        else:
            _linear(axes, shown, limits, percent)
            if guide is not None:
                axes.axhline(guide, color=MUTED, linewidth=0.8, zorder=1)
        axes.grid(axis="y")
        first, last = ticks[0][0], ticks[-1][0]
        room = (last - first) * 0.04 or 0.5
        axes.set_xlim(first - room, last + room)
        axes.set_xticks([x for x, _ in labelled], [text for _, text in labelled])
        for order, line in enumerate(lines, start=2):
            _draw_line(axes, line, order)
        for _, value in levels:
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        _name_lines(axes, lines, levels, last)
        if kl_top is not None:
            axes.annotate(
                f"KL {KL_GUIDE:g}",
                (0, KL_GUIDE),
                xycoords=("axes fraction", "data"),
                xytext=(3, 2.5),
                textcoords="offset points",
                color=ORANGE,
                fontsize=7.5,
                zorder=9,
            )

    return Panel(
        label=f"{title}. {y_label} by {x_label}. {_in_words(lines, levels, ticks)}",
        draw=draw,
        right=right,
    )


def top_of(values: Iterable[float]) -> float:
    """The power of ten that ends a KL axis for these values: at least 1, common to a figure."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    top = 1.0
    while top < largest:
        top *= 10
    return top


def scale_kl(axes: Axes, top: float, axis: str) -> None:
    """Give an axis the KL scale: linear up to `KL_LINEAR`, then logarithmic up to `top`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = [KL_LINEAR * 10**k for k in range(12) if KL_LINEAR * 10**k <= top * 1.01]
    if axis == "x" and len(decades) > 5:
        decades = decades[1:]  # no room for its label beside 0
    target: Axis = axes.yaxis if axis == "y" else axes.xaxis
    set_scale, set_limits = (
        (axes.set_yscale, axes.set_ylim) if axis == "y" else (axes.set_xscale, axes.set_xlim)
    )
    set_scale("symlog", linthresh=KL_LINEAR, linscale=0.5)
    set_limits(0, top)
    target.set_major_locator(FixedLocator([0, *decades]))
    target.set_minor_locator(NullLocator())
    target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0..count-1, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _with_room(ticks: Sequence[tuple[float, str]], width: float) -> list[tuple[float, str]]:
    """The ticks whose labels fit side by side in so many inches; the first and the last always."""
    first, last = ticks[0], ticks[-1]
    inches = width / 1.08 / ((last[0] - first[0]) or 1)

    def fits(one: tuple[float, str], other: tuple[float, str]) -> bool:
        need = (text_width(one[1]) + text_width(other[1])) / 2 + 0.06
        return abs(one[0] - other[0]) * inches >= need

    kept = [first]
    for tick in ticks[1:-1]:
        if fits(kept[-1], tick) and fits(tick, last):
            kept.append(tick)
    return kept if last is first else [*kept, last]


def _linear(
    axes: Axes, shown: Sequence[float], limits: tuple[float, float] | None, percent: bool
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = limits or (min(shown, default=0.0), max(shown, default=1.0))
    low, high = min([low, *shown]), max([high, *shown])
    room = (high - low) * 0.04 or 0.5
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: share(value)))


def _draw_line(axes: Axes, line: Line, order: int) -> None:
    look = line.look
    if line.low:
        axes.fill_between(
            line.x, line.low, line.high, color=look.colour, alpha=0.16, linewidth=0, zorder=1.2
        )
    axes.plot(
        line.x,
        line.y,
        color=look.colour,
        linestyle=look.dashes,
        linewidth=2.1 if look.main else 1.3,
        marker=look.marker,
        markersize=5 if look.main else 4,
        markevery=spread(len(line.x), _MOST_MARKERS),
        markeredgecolor=PAGE,
        markeredgewidth=0.6,
        clip_on=False,
        zorder=order,
    )


def _name_lines(
    axes: Axes, lines: Sequence[Line], levels: Sequence[tuple[str, float]], last: float
) -> None:
    """Write the names right of the axes, at the lines' last points but apart from each other."""
    names: list[tuple[float, str, str, str]] = []
    for line in lines:
        ends = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        if ends:
            weight = "bold" if line.look.main else "normal"
            names.append((_height(axes, last, ends[-1][1]), line.name, line.look.colour, weight))
    names += [(_height(axes, last, y), name, MUTED, "normal") for name, y in levels]
    names.sort(key=lambda name: name[0])
    box = axes.get_window_extent()
    gap = 10.5 / 72 / (box.height / axes.figure.dpi)  # a line of text, as a share of the axes
    heights = _apart([height for height, *_ in names], gap)
    for height, (_, name, colour, weight) in zip(heights, names, strict=True):
        axes.annotate(
            name,
            (1, height),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight=weight,
            annotation_clip=False,
        )


def _height(axes: Axes, x: float, y: float) -> float:
    at = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    return float(min(max(at[1], 0.0), 1.0))


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as it takes to stand `gap` apart."""
    placed: list[list[float]] = []  # groups of touching names: [sum of wishes, count]
    for height in heights:
        placed.append([height, 1])
        while len(placed) > 1 and _bottom(placed[-1], gap) < _top(placed[-2], gap) + gap - 1e-9:
            total, count = placed.pop()
            placed[-1][0] += total
            placed[-1][1] += count
    return [_bottom(group, gap) + i * gap for group in placed for i in range(int(group[1]))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return group[0] / group[1] - gap * (group[1] - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return group[0] / group[1] + gap * (group[1] - 1) / 2


def _in_words(
    lines: Sequence[Line], levels: Sequence[tuple[str, float]], ticks: Sequence[tuple[float, str]]
) -> str:
    texts = dict(ticks)
    parts = []
    for line in lines:
        chosen = [(line.x[i], line.y[i]) for i in spread(len(line.x), 8)]
        values = ", ".join(f"{texts.get(x, f'{x:g}')}: {y:.3g}" for x, y in chosen)
        parts.append(f"{line.name}: {values}.")
    parts += [f"{name}: {value:.3g}." for name, value in levels]
    return " ".join(parts)
