"""What goes wrong with a server: lost jobs, its own troubles, refusals, results that are none."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_ndif import DONE, DROP, KEY, FakeJob, Reply, Word, packed
from ndif_world import QUEUED, RUNNING, SMALL, TWO_BY_TWO, World, assert_equal, jobs_of

from persona_nnsight import PersonaError, substitute
from persona_nnsight.backends.interface import Detached
from persona_nnsight.backends.ndif.ledger import DONE as HERE
from persona_nnsight.backends.ndif.ledger import FAILED, SENT, Ledger

pytestmark = pytest.mark.usefixtures("key", "two_cells_a_job")


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
