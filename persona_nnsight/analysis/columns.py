"""Columns that every table has, and tables by row and by edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

CELL = ["persona", "task"]
SITE = ["host", "position", "layers"]
FACTORS = ["alpha", "beta"]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain mappings."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def wide_by_edit(table: pd.DataFrame, *values: str) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """The edits of a table, and for each of `values` a table of cells down and edits across.

    Cells and edits keep the order in which the table first names them.
    """
    edit = [name for name in ("condition", *SITE, *FACTORS) if name in table]
    edits = table[edit].drop_duplicates(ignore_index=True)
    across = table.groupby(edit, sort=False, dropna=False).ngroup()
    down = table.groupby(CELL, sort=False).ngroup()
    return edits, [
        table[value].astype(float).set_axis([down, across]).unstack() for value in values
    ]


#: Columns of words, in every table; all other columns hold numbers or truth values.
TEXT_COLUMNS = (
    *("persona", "task", "condition", "control", "host", "position", "layers", "measure", "hits"),
    *("published_model", "published_dtype", "published_layers"),
)


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of a run directory with the types it was written with.

    pandas alone reads ``layers`` as numbers where every edit has one layer, and a persona whose
    key is ``NA`` as missing.
    """
    with open(path, encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split(",")
    text = [name for name in columns if name in TEXT_COLUMNS]
    return pd.read_csv(
        path,
        dtype=dict.fromkeys(text, "str"),
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in TEXT_COLUMNS},
    )
