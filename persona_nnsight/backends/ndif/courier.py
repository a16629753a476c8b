"""Takes jobs to an NDIF server and brings back what they return; one job's life, step by step."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from persona_nnsight.backends.interface import EngineFunction
from persona_nnsight.backends.ndif.ledger import DONE, FAILED, SENT, WAITING, Job, Ledger
from persona_nnsight.backends.ndif.server import Answer, JobLostError, Server, one_line
from persona_nnsight.backends.ndif.versions import require_same_nnsight
from persona_nnsight.backends.wire.session import Envelope, run_block
from persona_nnsight.errors import PersonaError
from persona_nnsight.models.loading import Model
from persona_nnsight.plan.events import Event, Recorded, Scored, Written
from persona_nnsight.plan.packing import unpack
from persona_nnsight.plan.plan import Plan

#: Seconds before a passing trouble of the server is met again, doubled each time.
_PAUSE = 5.0
#: A job of which the server has said nothing new for so many seconds may be lost.
_SILENCE = 30.0
#: A queued job is given up after so much silence: where the server was seen to be away since the
#: job was sent, and where it was not (jobs of other people may take their time).
_GIVE_UP_AFTER_OUTAGE, _GIVE_UP = 120.0, 900.0
#: A running job says nothing until it ends; servers stop jobs earlier than this.
_GIVE_UP_RUNNING = 7200.0
#: A server that does not answer at all is given up after so many seconds while nothing was sent.
_FIRST_PATIENCE = 15.0
#: A job is sent at most so often before somebody is told.
_ATTEMPTS = 3

#: What a job says of how it ran, for ``run.json``.
_SERVED = ("dtype", "device", "attention", "path", "versions")

#: How the server begins to tell of its own troubles, which another attempt may not meet.
_PASSING = (
    "Critical server error",
    "Error provisioning model",
    "Error starting model",
    "Error submitting request",
    "Replica was evicted",
)


class HopelessError(PersonaError):
    """The same job would fail again."""


@dataclass
class Part:
    """A job and the cells it stands for.

    Attributes:
        job: its record.
        first_cell: of the whole plan.
        plan: what it computes.
        attempts: how often it was sent by this process.
        last_news: when the server last said something new of it, by the monotonic clock.
        last_doubt: when it was last looked into whether it is lost.
        replicas: of the model, when the job was first seen running.
    """

    job: Job
    first_cell: int
    plan: Plan
    attempts: int = 0
    last_news: float = 0.0
    last_doubt: float = 0.0
    replicas: frozenset[str] = frozenset()


class Courier:
    """Sends jobs, asks after them and takes their results, for one model on one server.

    Args:
        model: without weights.
        model_key: what the server calls it.
        server: the server.
        dtype: what the weights there have to be, or None.
        ledger: where everything is recorded.
        notify: told in a few words when there is a pause.
    """

    def __init__(
        self,
        model: Model,
        *,
        model_key: str,
        server: Server,
        dtype: str | None,
        ledger: Ledger,
        notify: Callable[[str], None],
    ) -> None:
        self.model, self.model_key = model, model_key
        self.server, self.dtype, self.ledger, self.notify = server, dtype, ledger, notify
        self._checked = False
        self._last_outage = 0.0

    def send(self, part: Part, function: EngineFunction) -> None:
        """Give a job to the server.

        Raises:
            PersonaError: the server refuses it, cannot understand it, lost it too often, or does
                not answer.
        """
        job = part.job
        if part.attempts >= _ATTEMPTS:
            raise PersonaError(
                f"{self.server.host} was sent a job {part.attempts} times and did none of them "
                f"(last: {job.description}); try again later."
            )
        if not self._checked:
            environment = self.server.patiently(
                self.server.environment, self.notify, _FIRST_PATIENCE
            )
            require_same_nnsight(environment, self.server.host)
            self._checked = True
        envelope = Envelope()
        run_block(self.model, function, part.plan, self.dtype, envelope)
        env = self.model.lm._remoteable_get_env()

        def submit() -> str:
            return self.server.submit(self.model_key, env, envelope.blob)

        job.id = self.server.patiently(submit, self._outage)
        job.state, job.status, job.description = SENT, "RECEIVED", ""
        job.sent, job.bytes_up = time.time(), len(envelope.blob)
        job.attempts += 1
        part.attempts += 1
        part.last_news = time.monotonic()
        self.ledger.save()

    def look(self, part: Part, parts: Sequence[Part]) -> bool:
        """Ask after a job, and take its result if it is done; whether there was news.

        Args:
            part: a job that was sent.
            parts: all jobs of the plan.

        Raises:
            PersonaError: it failed, its result cannot be read, or the server does not answer.
        """
        job = part.job
        assert job.id is not None
        identity = job.id
        answer = self.server.patiently(lambda: self.server.ask(identity), self._outage)
        part.last_news = part.last_news or time.monotonic()
        if answer is None:
            if self._silent(part):
                self._again(part, "the server knows nothing of it")
            return False
        news = (answer.status, answer.description) != (job.status, job.description)
        if news:
            job.status, job.description = answer.status, answer.description
            part.last_news = time.monotonic()
            self.ledger.save()
        if answer.status == "RUNNING" and not part.replicas:
            part.replicas = frozenset(self._replicas())
        if answer.status == "COMPLETED":
            self._take(part, answer)
        elif answer.status == "ERROR":
            self._fail(part, answer)
        elif self._silent(part) and (reason := self._lost(part, parts)):
            self._again(part, reason)
        return news

    # -- how it ends -----------------------------------------------------------------------------

    def _take(self, part: Part, answer: Answer) -> None:
        job = part.job
        try:
            result, size = self.server.patiently(
                lambda: self.server.fetch(answer.url), self._outage
            )
        except JobLostError as error:
            self._again(part, str(error))
            return
        try:
            facts = result["facts"]
            started, seconds = float(facts["started"]), float(facts["seconds"])
            served = {name: facts[name] for name in _SERVED}
            if not (math.isfinite(started) and math.isfinite(seconds)):
                raise ValueError("times that are no numbers")
            json.dumps(served)
            # A tensor of its own each: a server may send several that share memory.
            tensors = {name: value.clone() for name, value in result["tensors"].items()}
            if not _complete(part.plan, unpack(result["events"], tensors)):
                raise ValueError("other rows")
        except Exception as error:  # whatever was sent in its place
            raise PersonaError(
                f"The result that {self.server.host} sent cannot be read as the job's "
                f"({type(error).__name__}); nothing of it was used."
            ) from error
        self.ledger.keep(job, result["events"], tensors)
        self.ledger.server = served
        job.state, job.bytes_down = DONE, size
        job.started, job.ended = started, started + seconds
        job.run_seconds = seconds if answer.runtime is None else answer.runtime
        if job.sent is not None:
            job.queue_seconds = max(0.0, round(started - job.sent, 3))
        self.ledger.save()

    def _fail(self, part: Part, answer: Answer) -> None:
        job = part.job
        words = answer.description
        if words.startswith(_PASSING):
            self.notify(one_line(words))
            time.sleep(_PAUSE * 2 ** (part.attempts - 1))
            self._again(part, words)
            return
        if words.startswith("Could not deploy this model"):
            # Nor will any other job of it come to anything.
            for other in self.ledger.jobs.values():
                if other.state == SENT:
                    other.state, other.id = WAITING, None
            self.ledger.save()
            raise HopelessError(
                f"{self.server.host} cannot serve {self.model.weights.model_id!r} "
                f"({one_line(_gist(words))}); `persona doctor --backend ndif --model ...` says "
                "which models it has."
            )
        job.state = FAILED
        self.ledger.save()
        gist = _gist(words)
        kind, _, message = gist.partition(": ")
        if kind.rpartition(".")[2] == PersonaError.__name__:
            raise HopelessError(message)
        advice = ""
        if "execution timeout" in gist:
            advice = "; use fewer --layers or --positions at a time, or fewer --conditions"
        elif self.ledger.directory is not None:
            advice = f"; `persona jobs -v {self.ledger.directory}` shows what the server said"
        raise PersonaError(
            f"A job of {job.cells} cells failed on {self.server.host} ({one_line(gist)}){advice}."
        )

    # -- whether it ends -------------------------------------------------------------------------

    def _silent(self, part: Part) -> bool:
        """Whether it is time to wonder about a job."""
        now = time.monotonic()
        if now - max(part.last_news, part.last_doubt) < _SILENCE:
            return False
        part.last_doubt = now
        return True

    def _lost(self, part: Part, parts: Sequence[Part]) -> str | None:
        """Why the server is not going to finish a job, if that is so.

        A server that was restarted knows nothing of the jobs it had, and the last thing it said of
        them stays where it was written.
        """
        job = part.job
        replicas = self._replicas()
        starting = job.status in ("PROVISIONING", "DEPLOYING")  # which may take minutes
        if not starting and not replicas:
            return "the server has been restarted since, or has dropped the model"
        if job.status == "RUNNING":
            gone = part.replicas and part.replicas.isdisjoint(replicas)
            if gone or time.monotonic() - part.last_news > _GIVE_UP_RUNNING:
                return "what ran it is gone from the server"
            return None
        sent = job.sent or 0.0
        # Jobs of one model are taken in the order in which they came.
        overtaken = any(each.job.state == DONE and (each.job.sent or 0.0) > sent for each in parts)
        patience = _GIVE_UP_AFTER_OUTAGE if self._last_outage > sent else _GIVE_UP
        if overtaken or time.monotonic() - part.last_news > patience:
            trouble = "did not finish starting the model" if starting else "no longer works on it"
            return f"the server {trouble}"
        return None

    def _replicas(self) -> dict[str, str]:
        """The replicas of our model that are there, with their states."""
        found = self.server.patiently(self.server.deployments, self._outage)
        replicas = found.get(self.model_key, {})
        return {identity: state for identity, state in replicas.items() if state != "COLD"}

    def _outage(self, words: str) -> None:
        """The server did not answer: it may be another one when it is back."""
        self._last_outage = time.time()
        self.notify(words)

    def _again(self, part: Part, reason: str) -> None:
        """Have a job sent anew; whatever becomes of the old one, its result is not taken."""
        job = part.job
        job.state, job.id, job.status = WAITING, None, ""
        job.description = one_line(reason)
        self.ledger.save()


def _complete(plan: Plan, events: Sequence[Event]) -> bool:
    """Whether these are the plan's results, each once."""
    wanted: Counter[tuple[str, int, int]] = Counter()
    for cell in range(len(plan.cells)):
        wanted["recorded", cell, 0] += 1
        for number, edit in enumerate(plan.edits):
            if edit.runs_on(cell):
                wanted["scored", cell, number] += edit.scored
                wanted["written", cell, number] += edit.generate > 0
    found: Counter[tuple[str, int, int]] = Counter()
    for event in events:
        match event:
            case Recorded():
                found.update(("recorded", cell, 0) for cell in event.cells)
                if plan.keeps_residuals != (event.residuals is not None):
                    return False
            case Scored():
                found["scored", event.cell, event.edit] += 1
            case Written():
                found["written", event.cell, event.edit] += 1
    return +wanted == found


def _gist(text: str) -> str:
    """A text without the traceback that it may end with, but for that one's last line."""
    before, found, trace = text.partition("Traceback (most recent call last)")
    lines = [line for line in trace.splitlines() if line.strip()]
    while lines and not lines[-1].strip(" ^~"):
        lines.pop()  # what marks a place in the line above
    gist = f"{before.strip()} {lines[-1]}" if found and lines else text
    return gist.strip() or "no reason given"
