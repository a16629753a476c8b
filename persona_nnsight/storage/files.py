"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from filecmp import cmp
from pathlib import Path

from persona_nnsight.errors import PersonaError


def check_creatable(path: Path, advice: str) -> None:
    """Refuse a file or directory that cannot be made or written into, before work is spent on it.

    Raises:
        PersonaError: says why, and `advice`.
    """
    there = path.absolute()
    # A link to nowhere is there: nothing can be made below it.
    while not there.exists() and not there.is_symlink() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise PersonaError(
            f"Cannot create {str(path)!r}: {str(there)!r} is no directory that you may write to; "
            f"{advice}."
        )


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to its disk.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a directory with what it holds; nothing where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Refuse the name of a file that exists, or that cannot be made.

    Raises:
        PersonaError: `path` exists already, or is nowhere to write to.
    """
    # A link to nowhere does not exist, but os.replace would put the file in its place.
    if path.exists() or path.is_symlink():
        raise PersonaError(
            f"{str(path)!r} exists already and is not overwritten; choose another name, or remove "
            "it first."
        )
    check_creatable(path, "choose a path in a directory that you may write to")


def write_new(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file that does not exist yet, whole or not at all, and return its path.

    One with the same content may be there: a run that is gone on with writes it again.

    Args:
        path: where the file goes; missing directories are made.
        write: writes the file under the name it is given, in the same directory.

    Raises:
        PersonaError: `path` exists already, or cannot be written.
    """
    path = Path(path)
    if not path.is_file():
        check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as directory:
            partial = Path(directory, path.name)
            write(partial)
            if path.is_file() and cmp(partial, path, shallow=False):
                return path
            check_new(path)
            os.replace(partial, path)
    except OSError as error:
        raise PersonaError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); choose a path in a "
            "directory that you may write to."
        ) from error
    return path
