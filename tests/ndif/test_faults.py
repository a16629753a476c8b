"""What goes wrong between a client and a real NDIF server, and what becomes of the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from cells import TINY_GRID
from commands import Outcome, Persona
from ndif_server import NdifServer, free_port
from rounding import PROMISED_KL
from safetensors.torch import load_file, save_file
from tiny import TinyDir

from persona_nnsight import PersonaError, capture, load_model
from persona_nnsight.backends.ndif.backend import NdifBackend
from persona_nnsight.backends.ndif.server import Answer, Server
from persona_nnsight.engine.run import run
from persona_nnsight.experiments.substitute import Substitute
from persona_nnsight.plan.interventions import Write
from persona_nnsight.plan.plan import Edit

pytestmark = pytest.mark.ndif

N_JOBS = 3


@pytest.fixture(autouse=True)
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three jobs for the tiny grid's six cells, looked after often."""
    monkeypatch.setattr("persona_nnsight.backends.ndif.backend._MOST_CELLS", 2)
    monkeypatch.setattr("persona_nnsight.backends.ndif.backend._LOOKS", (0.1, 0.3))


@pytest.fixture
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds where a user waits for minutes until a job is given up."""
    for name, value in {
        "_SILENCE": 5.0,
        "_GIVE_UP": 30.0,
        "_GIVE_UP_AFTER_OUTAGE": 8.0,
        "_FIRST_PATIENCE": 5.0,
    }.items():
        monkeypatch.setattr(f"persona_nnsight.backends.ndif.courier.{name}", value)


@pytest.fixture(scope="session")
def deployed(running_ndif: NdifServer, tiny_dir: TinyDir) -> Path:
    """A tiny model that the server has loaded."""
    path = tiny_dir("llama")
    model = load_model(str(path), weights=False)
    capture(model, TINY_GRID, layers=2, backend=NdifBackend(model, Server(running_ndif.url)))
    return path


@pytest.fixture
def command(deployed: Path) -> list[object]:
    """A run on it."""
    return ["substitute", "--grid", "grid.yaml", "--model", deployed, "--layers", "2,3"]


def finish(persona: Persona, command: list[object], out: str = "run") -> dict[str, Any]:
    """Check that the run in `out` is whole and what it is on this machine; its run.json."""
    assert sorted(path.name for path in Path(out).iterdir()) == [
        *("contrasts.csv", "geometry.csv", "kl.csv", "run.json", "summary.csv")
    ]
    assert persona(*command, "--out", "local").code == 0
    here, there = Path("local/kl.csv").read_text(), Path(out, "kl.csv").read_text()
    assert [line.rsplit(",", 2)[0] for line in here.splitlines()] == [
        line.rsplit(",", 2)[0] for line in there.splitlines()
    ]
    for one, other in zip(here.splitlines()[1:], there.splitlines()[1:], strict=True):
        assert float(one.split(",")[-2]) == pytest.approx(
            float(other.split(",")[-2]), abs=PROMISED_KL
        )
    data: dict[str, Any] = json.loads(Path(out, "run.json").read_text())
    assert [job["state"] for job in data["backend"]["jobs"]] == ["done"] * N_JOBS
    return data


def pending(out: str = "run") -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads(Path(out, "pending.json").read_text())["state"]["jobs"]
    return jobs


def one_sentence(outcome: Outcome) -> str:
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    *notes, sentence = outcome.err.splitlines()
    assert sentence.startswith("persona: ")
    assert not any(note.startswith("persona: ") for note in notes)
    return sentence


def until_completed(persona: Persona) -> None:
    """Wait until the server has done all jobs of the run."""
    for _ in range(300):
        jobs = json.loads(persona("jobs", "run", "--json").out)["jobs"]
        if all(job["status"] == "COMPLETED" for job in jobs):
            return
        time.sleep(0.3)
    pytest.fail("the jobs did not end")


def test_detached_and_collected(ndif: NdifServer, persona: Persona, command: list[object]) -> None:
    sent = persona(*command, "--remote", "--detach", "--out", "run")
    assert sent.code == 0, sent.err
    ids = sent.out.split()
    assert len(set(ids)) == N_JOBS
    assert [job["id"] for job in pending()] == ids
    assert "persona resume run" in sent.err
    assert persona("resume", "run", "--detach").code == 0
    resumed = persona("resume", "run")
    assert resumed.code == 0, resumed.err
    data = finish(persona, command)
    assert [job["id"] for job in data["backend"]["jobs"]] == ids
    assert ids[0][:8] in persona("jobs", "run").out


@pytest.mark.usefixtures("impatience")
def test_the_host_is_down_before(persona: Persona, command: list[object]) -> None:
    host = f"http://127.0.0.1:{free_port()}"
    outcome = persona(*command, "--remote", "--ndif-host", host, "--out", "run")
    assert host in one_sentence(outcome)
    assert not Path("run").exists()
    checked = persona("doctor", "--remote", "--ndif-host", host)
    assert checked.code == 1
    assert "does not answer" in checked.out


@pytest.mark.usefixtures("impatience")
def test_the_host_goes_away_during_a_run(
    ndif: NdifServer, persona: Persona, command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, gone = Server.ask, list[str]()

    def ask_and_lose(self: Server, job: str) -> Answer | None:
        answer = ask(self, job)
        if not gone:
            gone.append(job)
            ndif.stop("api")
            Timer(3.0, ndif.start_api).start()
        return answer

    monkeypatch.setattr(Server, "ask", ask_and_lose)
    outcome = persona(*command, "--remote", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert gone
    finish(persona, command)


@pytest.mark.usefixtures("impatience")
def test_the_host_does_not_come_back(
    ndif: NdifServer, persona: Persona, command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Server.ask

    def ask_and_lose(self: Server, job: str) -> Answer | None:
        ndif.stop("api")
        return ask(self, job)

    with monkeypatch.context() as patch:
        usual = Server.__init__.__kwdefaults__ or {}
        patch.setattr(Server.__init__, "__kwdefaults__", {**usual, "patience": 2.0})
        patch.setattr(Server, "ask", ask_and_lose)
        outcome = persona(*command, "--remote", "--out", "run")
    ndif.start_api()
    ndif.wait()
    assert "does not answer" in one_sentence(outcome)
    assert [job["state"] for job in pending()] == ["sent"] * N_JOBS
    resumed = persona("resume", "run")
    assert resumed.code == 0, resumed.err
    finish(persona, command)


@pytest.mark.usefixtures("impatience")
def test_a_restart_with_jobs_queued(
    ndif: NdifServer, persona: Persona, command: list[object]
) -> None:
    sent = persona(*command, "--remote", "--detach", "--out", "run")
    assert sent.code == 0, sent.err
    ndif.stop("api")
    ndif.start_api()
    ndif.wait()
    outcome = persona("resume", "run")
    assert outcome.code == 0, outcome.err
    finish(persona, command)


@pytest.mark.usefixtures("impatience")
def test_results_that_are_gone_are_computed_again(
    ndif: NdifServer, persona: Persona, command: list[object]
) -> None:
    sent = persona(*command, "--remote", "--detach", "--out", "run")
    assert sent.code == 0, sent.err
    until_completed(persona)
    ndif.stop("store")
    ndif.start_store()
    outcome = persona("resume", "run")
    assert outcome.code == 0, outcome.err
    data = finish(persona, command)
    assert [job["attempts"] for job in data["backend"]["jobs"]] == [2] * N_JOBS


def test_interrupted_while_waiting(ndif: NdifServer, persona: Persona, deployed: Path) -> None:
    # As a user's terminal does it, to a process of its own.
    arguments = ["substitute", "--grid", "grid.yaml", "--model", str(deployed)]
    arguments += ["--layers", "2,3"]
    code = (
        "import sys, persona_nnsight.backends.ndif.backend as n\n"
        "n._MOST_CELLS, n._LOOKS = 2, (60, 60)\n"
        "from persona_cli.app import main; main(sys.argv[1:])"
    )
    where = ["--remote", "--ndif-host", ndif.url, "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    for _ in range(300):
        if Path("run/pending.json").exists() and all(job["id"] for job in pending()):
            break
        time.sleep(0.2)
    time.sleep(1.0)  # into the wait between two looks
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    ids = [job["id"] for job in pending()]
    assert out.split() == ids
    assert len(ids) == N_JOBS
    resumed = persona("resume", "run")
    assert resumed.code == 0, resumed.err
    data = finish(persona, list(arguments))
    assert [job["id"] for job in data["backend"]["jobs"]] == ids


@pytest.mark.usefixtures("impatience")
def test_a_model_that_the_server_cannot_load(
    ndif: NdifServer, persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_dir("llama"), "model")
    submit = Server.submit

    def too_late(self: Server, *arguments: Any) -> str:
        shutil.rmtree("model", ignore_errors=True)
        return submit(self, *arguments)

    monkeypatch.setattr(Server, "submit", too_late)
    outcome = persona("capture", "--grid", "grid.yaml", "--model", "model", "--remote", "-o", "run")
    assert "cannot serve 'model'" in one_sentence(outcome)
    assert not Path("run").exists()


def test_a_value_that_is_not_finite_is_said_as_on_this_machine(
    ndif: NdifServer, persona: Persona, tiny_dir: TinyDir
) -> None:
    shutil.copytree(tiny_dir("llama"), "model")
    weights = load_file("model/model.safetensors")
    weights["model.layers.3.input_layernorm.weight"].fill_(torch.inf)
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    arguments = ("capture", "--grid", "grid.yaml", "--model", "model", "--layers", "4")
    here = one_sentence(persona(*arguments, "--out", "local"))
    assert "not finite" in here
    there = one_sentence(persona(*arguments, "--remote", "--out", "run"))
    assert there == here


def test_a_job_that_raises(ndif: NdifServer, deployed: Path) -> None:
    model = load_model(str(deployed), weights=False)
    plan = Substitute(layers=(2,), positions="p_last", conditions="bb").plan(model, TINY_GRID)
    far = Write("bb", ("p_last",), (99,))
    beyond = replace(plan, layers=(99,), edits=(Edit(far),))
    backend = NdifBackend(model, Server(ndif.url))
    with pytest.raises(
        PersonaError, match=r"A job of 2 cells failed on .* \(AttributeError: "
    ) as failed:
        list(backend.run(run, beyond, backend.limits(plan)))
    assert "\n" not in str(failed.value)
    job = next(iter(backend.ledger.jobs.values()))
    assert job.state == "failed"
    # The traceback names our file and shows the line, though the server never had the file.
    assert "engine" in job.description
    assert "Traceback" in job.description


def test_a_refused_key(
    ndif: NdifServer, persona: Persona, command: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = ndif.start_guarded_api()
    try:
        for key, words in ((None, "without an API key"), ("canary-4711", "this API key")):
            monkeypatch.setattr("nnsight.CONFIG.API.APIKEY", key)
            outcome = persona(*command, "--remote", "--ndif-host", guarded, "--out", "run")
            assert words in one_sentence(outcome)
            assert "canary" not in outcome.err + outcome.out
            assert not Path("run").exists()
    finally:
        ndif.stop("guarded")


def test_the_doctor_is_content(ndif: NdifServer, persona: Persona, deployed: Path) -> None:
    outcome = persona("doctor", "--remote", "--model", deployed, "--json")
    assert outcome.code == 0, outcome.out
    found = {finding["what"]: finding for finding in json.loads(outcome.out)}
    assert found["nnsight there"]["text"].startswith("0.8.0 there")
    assert found["nnsight there"]["verdict"] == "ok"
    assert "running" in found["model there"]["text"]
