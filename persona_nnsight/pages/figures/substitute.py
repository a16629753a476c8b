"""Figures of runs that overwrite a residual of the XY run: KL by layer, by site, by cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import records
from persona_nnsight.pages.figures.canvas import Figure, Panel
from persona_nnsight.pages.figures.heat import columns_beside, heat_panel
from persona_nnsight.pages.figures.lines import (
    ADDITIVE,
    CONTROLS,
    EQUALS,
    Line,
    line_panel,
    spread,
    top_of,
)
from persona_nnsight.pages.figures.rows import Row, row_panel
from persona_nnsight.pages.figures.table_values import (
    KL_LABEL,
    Records,
    distinct,
    layer_axis,
    layer_sets,
    main_condition,
)

if TYPE_CHECKING:
    import pandas as pd


#: Panels of per-cell dots at most: with more sites, a part of the layers is drawn.
_MOST_DOT_PANELS = 12

#: A position looks the same in every panel.
_POSITION = dict(zip(("p_last", "g1", "g2", "p_user_last"), EQUALS, strict=False))

_AXIS = "The axis is linear up to 0.001 and logarithmic above."
_MEANS_LITTLE = "Where additive is not below its controls, a small KL means little."


def kl_by_layer(summary: pd.DataFrame) -> Figure:
    """KL by layer, a panel per position, with the controls behind."""
    rows = records(summary)
    main = main_condition(rows)
    controls = [name for name in CONTROLS if name in distinct(rows, "condition") and name != main]
    behind = (
        f" Behind it the controls: {' and '.join(controls)}. "
        + _MEANS_LITTLE.replace("additive", main)
        if controls
        else " Without controls, a small KL may only mean that hardly any edit matters there."
    )
    top = _drawn_top(rows, main, controls)
    return Figure(
        name="kl-by-layer",
        caption=f"Median KL by layer of the edit. Band: the middle half of the cells under {main}."
        f"{behind} {_AXIS}",
        panels=[
            _by_layer(position, rows, position, main, controls, top)
            for position in distinct(rows, "position")
        ],
    )


def _by_layer(
    title: str, rows: Records, position: str, main: str, controls: Sequence[str], top: float
) -> Panel:
    """One position: the main condition with its band in front of the controls."""
    rows = [row for row in rows if row["position"] == position]
    at, ticks = layer_axis(layer_sets(rows))
    lines = [
        _line(name, [row for row in rows if row["condition"] == name], at, CONTROLS[name], False)
        for name in controls
    ]
    lines.append(_line(main, [row for row in rows if row["condition"] == main], at, ADDITIVE, True))
    return line_panel(title, lines, x_label="layer", y_label=KL_LABEL, ticks=ticks, kl_top=top)


def _drawn_top(rows: Records, main: str, controls: Sequence[str]) -> float:
    """The end of the KL axis that the panels of a figure share."""
    return top_of(
        value
        for row in rows
        for value in (row["median"], row["q75"] if row["condition"] == main else 0.0)
        if row["condition"] in (main, *controls)
    )


def _line(name: str, rows: Records, at: Mapping[str, float], look: Any, band: bool) -> Line:
    rows = sorted(rows, key=lambda row: at[row["layers"]])
    return Line(
        name,
        look,
        x=[at[row["layers"]] for row in rows],
        y=[row["median"] for row in rows],
        low=[row["q25"] for row in rows] if band else (),
        high=[row["q75"] for row in rows] if band else (),
    )


def kl_by_layer_and_position(tables: Mapping[str, pd.DataFrame]) -> list[Figure]:
    """The paper's Figure 1, a panel per table and a line per position; then beside the controls.

    Args:
        tables: summary by the name that goes into the panel's title.
    """
    by_title = {title: records(summary) for title, summary in tables.items()}
    top = max(_drawn_top(rows, "additive", list(CONTROLS)) for rows in by_title.values())
    panels = []
    for title, every in by_title.items():
        additive = [row for row in every if row["condition"] == "additive"]
        at, ticks = layer_axis(layer_sets(additive))
        lines = [
            _line(p, [row for row in additive if row["position"] == p], at, _POSITION[p], True)
            for p in distinct(additive, "position")
            if p in _POSITION
        ]
        panels.append(
            line_panel(title, lines, x_label="layer", y_label=KL_LABEL, ticks=ticks, kl_top=top)
        )
    beside = []
    for title, rows in by_title.items():
        controls = [name for name in CONTROLS if name in distinct(rows, "condition")]
        if controls:
            beside += [
                _by_layer(f"{title}, {position}", rows, position, "additive", controls, top)
                for position in distinct(rows, "position")
            ]
    figures = [
        Figure(
            name="figure1",
            caption="Median KL of the additive vector by layer, a line per position, as in the "
            f"paper's Figure 1. Band: the middle half of the cells. {_AXIS}",
            panels=panels,
        )
    ]
    if beside:
        figures.append(
            Figure(
                name="figure1-controls",
                caption="The same, each position with the controls that the paper does not draw: "
                f"bb (neither persona nor task) and by (the task alone). {_MEANS_LITTLE}",
                panels=beside,
            )
        )
    return figures


def site_maps(summary: pd.DataFrame) -> Figure | None:
    """Layer by position: median KL of the main condition, and what it recovers.

    None where there is a single site.
    """
    every = records(summary)
    main = main_condition(every)
    rows = [row for row in every if row["condition"] == main]
    if len(rows) < 2:
        return None
    layers, positions = layer_sets(rows), distinct(rows, "position")
    shape: dict[str, Any] = {
        "rows": layers,
        "columns": positions,
        "row_label": "layer",
        "column_label": "position",
    }
    kls = {(row["layers"], row["position"]): row["median"] for row in rows}
    panels = [heat_panel(f"Median KL of {main}, nats", kls, **shape)]
    caption = f"Every site at a glance: the median KL of {main}"
    shares = {(r["layers"], r["position"]): r.get("recovered", math.nan) for r in rows}
    if any(math.isfinite(value) for value in shares.values()):
        panels.append(heat_panel("Recovered, %", shares, **shape, percent=True))
        caption += (
            ", and how much of what writing h_BB loses it recovers (below 0: it does worse than "
            "writing neither persona nor task)"
        )
    return Figure(name="sites", caption=f"{caption}.", panels=panels)


def cell_dots(summary: pd.DataFrame, cells: pd.DataFrame) -> Figure:
    """Every cell as a dot, a panel per site, a row per condition."""
    rows, single = records(summary), records(cells)
    main = main_condition(rows)
    sites = _dot_sites(rows)
    every = list(dict.fromkeys((row["position"], row["layers"]) for row in rows))
    top = top_of(row["kl"] for row in single if (row["position"], row["layers"]) in sites)
    panels = []
    for position, layers in sites:
        here = [r for r in rows if (r["position"], r["layers"]) == (position, layers)]
        kls = _by(single, position, layers)
        panels.append(
            row_panel(
                f"{position}, layer {layers}",
                [
                    Row(
                        name=row["condition"],
                        middle=row["median"],
                        low=row.get("median_lo", math.nan),
                        high=row.get("median_hi", math.nan),
                        cells=kls.get(row["condition"], ()),
                        main=row["condition"] == main,
                    )
                    for row in here
                ],
                x_label=KL_LABEL,
                bars=False,
                kl_top=top,
            )
        )
    return Figure(
        name="cells",
        caption="Each dot is a cell. Diamond or circle: the median, written at the right; dark "
        "line: its 95 % interval; vertical line: KL 0.1." + _of(len(sites), len(every), "sites"),
        panels=panels,
    )


def _by(single: Records, position: str, layers: str) -> dict[str, list[float]]:
    kls: dict[str, list[float]] = {}
    for row in single:
        if (row["position"], row["layers"]) == (position, layers) and math.isfinite(row["kl"]):
            kls.setdefault(row["condition"], []).append(row["kl"])
    return kls


def _dot_sites(rows: Records) -> list[tuple[str, str]]:
    """All sites, or evenly spaced layers of every position where there are too many."""
    positions = distinct(rows, "position")
    each = max(1, _MOST_DOT_PANELS // len(positions))
    sites = []
    for position in positions[:_MOST_DOT_PANELS]:
        layers = layer_sets([row for row in rows if row["position"] == position])
        chosen = spread(len(layers), each) if each > 1 else [len(layers) // 2]
        sites += [(position, layers[i]) for i in chosen]
    return sites


def by_persona_and_task(cells: pd.DataFrame) -> list[Figure]:
    """Median KL of the main condition by persona and by task, a panel per position.

    A breakdown by something that there is only one of is left out.
    """
    every = records(cells)
    main = main_condition(every)
    rows = [row for row in every if row["condition"] == main and math.isfinite(row["kl"])]
    figures = []
    for part in ("persona", "task"):
        names = distinct(rows, part)
        if len(names) < 2:
            continue
        every_layer = layer_sets(rows)
        layers = [every_layer[i] for i in spread(len(every_layer), columns_beside(names))]
        medians = {
            position: _medians([row for row in rows if row["position"] == position], part)
            for position in distinct(rows, "position")
        }
        panels = [
            heat_panel(
                position,
                values,
                rows=names,
                columns=layers,
                row_label="",
                column_label="layer",
                largest=max(max(each.values()) for each in medians.values()),
            )
            for position, values in medians.items()
        ]
        figures.append(
            Figure(
                name=f"by-{part}",
                caption=f"Median KL of {main} in nats by {part}."
                + _of(len(layers), len(every_layer), "layers"),
                panels=panels,
            )
        )
    return figures


def _of(shown: int, every: int, what: str) -> str:
    return f" {shown} of {every} {what} are drawn; the run's tables hold all." * (shown < every)


def _medians(rows: Records, part: str) -> dict[tuple[str, str], float]:
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row[part], row["layers"]), []).append(row["kl"])
    return {key: median(values) for key, values in groups.items()}
