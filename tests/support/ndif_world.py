"""A client of the fake server, a run of two jobs, and what is asked of them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from cells import TINY_GRID
from commands import Outcome
from fake_ndif import KEY, Clock, FakeNdif

from persona_nnsight import EditResult, Model, substitute
from persona_nnsight.backends.ndif.backend import NdifBackend
from persona_nnsight.backends.ndif.ledger import Ledger
from persona_nnsight.backends.ndif.server import Server
from persona_nnsight.experiments.results import Result
from persona_nnsight.storage.journal import Journal

TWO_BY_TWO = TINY_GRID.select(["yoda", "marx"])
SMALL: dict[str, Any] = {
    "layers": (2,),
    "positions": "p_last",
    "conditions": "additive",
    "window": 2,
}
"""With two cells to a job, two jobs."""

QUEUED, RUNNING = ("QUEUED", "Position 1 in the queue."), ("RUNNING", "It runs.")


@dataclass
class World:
    """A client of the fake server."""

    fake: FakeNdif
    clock: Clock
    model: Model

    def backend(self, directory: Path | None = None, **options: Any) -> NdifBackend:
        ledger = None
        if directory is not None:
            pending = (directory / "pending.json").exists()
            ledger = Ledger.load(directory) if pending else Ledger(Journal(directory, "ndif"))
        return NdifBackend(self.model, Server(self.fake.url), ledger=ledger, **options)

    def run(self, backend: NdifBackend) -> EditResult:
        with closing(backend):
            return substitute(self.model, TWO_BY_TWO, **SMALL, backend=backend)


def assert_equal(result: Result, frame: pd.DataFrame) -> None:
    assert result.complete
    pd.testing.assert_frame_equal(result.frame(), frame, check_exact=True)


def jobs_of(backend: NdifBackend) -> list[tuple[str, str | None, int]]:
    return [(job.state, job.id, job.attempts) for job in backend.ledger.jobs.values()]


def assert_no_key(outcome: Outcome, directory: Path = Path()) -> None:
    assert KEY not in outcome.out
    assert KEY not in outcome.err
    for path in directory.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
