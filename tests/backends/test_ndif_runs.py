"""Whole runs on a server that is a fake but really computes, beside the same runs here.

The server of a deployment is tested in ``tests/ndif``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cells import MARKED, TINY_GRID
from fake_ndif import DONE, FakeJob
from ndif_world import QUEUED, RUNNING, SMALL, TWO_BY_TWO, World
from tiny import Tiny

from persona_nnsight import (
    CaptureResult,
    Model,
    PersonaError,
    capture,
    inject,
    markers,
    steer,
    substitute,
)
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.backends.ndif.backend import NdifBackend
from persona_nnsight.backends.ndif.server import Server
from persona_nnsight.backends.simulate import SimulatedBackend
from persona_nnsight.experiments.results import Result
from persona_nnsight.plan.costs import Limits

pytestmark = pytest.mark.usefixtures("key", "two_cells_a_job")


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
    assert world.fake.posts == 6
    assert len(result.frame()) == 2 * 6  # additive and clean
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
