"""The jobs of a run that is not finished: which there are, and what came back.

A run directory holds ``pending.json`` and ``parts/`` until its tables can be written:

* ``pending.json``: how to go on (`Origin`) and one record per job, with the id that the server
  gave it. It is written anew, whole, whenever a job changes, so it is there after a crash.
* ``.lock``: held by the process that works on the run.
* ``parts/KEY.safetensors``: what a job returned (`persona_nnsight.backends.packing`). The key is
  a digest of what the job computes, so a part is never taken for another plan's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.runs import LOCK, PARTS, PENDING, RUN

try:
    import fcntl
except ImportError:  # Windows has other locks; there nothing guards a directory
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1

#: States of a job: not sent; with the server; its result is here; ended by an error.
WAITING, SENT, DONE, FAILED = STATES = "waiting", "sent", "done", "failed"


@dataclass
class Job:
    """One job, from the plan to its result.

    Attributes:
        key: digest of what it computes.
        cells: how many cells of the grid it has.
        state: ``waiting``, ``sent``, ``done`` or ``failed``.
        id: the server's name for it; None before it is sent.
        status, description: the server's last word.
        attempts: how often it was sent; above 1 where the server lost it.
        sent: when it was sent, seconds since the epoch.
        queue_seconds: from being sent to starting, as far as the clocks agree; None until done.
        run_seconds: how long it ran, as the server reports it; None until done.
        started, ended: when it ran, by the server's clock, seconds since the epoch.
        bytes_up, bytes_down: sizes of the request and the result.
    """

    key: str
    cells: int
    state: str = WAITING
    id: str | None = None
    status: str = ""
    description: str = ""
    attempts: int = 0
    sent: float | None = None
    queue_seconds: float | None = None
    run_seconds: float | None = None
    started: float | None = None
    ended: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Origin:
    """How a pending run was started, so that it can be gone on with.

    Attributes:
        argv: the command line after ``persona``.
        cwd: where it was typed.
        subject: what it computes: model, grid, arguments, versions; compared when resuming.
    """

    argv: tuple[str, ...]
    cwd: str
    subject: Mapping[str, Any]


@dataclass
class Ledger:
    """The jobs of one run, and their results.

    Attributes:
        directory: the run directory; None keeps everything in memory.
        origin: how the run was started.
        host: the server that has the jobs.
        server: what the server runs, once a job said so: dtype, device, versions.
        jobs: by key, in the order of the plan.
        loaded: whether it was read from a directory, and is not of this process's making.
    """

    directory: Path | None = None
    origin: Origin | None = None
    host: str = ""
    server: dict[str, Any] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    loaded: bool = field(default=False, compare=False)
    _lock: IO[str] | None = field(default=None, compare=False)
    _results: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Ledger:
        """The ledger of a run directory.

        Raises:
            PersonaError: none is there, or it cannot be read.
        """
        path = directory / PENDING
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}")
            origin = data["origin"]
            return cls(
                directory=directory,
                origin=None
                if origin is None
                else Origin(
                    argv=tuple(map(str, origin["argv"])),
                    cwd=str(origin["cwd"]),
                    subject=dict(origin["subject"]),
                ),
                host=str(data["host"]),
                server=dict(data["server"]),
                jobs={job["key"]: _job(job) for job in data["jobs"]},
                loaded=True,
            )
        except FileNotFoundError:
            raise PersonaError(
                f"{str(directory)!r} holds no jobs; name the directory of a run that was started "
                "with --backend ndif and is not finished."
            ) from None
        except OSError as error:
            raise PersonaError(f"{str(path)!r} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PersonaError(
                f"{str(path)!r} is damaged or of another version of persona ({error}); its jobs "
                "cannot be collected. Remove the directory and start the run again."
            ) from error

    def claim(self) -> None:
        """Take the directory for this process, and make it where it is not there.

        Raises:
            PersonaError: another process has it, or it cannot be written.
        """
        if self.directory is None or self._lock is not None:
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
        if self._lock is not None and self.directory is not None:
            (self.directory / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def expect(self, keys: Iterable[tuple[str, int]]) -> list[Job]:
        """The jobs with these (key, cells), made where they are new."""
        return [self.jobs.setdefault(key, Job(key, cells)) for key, cells in keys]

    def save(self) -> None:
        """Write ``pending.json``.

        Raises:
            PersonaError: it cannot be written.
        """
        if self.directory is None:
            return
        data = {
            "format": _FORMAT,
            "host": self.host,
            "origin": None if self.origin is None else asdict(self.origin),
            "server": self.server,
            "jobs": [asdict(job) for job in self.jobs.values()],
        }
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _replace(self.directory / PENDING, json.dumps(data, indent=1, ensure_ascii=False))
        except OSError as error:
            raise self._unwritable(error) from error

    def keep(self, job: Job, events: str, tensors: dict[str, Tensor]) -> None:
        """Keep what a job returned.

        Raises:
            PersonaError: it cannot be written.
        """
        if self.directory is None:
            self._results[job.key] = events, tensors
            return
        path = self._part(job)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"events": events})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error
        finally:
            partial.unlink(missing_ok=True)

    def result(self, job: Job) -> tuple[str, dict[str, Tensor]] | None:
        """What a job returned; None where it is not here, whole."""
        if self.directory is None:
            return self._results.get(job.key)
        try:
            with safe_open(self._part(job), framework="pt") as file:
                events = (file.metadata() or {})["events"]
                return events, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError):
            return None

    def discard(self) -> None:
        """Remove the ledger, and the directory if nothing else is in it."""
        if self.directory is None:
            return
        (self.directory / PENDING).unlink(missing_ok=True)
        shutil.rmtree(self.directory / PARTS, ignore_errors=True)
        self.release()
        with suppress(OSError):  # it was there before, or holds something
            self.directory.rmdir()

    def record(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """The jobs for ``run.json``: those with `keys`, or all."""
        jobs = [self.jobs[key] for key in (self.jobs if keys is None else keys)]
        return {
            "argv": None if self.origin is None else list(self.origin.argv),
            "host": self.host,
            "server": self.server,
            "bytes_up": sum(job.bytes_up for job in jobs),
            "bytes_down": sum(job.bytes_down for job in jobs),
            "jobs": [asdict(job) for job in jobs],
        }

    def _part(self, job: Job) -> Path:
        assert self.directory is not None
        return self.directory / PARTS / f"{job.key}.safetensors"

    def _unwritable(self, error: Exception) -> PersonaError:
        reason = error.strerror if isinstance(error, OSError) else error
        ids = ", ".join(job.id for job in self.jobs.values() if job.id and job.state == SENT)
        lost = f" The server still has the jobs {ids}." if ids else ""
        return PersonaError(
            f"The run's jobs cannot be recorded in {str(self.directory)!r} ({reason}); make room "
            f"or choose another --out.{lost}"
        )


def _job(data: dict[str, Any]) -> Job:
    job = Job(**data)
    if job.state not in STATES or (job.state == SENT and job.id is None):
        raise ValueError(f"a job is {job.state!r}")
    return job


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, whatever happens."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
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
