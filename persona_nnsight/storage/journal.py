"""A run that is not finished, on disk: how it was started, and what of it is done.

Its directory holds these until the tables can be written:

* ``pending.json``: how to go on (`Origin`), and what the backend has to remember. It is written
  anew, whole, so it is the old or the new one after a crash.
* ``.lock``: held by the process that works on the run (`persona_nnsight.storage.lock`).
* ``parts/NAME.safetensors``: finished events (`persona_nnsight.plan.packing`), whole or not
  there at all. Nothing in them is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.files import (
    check_ours,
    clear_partial,
    our_directory,
    put,
    remove,
    workshop,
)
from persona_nnsight.storage.lock import LOCK, Hold, hold
from persona_nnsight.storage.run_directory import ANOTHER_OUT, PARTS, PENDING, RUN

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

    @property
    def date(self) -> str | None:
        """The day that goes into its prompts; None where none does."""
        rendering = self.subject.get("rendering")
        return rendering.get("date") if isinstance(rendering, Mapping) else None


@dataclass
class Journal:
    """An unfinished run in its directory.

    Attributes:
        directory: the run directory.
        backend: which backend writes it: ``local`` or ``ndif``.
        origin: how the run was started; None where no command did.
        state: what the backend remembers, JSON-like data.
        loaded: whether it was read from a directory, and is not of this process's making.
        notify: told what the user should know of the directory.
    """

    directory: Path
    backend: str
    origin: Origin | None = None
    state: dict[str, Any] = field(default_factory=dict)
    loaded: bool = field(default=False, compare=False)
    notify: Callable[[str], None] = field(default=lambda _: None, compare=False, repr=False)
    _lock: Hold | None = field(default=None, compare=False, repr=False)

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
            PersonaError: another process has it, or it is not ours.
            JournalError: it cannot be written.
        """
        if self._lock is not None:
            return
        made = not self.directory.exists()
        try:
            our_directory(self.directory, ANOTHER_OUT)
            with suppress(FileNotFoundError):
                check_ours(self.directory / PARTS, ANOTHER_OUT, named=False)
            self._lock = hold(self.directory / LOCK, self.notify)
            clear_partial(self.directory)
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
            self._lock.release()
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
            our_directory(self.directory, ANOTHER_OUT)
            with workshop(self.directory) as made:
                text = json.dumps(data, indent=1)  # in ASCII: a path may have halves of letters
                (made / PENDING).write_text(text + "\n", encoding="utf-8")
                put(made / PENDING, self.directory / PENDING)
        except OSError as error:
            raise self._unwritable(error) from error

    def keep(self, name: str, events: str, tensors: dict[str, Tensor]) -> None:
        """Keep packed events as the part `name`.

        Raises:
            JournalError: they cannot be written.
        """
        path = self._part(name)
        try:
            our_directory(self.directory, ANOTHER_OUT)
            our_directory(path.parent, ANOTHER_OUT, named=False)
            with workshop(path.parent) as made:
                save_file(tensors, made / path.name, metadata={"events": events})
                put(made / path.name, path)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

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
        remove(self.directory / PENDING)
        remove(self.directory / PARTS)
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
