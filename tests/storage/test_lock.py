"""One process at a time, also where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import WHERE, Persona, assert_one_sentence, contents
from tiny import TinyDir

from persona_nnsight import PersonaError
from persona_nnsight.storage.lock import hold
from persona_nnsight.storage.run_directory import check_free

CODES = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def without(code: int = errno.ENOSYS) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    return without


def another(path: Path, **changes: Any) -> Path:
    """The file of a process at work, in a process that has a lock of its own here."""
    process = psutil.Process()
    said = {
        "host": os.uname().nodename,
        "namespace": os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else "",
        "pid": process.pid,
        "started": process.create_time(),
    }
    (made := path.with_name(".lock-0123")).write_text(json.dumps({**said, **changes}))
    return made


def test_it_is_held_and_let_go(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock"):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(PersonaError, match=rf"by process {os.getpid()}; wait for it"):
            hold(tmp_path / ".lock")
    assert os.listdir(tmp_path) == []
    hold(tmp_path / ".lock").release()


def test_what_a_lock_says_is_a_number(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock"):
        (tmp_path / ".lock").write_text("\x1b[2J")
        with pytest.raises(PersonaError, match="by process unknown"):
            hold(tmp_path / ".lock")


def test_a_lock_that_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking, its holder lets go: locked is the file that has the name."""
    path, flock = tmp_path / ".lock", fcntl.flock
    times: list[int] = []

    def late(handle: int, operation: int) -> None:
        if not times:
            path.unlink()
        times.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(path) as held:
        assert len(times) == 2
        assert os.fstat(held._handle).st_ino == path.stat().st_ino


@pytest.mark.parametrize("code", CODES)
def test_without_locks(tmp_path: Path, no_locks: Callable[[int], None], code: int) -> None:
    no_locks(code)
    said: list[str] = []
    with hold(tmp_path / ".lock", said.append):
        (sentence,) = said
        assert "has no locks" in sentence
        with pytest.raises(PersonaError, match=rf"by process {os.getpid()}; wait for it"):
            hold(tmp_path / ".lock")
    assert os.listdir(tmp_path) == []


def test_an_error_that_is_none_of_these(tmp_path: Path, no_locks: Callable[[int], None]) -> None:
    no_locks(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        hold(tmp_path / ".lock")


def test_a_process_that_ended_counts_for_nothing(
    tmp_path: Path, no_locks: Callable[..., None]
) -> None:
    """Killed, or killed so long ago that another process has its number."""
    no_locks()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in (
        {"pid": ended.pid},
        {"started": 1.0},
        {"pid": 0},
        {"pid": -1},
        {"pid": 1 << 70},
    ):
        left = another(tmp_path / ".lock", **changes)
        check_free(tmp_path)
        with hold(tmp_path / ".lock"):
            assert not left.exists()


def test_a_process_of_another_machine_may_be_at_work(
    tmp_path: Path, no_locks: Callable[..., None]
) -> None:
    no_locks()
    for changes in ({"host": "elsewhere"}, {"namespace": "pid:[1]"}):
        left = another(tmp_path / ".lock", pid=7, **changes)
        with pytest.raises(
            PersonaError, match=r"by process 7 of '.*if it has ended, remove '.*0123"
        ):
            hold(tmp_path / ".lock")
        assert left.exists()
        assert len(list(tmp_path.glob(".lock-*"))) == 1


@pytest.mark.parametrize("words", ["", "{}", "[]", '{"pid": "x"}', "\udc80", "x" * 5000])
def test_a_file_that_says_nothing(
    tmp_path: Path, no_locks: Callable[..., None], words: str
) -> None:
    no_locks()
    (tmp_path / ".lock-0").write_text(words, errors="surrogateescape")
    with pytest.raises(PersonaError, match="cannot be read; if there is none, remove that file"):
        hold(tmp_path / ".lock")
    assert (tmp_path / ".lock-0").exists()


def test_of_two_at_once_none_or_one_goes_on(
    tmp_path: Path, no_locks: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lays its file down before it looks: the one that looks last sees the other."""
    no_locks()
    from persona_nnsight.storage import lock

    look = lock._others
    inner: list[bool] = []

    def interleaved(path: Path, mine: Path) -> Any:
        if not inner:
            inner.append(True)
            with pytest.raises(PersonaError, match="being worked on"):
                hold(path)
        return look(path, mine)

    monkeypatch.setattr(lock, "_others", interleaved)
    hold(tmp_path / ".lock").release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", CODES)
def test_a_run_without_locks(
    persona: Persona, tiny_dir: TinyDir, no_locks: Callable[[int], None], code: int
) -> None:
    run = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    no_locks(code)
    outcome = persona(*run, "-o", "out")
    assert outcome.code == 0, outcome.err
    assert "has no locks" in outcome.err
    contents(Path("out"))


def test_a_directory_in_use_without_locks(
    persona: Persona, tiny_dir: TinyDir, no_locks: Callable[..., None]
) -> None:
    no_locks()
    Path("out").mkdir()
    another(Path("out/.lock"))
    run = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    outcome = persona(*run, "-o", "out")
    assert_one_sentence(outcome, f"being worked on by process {os.getpid()}")
    assert os.listdir("out") == [".lock-0123"]
