"""Places where no run can be written."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import OUT, WHERE, Persona, refused
from tiny import TinyDir


def make_places() -> None:
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("dangling").symlink_to("gone")
    Path("loop").symlink_to("loop")


PLACES: dict[str, tuple[str, str]] = {
    "a file": ("file", "'file' is a file"),
    "below a file": ("file/run", "Cannot create 'file/run'"),
    "a directory in use": ("full", "The directory 'full' is not empty"),
    "a link to nowhere": ("dangling", "'dangling' is a file, not a directory"),
    "below a link to nowhere": ("dangling/run", "Cannot create 'dangling/run'"),
    "a link to itself": ("loop", "'loop' is a file"),
    "below a link to itself": ("loop/run", "Cannot create 'loop/run'"),
    "a device": ("/dev/full", "'/dev/full' is a file"),
    "below a device": ("/dev/null/run", "Cannot create '/dev/null/run'"),
    "where nothing can be made": ("/proc/run", "'/proc/run'"),
    "a long name": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    place, says = PLACES[case]
    if place.startswith("/") and sys.platform != "linux":
        pytest.skip("a place of Linux")
    make_places()
    before = sorted(Path().rglob("*"))
    base = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    refused(persona(*base, "--out", place), says)
    assert sorted(Path().rglob("*")) == before
    assert Path("file").read_text() == "mine"


def test_a_directory_that_may_not_be_written(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root may write anywhere, the system's answer is a stand-in."""
    Path("locked").mkdir()
    real = os.access

    def access(path: Any, mode: int) -> bool:
        return Path(path).name != "locked" and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    base = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    refused(persona(*base, "--out", "locked/run"), "is no directory that you may write to")


def test_a_disk_that_is_full_from_the_start(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk that fills up later leaves is in test_resume.py."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    base = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-o", OUT, *WHERE)
    refused(persona(*base), f"cannot be recorded in '{OUT}' (No space left on device)")
