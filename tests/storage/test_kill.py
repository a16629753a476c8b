"""Real processes, killed at random moments with a signal that none can catch, and gone on with."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cells import TINY_GRID
from commands import contents
from forked import start
from tiny import TinyDir


def finish(arguments: Sequence[object], interval: float) -> float:
    """Run a command to its end; returns how long it took."""
    begin = time.perf_counter()
    process = start(arguments, interval)
    process.join()
    assert process.exitcode == 0, Path("words").read_text(encoding="utf-8")
    return time.perf_counter() - begin


def next_command(out: Path, arguments: Sequence[object]) -> Sequence[object]:
    """What a user types next: `persona resume`, or, where nothing was begun yet, the same again."""
    return ("resume", out) if (out / "pending.json").exists() else arguments


def killed_until_done(
    arguments: Sequence[object], out: Path, *, interval: float, takes: float, times: int
) -> int:
    """Kill a run again and again at random moments; returns how often one was at work then."""
    chance = random.Random(20260523)
    kills = 0
    while kills < times and not (out / "run.json").exists():
        process = start(next_command(out, arguments), interval)
        process.join(chance.uniform(0, takes))
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0, Path("words").read_text(encoding="utf-8")
    if not (out / "run.json").exists():
        finish(next_command(out, arguments), interval)
    elif (out / "pending.json").exists():  # killed after the last file
        start(("resume", out), interval).join()
    return kills


@pytest.fixture(autouse=True)
def started_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory, and the server at work: the first process waits for its imports."""
    monkeypatch.chdir(tmp_path)
    finish(("grids",), 0.0)


TINY = {
    "substitute": ("-l", "0-3", "-p", "p_last,g1,g2", "--generate", "3"),
    "capture": ("-l", "all", "-p", "p_last,g1"),
    "inject": ("-l", "1;2;1-3"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of this kind")
@pytest.mark.parametrize("name", TINY)
def test_killed_at_random(name: str, tiny_dir: TinyDir) -> None:
    """Eight kills of each of three commands on a tiny model."""
    Path("grid.yaml").write_text(TINY_GRID.to_yaml(), encoding="utf-8")
    command = (name, "-m", tiny_dir("llama"), "-g", "grid.yaml", *TINY[name], "-o")
    takes = finish((*command, "whole"), 0.0)
    kills = 0
    for run in range(20):
        out = Path(f"run{run}")
        kills += killed_until_done((*command, out), out, interval=0.0, takes=takes, times=8 - kills)
        assert contents(out) == contents(Path("whole"))
        if kills == 8:
            return
    pytest.fail(f"{name} was killed {kills} times in 20 runs")


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals of this kind")
@pytest.mark.usefixtures("smollm2")  # so that it is on this machine
def test_the_embedded_model_killed_at_random() -> None:
    """Four kills of a run that takes seconds."""
    some = ("--personas", "yoda,marx", "--layers", "8,16", "--conditions", "additive,bb")
    command = ("substitute", *some, "-o")
    takes = finish((*command, "whole"), 1.0)
    out = Path("run")
    kills = killed_until_done((*command, out), out, interval=0.2, takes=takes, times=4)
    assert kills
    assert contents(out) == contents(Path("whole"))
