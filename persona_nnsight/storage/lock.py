"""One process at a time works on a run directory.

The system's lock on ``.lock`` says so, which a process cannot leave behind. Some file systems have
no locks (Lustre as it is often mounted, some NFS), nor has Windows of this kind. There each process
lays down a file of its own, ``.lock-`` and a random name, which says who it is, and then looks for
others: of two that come at once at least one sees the other, and the one that sees another gives
way. A file whose process has ended on this machine counts for nothing and is removed; whether a
process of another machine has ended cannot be seen from here, so its file stands until it is
removed by hand.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.files import is_plain, open_plain, put, workshop

try:
    import fcntl
except ImportError:  # Windows
    _LOCKS = False
else:
    _LOCKS = True

LOCK = ".lock"

#: What a file system without locks answers.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
#: Seconds by which two readings of when a process began may differ: clocks are set.
_SAME_START = 60.0
#: More than a lock's file ever holds.
_LONGEST = 1000


class Hold:
    """A lock that is held, until `release` or the end of a ``with``.

    Attributes:
        by_name: the file that stands for it where the file system has no locks.
    """

    def __init__(self, path: Path, handle: int, by_name: Path | None = None) -> None:
        self.path, self.by_name = path, by_name
        self._handle = handle

    def release(self) -> None:
        """Let it go."""
        if self._handle >= 0:
            self.path.unlink(missing_ok=True)
            if self.by_name is not None:
                self.by_name.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def hold(path: Path, notify: Callable[[str], None] = lambda _: None) -> Hold:
    """Take the lock of a run directory, which is ours.

    Args:
        path: of the file ``.lock``.
        notify: told where the file system has no locks.

    Raises:
        PersonaError: another process holds it, which is named, or the file is not a plain one.
        OSError: the file cannot be made or written.
    """
    while True:
        handle = open_plain(path)
        try:
            locks = _lock(handle, path)
            # It may have been removed by the one that held it, after it was opened here.
            if os.fstat(handle).st_nlink == 0:
                os.close(handle)
                continue
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            by_name = None if locks else _lay_down(path)
        except BaseException:
            os.close(handle)
            raise
        if by_name is not None and _LOCKS:
            notify(
                f"the file system of {str(path.parent)!r} has no locks; while this run is at work, "
                f"{by_name.name} keeps others out"
            )
        return Hold(path, handle, by_name)


def _lock(handle: int, path: Path) -> bool:
    """Lock an open file; False where the file system cannot.

    Raises:
        PersonaError: another process has locked it.
    """
    if not _LOCKS:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        words = os.read(handle, _LONGEST).decode("ascii", errors="replace").strip()
        raise _held(path, words if words.isdecimal() else "unknown") from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _lay_down(path: Path) -> Path:
    """Say by a file that we are here, and give way where another does.

    Raises:
        PersonaError: another process is here, or may be.
        OSError: the file cannot be written.
    """
    mine = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    with workshop(path.parent) as made:
        written = made / mine.name
        written.write_text(json.dumps(_myself()), encoding="utf-8")
        put(written, mine)
    try:
        for other in _others(path, mine):
            _give_way(path, other)
    except BaseException:
        for each in (mine, path):  # `path` locks nothing here
            each.unlink(missing_ok=True)
        raise
    return mine


def _others(path: Path, mine: Path) -> Iterator[Path]:
    return (other for other in sorted(path.parent.glob(f"{path.name}-*")) if other != mine)


def _give_way(path: Path, other: Path) -> None:
    """Refuse where the process of a file may be at work; remove the file where it is not.

    Raises:
        PersonaError: it may be.
    """
    if not os.path.lexists(other):
        return  # let go of meanwhile
    try:
        if not is_plain(other) or other.stat().st_size > _LONGEST:
            raise ValueError
        said = json.loads(other.read_text(encoding="utf-8"))
        pid, started = int(said["pid"]), float(said["started"])
        host = str(said["host"])
        here = (host, said["namespace"]) == (_myself()["host"], _myself()["namespace"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise PersonaError(
            f"{str(other)!r} stands for a process that works on this run, and cannot be read; if "
            "there is none, remove that file."
        ) from None
    if not here:
        raise PersonaError(
            f"The run in {str(path.parent)!r} is being worked on by process {pid} of {host!r}; "
            f"wait for it, or stop it; if it has ended, remove {str(other)!r}."
        )
    if _runs(pid, started):
        raise _held(path, str(pid))
    other.unlink(missing_ok=True)


def _runs(pid: int, started: float) -> bool:
    """Whether a process of this machine is at work; a later one with its number is another."""
    try:
        return abs(psutil.Process(pid).create_time() - started) < _SAME_START
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False


def _myself() -> dict[str, Any]:
    """This process, so that others can tell whether it is still there."""
    try:
        # Containers of one name count their processes each for itself.
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {
        "host": socket.gethostname(),
        "namespace": namespace,
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _held(path: Path, holder: str) -> PersonaError:
    return PersonaError(
        f"The run in {str(path.parent)!r} is being worked on by process {holder}; wait for it, "
        "or stop it."
    )
