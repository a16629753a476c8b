"""Runs on a server that is a fake but really computes: whole runs, lost jobs, failures, commands.

The server is `fake_ndif.FakeNdif`; the one of a deployment is tested in ``tests/ndif``.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nnsight
import pandas as pd
import pytest
import torch
from cells import MARKED, TINY_GRID
from commands import Outcome, Persona, assert_one_sentence
from fake_ndif import (
    DONE,
    DROP,
    KEY,
    Clock,
    FakeJob,
    FakeNdif,
    Reply,
    Word,
    packed,
    share_ssl_context,
    stop_clocks,
)
from tiny import make_model_dir

from persona_nnsight import (
    CaptureResult,
    EditResult,
    Grid,
    Model,
    PersonaError,
    capture,
    inject,
    load_model,
    markers,
    read_table,
    steer,
    substitute,
)
from persona_nnsight.backends.interface import Detached
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.backends.ndif.backend import NdifBackend
from persona_nnsight.backends.ndif.ledger import DONE as HERE
from persona_nnsight.backends.ndif.ledger import FAILED, SENT, Ledger
from persona_nnsight.backends.ndif.server import Server
from persona_nnsight.backends.simulate import SimulatedBackend
from persona_nnsight.experiments.execution import Interrupted
from persona_nnsight.experiments.results import Result
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.plan import Plan
from persona_nnsight.storage.journal import Journal

Tiny = Callable[..., Model]
TinyDir = Callable[..., Path]

TWO_BY_TWO = TINY_GRID.select(["yoda", "marx"])
SMALL: dict[str, Any] = {
    "layers": (2,),
    "positions": "p_last",
    "conditions": "additive",
    "window": 2,
}
"""With two cells to a job, two jobs."""

QUEUED, RUNNING = ("QUEUED", "Position 1 in the queue."), ("RUNNING", "It runs.")


@pytest.fixture(scope="module")
def bare(tiny_dir: TinyDir) -> Model:
    return load_model(str(tiny_dir("llama")), weights=False)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    share_ssl_context(monkeypatch)


@pytest.fixture
def fake(tiny: Tiny, tiny_dir: TinyDir) -> Iterator[FakeNdif]:
    with FakeNdif(tiny("llama")) as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_clocks(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def two_cells_a_job() -> Iterator[None]:
    """For the server's jobs and, so that numbers are equal, for batches on this machine."""
    sized = LocalBackend.limits

    def limits(self: Any, plan: Plan) -> Limits:
        return replace(sized(LocalBackend(self.model), plan), cells=2)

    with pytest.MonkeyPatch.context() as patched:
        for backend in (NdifBackend, LocalBackend):
            patched.setattr(backend, "limits", limits)
        yield


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


@pytest.fixture
def world(fake: FakeNdif, clock: Clock, bare: Model) -> World:
    return World(fake, clock, bare)


@pytest.fixture(scope="module")
def expected(tiny: Tiny, two_cells_a_job: None) -> pd.DataFrame:
    return substitute(tiny("llama"), TWO_BY_TWO, **SMALL).frame()


def assert_equal(result: Result, frame: pd.DataFrame) -> None:
    assert result.complete
    pd.testing.assert_frame_equal(result.frame(), frame, check_exact=True)


def jobs_of(backend: NdifBackend) -> list[tuple[str, str | None, int]]:
    return [(job.state, job.id, job.attempts) for job in backend.ledger.jobs.values()]


# ---------------------------------------------------------------------------------- whole runs


def test_a_run_in_jobs_equals_a_local_one(world: World, tiny: Tiny, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"layers": (2, 4), "positions": "p_last,g1", "generate": 3}
    world.fake.scripts = [(QUEUED, QUEUED, QUEUED, RUNNING, *DONE), DONE, (RUNNING, *DONE)]
    said = list[str]()
    backend = world.backend(tmp_path / "there", notify=said.append)
    rows = list[int]()
    there = substitute(
        world.model,
        TINY_GRID,
        **arguments,
        backend=backend,
        progress=lambda done, _: rows.append(done),
    )
    here = substitute(tiny("llama"), TINY_GRID, **arguments)
    assert world.fake.posts == 3
    assert [job.polls for job in world.fake.jobs] == [5, 1, 2]  # the first came last
    assert there.complete
    assert there.continuations == here.continuations
    assert there.texts == here.texts
    pd.testing.assert_frame_equal(there.frame(), here.frame(), check_exact=True)
    assert rows[-1] == there.plan.n_results
    there.save(tmp_path / "there", finishes=True)
    here.save(tmp_path / "here")
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == names
    different = [
        name
        for name in names
        if (tmp_path / "there" / name).read_bytes() != (tmp_path / "here" / name).read_bytes()
    ]
    assert different == ["run.json"]

    manifest = json.loads((tmp_path / "there" / "run.json").read_text("utf-8"))
    where = manifest["backend"]
    assert where["name"] == "ndif"
    assert where["host"] == world.fake.url
    assert [job["id"] for job in where["jobs"]] == ["job-1", "job-2", "job-3"]
    assert [job["cells"] for job in where["jobs"]] == [2, 2, 2]
    for job, sent in zip(where["jobs"], world.fake.jobs, strict=True):
        assert (job["state"], job["status"], job["attempts"]) == ("done", "COMPLETED", 1)
        assert (job["bytes_up"], job["bytes_down"]) == (len(sent.blob), len(sent.result))
        assert (job["run_seconds"], job["queue_seconds"] >= 0) == (0.25, True)
    assert where["bytes_up"] == sum(len(job.blob) for job in world.fake.jobs)
    assert manifest["model"]["dtype"] == where["server"]["dtype"] == "float32"
    assert "3/3 jobs" in said
    assert "1/3 jobs, 1 running, position 1" in said


def test_capture_comes_back_whole(world: World, tiny: Tiny, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"layers": (1, 3), "positions": "p_user_last,p_last,g2"}
    backend = world.backend(tmp_path / "run")
    there = capture(world.model, TINY_GRID, **arguments, backend=backend)
    here = capture(tiny("llama"), TINY_GRID, **arguments)
    assert isinstance(there, CaptureResult)
    for name, value in here.residuals.items():
        assert torch.equal(there.residuals[name], value)
    pd.testing.assert_frame_equal(there.frame(), here.frame(), check_exact=True)


def test_what_the_server_is_asked(world: World) -> None:
    world.run(world.backend())
    assert world.fake.calls("/env") == 1  # for all jobs
    key = world.backend().model_key
    assert {job.envelope["model_key"] for job in world.fake.jobs} == {key}
    assert key.startswith("nnsight.modeling.transformers.TransformersModel:")
    assert json.loads(key.partition(":")[2])["repo_id"] == world.model.weights.path
    for job in world.fake.jobs:
        assert job.envelope["env"] == world.model.lm._remoteable_get_env()


def test_a_model_of_this_machine_is_not_asked_of_another(world: World) -> None:
    with pytest.raises(PersonaError, match=r"is only on this machine and https://ndif.example.org"):
        NdifBackend(world.model, Server("https://ndif.example.org"))


def test_jobs_ahead_are_few(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Limits(cells=1, rows=100)
    monkeypatch.setattr(NdifBackend, "limits", lambda *_: one)
    world.fake.scripts = [(QUEUED, QUEUED, *DONE)] * 6
    most = 0

    def look(_: FakeJob) -> None:
        nonlocal most
        waiting = [job for job in world.fake.jobs if job.script[0] is not None]
        most = max(most, sum(len(job.script) > 1 for job in waiting))

    world.fake.meanwhile = look
    result = substitute(world.model, TINY_GRID, **SMALL, backend=world.backend())
    assert len(result.frame()) == world.fake.posts == 6
    assert most == 4


def test_a_weightless_model_needs_a_server(bare: Model) -> None:
    for backend in (LocalBackend(bare), SimulatedBackend(bare)):
        with pytest.raises(PersonaError, match="without weights"):
            substitute(bare, TWO_BY_TWO, **SMALL, backend=backend)


EXPERIMENTS: dict[str, Callable[..., Result]] = {
    "substitute": lambda model, **options: substitute(
        model, MARKED, layers=(2, 4), positions="p_last,g1", generate=3, **options
    ),
    "capture": lambda model, **options: capture(
        model, MARKED, layers=(0, 3), positions="p_last,g1", **options
    ),
    "inject": lambda model, **options: inject(
        model, MARKED, layers="2,3; 4", generate=3, **options
    ),
    "markers": lambda model, **options: markers(model, MARKED, layers="2", tokens=5, **options),
    "steer": lambda model, **options: steer(
        model, MARKED, layers=(2,), alpha="0,2", host="by", generate=3, **options
    ),
}


@pytest.mark.parametrize("command", EXPERIMENTS)
def test_simulated_equals_local(tiny: Tiny, command: str) -> None:
    model, experiment = tiny("llama"), EXPERIMENTS[command]
    before = list(sys.meta_path)
    simulated = experiment(model, backend=SimulatedBackend(model))
    assert sys.meta_path == before
    local = experiment(model)
    assert simulated.where == {"name": "simulate"}
    assert simulated.complete
    assert simulated.texts == local.texts
    assert simulated.continuations == local.continuations
    for name, table in local.tables.items():
        pd.testing.assert_frame_equal(simulated.tables[name], table, check_exact=True)
    if isinstance(local, CaptureResult):
        assert isinstance(simulated, CaptureResult)
        for key, value in local.residuals.items():
            assert torch.equal(simulated.residuals[key], value)


# ------------------------------------------------------------------------------- what goes wrong


def test_a_job_that_the_server_forgot(world: World, expected: pd.DataFrame) -> None:
    world.fake.scripts = [(RUNNING, None)]
    backend = world.backend()
    assert_equal(world.run(backend), expected)
    assert jobs_of(backend) == [(HERE, "job-3", 2), (HERE, "job-2", 1)]
    assert world.fake.posts == 3


def test_a_moment_of_forgetting_is_no_loss(world: World, expected: pd.DataFrame) -> None:
    world.fake.scripts = [(None, None, RUNNING, None, *DONE)]
    assert_equal(world.run(world.backend()), expected)
    assert world.fake.posts == 2


def test_a_restarted_server(world: World, expected: pd.DataFrame) -> None:
    """Its store still says RUNNING, and no replica is left that could be."""
    world.fake.scripts = [(QUEUED, RUNNING), DONE]
    (key,) = world.fake.deployments
    before = world.fake.deployments[key]
    world.fake.deployments.clear()

    def deploys(job: FakeJob) -> None:
        if job.id == "job-3":
            world.fake.deployments[key] = before

    world.fake.meanwhile = deploys
    backend = world.backend()
    assert_equal(world.run(backend), expected)
    assert jobs_of(backend) == [(HERE, "job-3", 2), (HERE, "job-2", 1)]


def test_a_server_with_other_replicas(world: World, expected: pd.DataFrame) -> None:
    """Restarted, and somebody has asked for the model again: what ran our job is gone."""
    world.fake.scripts = [(RUNNING,), DONE]
    (key,) = world.fake.deployments
    backend = world.backend()

    def restarts() -> None:
        if len(world.clock.sleeps) == 3:
            world.fake.deployments = {"another": ["RUNNING"], key: ["RUNNING"]}

    world.clock.on_sleep = restarts
    assert_equal(world.run(backend), expected)
    assert jobs_of(backend) == [(HERE, "job-3", 2), (HERE, "job-2", 1)]


def test_a_job_that_was_overtaken(world: World, expected: pd.DataFrame) -> None:
    world.fake.scripts = [(QUEUED,), DONE]
    backend = world.backend()
    assert_equal(world.run(backend), expected)
    assert jobs_of(backend)[0] == (HERE, "job-3", 2)


def test_a_long_job_is_not_given_up(world: World, expected: pd.DataFrame) -> None:
    world.fake.scripts = [(*[RUNNING] * 250, *DONE), DONE]
    assert_equal(world.run(world.backend()), expected)
    assert world.fake.posts == 2
    assert world.clock.now > 2000


def test_a_queue_that_moves_is_not_given_up(world: World, expected: pd.DataFrame) -> None:
    places = [("QUEUED", f"Position {place}.") for place in range(16, 0, -1)]
    slow: list[Word] = [word for word in places for _ in range(20)]
    world.fake.scripts = [(*slow, *DONE)]
    one_job = TWO_BY_TWO.select(["yoda"])
    result = substitute(world.model, one_job, **SMALL, backend=world.backend())
    assert_equal(result, expected[expected["persona"] == "yoda"])
    assert world.fake.posts == 1
    assert world.clock.now > 2000


def test_a_queue_that_stands_still_is_given_up(world: World, expected: pd.DataFrame) -> None:
    world.fake.scripts = [(QUEUED,)]
    one_job = TWO_BY_TWO.select(["yoda"])
    backend = world.backend()
    result = substitute(world.model, one_job, **SMALL, backend=backend)
    assert_equal(result, expected[expected["persona"] == "yoda"])
    assert jobs_of(backend) == [(HERE, "job-2", 2)]
    assert world.clock.now > 1900


def test_a_lost_jobs_late_result_is_not_used(world: World, expected: pd.DataFrame) -> None:
    """The old job finishes after all, with other numbers."""
    world.fake.scripts = [(RUNNING, None), DONE, (RUNNING, RUNNING, *DONE)]

    def spoil(job: FakeJob) -> None:
        if job.id == "job-3":
            old = world.fake.jobs[0]
            old.script, old.result = list(DONE), b"never to be read"

    world.fake.meanwhile = spoil
    assert_equal(world.run(world.backend()), expected)
    late = [seen.path for seen in world.fake.seen if seen.path.endswith("job-1")]
    again = [seen.path for seen in world.fake.seen].index("/response/job-3")
    assert late
    assert "/result/job-1" not in late
    assert all(seen.path != "/response/job-1" for seen in world.fake.seen[again:])


def test_three_losses_are_enough(world: World, tmp_path: Path) -> None:
    world.fake.scripts = [DONE, (None,), (None,), (None,), (None,)]
    backend = world.backend(tmp_path / "run")
    with pytest.raises(PersonaError, match=r"was sent a job 3 times .*\(last: .*nothing of it\)"):
        world.run(backend)
    assert world.fake.posts == 4
    assert Ledger.load(tmp_path / "run").jobs.keys() == backend.ledger.jobs.keys()


def test_after_three_losses_it_can_be_resumed(
    world: World, expected: pd.DataFrame, tmp_path: Path
) -> None:
    """The message says to try again later, so that has to be possible."""
    world.fake.scripts = [DONE, (None,), (None,), (None,)]
    with pytest.raises(PersonaError, match="try again later"):
        world.run(world.backend(tmp_path / "run"))
    assert_equal(world.run(world.backend(tmp_path / "run")), expected)
    assert world.fake.posts == 5


def test_a_result_that_expired_is_made_again(world: World, expected: pd.DataFrame) -> None:
    world.fake.replies = {"/result": [Reply(403, b"<Error>Request has expired</Error>")]}
    backend = world.backend()
    assert_equal(world.run(backend), expected)
    assert world.fake.posts == 3
    assert jobs_of(backend)[0] == (HERE, "job-3", 2)
    assert "/result/job-1" in {seen.path for seen in world.fake.seen}


def test_a_store_that_is_away_for_a_while(world: World, expected: pd.DataFrame) -> None:
    world.fake.replies = {"/result": [Reply(503), DROP]}
    assert_equal(world.run(world.backend()), expected)
    assert world.fake.posts == 2


def test_a_server_that_is_away_for_a_while(world: World, expected: pd.DataFrame) -> None:
    world.fake.replies = {
        "/env": [DROP, Reply(503)],
        "/request": [Reply(503), DROP],
        "/response": [DROP, Reply(502, b"<html>"), Reply(200, b"garbage")],
    }
    said = list[str]()
    assert_equal(world.run(world.backend(notify=said.append)), expected)
    assert len(world.fake.jobs) == 2
    assert sum("trying again" in words for words in said) == 7


@pytest.mark.parametrize(
    "words",
    [
        "Critical server error occurred. Please try again later.",
        "Error provisioning model deployment: busy",
        "Error starting model deployment: an actor died",
    ],
)
def test_the_servers_own_troubles_pass(world: World, expected: pd.DataFrame, words: str) -> None:
    world.fake.scripts = [(RUNNING, ("ERROR", words))]
    backend = world.backend()
    assert_equal(world.run(backend), expected)
    assert jobs_of(backend)[0] == (HERE, "job-3", 2)


def test_the_servers_own_troubles_do_not_pass(world: World) -> None:
    words = "Critical server error occurred.\nTry later."
    world.fake.scripts = [(("ERROR", words),)] * 9
    with pytest.raises(PersonaError, match=r"was sent a job 3 times .*\(last: Critical") as gave_up:
        world.run(world.backend())
    assert "\n" not in str(gave_up.value)


def test_a_persona_error_there_is_told_as_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = world.backend(tmp_path / "run", dtype="bfloat16")
    with pytest.raises(
        PersonaError, match=r"^The server has this model in float32 and --dtype asks for bfloat16;"
    ):
        world.run(backend)
    assert jobs_of(backend)[0][0] == FAILED
    # It would fail again, so there is nothing to go on with.
    assert not (tmp_path / "run").exists()


def test_another_error_there_is_told_with_ours(world: World, tmp_path: Path) -> None:
    words = f"Traceback (most recent call last):\n  File 'x', line 3\nRuntimeError: CUDA {KEY}\n\n"
    world.fake.scripts = [(RUNNING, ("ERROR", words)), (QUEUED,)]
    with pytest.raises(
        PersonaError,
        match=r"job of 2 cells failed on http://\S+ \(RuntimeError: CUDA \*\*\*\); `persona jobs",
    ) as failed:
        world.run(world.backend(tmp_path / "run"))
    assert "\n" not in str(failed.value)
    kept = list(Ledger.load(tmp_path / "run").jobs.values())
    assert [job.state for job in kept] == [FAILED, SENT]
    assert kept[0].description == words.replace(KEY, "***")


@pytest.mark.parametrize("words", ["", "\n \n"])
def test_an_error_without_a_reason(world: World, words: str) -> None:
    world.fake.scripts = [(("ERROR", words),)]
    with pytest.raises(PersonaError, match="no reason given"):
        world.run(world.backend())


def test_an_unknown_model_leaves_nothing(world: World, tmp_path: Path) -> None:
    words = "Could not deploy this model. Repository Not Found for url: .../config.json\nCheck it."
    world.fake.scripts = [(QUEUED, ("ERROR", words))] * 2  # as for all jobs of the queue
    with pytest.raises(PersonaError, match=r"cannot serve 'llama' .*Repository Not") as refused:
        world.run(world.backend(tmp_path / "run"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_refusal_does_not_take_what_was_there(
    world: World, expected: pd.DataFrame, tmp_path: Path
) -> None:
    """The server has no room for the model today; the run can be gone on with tomorrow."""
    world.fake.scripts = [DONE, (QUEUED,)]
    with pytest.raises(Detached):
        world.run(world.backend(tmp_path / "run", detach=True))
    words = "Could not deploy this model. CANT_ACCOMMODATE"
    world.fake.jobs[1].script = [("ERROR", words)]
    with pytest.raises(PersonaError, match="CANT_ACCOMMODATE"):
        world.run(world.backend(tmp_path / "run"))
    assert [job.id for job in Ledger.load(tmp_path / "run").jobs.values()] == ["job-1", None]
    assert_equal(world.run(world.backend(tmp_path / "run")), expected)
    assert world.fake.posts == 3


def test_another_nnsight_is_refused_before_anything_is_sent(world: World, tmp_path: Path) -> None:
    world.fake.packages["nnsight"] = "0.6.1"
    with pytest.raises(
        PersonaError, match=r"runs nnsight 0\.6\.1 .*a release of persona-nnsight for nnsight 0\.6"
    ):
        world.run(world.backend(tmp_path / "run"))
    assert (world.fake.posts, world.fake.calls("/env")) == (0, 1)
    assert not (tmp_path / "run").exists()


def test_no_environment_is_refused_before_anything_is_sent(world: World, tmp_path: Path) -> None:
    world.fake.replies = {"/env": [Reply(404, {"detail": "Not Found"})]}
    with pytest.raises(PersonaError, match="no NDIF server of this generation"):
        world.run(world.backend(tmp_path / "run"))
    assert world.fake.posts == 0
    assert not (tmp_path / "run").exists()


def test_a_refused_key_leaves_nothing(world: World, tmp_path: Path) -> None:
    world.fake.replies = {"/request": [Reply(401, {"detail": f"bad key {KEY}"})]}
    with pytest.raises(PersonaError, match="refuses this API key") as refused:
        world.run(world.backend(tmp_path / "run"))
    assert KEY not in "".join(traceback.format_exception(refused.value))
    assert not (tmp_path / "run").exists()


def altered(**changes: Any) -> Callable[[FakeJob], bytes]:
    facts: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "attention": "sdpa",
        "versions": {},
    }
    facts |= {"started": 1.0, "seconds": 1.0}
    events = json.dumps({"recorded": [], "scored": [], "written": []})
    answer = {"events": events, "tensors": {}, "facts": facts, **changes}
    return lambda _: packed({"answer": answer})


@pytest.mark.parametrize(
    "make",
    [
        lambda job: job.result[:200],
        altered(facts={}),
        altered(facts=None),
        altered(facts={"dtype": "float32", "started": "x", "seconds": "y"}),
        altered(events=3),
        altered(events="not JSON"),
        altered(events='{"recorded": 1}'),
        altered(tensors=[1]),
        altered(tensors={"a": 1}),
        altered(events='{"recorded": [], "scored": [[0]], "written": []}'),
        altered(events='{"recorded": [], "scored": [], "written": []}'),
    ],
)
def test_a_result_of_other_contents(
    world: World, make: Callable[[FakeJob], bytes], tmp_path: Path
) -> None:
    """Whatever a server sends in place of a result, one sentence says that it is none."""

    def spoil(job: FakeJob) -> None:
        job.result = make(job)

    world.fake.meanwhile = spoil
    with pytest.raises(PersonaError, match="cannot be read") as refused:
        world.run(world.backend(tmp_path / "run"))
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------- going on with a run


def test_detached_and_collected(world: World, expected: pd.DataFrame, tmp_path: Path) -> None:
    world.fake.scripts = [(RUNNING, QUEUED, *DONE), DONE]
    with pytest.raises(Detached):
        world.run(world.backend(tmp_path / "run", detach=True))
    assert not world.clock.sleeps
    kept = Ledger.load(tmp_path / "run")
    assert [(job.state, job.id) for job in kept.jobs.values()] == [(SENT, "job-1"), (HERE, "job-2")]
    with pytest.raises(Detached):  # still not
        world.run(world.backend(tmp_path / "run", detach=True))
    result = world.run(world.backend(tmp_path / "run"))
    assert_equal(result, expected)
    assert world.fake.posts == 2
    result.save(tmp_path / "run", finishes=True)
    assert not (tmp_path / "run" / "pending.json").exists()


def test_detaching_from_finished_jobs(world: World, expected: pd.DataFrame, tmp_path: Path) -> None:
    assert_equal(world.run(world.backend(tmp_path / "run", detach=True)), expected)


def test_interrupted_and_collected(world: World, expected: pd.DataFrame, tmp_path: Path) -> None:
    world.fake.scripts = [(QUEUED, RUNNING, *DONE), DONE]

    def interrupt() -> None:
        if len(world.clock.sleeps) == 2:
            raise KeyboardInterrupt

    world.clock.on_sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        world.run(world.backend(tmp_path / "run"))
    kept = Ledger.load(tmp_path / "run")
    assert [job.id for job in kept.jobs.values()] == ["job-1", "job-2"]
    assert_equal(world.run(world.backend(tmp_path / "run")), expected)
    assert world.fake.posts == 2


def test_interrupted_before_anything_was_sent(world: World, tmp_path: Path) -> None:
    world.fake.replies = {"/env": [Reply(503)] * 9}

    def interrupt() -> None:
        raise KeyboardInterrupt

    world.clock.on_sleep = interrupt
    with pytest.raises(Interrupted) as stopped:
        world.run(world.backend(tmp_path / "run"))
    assert not stopped.value.results
    assert world.fake.posts == 0
    assert not (tmp_path / "run").exists()


def test_a_part_that_was_damaged_is_made_again(
    world: World, expected: pd.DataFrame, tmp_path: Path
) -> None:
    world.fake.scripts = [(QUEUED, QUEUED, *DONE), DONE]
    with pytest.raises(Detached):
        world.run(world.backend(tmp_path / "run", detach=True))
    (part,) = (tmp_path / "run" / "parts").iterdir()
    part.write_bytes(part.read_bytes()[:50])
    backend = world.backend(tmp_path / "run")
    assert_equal(world.run(backend), expected)
    assert jobs_of(backend) == [(HERE, "job-1", 1), (HERE, "job-3", 2)]


def test_a_failed_job_is_sent_again_on_resuming(
    world: World, expected: pd.DataFrame, tmp_path: Path
) -> None:
    world.fake.scripts = [DONE, (("ERROR", "MemoryError: too little"),)]
    with pytest.raises(PersonaError, match="MemoryError"):
        world.run(world.backend(tmp_path / "run"))
    assert_equal(world.run(world.backend(tmp_path / "run")), expected)
    assert world.fake.posts == 3


def test_a_server_that_goes_away_keeps_the_jobs(
    world: World, expected: pd.DataFrame, tmp_path: Path
) -> None:
    world.fake.scripts = [(QUEUED, RUNNING, *DONE), DONE]
    world.fake.replies = {"/response": [DROP] * 60}
    with pytest.raises(PersonaError, match="does not answer"):
        world.run(world.backend(tmp_path / "run"))
    assert len(Ledger.load(tmp_path / "run").jobs) == 2
    world.fake.replies.clear()
    assert_equal(world.run(world.backend(tmp_path / "run")), expected)
    assert world.fake.posts == 2


def test_another_plans_part_is_not_taken(world: World, tmp_path: Path) -> None:
    """A job is known by what it computes."""
    world.fake.scripts = [(QUEUED,), DONE]
    with pytest.raises(Detached):
        world.run(world.backend(tmp_path / "run", detach=True))
    keys = set(Ledger.load(tmp_path / "run").jobs)
    for change in ({"window": 3}, {"layers": (3,)}, {"conditions": "by"}):
        backend = world.backend(detach=True)
        world.fake.scripts = [(QUEUED,)] * 20
        with pytest.raises(Detached):
            substitute(world.model, TWO_BY_TWO, **{**SMALL, **change}, backend=backend)
        assert not keys & set(backend.ledger.jobs)
    other = world.backend(detach=True, dtype="float32")
    with pytest.raises(Detached):
        world.run(other)
    assert not keys & set(other.ledger.jobs)


# ------------------------------------------------------------------------------------ commands


@pytest.fixture
def command(
    persona: Persona, fake: FakeNdif, clock: Clock, tiny_dir: TinyDir
) -> Callable[..., Outcome]:
    """`persona substitute` of two jobs on the fake server, with more options."""

    def run(*options: object) -> Outcome:
        return persona(
            *("substitute", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", 2, "-p", "p_last"),
            *("--personas", "yoda,marx", "--conditions", "additive", "--window", 2),
            *("--backend", "ndif", "--ndif-host", fake.url, "-o", "run", *options),
        )

    return run


Command = Callable[..., Outcome]


def assert_no_key(outcome: Outcome, directory: Path = Path()) -> None:
    assert KEY not in outcome.out
    assert KEY not in outcome.err
    for path in directory.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_the_command(command: Command, expected: pd.DataFrame) -> None:
    outcome = command()
    assert outcome.code == 0, outcome.err
    names = {path.name for path in Path("run").iterdir()}
    assert names == {"kl.csv", "summary.csv", "geometry.csv", "run.json"}
    assert read_table("run/kl.csv")["kl"].tolist() == expected["kl"].tolist()
    assert_no_key(outcome)


def test_detach_and_resume(command: Command, fake: FakeNdif, persona: Persona) -> None:
    fake.scripts = [(QUEUED, QUEUED, QUEUED, *DONE), DONE]
    outcome = command("--detach")
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == ["job-1", "job-2"]
    assert "persona resume run" in outcome.err
    assert "persona jobs run" in outcome.err
    assert {path.name for path in Path("run").iterdir()} == {"pending.json", "parts"}
    assert_no_key(outcome)

    shown = persona("jobs", "run")
    assert shown.code == 0, shown.err
    assert f"2 jobs with {fake.url}" in shown.out
    for word in ("job-1", "job-2", "QUEUED", "sent", "done"):
        assert word in shown.out
    shown = persona("jobs", "run", "--json")
    report = json.loads(shown.out)
    assert report["host"] == fake.url
    assert [(job["id"], job["state"]) for job in report["jobs"]] == [
        ("job-1", "sent"),
        ("job-2", "done"),
    ]
    assert_no_key(shown)

    assert_one_sentence(again := command())
    assert "persona resume run" in again.err
    somewhere = Path("elsewhere")
    somewhere.mkdir()
    os.chdir(somewhere)
    outcome = persona("resume", "../run")
    assert outcome.code == 0, outcome.err
    assert Path.cwd().name != "elsewhere"
    assert fake.posts == 2
    assert "run.json" in {path.name for path in Path("run").iterdir()}
    assert "pending.json" not in {path.name for path in Path("run").iterdir()}
    assert_no_key(outcome)

    shown = persona("jobs", "run", "--json")
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    assert [job["state"] for job in report["jobs"]] == ["done", "done"]
    assert persona("jobs", "run").code == 0
    assert_one_sentence(outcome := persona("resume", "run"))
    assert "is finished" in outcome.err


def test_resuming_detached(command: Command, fake: FakeNdif, persona: Persona) -> None:
    fake.scripts = [(QUEUED,), (QUEUED,)]
    assert command("--detach").code == 0
    outcome = persona("resume", "run", "--detach")
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == ["job-1", "job-2"]
    for job in fake.jobs:
        job.script = list(DONE)
    outcome = persona("resume", "run", "--detach")
    assert outcome.code == 0, outcome.err
    assert Path("run/run.json").exists()
    assert fake.posts == 2


def test_ctrl_c_leaves_the_jobs(
    command: Command, fake: FakeNdif, clock: Clock, persona: Persona
) -> None:
    fake.scripts = [(QUEUED, QUEUED, RUNNING, *DONE), (QUEUED, *DONE)]

    def interrupt() -> None:
        raise KeyboardInterrupt

    clock.on_sleep = interrupt
    outcome = command()
    assert outcome.code == 130, outcome.err
    assert outcome.out.split() == ["job-1", "job-2"]
    assert "Interrupted" in outcome.err
    assert "persona resume run" in outcome.err
    clock.on_sleep = lambda: None
    outcome = persona("resume", "run")
    assert outcome.code == 0, outcome.err
    assert fake.posts == 2
    assert len(pd.read_csv("run/kl.csv")) == 4


def test_a_default_directory_is_resumed(
    fake: FakeNdif, clock: Clock, persona: Persona, tiny_dir: TinyDir
) -> None:
    fake.scripts = [(QUEUED, *DONE)]
    outcome = persona(
        *("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", 2, "--personas", "yoda"),
        *("--remote", "--ndif-host", fake.url, "--detach"),
    )
    assert outcome.code == 0, outcome.err
    out = Path("outputs/capture-llama-tiny-1")
    assert (out / "pending.json").exists()
    outcome = persona("resume", out)
    assert outcome.code == 0, outcome.err
    assert (out / "residuals.safetensors").exists()
    assert [path.name for path in Path("outputs").iterdir()] == [out.name]
    assert fake.posts == 1


def test_reproduce_in_two_passes(
    fake: FakeNdif,
    clock: Clock,
    persona: Persona,
    tiny_dir: TinyDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Detached, both passes are sent at once; they come back in whatever order."""
    monkeypatch.setattr("persona_nnsight.report.write.write_report", lambda _: None)  # slow
    for name, key in (("short", "yoda"), ("long", "marx")):
        data: dict[str, Any] = TINY_GRID.to_dict()
        data["personas"] = {key: data["personas"][key], "chef": "a chef"}
        data["tasks"] = {"haiku": "write a haiku."}
        Path(f"{name}.yaml").write_text(Grid.from_dict(data).to_yaml(), encoding="utf-8")
    fake.scripts = [(QUEUED, QUEUED, *DONE), DONE]
    outcome = persona(
        *("reproduce", "-m", tiny_dir("llama"), "--only", "table1,table2", "-o", "run"),
        *("-g", "short=short.yaml", "-g", "long=long.yaml"),
        *("--remote", "--ndif-host", fake.url, "--detach"),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == ["job-1", "job-2"]
    states = [job.state for job in Ledger.load(Path("run")).jobs.values()]
    assert states == [SENT, HERE]
    outcome = persona("resume", "run")
    assert outcome.code == 0, outcome.err
    assert {"run.json", "table1", "table2"} <= {path.name for path in Path("run").iterdir()}
    assert not Path("run/pending.json").exists()
    assert fake.posts == 2
    assert_no_key(outcome)


def change_text(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def change_pending(change: Callable[[dict[str, Any]], object]) -> None:
    pending = json.loads(Path("run/pending.json").read_text("utf-8"))
    change(pending)
    Path("run/pending.json").write_text(json.dumps(pending), encoding="utf-8")


def other_window(pending: dict[str, Any]) -> None:
    argv = pending["origin"]["argv"]
    argv[argv.index("--window") + 1] = "3"


def other_version(pending: dict[str, Any]) -> None:
    pending["origin"]["subject"]["persona-nnsight"] = "0.0.0"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda: change_text(Path("grid.yaml"), "Yoda", "Master Yoda"),
            r"\(grid 1 personas yoda was 'Yoda', is 'Master Yoda'; plan 1 was 'sub",
        ),
        (
            lambda: change_text(Path("grid.yaml"), "name: tiny", "name: other"),
            r"\(grid 1 name was 'tiny', is 'other'\)",
        ),
        (lambda: change_pending(other_window), r"\(plan 1 was 'substitute \w+', is 'sub"),
        (lambda: change_pending(other_version), r"\(persona-nnsight was '0\.0\.0', is '"),
    ],
)
def test_a_changed_run_is_not_gone_on_with(
    command: Command,
    fake: FakeNdif,
    persona: Persona,
    change: Callable[[], None],
    named: str,
) -> None:
    fake.scripts = [(QUEUED,), DONE]
    assert command("--detach").code == 0
    change()
    before = (fake.posts, Path("run/pending.json").read_bytes())
    outcome = persona("resume", "run")
    assert_one_sentence(outcome)
    assert "cannot be gone on with" in outcome.err
    assert re.search(named, outcome.err), outcome.err
    assert (fake.posts, Path("run/pending.json").read_bytes()) == before


def test_a_changed_model_is_not_gone_on_with(
    fake: FakeNdif, clock: Clock, persona: Persona, tmp_path: Path
) -> None:
    directory = make_model_dir("llama", tmp_path / "model")
    fake.scripts = [(QUEUED,)] * 3
    outcome = persona(
        *("capture", "-m", "model", "-g", "grid.yaml", "-l", 2, "-o", "run", "--remote"),
        *("--ndif-host", fake.url, "--detach"),
    )
    assert outcome.code == 0, outcome.err
    config = json.loads((directory / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (directory / "config.json").write_text(json.dumps(config))
    outcome = persona("resume", "run")
    assert_one_sentence(outcome)
    assert "model was 'model " in outcome.err


def test_the_jobs_of_another_host(command: Command, fake: FakeNdif, persona: Persona) -> None:
    fake.scripts = [(QUEUED,), DONE]
    assert command("--detach").code == 0
    change_pending(lambda pending: pending["state"].update(host="http://127.0.0.1:9"))
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr("persona_nnsight.backends.ndif.server.time", Clock())
        outcome = persona("resume", "run")
    assert outcome.code == 2
    assert "http://127.0.0.1:9 does not answer" in outcome.err
    assert fake.posts == 2


def test_a_directory_does_not_say_where_the_key_goes(
    command: Command, fake: FakeNdif, persona: Persona
) -> None:
    fake.scripts = [(QUEUED,), DONE]
    assert command("--detach").code == 0
    change_pending(lambda pending: pending["state"].update(host="https://elsewhere.invalid"))
    assert_one_sentence(outcome := persona("resume", "run"))
    assert "add --ndif-host https://elsewhere.invalid" in outcome.err


def test_a_directory_has_only_experiments_run(
    command: Command, fake: FakeNdif, persona: Persona
) -> None:
    fake.scripts = [(QUEUED,), DONE]
    assert command("--detach").code == 0
    change_pending(lambda pending: pending["origin"].update(argv=["models", "pull", "x"]))
    assert_one_sentence(outcome := persona("resume", "run"))
    assert "was not started by a command" in outcome.err


def test_a_directory_that_went_away(command: Command, fake: FakeNdif, persona: Persona) -> None:
    fake.scripts = [(QUEUED,), DONE]
    assert command("--detach").code == 0
    change_pending(lambda pending: pending["origin"].update(cwd="/nowhere/at/all"))
    assert_one_sentence(outcome := persona("resume", "run"))
    assert "'/nowhere/at/all'" in outcome.err
    change_pending(lambda pending: pending.update(origin=None))
    assert_one_sentence(outcome := persona("resume", "run"))
    assert "was not started by a command" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "nonsense"), "Backend 'nonsense' does not exist; use local, simulate, ndif"),
        (("--detach",), "--detach is for a server"),
        (("--insecure",), "--insecure is for a server"),
        (("--ndif-host", "http://127.0.0.1:9"), "--ndif-host is for a server"),
        (("--backend", "simulate", "--detach"), "--detach is for a server"),
        (("--backend", "simulate", "--remote"), "--remote means --backend ndif"),
        (("--remote", "--device", "cpu"), "--device cpu is for this machine"),
        (("--remote", "--ndif-host", "http://ndif.example.org"), "plain http to another machine"),
        (("--remote", "--ndif-host", "nonsense"), "is not a URL"),
        (("--remote", "--ndif-host", "https://ndif.example.org"), "is only on this machine"),
    ],
)
def test_options_that_do_not_go_together(
    persona: Persona, tiny_dir: TinyDir, options: tuple[str, ...], words: str
) -> None:
    outcome = persona(
        *("substitute", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", 2, "-o", "run", *options)
    )
    assert_one_sentence(outcome)
    assert words in outcome.err
    assert [path.name for path in Path().iterdir()] == ["grid.yaml"]


def test_a_dry_run_asks_no_server(command: Command, fake: FakeNdif) -> None:
    outcome = command("--dry-run")
    assert outcome.code == 0, outcome.err
    assert "on the server" in outcome.out
    assert not fake.seen
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        ({"packages": {"nnsight": "0.6.1"}}, "runs nnsight 0.6.1"),
        ({"replies": {"/request": [Reply(401, {"detail": f"bad {KEY}"})]}}, "(bad ***)"),
        ({"replies": {"/env": [Reply(404)]}}, "no NDIF server"),
        ({"scripts": [(("ERROR", "Could not deploy this model. Not Found"),)] * 2}, "cannot serve"),
    ],
)
def test_what_fails_leaves_nothing(
    command: Command, fake: FakeNdif, prepare: dict[str, Any], words: str
) -> None:
    for name, value in prepare.items():
        setattr(fake, name, value)
    outcome = command()
    assert_one_sentence(outcome)
    assert words in outcome.err
    assert_no_key(outcome)
    assert not Path("run").exists()


def test_a_failed_job_is_shown(command: Command, fake: FakeNdif, persona: Persona) -> None:
    words = f"Traceback (most recent call last):\n  File 'far', line 3\nRuntimeError: no {KEY}"
    fake.scripts = [(("ERROR", words),), (QUEUED,)]
    outcome = command()
    assert_one_sentence(outcome)
    assert "RuntimeError: no ***" in outcome.err
    assert "`persona jobs -v run`" in outcome.err
    shown = persona("jobs", "run", "--verbose")
    assert shown.code == 0, shown.err
    assert "File 'far', line 3" in shown.out
    assert "failed" in shown.out
    assert_no_key(shown)
    fake.jobs[1].script = list(DONE)
    outcome = persona("resume", "run")  # sends what failed again
    assert outcome.code == 0, outcome.err
    assert fake.posts == 3


def test_jobs_while_the_server_is_away(command: Command, fake: FakeNdif, persona: Persona) -> None:
    fake.scripts = [(QUEUED,), (QUEUED,)]
    assert command("--detach").code == 0
    fake.replies = {"/response": [DROP]}
    shown = persona("jobs", "run", "--json")
    assert shown.code == 0
    assert "does not answer" in shown.err
    assert [job["id"] for job in json.loads(shown.out)["jobs"]] == ["job-1", "job-2"]
    fake.jobs.clear()  # restarted
    shown = persona("jobs", "run", "--json")
    words = {job["description"] for job in json.loads(shown.out)["jobs"]}
    assert words == {"the server knows nothing of it"}


def test_jobs_of_a_run_that_had_none(persona: Persona, tiny_dir: TinyDir) -> None:
    for backend in ("local", "simulate"):
        outcome = persona(
            *("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-l", 2, "-o", backend),
            *("--personas", "yoda", "--backend", backend),
        )
        assert outcome.code == 0, outcome.err
        assert_one_sentence(outcome := persona("jobs", backend))
        assert "had no jobs" in outcome.err
    assert_one_sentence(outcome := persona("jobs", "nowhere"))
    assert "holds no unfinished run" in outcome.err
    Path("bad").mkdir()
    Path("bad/run.json").write_text("[")
    assert_one_sentence(outcome := persona("jobs", "bad"))
    assert "cannot be read" in outcome.err


# -------------------------------------------------------------------------------------- doctor


def findings(outcome: Outcome) -> dict[str, tuple[str, str]]:
    return {found["what"]: (found["verdict"], found["text"]) for found in json.loads(outcome.out)}


def test_doctor_of_a_server(fake: FakeNdif, persona: Persona, tiny_dir: TinyDir) -> None:
    arguments = ("doctor", "-m", tiny_dir("llama"), "--backend", "ndif", "--ndif-host", fake.url)
    outcome = persona(*arguments, "--json")
    assert outcome.code == 0, outcome.out
    found = findings(outcome)
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert "someone@example.org" in found["API key"][1]
    assert "running" in found["model there"][1]
    assert_no_key(outcome)
    outcome = persona(*arguments)
    assert outcome.code == 0
    assert "someone@example.org" in outcome.out
    assert_no_key(outcome)
    assert fake.posts == 0


@pytest.mark.parametrize(
    ("prepare", "what", "verdict", "code"),
    [
        ({"packages": {"nnsight": "0.6.1"}}, "nnsight there", "problem", 1),
        ({"replies": {"/connected": [Reply(503)]}}, "server", "problem", 1),
        ({"replies": {"/env": [Reply(404)]}}, "versions there", "problem", 1),
        ({"replies": {"/env": [Reply(503, KEY.encode())]}}, "versions there", "problem", 1),
        ({"replies": {"/status": [Reply(500, KEY.encode())]}}, "model there", "problem", 1),
        ({"replies": {"/whoami": [Reply(401, {"detail": KEY})]}}, "API key", "note", 0),
        ({"replies": {"/whoami": [DROP]}}, "API key", "note", 0),
        ({"deployments": {}}, "model there", "note", 0),
        ({"python": "3.8.0"}, "python there", "ok", 0),
    ],
)
def test_doctor_finds(
    fake: FakeNdif,
    persona: Persona,
    tiny_dir: TinyDir,
    prepare: dict[str, Any],
    what: str,
    verdict: str,
    code: int,
) -> None:
    for name, value in prepare.items():
        setattr(fake, name, value)
    outcome = persona(
        *("doctor", "-m", tiny_dir("llama"), "--remote", "--ndif-host", fake.url, "--json")
    )
    assert outcome.code == code, outcome.out
    assert findings(outcome)[what][0] == verdict
    assert_no_key(outcome)


def test_doctor_of_a_server_that_is_down(persona: Persona, tiny_dir: TinyDir) -> None:
    with FakeNdif() as gone:
        url = gone.url
    outcome = persona("doctor", "-m", tiny_dir("llama"), "--remote", "--ndif-host", url, "--json")
    assert outcome.code == 1
    assert findings(outcome)["server"][0] == "problem"
    assert "does not answer" in findings(outcome)["server"][1]
    assert_no_key(outcome)


def test_doctor_without_a_key(
    fake: FakeNdif, persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    outcome = persona(
        *("doctor", "-m", tiny_dir("llama"), "--remote", "--ndif-host", fake.url, "--json")
    )
    assert outcome.code == 0, outcome.out
    assert findings(outcome)["API key"][0] == "note"


def test_doctor_of_this_machine(persona: Persona, tiny_dir: TinyDir) -> None:
    outcome = persona("doctor", "-m", tiny_dir("llama"), "--json")
    assert outcome.code == 0, outcome.out
    assert set(findings(outcome)) == {"python", "nnsight", "torch", "transformers", "model here"}
