"""A small NDIF server for tests: the HTTP interface that `Server` uses, on this machine.

It really runs the jobs it is given, on a model with weights, and it can be told to misbehave:
`FakeNdif.replies` holds what an endpoint answers in place of its own answer, `FakeNdif.scripts`
what is said of each job, poll by poll.
"""

from __future__ import annotations

import io
import json
import linecache
import platform
import ssl
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any

import pytest
import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import _saves, dec, inc

from persona_nnsight import Model
from persona_nnsight.backends.ndif.backend import model_key

KEY = "canary-5b1e9c77"
"""The API key of the tests, which must not turn up anywhere."""

PACKAGES = {name: version(name) for name in ("nnsight", "torch", "transformers")}


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; a body that is not bytes is sent as JSON. Status 0 hangs up."""

    status: int
    body: Any = b""

    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


DROP = Reply(0)
"""No answer: the connection is closed."""

Word = tuple[str, str] | None
"""(status, description) of a job, or None where the server knows nothing of it (404)."""

DONE: tuple[Word, ...] = (("COMPLETED", "Your job has been completed."),)


@dataclass
class Seen:
    """A request that reached the server; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class FakeJob:
    """One POST: what came, what it gave, and what is still to be said of it."""

    id: str
    envelope: dict[str, Any]
    blob: bytes
    script: list[Word]
    result: bytes = b""
    polls: int = 0


@dataclass
class FakeNdif:
    """The server, a context manager that stops it.

    Attributes:
        model: with weights, to run jobs on; None for a server that is only talked to.
        replies: by endpoint (``/env``, ``/request``, ``/result`` ...), used up one by one before
            the server's own answers.
        scripts: of the jobs in the order in which they come; `DONE` for the others.
        deployments: states of the replicas by model key.
        python, packages: what ``/env`` says.
        jobs: all that were taken.
        seen: all requests.
        meanwhile: called before each answer to a poll, with the job.
    """

    model: Model | None = None
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    scripts: list[tuple[Word, ...]] = field(default_factory=list)
    deployments: dict[str, list[str]] = field(default_factory=dict)
    python: str = platform.python_version()
    packages: dict[str, str] = field(default_factory=lambda: dict(PACKAGES))
    jobs: list[FakeJob] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    meanwhile: Callable[[FakeJob], None] = lambda _: None

    def __enter__(self) -> FakeNdif:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.005,), daemon=True)
        self.thread.start()
        self.lock = threading.Lock()
        if self.model is not None:
            self.deployments[model_key(self.model, self.url)] = ["RUNNING"]
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def posts(self) -> int:
        """How many jobs were sent, those that were refused too."""
        return sum(seen.method == "POST" for seen in self.seen)

    def calls(self, endpoint: str) -> int:
        return sum(_endpoint(seen.path) == endpoint for seen in self.seen)

    def reply(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        """The answer to a request."""
        self.seen.append(Seen(method, path, headers))
        endpoint = _endpoint(path)
        if self.replies.get(endpoint):
            return self.replies[endpoint].pop(0)
        match method, endpoint:
            case "POST", "/request":
                return self._take(headers["content-type"], body)
            case "GET", "/connected":
                return Reply(200, "connected")
            case "GET", "/env":
                return Reply(200, {"python_version": self.python, "packages": self.packages})
            case "GET", "/status":
                return Reply(200, {"deployments": self._replicas()})
            case "GET", "/whoami":
                return Reply(200, {"email": "someone@example.org"})
            case "GET", "/response":
                return self._word(path.removeprefix("/response/"))
            case "GET", "/result":
                found = [job for job in self.jobs if job.id == path.removeprefix("/result/")]
                return Reply(200, found[0].result) if found else Reply(404)
        return Reply(404, {"detail": "Not Found"})

    def _replicas(self) -> dict[str, dict[str, str]]:
        return {
            f"replica-{number}-{place}": {"model_key": key, "application_state": state}
            for number, (key, states) in enumerate(self.deployments.items())
            for place, state in enumerate(states)
        }

    def _take(self, content_type: str, body: bytes) -> Reply:
        fields = _form(content_type, body)
        envelope, blob = json.loads(fields["data"]), fields["blob"]
        with self.lock:
            number = len(self.jobs)
            script = list(self.scripts[number] if number < len(self.scripts) else DONE)
            job = FakeJob(f"job-{number + 1}", envelope, blob, script)
            if self.model is not None:
                try:
                    job.result = packed(_executed(self.model, blob))
                except Exception:  # whatever the block raised, as on a server
                    job.script = [("ERROR", traceback.format_exc())]
            self.jobs.append(job)
        return Reply(200, {"id": job.id, "status": "RECEIVED"})

    def _word(self, identity: str) -> Reply:
        found = [job for job in self.jobs if job.id == identity]
        if not found:
            return Reply(404, {"detail": "Response not found."})
        job = found[0]
        self.meanwhile(job)
        job.polls += 1
        word = job.script.pop(0) if len(job.script) > 1 else job.script[0]
        if word is None:
            return Reply(404, {"detail": "Response not found."})
        status, description = word
        answer: dict[str, Any] = {"id": job.id, "status": status, "description": description}
        if status == "COMPLETED":
            answer |= {"data": f"{self.url}/result/{job.id}", "meta": {"runtime": 0.25}}
        return Reply(200, answer)


def packed(saved: dict[str, Any]) -> bytes:
    """What a block saved, as a server stores it."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def _executed(model: Model, blob: bytes) -> dict[str, Any]:
    """Run a block as the server's actor does, and return the variables that it saved."""
    before = dict(linecache.cache)
    tracer = RequestModel.deserialize(blob, model.lm._remoteable_persistent_objects(), True)
    inc()
    try:
        tracer.execute(tracer.info.code)
        return {name: x for name, x in tracer.info.frame.f_locals.items() if id(x) in _saves()}
    finally:
        dec()
        # The block took the place of our source file, which nnsight reads for the next block.
        linecache.cache.clear()
        linecache.cache.update(before)


def _endpoint(path: str) -> str:
    return "/" + path.split("/")[1]


def _form(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of multipart/form-data."""
    boundary = b"--" + content_type.partition("boundary=")[2].encode()
    fields = {}
    for part in body.split(boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = head.partition(b'name="')[2].partition(b'"')[0].decode()
        fields[name] = content.removesuffix(b"\r\n")
    return fields


def _handler(fake: FakeNdif) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = fake.reply(self.command, self.path, headers, body)
            if not reply.status:
                self.close_connection = True
                return
            content = reply.content()
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


class Clock:
    """Time for `persona_nnsight.backends`, in which sleeping takes none.

    Attributes:
        now: seconds, moved by `sleep`.
        sleeps: how long each was.
        on_sleep: called before each.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []
        self.on_sleep: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        assert len(self.sleeps) < 600, "this would wait for ever"
        self.sleeps.append(seconds)
        self.on_sleep()
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    @staticmethod
    def time() -> float:
        return time.time()


_shared_context = cache(ssl.create_default_context)


def share_ssl_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the certificates once, not for every client: nothing here speaks https."""
    monkeypatch.setattr(ssl, "create_default_context", _shared_context)


def stop_clocks(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Put a `Clock` in the place of time, where it is waited."""
    clock = Clock()
    for module in ("backend", "courier", "server"):
        monkeypatch.setattr(f"persona_nnsight.backends.ndif.{module}.time", clock)
    return clock
