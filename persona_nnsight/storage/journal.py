"""A run that is not finished, on disk: how it was started, and what of it is done.

Its directory holds these until the tables can be written:

* ``pending.json``: how to go on (`Origin`), and what the backend has to remember. It is written
  anew, whole, so it is the old or the new one after a crash.
* ``.lock``: held by the process that works on the run.
* ``parts/NAME.safetensors``: finished events (`persona_nnsight.plan.packing`), whole or not
  there at all. Nothing in them is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.files import sync
from persona_nnsight.storage.run_directory import LOCK, PARTS, PENDING, RUN

try:
    import fcntl
except ImportError:  # Windows has other locks; there nothing guards a directory
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2


class JournalError(PersonaError):
    """A journal cannot be written; what it held before is still there."""


@dataclass(frozen=True)
class Origin:
    """How a run was started, so that it can be gone on with.

    Attributes:
        argv: the command line after ``persona``.
        cwd: where it was typed.
        subject: what it computes, as JSON-like data: model, grids, plans, versions; compared when
            resuming.
    """

    argv: tuple[str, ...]
    cwd: str
    subject: Mapping[str, Any]


@dataclass
class Journal:
    """An unfinished run in its directory.

    Attributes:
        directory: the run directory.
        backend: which backend writes it: ``local`` or ``ndif``.
        origin: how the run was started; None where no command did.
        state: what the backend remembers, JSON-like data.
        loaded: whether it was read from a directory, and is not of this process's making.
    """

    directory: Path
    backend: str
    origin: Origin | None = None
    state: dict[str, Any] = field(default_factory=dict)
    loaded: bool = field(default=False, compare=False)
    _lock: IO[str] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def load(cls, directory: Path) -> Journal:
        """The journal of a run directory.

        Raises:
            PersonaError: none is there, or it cannot be read.
        """
        path = directory / PENDING
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}")
            return cls(
                directory=directory,
                backend=str(data["backend"]),
                origin=None if data["origin"] is None else _origin(data["origin"]),
                state=dict(data["state"]),
                loaded=True,
            )
        except FileNotFoundError:
            raise PersonaError(
                f"{str(directory)!r} holds no unfinished run; name the directory of a run that was "
                "started and did not come to its end."
            ) from None
        except OSError as error:
            raise PersonaError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, error) from error

    @property
    def argv(self) -> list[str] | None:
        """The command line that the run was started with; None where no command did."""
        return None if self.origin is None else list(self.origin.argv)

    def claim(self) -> None:
        """Take the directory for this process, and make it where it is not there.

        Raises:
            PersonaError: another process has it.
            JournalError: it cannot be written.
        """
        if self._lock is not None:
            return
        made = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.directory / LOCK)
        except OSError as error:
            raise self._unwritable(error) from error
        if not self.loaded and any((self.directory / name).exists() for name in (PENDING, RUN)):
            self.release()
            raise PersonaError(
                f"Another run has taken {str(self.directory)!r} meanwhile; choose another --out."
            )
        try:
            self.save()
        except PersonaError:
            self.release()
            if made:
                with suppress(OSError):
                    self.directory.rmdir()
            raise

    def release(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            (self.directory / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def save(self) -> None:
        """Write ``pending.json``.

        Raises:
            JournalError: it cannot be written.
        """
        data = {
            "format": _FORMAT,
            "backend": self.backend,
            "origin": None if self.origin is None else asdict(self.origin),
            "state": self.state,
        }
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _replace(self.directory / PENDING, json.dumps(data, indent=1, ensure_ascii=False))
        except OSError as error:
            raise self._unwritable(error) from error

    def keep(self, name: str, events: str, tensors: dict[str, Tensor]) -> None:
        """Keep packed events as the part `name`.

        Raises:
            JournalError: they cannot be written.
        """
        path = self._part(name)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"events": events})
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error
        finally:
            partial.unlink(missing_ok=True)

    def find(self, name: str) -> tuple[str, dict[str, Tensor]] | None:
        """The packed events of a part; None where it is not there, whole."""
        try:
            with safe_open(self._part(name), framework="pt") as file:
                events = (file.metadata() or {})["events"]
                return events, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError):
            return None

    @property
    def has_parts(self) -> bool:
        """Whether anything is there for another process to go on with."""
        return any(self.parts())

    def parts(self, beginning: str = "") -> Iterator[str]:
        """The names of the parts that begin so, in order."""
        names = (path.stem for path in (self.directory / PARTS).glob("*.safetensors"))
        yield from sorted(name for name in names if name.startswith(beginning))

    def discard(self) -> None:
        """Remove the journal, and the directory if nothing else is in it."""
        (self.directory / PENDING).unlink(missing_ok=True)
        shutil.rmtree(self.directory / PARTS, ignore_errors=True)
        self.release()
        with suppress(OSError):  # it was there before, or holds something
            self.directory.rmdir()

    def _part(self, name: str) -> Path:
        return self.directory / PARTS / f"{name}.safetensors"

    def _unwritable(self, error: Exception) -> JournalError:
        reason = error.strerror if isinstance(error, OSError) else error
        return JournalError(
            f"The run cannot be recorded in {str(self.directory)!r} ({reason}); make room there, "
            "or choose another --out."
        )


def damaged(path: Path, error: Exception) -> PersonaError:
    """What to say of a ``pending.json`` that is not as it was written."""
    return PersonaError(
        f"{str(path)!r} is damaged or of another version of persona ({error}); its run cannot be "
        "gone on with. Remove the directory and start the run again."
    )


def _origin(data: Any) -> Origin:
    argv = data["argv"]
    if not isinstance(argv, list):
        raise TypeError("argv is no list")
    return Origin(tuple(map(str, argv)), str(data["cwd"]), dict(data["subject"]))


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def hold(path: Path) -> IO[str]:
    """Open a file that one process at a time can hold; closing it lets it go.

    Raises:
        PersonaError: another process holds it; says which.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as it is held
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise PersonaError(
            f"The run in {str(path.parent)!r} is being worked on by process {holder}; wait for it, "
            "or stop it."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
