"""From panels to SVG and PNG, with colours that the page can exchange for its own.

A panel is drawn into axes of a fixed size in inches, so that it looks the same alone (in the page,
where a phone stacks the panels) and beside the others (in the files of the figure). Only the
colours named here are used: the files show them as they are, on white, and the SVG in the page
names a CSS variable in the place of each.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK = "#1b1b1b"
MUTED = "#5f5f5f"
RULE = "#dcdcda"
PAGE = "#ffffff"
BLUE = "#005ea8"
ORANGE = "#ab4700"
GREEN = "#006b4f"
PURPLE = "#8b3a75"

#: Drawn colour: the page's variable for it, whose value depends on the reader's colour scheme.
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAGE: "var(--page)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
}

#: Width of every panel in inches: one column of a phone, a third of a wide page.
WIDTH = 3.6
_PER_ROW = 3
_PNG_DPI = 200  # twice the 100 pixels per inch of an ordinary figure

_STYLE = {
    "figure.facecolor": PAGE,
    "axes.facecolor": PAGE,
    "savefig.facecolor": PAGE,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    # Words stay words: the page's own font, small files, text that can be found and read aloud.
    "svg.fonttype": "none",
    "text.parse_math": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: what the panel shows, in words and numbers, for those who do not see it.
        draw: draws into the axes it is given.
        height: of the whole panel, in inches; its width is `WIDTH`.
        left, right, top, bottom: inches around the axes, for labels.
    """

    label: str
    draw: Callable[[Axes], None]
    height: float = 2.6
    left: float = 0.62
    right: float = 0.2
    top: float = 0.34
    bottom: float = 0.46


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, with the caption below them.

    Attributes:
        name: of its files; unique within a run.
    """

    name: str
    caption: str
    panels: Sequence[Panel]


def text_width(text: str) -> float:
    """About how many inches a text takes at the figures' font size."""
    return 0.075 * len(text)


def inline_svg(panel: Panel, unique: str) -> str:
    """One panel as an SVG element for the page.

    Args:
        panel: what to draw.
        unique: letters, digits and dashes that no other SVG of the page has; ids start with it.
    """
    with _style(unique):
        return page_svg(_svg(_canvas([panel], 1)), unique)


def save(figure: Figure, directory: Path, stem: str) -> None:
    """Write ``stem.svg`` and ``stem.png`` with all panels into `directory`."""
    with _style(stem):
        canvas = _canvas(figure.panels, _PER_ROW)
        (directory / f"{stem}.svg").write_text(_svg(canvas), encoding="utf-8", newline="\n")
        canvas.savefig(
            directory / f"{stem}.png", format="png", dpi=_PNG_DPI, metadata={"Software": None}
        )


def page_svg(svg: str, unique: str) -> str:
    """Make a written SVG fit to stand in a page among others.

    Its colours become variables, ids that something refers to start with `unique` and the others
    go, and so do the XML head, the metadata and the style sheet, which would apply to the page.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{unique}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{unique}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # The size is the page's business; the view box keeps the proportions.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height|version|xmlns(?::\w+)?)="[^"]*"', "", head)
    return re.sub(r"\n\s*", "\n", f"{head}>{rest}")


def _svg(canvas: Canvas) -> str:
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def _style(salt: str) -> AbstractContextManager[None]:
    """The style while something is drawn, whatever the reader's own settings; ids from `salt`."""
    from matplotlib import style

    return style.context(["default", {**_STYLE, "svg.hashsalt": salt}])


def _canvas(panels: Sequence[Panel], per_row: int) -> Canvas:
    """All panels in rows, each row as high as its highest panel."""
    from matplotlib.figure import Figure as Canvas

    rows = [panels[i : i + per_row] for i in range(0, len(panels), per_row)]
    heights = [max(panel.height for panel in row) for row in rows]
    width, height = WIDTH * max(map(len, rows)), sum(heights)
    canvas = Canvas(figsize=(width, height))
    above = 0.0
    for row, row_height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            axes = canvas.add_axes(
                (
                    (column * WIDTH + panel.left) / width,
                    1 - (above + panel.height - panel.bottom) / height,
                    (WIDTH - panel.left - panel.right) / width,
                    (panel.height - panel.top - panel.bottom) / height,
                )
            )
            panel.draw(axes)
        above += row_height
    return canvas
