"""What many cells take: planned, run, killed half-way, resumed and reported, on a tiny model.

Memory is that of the process of each command at its peak, as the system counts it: the libraries
are most of it, and what grows with the cells is what to look at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny import make_model_dir

from persona_nnsight import Grid, PersonaError

_CAPTURE = ("capture", "--layers", "all", "--positions", "p_last,g1,g2")
_SUBSTITUTE = ("substitute", "--layers", "1,3", "--positions", "p_last")
#: Given, so that a batch is what it is whatever else the machine does.
_BUDGET = ("--memory-budget", "1GB")


@dataclass(frozen=True)
class Load:
    """One command on one grid.

    Attributes:
        cells: of the grid.
        what: the command, and what became of it.
        seconds: wall time of the process.
        peak_bytes: the most memory that the process held.
        parts: files of finished work that were there when it ended.
    """

    cells: int
    what: str
    seconds: float
    peak_bytes: int
    parts: int


def loads(sizes: Sequence[int]) -> Iterator[Load]:
    """Run the commands on grids of so many cells each.

    Raises:
        PersonaError: a command fails.
    """
    with TemporaryDirectory() as directory:
        place = Path(directory)
        make_model_dir("llama", place / "model")
        for cells in sizes:
            grid = place / f"{cells}.yaml"
            grid.write_text(_grid(cells).to_yaml(), encoding="utf-8")
            for command in (_CAPTURE, _SUBSTITUTE):
                yield from _life(place, cells, (*command, "-m", "model", "-g", grid.name, *_BUDGET))


def _life(place: Path, cells: int, command: Sequence[str]) -> Iterator[Load]:
    """A run from its plan to its report."""
    out = f"{command[0]}-{cells}"
    name = command[0]
    yield _measured(place, cells, f"{name} --dry-run", (*command, "--dry-run"), out)
    # The grid's text says how many cells there are; half of them recorded is half-way.
    yield _measured(place, cells, f"{name}, killed", (*command, "-o", out), out, kill=cells // 2)
    yield _measured(place, cells, "resume", ("resume", out), out)
    yield _measured(place, cells, "report", ("report", out), out)


def _measured(
    place: Path, cells: int, what: str, arguments: Sequence[str], out: str, kill: int | None = None
) -> Load:
    """Run a command in a process of its own; with `kill`, until so many cells are recorded."""
    start = time.perf_counter()
    with open(place / "words", "w+b") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "persona_cli", *arguments],
            cwd=place,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=words,
            stderr=words,
        )
        killed = False
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            if kill is not None and not killed and _recorded(place / out) >= kill:
                process.send_signal(signal.SIGKILL)
                killed = True
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        words.seek(0)
        if process.returncode not in (0, -signal.SIGKILL if killed else 0):
            last = words.read().decode(errors="replace").strip()[-500:]
            raise PersonaError(f"{what} failed with {process.returncode}: {last}")
    return Load(
        cells=cells,
        what=what,
        seconds=time.perf_counter() - start,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        parts=len(list((place / out).glob("parts/*"))),
    )


def _recorded(run: Path) -> int:
    """Cells whose clean runs are on disk."""
    from safetensors import SafetensorError, safe_open

    found = 0
    for part in (run / "parts").glob("*.safetensors"):
        try:
            with safe_open(part, framework="pt") as file:
                events = json.loads((file.metadata() or {})["events"])
        except (OSError, SafetensorError):
            continue  # another name by now
        found += sum(len(each["cells"]) for each in events["recorded"])
    return found


def _grid(cells: int) -> Grid:
    """As many personas as tasks, as nearly as it goes."""
    tasks = next(n for n in range(int(cells**0.5), 0, -1) if cells % n == 0)
    return Grid.from_dict(
        {
            "name": f"load-{cells}",
            "baseline": {"persona": "someone", "task": "give some advice."},
            "personas": {f"p{n}": f"person number {n} of many" for n in range(cells // tasks)},
            "tasks": {f"t{n}": f"write note number {n}." for n in range(tasks)},
        }
    )
