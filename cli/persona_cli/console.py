"""The two consoles: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys

from rich.console import Console

#: Width of tables that are not printed to a terminal.
_WIDTH = 120

#: Progress, notes and errors.
notes = Console(stderr=True, highlight=False)


def note_step(step: str) -> None:
    """Say that something slow begins."""
    notes.print(f"{step} …", style="dim", markup=False, soft_wrap=True)


def output() -> Console:
    """Standard output, for results; wide enough for a table when it is a pipe or a file."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
