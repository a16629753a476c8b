"""Going on with a run on a server: detached, interrupted, damaged or failed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from fake_ndif import DONE, DROP, Reply
from ndif_world import QUEUED, RUNNING, SMALL, TWO_BY_TWO, World, assert_equal, jobs_of

from persona_nnsight import PersonaError, substitute
from persona_nnsight.backends.interface import Detached
from persona_nnsight.backends.ndif.ledger import DONE as HERE
from persona_nnsight.backends.ndif.ledger import SENT, Ledger
from persona_nnsight.experiments.execution import Interrupted

pytestmark = pytest.mark.usefixtures("key", "two_cells_a_job")


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
