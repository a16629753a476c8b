"""Commands back to back in one process, for as long as asked: what is not given back shows."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from persona_cli.app import main
from tiny import make_model_dir

from persona_nnsight import Grid, PersonaError
from persona_nnsight.engine.run import run
from persona_nnsight.plan.events import Event

_SITES = ("--layers", "1,3", "--memory-budget", "1GB")
_ROUND: dict[str, tuple[str, ...]] = {
    "capture": _SITES,
    "substitute": (*_SITES, "--generate", "4"),
    "inject": _SITES,
    "markers": ("--layers", "3", "--tokens", "8", "--memory-budget", "1GB"),
    "steer": (*_SITES, "--alpha", "0,1"),
}


@dataclass(frozen=True)
class Round:
    """What the process holds after a round of all commands.

    Attributes:
        number: of rounds that are done.
        seconds: since the first began.
        bytes: resident memory.
        files: open ones, sockets and pipes too.
        threads, children: of the process.
        left: files that are left in the directory for temporary ones.
    """

    number: int
    seconds: float
    bytes: int
    files: int
    threads: int
    children: int
    left: int


def soak(minutes: float) -> Iterator[Round]:
    """Do rounds until the time is over; each command is also interrupted once and resumed.

    Raises:
        PersonaError: a command fails.
    """
    before, temporary = Path.cwd(), tempfile.tempdir
    start, process = time.perf_counter(), psutil.Process()
    with tempfile.TemporaryDirectory() as directory:
        place, own = Path(directory, "place"), Path(directory, "temporary")
        place.mkdir()
        own.mkdir()
        os.chdir(place)
        tempfile.tempdir = str(own)
        try:
            make_model_dir("llama", Path("model"))
            grid = Grid.load("long").select(["engineer", "chef"], ["arch", "haiku"])
            Path("grid.yaml").write_text(grid.to_yaml(), encoding="utf-8")
            number = 0
            while time.perf_counter() - start < 60 * minutes:
                _round()
                number += 1
                yield Round(
                    number=number,
                    seconds=time.perf_counter() - start,
                    bytes=process.memory_info().rss,
                    files=process.num_fds(),
                    threads=process.num_threads(),
                    children=len(process.children(recursive=True)),
                    left=len(list(own.iterdir())),
                )
        finally:
            os.chdir(before)
            tempfile.tempdir = temporary


def _round() -> None:
    for name, options in _ROUND.items():
        command = (name, "-m", "model", "-g", "grid.yaml", *options, "-o", "out")
        with patch("persona_nnsight.experiments.execution.run", _stopped):
            _persona(command, 130)
        _persona(("resume", "out"), 0)
        _persona(("report", "out"), 0)
        _persona(command, 2)  # refused: there is a run
        shutil.rmtree("out")


def _stopped(*arguments: Any) -> Iterator[Event]:
    """The engine, interrupted after some events."""
    for number, event in enumerate(run(*arguments)):
        yield event
        if number == 1 or not arguments[2].edits:
            raise KeyboardInterrupt


def _persona(arguments: Sequence[str], expected: int) -> None:
    with (
        open("words", "w", encoding="utf-8") as words,
        redirect_stdout(words),
        redirect_stderr(words),
    ):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    if code != expected:
        last = Path("words").read_text(encoding="utf-8").strip()[-500:]
        print(last, file=sys.stderr)
        raise PersonaError(f"{arguments[0]} ended with {code} and not {expected}: {last}")
