"""The two consoles: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

#: Width of tables that are not printed to a terminal.
_WIDTH = 120

#: Progress, notes and errors.
notes = Console(stderr=True, highlight=False)


def note_step(step: str) -> None:
    """Say that something slow begins."""
    notes.print(f"{step} …", style="dim", markup=False, soft_wrap=True)


@contextmanager
def spinner(text: str) -> Iterator[Callable[[], None]]:
    """Show that something is going on, on a terminal; yields a function that ends it early."""
    if not notes.is_terminal:
        yield lambda: None
        return
    with notes.status(text) as status:
        yield status.stop


def titled(title: str, table: Table) -> RenderableType:
    """A table below its title, which may be wider than the table."""
    return Group(Text(title, style="italic"), table)


def output() -> Console:
    """Standard output, for results; wide enough for a table when it is a pipe or a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
