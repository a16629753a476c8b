"""Files that are written whole or not at all, and nowhere but where they seem to be.

This is the only place that opens anything to write in a directory that may have been there before,
and may be somebody else's work. What is written is written in a directory of our own with a random
name (`workshop`), and moved to its place (`put`): a move takes the place of a link and never
follows one. What stays open where it is (`open_plain`) is opened without following links, and is
refused where it is anything but a plain file of ours with one name.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path

from persona_nnsight.errors import PersonaError

#: How the names of directories begin in which something is written before it has its place.
PARTIAL = ".partial-"

#: What opening something answers that is there and can be no plain file.
_NOT_PLAIN = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EMLINK)


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
    """Remove a file, a link, or a directory with what it holds; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def workshop(place: Path) -> Iterator[Path]:
    """A directory below `place` to write files in; what was not moved by then goes with it.

    Nobody could prepare it: its name is random, it is new, and only we may enter it.

    Raises:
        OSError: it cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=place) as made:
        yield Path(made)


def put(made: Path, place: Path) -> None:
    """Move what was written in a workshop to its place, and see it to the disk.

    A file or link that is there is replaced, and not written through.

    Raises:
        OSError: it cannot be moved.
    """
    sync(made)
    os.replace(made, place)
    sync(place.parent)


def clear_partial(directory: Path) -> None:
    """Remove what processes that were killed have left of their workshops."""
    for path in directory.glob(f"{PARTIAL}*"):
        remove(path)


def our_directory(path: Path, advice: str, *, named: bool = True) -> None:
    """Make a directory, or see to it that one that is there is ours to write to.

    Args:
        path: the directory.
        advice: what to do where it is not.
        named: whether the user named it; it may be a link then, and one below it may not.

    Raises:
        PersonaError: it is a link, is no directory, or belongs to another user.
        OSError: it cannot be made.
    """
    if named:
        path.mkdir(parents=True, exist_ok=True)
    elif not os.path.lexists(path):
        path.mkdir(exist_ok=True)
    check_ours(path, advice, named=named)


def check_ours(path: Path, advice: str, *, named: bool = True) -> None:
    """Refuse a directory that is there and not ours; see `our_directory`.

    Raises:
        PersonaError: it is a link, is no directory, or belongs to another user.
        OSError: it is not there.
    """
    found = path.stat() if named else path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no directory"
        raise PersonaError(
            f"{str(path)!r} is {what}, and is not written through; remove it, or {advice}."
        )
    if os.name == "nt" or found.st_uid == os.geteuid():
        return
    try:
        # Some file systems name one owner for everything; then it is also that of what we make.
        with workshop(path) as made:
            ours = made.stat().st_uid == found.st_uid
    except OSError:
        ours = False
    if not ours:
        raise PersonaError(
            f"The directory {str(path)!r} belongs to another user (uid {found.st_uid}), who could "
            f"change what is written there; {advice}."
        )


def is_plain(path: Path) -> bool:
    """Whether a name is that of a file which has no other name and is no link or device."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def open_plain(path: Path) -> int:
    """Open a file of ours to read and write, or make it; what it holds is left as it is.

    Returns:
        The descriptor.

    Raises:
        PersonaError: what is there is a link, a device, a file with a second name, or another
            user's; it was not touched.
        OSError: it cannot be opened.
    """
    # Opened without waiting, as a pipe would have it; Windows knows neither of the two.
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | careful, 0o666)
    except OSError as error:
        if error.errno in _NOT_PLAIN:
            raise _not_plain(path) from error
        raise
    found = os.fstat(handle)
    plain = stat.S_ISREG(found.st_mode) and found.st_nlink <= 1
    if not plain or (os.name != "nt" and found.st_uid != path.parent.stat().st_uid):
        os.close(handle)
        raise _not_plain(path)
    return handle


def _not_plain(path: Path) -> PersonaError:
    return PersonaError(
        f"{str(path)!r} is not a plain file of your own, but a link, a device, a second name of "
        "another file, or another user's; it was not touched. Somebody may have prepared this "
        "directory: look at it, and remove the file or choose another directory."
    )


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
        with workshop(path.parent) as directory:
            partial = directory / path.name
            write(partial)
            if path.is_file() and cmp(partial, path, shallow=False):
                return path
            check_new(path)
            put(partial, path)
    except OSError as error:
        raise PersonaError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); choose a path in a "
            "directory that you may write to."
        ) from error
    return path
