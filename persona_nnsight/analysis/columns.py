"""The columns of all tables, each said once: name, type, heading, meaning.

From here the tables are typed when they are read, the report takes its headings and formats, and
the documentation of run directories its list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

#: What the numbers of a column are: it decides how they are written for a person.
Unit = Literal["nats", "share", "count", "mean", "factor", "layer", ""]


@dataclass(frozen=True)
class Column:
    """A column of one or more tables.

    Attributes:
        name: as in the first line of the file.
        type: ``text``, ``float``, ``integer`` or ``bool``; what it is in a summary after a comma.
        meaning: a phrase, Markdown.
        heading: over the column on a page; empty where no page shows it.
        unit: of its numbers.
        has_interval: whether a summary has its ends beside it, ``…_lo`` and ``…_hi``.
        is_name: whether it holds names of ours or keys of a grid, and no free text.
        is_key: whether it says what a row is about; rows that agree in all of these are one.
    """

    name: str
    type: str
    meaning: str
    heading: str = ""
    unit: Unit = ""
    has_interval: bool = False
    is_name: bool = False
    is_key: bool = False

    @property
    def names(self) -> Iterator[str]:
        """Its own name, and those of the ends of its interval."""
        yield self.name
        if self.has_interval:
            yield from interval_of(self.name)


def interval_of(name: str) -> tuple[str, str]:
    """The columns that hold the ends of a column's interval."""
    return f"{name}_lo", f"{name}_hi"


def _key(name: str, meaning: str, heading: str = "") -> Column:
    """A column of names that says what a row is about."""
    return Column(name, "text", meaning, heading or name, is_name=True, is_key=True)


COLUMNS = (
    _key("persona", "the cell's persona, a key of the grid"),
    _key("task", "the cell's task, a key of the grid"),
    _key("condition", "the vector that was written"),
    _key("control", "the condition that it is set against"),
    _key("host", "the prompt that was run: `XY` or `BY`"),
    _key("position", "`p_last`, `g1`, …"),
    _key("layers", "the layers written together: `14`, `10+12+14`, or `none` for an unedited run"),
    Column("layer", "integer", "the layer of a geometry row", "layer", "layer", is_key=True),
    Column("alpha", "float", "factor of Δ_X; steer only", "α", "factor", is_key=True),
    Column("beta", "float", "factor of Δ_Y; steer only", "β", "factor", is_key=True),
    _key("measure", "what is counted or compared, such as `any` or `distinct`"),
    Column(
        "kl", "float", "nats, summed over `n_tokens`; empty where the window is empty", "KL", "nats"
    ),
    Column("n_tokens", "integer", "tokens in the window", unit="count"),
    Column("median", "float", "median KL over cells", "median KL", "nats", has_interval=True),
    Column("q25", "float", "the lower quartile over cells", unit="nats"),
    Column("q75", "float", "the upper quartile over cells", unit="nats"),
    Column("min", "float", "the smallest over cells", unit="nats"),
    Column("max", "float", "the largest over cells", unit="nats"),
    Column("n", "integer", "cells that have a window", "cells", "count"),
    Column(
        "floor",
        "float",
        "the median KL of `clean` at the same site: what rounding alone makes",
        "floor",
        "nats",
    ),
    Column(
        "recovered",
        "float",
        "median over cells of 1 - KL / KL of `bb` at the same site, for the host `XY`; empty "
        "without `bb`, or where its KL is not clearly above the floor",
        "recovered",
        "share",
        has_interval=True,
    ),
    Column(
        "recovered_pooled",
        "float",
        "1 - ΣKL / ΣKL of `bb` over the same cells",
        "recovered, pooled",
        "share",
    ),
    Column(
        "gap_closed",
        "float",
        "median over cells of 1 - KL / KL of the unedited host, for the host `BY`; in `kl.csv` "
        "that of the cell",
        "gap closed",
        "share",
        has_interval=True,
    ),
    Column(
        "gap_closed_pooled",
        "float",
        "1 - ΣKL / ΣKL of the host over the same cells",
        "gap closed, pooled",
        "share",
    ),
    Column(
        *("difference", "float", "median paired difference in nats; of markers the mean"),
        *("difference", "nats"),
    ),
    Column(
        "lo",
        "float",
        "the lower end of its 95 % interval; those of `contrasts.csv` hold all at once",
        unit="nats",
    ),
    Column("hi", "float", "the upper end", unit="nats"),
    Column(
        "margin",
        "float",
        "differences up to this make no matter: `--margin` times the median KL of `bb`, or of the "
        "host, at the same site",
        unit="nats",
    ),
    Column(
        "verdict",
        "text",
        "what the interval decides: `lower`, `higher`, `equivalent` (within ± `margin`) or "
        "`undecided`; empty without an interval",
        "verdict",
        is_name=True,
    ),
    Column("lower", "integer", "cells whose KL is below the control's", "lower in", "count"),
    Column(
        *("any", "bool, integer", "whether a marker occurs; in how many texts"),
        *("cells with a marker", "count"),
        has_interval=True,
    ),
    Column(
        *("distinct", "integer, float", "how many distinct markers; their mean over texts"),
        *("distinct markers, mean", "mean"),
        has_interval=True,
    ),
    Column("hits", "text", "which markers occur"),
    Column(
        *("cos_xy_sum", "float", "cos(Δ_XY, Δ_X + Δ_Y)", "cos(Δ_XY, Δ_X + Δ_Y)", ""),
        has_interval=True,
    ),
    Column(
        *("cos_xy_y", "float", "control: cos(Δ_XY, Δ_Y), without the persona"),
        "cos(Δ_XY, Δ_Y)",
        has_interval=True,
    ),
    Column(
        *("cos_xy_x", "float", "control: cos(Δ_XY, Δ_X), without the task"),
        "cos(Δ_XY, Δ_X)",
        has_interval=True,
    ),
    Column(
        *("cos_xy_other", "float", "control: cos(Δ_XY, Δ_X′ + Δ_Y), with another persona's Δ_X′"),
        "cos(Δ_XY, Δ_X′ + Δ_Y)",
        has_interval=True,
    ),
    Column("cos_x_y", "float", "cos(Δ_X, Δ_Y)", "cos(Δ_X, Δ_Y)", has_interval=True),
    Column("inter_over_xy", "float", "‖Inter‖ / ‖Δ_XY‖", "‖Inter‖ / ‖Δ_XY‖", has_interval=True),
    Column(
        *("rest_y", "float", "control: ‖Δ_XY − Δ_Y‖ / ‖Δ_XY‖, what Δ_Y alone leaves"),
        "‖Δ_XY − Δ_Y‖ / ‖Δ_XY‖",
        has_interval=True,
    ),
    Column(
        *("rest_x", "float", "control: ‖Δ_XY − Δ_X‖ / ‖Δ_XY‖, what Δ_X alone leaves"),
        "‖Δ_XY − Δ_X‖ / ‖Δ_XY‖",
        has_interval=True,
    ),
    Column(
        *("rest_other", "float", "control: ‖Δ_XY − Δ_X′ − Δ_Y‖ / ‖Δ_XY‖"),
        "‖Δ_XY − Δ_X′ − Δ_Y‖ / ‖Δ_XY‖",
        has_interval=True,
    ),
    Column(
        *("inter_over_xy_normed", "float", "`inter_over_xy` after the layer's input norm"),
        "‖Inter‖ / ‖Δ_XY‖ after the norm",
        has_interval=True,
    ),
    Column("norm_dx", "float", "the length of Δ_X"),
    Column("norm_dy", "float", "the length of Δ_Y"),
    Column("norm_dxy", "float", "the length of Δ_XY"),
    Column("norm_inter", "float", "the length of Inter"),
    Column("value", "float", "ours, in a table of the paper"),
    Column("published_model", "text", "the model of the published number"),
    Column("published_dtype", "text", "the dtype of its weights"),
    Column("published_layers", "text", "as deep in that model"),
    Column("published", "float", "the published number"),
    Column("published_q25", "float", "its lower quartile over cells"),
    Column("published_q75", "float", "its upper quartile over cells"),
    Column("same_stimuli", "bool", "whether the cells have the texts of the paper's"),
)

#: Columns by name, the ends of intervals under those of the column that they belong to.
COLUMN = {name: column for column in COLUMNS for name in column.names}

#: The share of the control's KL that makes no matter, where no other is asked for.
MARGIN = 0.1

CELL = ["persona", "task"]
SITE = ["host", "position", "layers"]
FACTORS = ["alpha", "beta"]


@dataclass(frozen=True)
class TableFile:
    """A table of a run directory.

    Attributes:
        columns: those it must have; every other is optional.
        needed: whether a whole run always has it, with rows.
    """

    columns: tuple[str, ...]
    needed: bool = False


_MARKERS = TableFile((*CELL, "condition", "layers", "any", "distinct", "hits"))
_GEOMETRY = TableFile((*CELL, "position", "layer", "cos_xy_sum", "cos_x_y", "inter_over_xy"))

#: The tables of runs that have KLs.
KL_FILES = {
    "kl": TableFile((*CELL, "condition", "position", "layers", "kl", "n_tokens"), needed=True),
    "summary": TableFile(
        ("condition", "position", "layers", "median", "q25", "q75", "min", "max", "n"), needed=True
    ),
    "contrasts": TableFile(
        (
            *("position", "layers", "condition", "control"),
            *("n", "difference", "lo", "hi", "lower"),
        )
    ),
    "markers": _MARKERS,
    "geometry": _GEOMETRY,
}
#: The tables of runs that have texts alone.
MARKER_FILES = {
    "summary": TableFile(("condition", "layers", "any", "distinct", "n"), needed=True),
    "contrasts": TableFile(
        ("condition", "layers", "control", "measure", "n", "difference", "lo", "hi")
    ),
    "markers": _MARKERS,
    "geometry": _GEOMETRY,
}
#: The tables of runs that only record.
GEOMETRY_FILES = {"geometry": TableFile(_GEOMETRY.columns, needed=True)}


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as plain mappings."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def cells_of(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The cells of a table, each once, in the order in which it first names them."""
    return list(table[CELL].drop_duplicates().itertuples(index=False, name=None))


def wide_by_edit(table: pd.DataFrame, *values: str) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """The edits of a table, and for each of `values` a table of cells down and edits across.

    Cells and edits keep the order in which the table first names them (`cells_of`).
    """
    edit = [name for name in ("condition", *SITE, *FACTORS) if name in table]
    edits = table[edit].drop_duplicates(ignore_index=True)
    across = table.groupby(edit, sort=False, dropna=False).ngroup()
    down = table.groupby(CELL, sort=False).ngroup()
    return edits, [
        table[value].astype(float).set_axis([down, across]).unstack() for value in values
    ]


def is_text(name: str) -> bool:
    """Whether a column holds words; all others hold numbers or truth values."""
    return name in COLUMN and COLUMN[name].type == "text"


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table of a run directory with the types it was written with.

    pandas alone reads ``layers`` as numbers where every edit has one layer, and a persona whose
    key is ``NA`` as missing.
    """
    import pandas as pd

    with open(path, encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split(",")
    text = [name for name in columns if is_text(name)]
    return pd.read_csv(
        path,
        dtype=dict.fromkeys(text, "str"),
        keep_default_na=False,
        na_values={name: [""] for name in columns if not is_text(name)},
    )
