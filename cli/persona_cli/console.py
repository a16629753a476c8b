"""The two consoles: results on standard output, everything else on standard error.

Nothing else prints. What is printed may have been written by others (a server, a run directory, a
checkpoint, a grid), so control sequences and markup in it mean nothing here, and a stream that
breaks off, fills up or has too few letters stops no command.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from persona_nnsight.errors import escaped

#: Width of tables that are not printed to a terminal.
_WIDTH = 120


class _Plain(Console):
    """A console on which text is text: markup and control characters are shown, not obeyed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Rich's own control codes are segments of another kind.
            if segment.control:
                yield segment
            else:
                yield Segment(escaped(segment.text), segment.style)


#: Progress, notes and errors.
notes: Console = _Plain(stderr=True)


def output() -> Console:
    """Standard output, for results; wide enough for a table when it is a pipe or a file."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return _Plain(width=None if terminal else _WIDTH)


def plain(text: object) -> Text:
    """Words of a user or of others, for a table: [brackets] and :colons: mean nothing in them."""
    return Text(escaped(str(text)))


def say(text: object, end: str = "\n") -> None:
    """A line of results, as it is and not wrapped."""
    print(escaped(str(text)), end=end)


def says_all() -> bool:
    """Whether standard output is in an encoding that has every letter, and is read back so."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")


def show_json(data: Any) -> None:
    """Results for a program, in ASCII, which every stream can carry."""
    print(json.dumps(data, indent=1))


def complain(text: object) -> None:
    """What is wrong, as one line on standard error."""
    print(f"persona: {escaped(str(text), keep='')}", file=sys.stderr)


def note(text: object) -> None:
    """A note on standard error, not wrapped."""
    notes.print(plain(text), soft_wrap=True)


def note_step(step: str) -> None:
    """Say that something slow begins."""
    notes.print(plain(f"{step} …"), style="dim", soft_wrap=True)


@contextmanager
def spinner(text: str) -> Iterator[Callable[[], None]]:
    """Show that something is going on, on a terminal; yields a function that ends it early."""
    if not notes.is_terminal:
        yield lambda: None
        return
    with notes.status(plain(text)) as status:
        yield status.stop


def titled(title: str, table: Table) -> RenderableType:
    """A table below its title, which may be wider than the table."""
    heading = plain(title)
    heading.stylize("italic")
    return Group(heading, table)


# -- streams that fail ---------------------------------------------------------------------------

#: What stands for a letter that a stream has not; for all others their number does.
_STAND_INS = {
    **{"…": "...", "‖": "|", "✓": "+", "✗": "x", "·": ".", "×": "x", "→": "->", "≤": "<="},
    **{"–": "-", "—": "-", "−": "-", "“": '"', "”": '"', "‘": "'", "’": "'"},
    **{"′": "'"},
    **{"Δ": "Delta", "α": "alpha", "β": "beta"},
    **dict.fromkeys("─━╌╴╶", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
}


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    words = (
        _STAND_INS.get(letter) or letter.encode("ascii", "backslashreplace").decode()
        for letter in letters
    )
    return "".join(words), error.end


codecs.register_error("persona", _stand_in)


class _Lasting:
    """A stream that takes everything; what cannot be written any more is dropped.

    Attributes:
        lost: why, where that is so.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        if self.lost is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.lost is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        # What is left in the buffer would fail again when Python ends.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_streams() -> Iterator[Callable[[], OSError | None]]:
    """Standard output and error that stop no command, whatever becomes of them.

    Yields what writes out all of standard output and returns why some of it is lost; None where
    nothing is, or where the reader wanted no more.
    """
    _occupy()
    out, err = sys.stdout, sys.stderr
    lasting = _Lasting(out), _Lasting(err)
    before = [(stream, stream.errors) for stream in (out, err) if hasattr(stream, "reconfigure")]

    def lost() -> OSError | None:
        lasting[0].flush()
        reason = lasting[0].lost
        quiet = reason is None or reason.errno in (errno.EPIPE, errno.EINVAL)
        return None if quiet else reason

    try:
        for stream, _ in before:
            stream.reconfigure(errors="persona")
        sys.stdout, sys.stderr = lasting
        yield lost
    finally:
        for each in lasting:
            each.flush()
        sys.stdout, sys.stderr = out, err
        for stream, errors in before:
            stream.reconfigure(errors=errors)


def _occupy() -> None:
    """Give streams that were closed a place to go: the next file opened would take theirs."""
    for number, name in ((0, None), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if name is not None and getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
