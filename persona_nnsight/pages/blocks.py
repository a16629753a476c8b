"""What a page is made of; the template turns each kind of block into HTML.

Texts are plain: the template escapes them. Only `Markup` goes into the page as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from persona_nnsight.pages.figures.canvas import Figure
from persona_nnsight.pages.numbers import MISSING, Format


@dataclass(frozen=True)
class Cell:
    """One cell of a table; a number carries its exact value along."""

    text: str
    value: float | None = None

    @property
    def exact(self) -> str:
        """The value as the csv has it; empty for words and missing numbers."""
        return "" if self.value is None or math.isnan(self.value) else repr(float(self.value))


def word(value: object) -> str:
    """A name, or a dash for an empty one."""
    return str(value) or MISSING


def number_cell(value: float, form: Format) -> Cell:
    """A cell with a number."""
    return Cell(form(value), value)


def interval_cell(row: Mapping[str, Any], ends: tuple[str, str], form: Format) -> Cell:
    """A cell with the interval between two columns of a row; a dash where there is none."""
    low, high = (row[name] for name in ends)
    if math.isnan(low) or math.isnan(high):
        return Cell(MISSING)
    return Cell(f"{form(low)} to {form(high)}")


@dataclass(frozen=True)
class Table:
    """A table whose first `heads` columns name the row.

    Attributes:
        numbers: indices of the columns that hold numbers.
        folded: shown as one line to open.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    heads: int
    numbers: frozenset[int]
    folded: bool = False
    kind: str = field(default="table", init=False)


def from_column(first: int, headings: Sequence[str]) -> frozenset[int]:
    """The indices of the columns from `first` on."""
    return frozenset(range(first, len(headings)))


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its panels as inline SVG with what they say in words."""

    figure: Figure
    stem: str
    panels: Sequence[tuple[Markup, str]]
    kind: str = field(default="picture", init=False)


@dataclass(frozen=True)
class Passage:
    """One generated text with its markers highlighted."""

    edit: str
    text: Markup
    note: str


@dataclass(frozen=True)
class Passages:
    """The texts of one cell, beside each other."""

    task: str
    task_text: str
    texts: Sequence[Passage]


@dataclass(frozen=True)
class Generations:
    """The texts of one persona, cell by cell."""

    persona: str
    persona_text: str
    markers: Sequence[str]
    cells: Sequence[Passages]
    kind: str = field(default="generations", init=False)


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]
    kind: str = field(default="facts", init=False)


Block = Table | Figure | Picture | Generations | Facts


@dataclass(frozen=True)
class Section:
    """A heading with blocks below it; a `Figure` among them is drawn when it is placed."""

    id: str
    title: str
    blocks: Sequence[Block]
    intro: str = ""
    folded: bool = False


@dataclass(frozen=True)
class RunPage:
    """One run on the page, or one part of a reproduction."""

    id: str
    title: str
    subtitle: str
    interrupted: str
    findings: Sequence[str]
    sections: Sequence[Section]
    parts: Sequence[RunPage] = ()
