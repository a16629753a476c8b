"""The tables of a reproduction: our numbers beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_nnsight.analysis.columns import COLUMN, records
from persona_nnsight.analysis.geometry_tables import RATIOS
from persona_nnsight.pages.blocks import (
    Cell,
    Table,
    from_column,
    interval_cell,
    number_cell,
    word,
)
from persona_nnsight.pages.figures.table_values import Records, distinct
from persona_nnsight.pages.numbers import FORMATS, Format, count, kl, share

if TYPE_CHECKING:
    import pandas as pd

_NAMES = ("position", "layers", "condition", "persona", "task", "measure")


def beside_published(part: str, table: pd.DataFrame) -> list[Table]:
    """A table of the paper, ours beside theirs: KL or markers, then geometry, then by group.

    Shown are the rows that the paper has a number for; all others are in the part's own sections.
    A difference is given only where the model is the same.

    Args:
        part: ``table1`` to ``table4``.
        table: its csv.
    """
    rows = [row for row in records(table) if not math.isnan(row["published"])] or records(table)
    groups = {
        "": [row for row in rows if not _is_geometry(row) and not _group(row)],
        ", geometry": [row for row in rows if _is_geometry(row)],
        ", by persona": [row for row in rows if _group(row) == "persona"],
        ", by task": [row for row in rows if _group(row) == "task"],
    }
    name = f"Table {part.removeprefix('table')}"
    return [
        _table(f"{name}{about}: {_whose(found)}", found, folded=bool(about))
        for about, found in groups.items()
        if found
    ]


def _is_geometry(row: Mapping[str, Any]) -> bool:
    return row.get("measure") in RATIOS


def _group(row: Mapping[str, Any]) -> str:
    return next((name for name in ("persona", "task") if row.get(name)), "")


def _whose(rows: Records) -> str:
    """Whose the published numbers are, in words."""
    if all(math.isnan(row["published"]) for row in rows):
        return "the paper has no numbers for it."
    models = ", ".join(distinct(rows, "published_model"))
    texts = (
        ""
        if all(row.get("same_stimuli", True) for row in rows)
        else ", over cells with other texts"
    )
    if _is_same_model(rows):
        return f"the published numbers are of the same model, {models}{texts}."
    return (
        f"the published numbers are of another model, {models}{texts}; they stand beside ours for "
        "orientation and are no target."
    )


def _is_same_model(rows: Records) -> bool:
    """Whether the published model is the one that was run: only then do rows have a difference."""
    return any(not math.isnan(row.get("difference", math.nan)) for row in rows)


def _table(caption: str, rows: Records, folded: bool) -> Table:
    same = _is_same_model(rows)
    names = [name for name in _NAMES if any(row.get(name) for row in rows)]
    if {row.get("measure") for row in rows} == {"kl"}:
        names.remove("measure")
    headings = list(names)
    body = [[Cell(_word(name, row[name])) for name in names] for row in rows]
    wordy: set[int] = set()

    def add(heading: str, cells: Sequence[Cell]) -> None:
        headings.append(heading)
        for line, cell in zip(body, cells, strict=True):
            line.append(cell)

    def add_numbers(heading: str, column: str, form: Format | None = None) -> None:
        if any(not math.isnan(row.get(column, math.nan)) for row in rows):
            add(heading, [number_cell(row[column], form or _format(row)) for row in rows])

    def add_interval(heading: str, low: str, high: str) -> None:
        if any(not math.isnan(row.get(low, math.nan)) for row in rows):
            add(heading, [interval_cell(row, (low, high), _format(row)) for row in rows])

    def add_words(heading: str, column: str) -> None:
        if any(row.get(column) for row in rows):
            wordy.add(len(headings))
            add(heading, [Cell(word(row[column])) for row in rows])

    add_numbers("ours", "value")
    add_interval("95 % interval", "lo", "hi")
    add_interval("middle half", "q25", "q75")
    add_numbers("recovered", "recovered", share)
    add_numbers("gap closed", "gap_closed", share)
    add_numbers("cells", "n", count)
    if same:
        add_numbers("published", "published")
    else:
        add_words("other model's layers", "published_layers")
        add_numbers("other model's value", "published")
    add_interval("its middle half", "published_q25", "published_q75")
    add_numbers("ours − published", "difference")
    return Table(
        caption,
        headings,
        body,
        len(names),
        frozenset(from_column(len(names), headings) - wordy),
        folded=folded,
    )


def _word(name: str, value: Any) -> str:
    """A name as it stands in the table, but a measure as its own column is headed."""
    measured = name == "measure" and value in COLUMN and value != "kl"
    return COLUMN[value].heading if measured else word(value)


def _format(row: Mapping[str, Any]) -> Format:
    measure = row.get("measure", "")
    return FORMATS[COLUMN[measure].unit][0] if measure in COLUMN else kl
