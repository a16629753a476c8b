"""On an NDIF server: a plan is cut into jobs, each one session there that returns numbers."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from nnsight.util import to_import_path

from persona_nnsight.backends.interface import Detached, EngineFunction
from persona_nnsight.backends.ndif.courier import Courier, HopelessError, Part
from persona_nnsight.backends.ndif.ledger import DONE, FAILED, SENT, WAITING, Ledger
from persona_nnsight.backends.ndif.server import Server, is_loopback
from persona_nnsight.backends.wire.session import job_sources
from persona_nnsight.backends.wire.sources import shipped_name
from persona_nnsight.errors import PersonaError
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.costs import Limits, estimate, fit_limits
from persona_nnsight.plan.data import to_data
from persona_nnsight.plan.events import Event
from persona_nnsight.plan.joining import part_of
from persona_nnsight.plan.packing import unpack
from persona_nnsight.plan.plan import Plan

#: A job has as many cells as push this many tokens through the model, within these bounds: a grid
#: is a handful of jobs, and what is lost with one is little.
_JOB_TOKENS = 60_000
_MOST_CELLS = 16
#: Jobs that are with the server at a time: enough for several replicas, and no more than is polite.
_AHEAD = 4
#: Seconds between two looks at the jobs: at first and after news, and at most.
_LOOKS = (0.3, 5.0)

_POSITION = re.compile(r"position \d+", re.IGNORECASE)


class NdifBackend:
    """Runs plans on an NDIF server.

    Args:
        model: loaded with ``weights=False``; the server has the weights.
        server: the server.
        dtype: what the weights there have to be, such as ``float32``; None takes what it has.
        ledger: where jobs and results are kept; in memory where None is given.
        detach: send all jobs, collect what is done, and raise `Detached` for the rest.
        notify: told in a few words how the jobs are, whenever that changes.

    Raises:
        PersonaError: a model that only exists on this machine, for a server that is another.
    """

    def __init__(
        self,
        model: Model,
        server: Server,
        *,
        dtype: str | None = None,
        ledger: Ledger | None = None,
        detach: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.server = server
        self.dtype = dtype
        self.ledger = Ledger() if ledger is None else ledger
        self.ledger.host = server.host
        self.detach = detach
        self.notify = notify or (lambda _: None)
        self.model_key = model_key(model, server.host)
        self._ran: list[tuple[Plan, list[str]]] = []
        self._courier = Courier(
            model,
            model_key=self.model_key,
            server=server,
            dtype=dtype,
            ledger=self.ledger,
            notify=self.notify,
        )

    def limits(self, plan: Plan) -> Limits:
        """As many cells as make a job; batches within it are cut on the server."""
        whole = fit_limits(plan, self.model.tree, budget=1 << 62, gpu=True)
        tokens = estimate(plan, self.model, whole).token_forwards
        cells = _JOB_TOKENS * len(plan.cells) // tokens
        return replace(whole, cells=min(max(cells, 1), _MOST_CELLS))

    def record(self, plan: Plan | None = None) -> dict[str, Any]:
        """See `Backend.record`."""
        keys = next((keys for known, keys in self._ran if known is plan), None)
        return {
            "name": "ndif",
            "model_key": self.model_key,
            "revision": self.model.weights.asked_revision,
            **self.ledger.record(keys),
        }

    def close(self) -> None:
        """See `Backend.close`."""
        self.ledger.release()

    def run(self, function: EngineFunction, plan: Plan, limits: Limits) -> Iterator[Event]:
        """See `Backend.run`; a part of the plan is yielded when its job is done.

        Raises:
            PersonaError: the server refuses or fails.
            Detached: where asked for; the jobs are in the ledger.
        """
        parts = self._parts(function, plan, limits.cells)
        self._ran.append((plan, [part.job.key for part in parts]))
        self.ledger.claim()
        try:
            yield from self._collect(parts, function)
        except KeyboardInterrupt:
            self._keep_unless(WAITING)
            raise
        except HopelessError:
            self._keep_unless(WAITING, SENT, FAILED)
            raise
        except PersonaError:
            self._keep_unless(WAITING)
            raise

    def _keep_unless(self, *states: str) -> None:
        """Save the ledger, or drop it where no job is beyond `states` and none was there before."""
        if self.ledger.loaded or any(job.state not in states for job in self.ledger.jobs.values()):
            self.ledger.save()
        else:
            self.ledger.discard()

    def _parts(self, function: EngineFunction, plan: Plan, cells: int) -> list[Part]:
        starts = range(0, len(plan.cells), cells)
        plans = [
            part_of(plan, range(start, min(start + cells, len(plan.cells)))) for start in starts
        ]
        wanted = [(self._key(function, part), len(part.cells)) for part in plans]
        jobs = self.ledger.expect(wanted)
        return [Part(*found) for found in zip(jobs, starts, plans, strict=True)]

    def _key(self, function: EngineFunction, plan: Plan) -> str:
        """A digest of everything that the numbers of a job depend on."""
        # What is shipped is named after its text.
        engine = shipped_name(function.__module__, job_sources(function))
        described = {
            "function": f"{engine}:{function.__name__}",
            "plan": to_data(plan),
            "model": self.model_key,
            "attention": self.model.attention,
            "dtype": self.dtype,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    def _collect(self, parts: Sequence[Part], function: EngineFunction) -> Iterator[Event]:
        missing = []
        for part in parts:
            if part.job.state == DONE and (events := self._events(part)) is not None:
                yield from events
            else:
                if part.job.state in (DONE, FAILED):
                    part.job.state, part.job.id = WAITING, None
                missing.append(part)
        pause = _LOOKS[0]
        while missing:
            news = False
            room = len(missing) if self.detach else _AHEAD
            room -= sum(part.job.state == SENT for part in missing)
            for part in [part for part in missing if part.job.state == WAITING][: max(room, 0)]:
                self._courier.send(part, function)
                news = True
            for part in [part for part in missing if part.job.state == SENT]:
                news = self._courier.look(part, parts) or news
                if part.job.state == DONE:
                    missing.remove(part)
                    events = self._events(part)
                    assert events is not None
                    yield from events
            self.notify(self._in_words(parts))
            if missing and self.detach and all(part.job.state == SENT for part in missing):
                raise Detached(self.server.host)
            if missing:
                pause = _LOOKS[0] if news else min(1.5 * pause, _LOOKS[1])
                time.sleep(pause)

    def _events(self, part: Part) -> list[Event] | None:
        """What a job returned; None where it is not here, whole."""
        found = self.ledger.result(part.job)
        try:
            return None if found is None else unpack(*found, part.first_cell)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None  # a file that was changed by hand

    def _in_words(self, parts: Sequence[Part]) -> str:
        """How the jobs are, in few words: ``1/4 jobs, 1 running, position 3``."""
        jobs = [part.job for part in parts]
        done = sum(job.state == DONE for job in jobs)
        sent = [job for job in jobs if job.state == SENT]
        running = sum(job.status == "RUNNING" for job in sent)
        waiting = [job for job in sent if job.status != "RUNNING"]
        words = [f"{done}/{len(jobs)} jobs"]
        if running:
            words.append(f"{running} running")
        if waiting:
            # The server says it in a sentence, or what it does meanwhile ("Model Deploying...").
            said = " ".join(waiting[0].description.split()).rstrip(".")
            place = _POSITION.search(said)
            words.append(place[0].lower() if place else said or f"{len(waiting)} waiting")
        return ", ".join(words)


def model_key(model: Model, host: str) -> str:
    """What an NDIF server calls a model: the class that loads it, and which checkpoint.

    Raises:
        PersonaError: the model is a directory here and the server is another machine.
    """
    weights = model.weights
    if weights.is_local and not is_loopback(host):
        raise PersonaError(
            f"The model {weights.spec!r} is only on this machine and {host} is another; name a hub "
            "model that the server has."
        )
    checkpoint = {
        "repo_id": weights.path if weights.is_local else weights.model_id,
        "revision": weights.asked_revision,
        "task": "text-generation",
    }
    return f"{to_import_path(type(model.lm))}:{json.dumps(checkpoint)}"
