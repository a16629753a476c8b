"""On an NDIF server: a plan is cut into jobs, each one session there that returns numbers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from nnsight.util import to_import_path

from persona_nnsight.backends import Detached, EngineFunction
from persona_nnsight.backends.block import Envelope, run_block
from persona_nnsight.backends.ledger import DONE, FAILED, SENT, WAITING, Job, Ledger
from persona_nnsight.backends.packing import unpack
from persona_nnsight.backends.server import Answer, JobLostError, Server, is_loopback
from persona_nnsight.backends.versions import require_same_nnsight
from persona_nnsight.costs import Limits, estimate, fit_limits
from persona_nnsight.engine import Event
from persona_nnsight.errors import PersonaError
from persona_nnsight.models import Model
from persona_nnsight.plan import Plan
from persona_nnsight.plan_data import part_of, to_data

#: A job has as many cells as push this many tokens through the model, within these bounds: a grid
#: is a handful of jobs, and none of them outlasts what a server allows a job.
_JOB_TOKENS = 60_000
_MOST_CELLS = 16
#: Jobs that are with the server at a time: enough for several replicas, and no more than is polite.
_AHEAD = 4
#: Seconds between two looks at a job: from the first to the second, longer while nothing happens.
_LOOKS = (0.3, 5.0)
#: A job of which the server has said nothing new for so many seconds may be lost.
_SILENCE = 30.0
#: After as many seconds of silence a queued job is given up, whatever the server says of the model.
_GIVE_UP = 900.0
#: A server that does not answer at all is given up after so many seconds while nothing was sent.
_FIRST_PATIENCE = 15.0
#: A job is sent at most so often.
_ATTEMPTS = 3

#: The server's own troubles, which another attempt may not meet.
_PASSING = ("Critical server error", "Error provisioning model", "Error starting model")


@dataclass
class _Part:
    """A job and the cells it stands for."""

    job: Job
    first_cell: int
    plan: Plan
    last_news: float = 0.0


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
        self._checked = False

    def limits(self, plan: Plan) -> Limits:
        """As many cells as make a job; batches within it are cut on the server."""
        whole = fit_limits(plan, self.model.tree, free_bytes=1 << 62, gpu=True)
        tokens = estimate(plan, self.model, whole).token_forwards
        cells = _JOB_TOKENS * len(plan.cells) // tokens
        return replace(whole, cells=min(max(cells, 1), _MOST_CELLS))

    def record(self) -> dict[str, Any]:
        """See `Backend.record`."""
        return {"name": "ndif", "model_key": self.model_key, **self.ledger.record()}

    def run(self, function: EngineFunction, plan: Plan, limits: Limits) -> Iterator[Event]:
        """See `Backend.run`; a part of the plan is yielded when its job is done.

        Raises:
            PersonaError: the server refuses or fails.
            Detached: after Ctrl-C, or where asked for; the jobs are in the ledger.
        """
        parts = self._parts(function, plan, limits.cells)
        try:
            yield from self._collect(parts, function)
        except KeyboardInterrupt:
            if any(part.job.state == SENT for part in parts):
                raise Detached(self.server.host, interrupted=True) from None
            raise
        except PersonaError:
            if not any(job.state in (SENT, DONE, FAILED) for job in self.ledger.jobs.values()):
                self.ledger.discard()
            raise

    def _parts(self, function: EngineFunction, plan: Plan, cells: int) -> list[_Part]:
        starts = range(0, len(plan.cells), cells)
        plans = [
            part_of(plan, range(start, min(start + cells, len(plan.cells)))) for start in starts
        ]
        wanted = [(self._key(function, part), len(part.cells)) for part in plans]
        jobs = self.ledger.expect(wanted)
        return [_Part(*found) for found in zip(jobs, starts, plans, strict=True)]

    def _key(self, function: EngineFunction, plan: Plan) -> str:
        """A digest of everything that the numbers of a job depend on."""
        described = {
            "function": f"{function.__module__}:{function.__name__}",
            "plan": to_data(plan),
            "model": self.model_key,
            "attention": self.model.attention,
            "dtype": self.dtype,
            "version": version("persona-nnsight"),
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    def _collect(self, parts: Sequence[_Part], function: EngineFunction) -> Iterator[Event]:
        missing = []
        for part in parts:
            if part.job.state == DONE and (events := self._events(part)) is not None:
                yield from events
            else:
                if part.job.state in (DONE, FAILED):
                    part.job.state, part.job.id = WAITING, None
                missing.append(part)
        look = _LOOKS[0]
        while missing:
            ahead = len(missing) if self.detach else _AHEAD
            news = False
            for part in missing[:ahead]:
                if part.job.state == WAITING:
                    self._send(part, function)
                    news = True
            for part in [part for part in missing[:ahead] if part.job.state == SENT]:
                before = (part.job.status, part.job.description)
                self._look(part, parts)
                news = news or before != (part.job.status, part.job.description)
                if part.job.state == DONE:
                    missing.remove(part)
                    events = self._events(part)
                    assert events is not None
                    yield from events
            self.notify(self._in_words(parts))
            if missing and self.detach and all(part.job.state == SENT for part in missing):
                raise Detached(self.server.host)
            if missing:
                look = _LOOKS[0] if news else min(1.5 * look, _LOOKS[1])
                time.sleep(look)

    def _events(self, part: _Part) -> list[Event] | None:
        found = self.ledger.result(part.job)
        return None if found is None else unpack(*found, part.first_cell)

    def _send(self, part: _Part, function: EngineFunction) -> None:
        """Give a job to the server.

        Raises:
            PersonaError: the server refuses it, cannot understand it, or does not answer.
        """
        job = part.job
        if job.attempts >= _ATTEMPTS:
            raise PersonaError(
                f"{self.server.host} lost a job {job.attempts} times (last: {job.description}); "
                "try again later."
            )
        if not self._checked:
            environment = self.server.patiently(
                self.server.environment, self.notify, _FIRST_PATIENCE
            )
            require_same_nnsight(environment, self.server.host)
            self._checked = True
        envelope = Envelope()
        run_block(self.model.lm, function, part.plan, self.dtype, envelope)
        env = self.model.lm._remoteable_get_env()

        def submit() -> str:
            return self.server.submit(self.model_key, env, envelope.blob)

        job.id = self.server.patiently(submit, self.notify)
        job.state, job.status, job.description = SENT, "RECEIVED", ""
        job.attempts += 1
        job.sent, job.bytes_up = time.time(), len(envelope.blob)
        part.last_news = time.monotonic()
        self.ledger.save()

    def _look(self, part: _Part, parts: Sequence[_Part]) -> None:
        """Ask after a job, and take its result if it is done.

        Raises:
            PersonaError: it failed, its result cannot be read, or the server does not answer.
        """
        job = part.job
        assert job.id is not None
        identity = job.id
        answer = self.server.patiently(lambda: self.server.ask(identity), self.notify)
        part.last_news = part.last_news or time.monotonic()
        if answer is not None and (answer.status, answer.description) != (
            job.status,
            job.description,
        ):
            job.status, job.description = answer.status, answer.description
            part.last_news = time.monotonic()
            self.ledger.save()
        if answer is not None and answer.status == "COMPLETED":
            self._take(part, answer)
        elif answer is not None and answer.status == "ERROR":
            self._fail(part, answer)
        elif reason := self._lost(part, parts, known=answer is not None):
            self._again(part, reason)

    def _take(self, part: _Part, answer: Answer) -> None:
        job = part.job
        try:
            result, size = self.server.patiently(lambda: self.server.fetch(answer.url), self.notify)
        except JobLostError as error:
            self._again(part, str(error))
            return
        facts = result["facts"]
        self.ledger.keep(job, result["events"], result["tensors"])
        self.ledger.server = {
            name: facts[name] for name in ("dtype", "device", "attention", "versions")
        }
        job.state, job.bytes_down = DONE, size
        job.started, job.ended = facts["started"], facts["started"] + facts["seconds"]
        job.run_seconds = facts["seconds"] if answer.runtime is None else answer.runtime
        if job.sent is not None:
            job.queue_seconds = max(0.0, round(job.started - job.sent, 3))
        self.ledger.save()

    def _fail(self, part: _Part, answer: Answer) -> None:
        job = part.job
        words = answer.description
        if any(passing in words for passing in _PASSING):
            self.notify(_one_line(words))
            time.sleep(_LOOKS[1])
            self._again(part, words)
            return
        if words.startswith("Could not deploy this model"):
            job.state, job.id = WAITING, None
            raise PersonaError(
                f"{self.server.host} cannot serve {self.model.weights.model_id!r} "
                f"({_one_line(words)}); `persona doctor --backend ndif --model ...` says which "
                "models it has."
            )
        job.state = FAILED
        self.ledger.save()
        lines = [line for line in words.strip().splitlines() if line.strip()] or ["no reason given"]
        kind, _, message = lines[-1].partition(": ")
        if kind.rpartition(".")[2] == PersonaError.__name__:
            raise PersonaError(message)
        kept = self.ledger.directory
        where = "" if kept is None else f"; `persona jobs {kept}` shows what the server said"
        raise PersonaError(
            f"A job of {job.cells} cells failed on {self.server.host} ({_one_line(lines[-1])})"
            f"{where}."
        )

    def _lost(self, part: _Part, parts: Sequence[_Part], *, known: bool) -> str | None:
        """Why the server is not going to finish a job, if that is so.

        A server that was restarted knows nothing of the jobs it had, and the last thing it said of
        them stays where it was written.
        """
        silence = time.monotonic() - part.last_news
        if silence < _SILENCE:
            return None
        if not known:
            return "the server knows nothing of it"
        job = part.job
        states = self.server.patiently(self.server.deployments, self.notify)
        part.last_news = max(part.last_news, time.monotonic() - 2 * _SILENCE)
        if not states.get(self.model_key):
            return "the server has been restarted since, or has dropped the model"
        overtaken = any(
            other.job.state == DONE and (other.job.sent or 0) > (job.sent or 0) for other in parts
        )
        # Jobs of one model are taken in the order in which they came.
        if job.status != "RUNNING" and (overtaken or silence > _GIVE_UP):
            return "the server no longer works on it"
        return None

    def _again(self, part: _Part, reason: str) -> None:
        """Have a job sent anew; whatever becomes of the old one, its result is not taken."""
        job = part.job
        job.state, job.id, job.status = WAITING, None, ""
        job.description = _one_line(reason)
        self.ledger.save()

    def _in_words(self, parts: Sequence[_Part]) -> str:
        """How the jobs are: ``1 of 4 jobs done, 1 running, 2 queued (position 3)``."""
        jobs = [part.job for part in parts]
        done = sum(job.state == DONE for job in jobs)
        sent = [job for job in jobs if job.state == SENT]
        running = sum(job.status == "RUNNING" for job in sent)
        queued = [job for job in sent if job.status != "RUNNING"]
        words = [f"{done} of {len(jobs)} jobs done"]
        if running:
            words.append(f"{running} running")
        if queued:
            place = _one_line(queued[0].description).rstrip(".") or queued[0].status.lower()
            words.append(f"{len(queued)} waiting ({place})")
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


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
