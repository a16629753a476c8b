"""One line that shows how far a run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from persona_cli.console import notes


@contextmanager
def progress_bar(
    command: str,
) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A bar with rows done, time left and a few words, on standard error.

    Yields what moves it, and what changes the words. Where there is no terminal, changed words
    are printed below each other instead, for a log.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("rows,"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        # Whatever a narrow terminal has no room for is cut off the words.
        TextColumn(
            "{task.fields[words]}",
            markup=False,
            style="dim",
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=notes,
        transient=True,
        expand=True,
        disable=not notes.is_terminal,  # else an empty line is all that is left of it
    )
    last = ""
    with bar:
        task = bar.add_task(command, total=None, words="")

        def say(words: str) -> None:
            nonlocal last
            if words != last and not notes.is_terminal:
                notes.print(Text(f"{command}: {words}"), soft_wrap=True)
            last = words
            bar.update(task, words=words)

        yield lambda done, total: bar.update(task, completed=done, total=total), say
