"""The jobs of a run on a server: which there are, and what came back.

They are kept in the run's journal (`persona_nnsight.storage.journal`): one record per job, with
the id that the server gave it, and one part per result. A part is named after a digest of what the
job computes, so it is never taken for another plan's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.storage.journal import Journal, damaged
from persona_nnsight.storage.run_directory import PENDING

#: What a journal says of who writes it.
BACKEND = "ndif"

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


@dataclass
class Ledger:
    """The jobs of one run, and their results.

    Attributes:
        journal: where they are kept; None keeps everything in memory.
        host: the server that has the jobs.
        server: what the server runs, once a job said so: dtype, device, versions.
        jobs: by key, in the order of the plan.
    """

    journal: Journal | None = None
    host: str = ""
    server: dict[str, Any] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    _results: dict[str, tuple[str, dict[str, Tensor]]] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Ledger:
        """The ledger of a run directory; see `of`."""
        return cls.of(Journal.load(directory))

    @classmethod
    def of(cls, journal: Journal) -> Ledger:
        """The jobs that a journal holds; none where it is new.

        Raises:
            PersonaError: it cannot be read, or is of a run without a server.
        """
        directory = journal.directory
        if journal.backend != BACKEND:
            raise PersonaError(
                f"The run in {str(directory)!r} has no jobs with a server; `persona resume "
                f"{directory}` goes on with it."
            )
        if not journal.loaded:
            return cls(journal)
        state = journal.state
        try:
            return cls(
                journal=journal,
                host=str(state["host"]),
                server=dict(state["server"]),
                jobs={job.key: job for job in map(job_from, state["jobs"])},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(directory / PENDING, error) from error

    @property
    def directory(self) -> Path | None:
        """The run directory; None in memory."""
        return None if self.journal is None else self.journal.directory

    @property
    def loaded(self) -> bool:
        """Whether it was read from a directory, and is not of this process's making."""
        return self.journal is not None and self.journal.loaded

    def claim(self) -> None:
        """Take the directory for this process; see `Journal.claim`."""
        if self.journal is not None:
            self._note()
            self.journal.claim()

    def release(self) -> None:
        """Let go of the directory."""
        if self.journal is not None:
            self.journal.release()

    def expect(self, keys: Iterable[tuple[str, int]]) -> list[Job]:
        """The jobs with these (key, cells), made where they are new."""
        return [self.jobs.setdefault(key, Job(key, cells)) for key, cells in keys]

    def save(self) -> None:
        """Write the jobs down.

        Raises:
            PersonaError: they cannot be written; names those that the server has.
        """
        if self.journal is None:
            return
        self._note()
        try:
            self.journal.save()
        except PersonaError as error:
            raise self._with_ids(error) from error

    def keep(self, job: Job, events: str, tensors: dict[str, Tensor]) -> None:
        """Keep what a job returned.

        Raises:
            PersonaError: it cannot be written; names the jobs that the server has.
        """
        if self.journal is None:
            self._results[job.key] = events, tensors
            return
        try:
            self.journal.keep(job.key, events, tensors)
        except PersonaError as error:
            raise self._with_ids(error) from error

    def result(self, job: Job) -> tuple[str, dict[str, Tensor]] | None:
        """What a job returned; None where it is not here, whole."""
        if self.journal is None:
            return self._results.get(job.key)
        return self.journal.find(job.key)

    def discard(self) -> None:
        """Remove the journal."""
        if self.journal is not None:
            self.journal.discard()

    def record(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """The jobs for ``run.json``: those with `keys`, or all."""
        jobs = [self.jobs[key] for key in (self.jobs if keys is None else keys)]
        return {
            "argv": None if self.journal is None else self.journal.argv,
            "host": self.host,
            "server": self.server,
            "bytes_up": sum(job.bytes_up for job in jobs),
            "bytes_down": sum(job.bytes_down for job in jobs),
            "jobs": [asdict(job) for job in jobs],
        }

    def _note(self) -> None:
        assert self.journal is not None
        jobs = [asdict(job) for job in self.jobs.values()]
        self.journal.state = {"host": self.host, "server": self.server, "jobs": jobs}

    def _with_ids(self, error: PersonaError) -> PersonaError:
        """The error, with the jobs that go on without this process."""
        ids = ", ".join(job.id for job in self.jobs.values() if job.id and job.state == SENT)
        return PersonaError(f"{error} The server still has the jobs {ids}.") if ids else error


def job_from(data: Any) -> Job:
    """A job as it was written down.

    Raises:
        ValueError, TypeError: it is none.
    """
    if not isinstance(data, dict):
        raise TypeError("a job is no object")
    job = Job(**data)
    for name, kind in _KINDS.items():
        value = getattr(job, name)
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"a job's {name} is a {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"a job's {name} is {value}")
    if job.state not in STATES or (job.state == SENT and job.id is None):
        raise ValueError(f"a job is {job.state!r}")
    return job


_NUMBER = (int, float, type(None))
#: What may stand in each field of a job.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("key", "state", "status", "description"), (str,)),
    "id": (str, type(None)),
    **dict.fromkeys(("cells", "attempts", "bytes_up", "bytes_down"), (int,)),
    **dict.fromkeys(("sent", "queue_seconds", "run_seconds", "started", "ended"), _NUMBER),
}
