"""Draw KL by layer from the run directory of a ``persona substitute``.

    python docs/figure.py outputs/substitute-smollm2-135m-short-1

writes ``kl_by_layer.svg`` next to this file: one panel per position, the additive vector with its
quartiles, and two controls behind it. The run needs the conditions ``additive``, ``bb`` and ``by``.
The plotted numbers stand in the file's description, as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

GUIDE = "#b8470b"
#: Condition: label, colour, line style, marker.
LINES = {
    "bb": ("bb: neither", "#757575", "--", "s"),
    "by": ("by: task only", "#404040", ":", "^"),
    "additive": ("additive", "#0060a8", "-", "o"),
}
PANELS = {
    "p_user_last": "end of the user turn",
    "p_last": "last prompt token",
    "g1": "first generated token",
    "g2": "second generated token",
}
TICKS = (0, 0.001, 0.01, 0.1, 1, 10)

STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "axes.titlesize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "kl_by_layer",
}


def quartiles(table: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles of KL over cells, by condition, position and layer."""
    table = table.assign(layer=table["layers"].astype(int))
    grouped = table.groupby(["condition", "position", "layer"], sort=True)["kl"]
    return pd.DataFrame({share: grouped.quantile(share) for share in (0.25, 0.5, 0.75)})


def draw_panel(axes: Axes, title: str, kl: dict[str, pd.DataFrame]) -> None:
    """Draw one position; `kl` holds a table of quartiles by layer for every condition."""
    axes.axhline(0.1, color=GUIDE, linewidth=1, zorder=1)
    for condition, (_, colour, style, marker) in LINES.items():
        band = kl[condition]
        if condition == "additive":
            axes.fill_between(band.index, band[0.25], band[0.75], color=colour, alpha=0.2, lw=0)
        axes.plot(
            band.index,
            band[0.5],
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=7 if condition == "additive" else 5,
            linewidth=2.6 if condition == "additive" else 1.7,
            zorder=3 if condition == "additive" else 2,
        )
    axes.set_title(title, loc="left", pad=8, linespacing=1.3)
    axes.set_xlabel("layer")
    axes.set_xticks(list(kl["additive"].index))
    axes.set_yscale("symlog", linthresh=0.001, linscale=0.5)
    axes.set_ylim(0, 10)
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def label_lines(axes: Axes, kl: dict[str, pd.DataFrame]) -> None:
    """Name the lines at their last point, apart from each other, and the guide."""
    heights = {name: float(kl[name][0.5].iloc[-1]) for name in LINES}
    low, high = sorted(("additive", "by"), key=lambda name: heights[name])
    heights[high] = max(heights[high], heights[low] * 1.35)
    heights[low] = min(heights[low], heights[high] / 2.1)
    last = kl["additive"].index[-1]
    for name, height in heights.items():
        label, colour, *_ = LINES[name]
        weight = "bold" if name == "additive" else "normal"
        axes.annotate(
            label,
            (last, height),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight=weight,
            annotation_clip=False,
        )
    axes.annotate(
        "KL 0.1",
        (kl["additive"].index[0], 0.1),
        xytext=(-4, 4),
        textcoords="offset points",
        color=GUIDE,
        fontsize=11,
    )


def draw(run: Path, into: Path) -> Path:
    """Draw the run directory `run` and return the file written to the directory `into`."""
    cells = pd.read_csv(run / "kl.csv")
    window = cells["n_tokens"].max()
    table = quartiles(cells)
    positions = [name for name in PANELS if name in table.index.get_level_values("position")]
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            ncols=len(positions),
            figsize=(2.75 * len(positions) + 1.3, 4.1),
            sharey=True,
            squeeze=False,
        )
        for axes, position in zip(panels[0], positions, strict=True):
            kl = {name: pd.DataFrame(table.xs((name, position))) for name in LINES}
            draw_panel(axes, f"{position}\n{PANELS[position]}", kl)
        label_lines(panels[0][-1], kl)
        panels[0][0].set_ylabel(f"KL over {window} tokens, nats")
        figure.tight_layout(w_pad=1.6)
        written = into / "kl_by_layer.svg"
        numbers = table.loc[list(LINES)].round(4).to_csv(float_format="%.4f", lineterminator="; ")
        figure.savefig(
            written, metadata={"Date": None, "Description": numbers}, bbox_inches="tight"
        )
        plt.close(figure)
    return written


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory of a persona substitute")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="output directory")
    arguments = parser.parse_args()
    print(draw(arguments.run, arguments.into))


if __name__ == "__main__":
    main()
