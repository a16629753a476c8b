"""The csv tables of a run as tables of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import COLUMN, interval_of, records
from persona_nnsight.analysis.geometry_tables import RATIOS
from persona_nnsight.method.conditions import (
    HOST,
    INJECT_CONDITIONS,
    STEER,
    SUBSTITUTE_CONDITIONS,
)
from persona_nnsight.pages.blocks import (
    Cell,
    Table,
    from_column,
    interval_cell,
    number_cell,
    word,
)
from persona_nnsight.pages.numbers import FORMATS, count, fixed

if TYPE_CHECKING:
    import pandas as pd

#: Tables with more rows are folded.
_LONG = 24

_MEANINGS = {
    **SUBSTITUTE_CONDITIONS,
    **INJECT_CONDITIONS,
    HOST: "nothing: the BY prompt as it is (control)",
    STEER: "h_BB + α Δ_X + β Δ_Y",
}

#: What the measures of markers are called.
MEASURES = {"any": "texts with a marker", "distinct": "distinct markers"}

#: Pairs of columns that are shown as one, beside the intervals of columns.
_QUARTILES = ("q25", "q75")
_DIFFERENCE = ("lo", "hi")

_KL_ORDER = (
    *("host", "position", "layers", "condition", "alpha", "beta"),
    *("median", interval_of("median"), "floor"),
    *("recovered", interval_of("recovered"), "recovered_pooled"),
    *("gap_closed", interval_of("gap_closed"), "gap_closed_pooled", _QUARTILES, "n"),
)
_CONTRAST_ORDER = (
    *("host", "position", "layers", "condition", "alpha", "beta", "control"),
    *("difference", _DIFFERENCE, "verdict", "lower"),
)
_MARKER_ORDER = (
    *("condition", "position", "layers", "alpha", "beta"),
    *("any", interval_of("any"), "distinct", interval_of("distinct"), "n"),
)


def kl_table(summary: pd.DataFrame, drawn: str = "") -> Table:
    """``summary.csv`` of a run with KLs, site by site.

    Args:
        summary: the table.
        drawn: what was drawn for the intervals (`resampling.Resampling.method`), if it is known.
    """
    caption = "KL over cells, in nats, one row per edit."
    if "floor" in summary:
        caption += _by_itself(drawn)
        caption += " Floor: the median KL of clean at the same site, which is rounding."
        names = (("recovered", "bb at the same site"), ("gap_closed", "the unedited host"))
        for name, control in names:
            if name in summary:
                caption += (
                    f" {COLUMN[name].heading.capitalize()}: the median over cells of 1 − KL / KL "
                    f"of {control}, and pooled, 1 − ΣKL / ΣKL; empty where that KL is not clearly "
                    "above the floor."
                )
    elif "recovered" in summary:  # of an older version
        caption += " Recovered: 1 − median KL / median KL of bb at the same site."
    rows = sorted(records(summary), key=_site_order(summary))
    return _table(
        caption,
        rows,
        _present(_KL_ORDER, summary),
    )


def contrast_table(contrasts: pd.DataFrame, drawn: str = "") -> Table:
    """``contrasts.csv``: a condition against its controls, cell by cell; see `kl_table`."""
    rows = records(contrasts)
    return _table(
        "Median over cells of KL(condition) − KL(control), in nats, with its 95 % interval. "
        f"{_at_once(contrasts, drawn)}Below 0: the condition does better than the control. Last "
        "column: in how many of the cells it does.",
        sorted(rows, key=_site_order(contrasts)),
        _present(_CONTRAST_ORDER, contrasts),
    )


def marker_table(summary: pd.DataFrame, drawn: str = "") -> Table:
    """``summary.csv`` of a markers run; see `kl_table`."""
    return _table(
        f"Markers of the persona in the generated texts, one row per edit.{_by_itself(drawn)}",
        records(summary),
        _present(_MARKER_ORDER, summary),
    )


def marker_contrast_table(contrasts: pd.DataFrame, drawn: str = "") -> Table:
    """``contrasts.csv`` of a markers run; see `kl_table`."""
    rows = [
        {**row, "measure": MEASURES.get(row["measure"], row["measure"])}
        for row in records(contrasts)
    ]
    return _table(
        "Mean over cells of condition − control, with its 95 % interval: share of texts with a "
        f"marker, and distinct markers in a text. {_at_once(contrasts, drawn)}".strip(),
        rows,
        _present(
            (
                *("condition", "layers", "control", "measure"),
                *("difference", _DIFFERENCE, "verdict", "n"),
            ),
            contrasts,
        ),
    )


def _by_itself(drawn: str) -> str:
    return f" Each 95 % interval is by itself: {drawn}." if drawn else ""


def _at_once(contrasts: pd.DataFrame, drawn: str) -> str:
    """That the intervals are simultaneous, which those of older versions are not."""
    if "verdict" not in contrasts:
        return ""
    of = f": {drawn}" if drawn else ""
    return f"The intervals of this table hold all at once (max-T){of}. "


def geometry_table(geometry: pd.DataFrame) -> Table:
    """Medians over cells of ``geometry.csv``, site by site."""
    names = {name: COLUMN[name].heading for name in RATIOS if name in geometry}
    grouped = geometry.groupby(["position", "layer"], sort=False)
    medians = grouped[list(names)].median()
    medians["n"] = grouped["cos_xy_sum"].count()
    rows = [
        [
            Cell(str(row["position"])),
            Cell(f"{row['layer']:g}"),
            *(number_cell(row[name], lambda value: fixed(value, 3)) for name in names),
            number_cell(row["n"], count),
        ]
        for row in records(medians.reset_index())
    ]
    headings = ["position", "layer", *names.values(), "cells"]
    return Table(
        "Medians over cells.", headings, rows, 2, from_column(2, headings), folded=len(rows) > _LONG
    )


def meaning_table(conditions: Sequence[str], meanings: Mapping[str, str]) -> Table | None:
    """What each condition writes; None where nothing is known about any of them."""
    meanings = {**_MEANINGS, **meanings}
    rows = [[Cell(name), Cell(meanings[name])] for name in conditions if name in meanings]
    if not rows:
        return None
    return Table("", ["condition", "what is written"], rows, 1, frozenset())


def _present(order: Sequence[Any], table: pd.DataFrame) -> list[Any]:
    """The columns and pairs of `order` that a table has; words that never vary say nothing."""
    chosen = []
    for name in order:
        if isinstance(name, tuple):
            if all(part in table for part in name):
                chosen.append(name)
        elif name in table and not (name == "host" and table[name].nunique() == 1):
            chosen.append(name)
    return chosen


def _table(caption: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Any]) -> Table:
    headings, body = [], [[] for _ in rows]  # type: list[str], list[list[Cell]]
    heads = 0
    for column in columns:
        if isinstance(column, tuple):
            headings.append("middle half" if column == _QUARTILES else "95 % interval")
            number = FORMATS[COLUMN[column[0]].unit][1]
            made = [interval_cell(row, column, number) for row in rows]
        else:
            known = COLUMN[column]
            headings.append(known.heading)
            heads += known.is_key
            if known.type == "text":
                made = [Cell(word(row[column])) for row in rows]
            elif column == "lower":
                made = [Cell(f"{row['lower']:.0f} of {row['n']:.0f}", row["lower"]) for row in rows]
            else:
                made = [number_cell(row[column], FORMATS[known.unit][0]) for row in rows]
        for cells, cell in zip(body, made, strict=True):
            cells.append(cell)
    return Table(
        caption, headings, body, heads, from_column(heads, headings), folded=len(body) > _LONG
    )


def _site_order(table: pd.DataFrame) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """Hosts, positions and layers as the table first names them, edits of a site together."""
    names = [name for name in ("host", "position", "layers") if name in table]
    at = {name: {v: i for i, v in enumerate(dict.fromkeys(table[name]))} for name in names}
    return lambda row: tuple(at[name][row[name]] for name in names)
