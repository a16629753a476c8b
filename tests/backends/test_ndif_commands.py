"""Commands on a server: runs, `persona resume`, `persona jobs`, options that it has no use for."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pandas as pd
import pytest
from cells import TINY_GRID
from commands import Outcome, Persona, assert_one_sentence
from fake_ndif import DONE, DROP, KEY, Clock, FakeNdif, Reply
from ndif_world import QUEUED, RUNNING, assert_no_key
from tiny import TinyDir, make_model_dir

from persona_nnsight import Grid, read_table
from persona_nnsight.backends.ndif.ledger import DONE as HERE
from persona_nnsight.backends.ndif.ledger import SENT, Ledger

pytestmark = pytest.mark.usefixtures("key", "two_cells_a_job")

Command = Callable[..., Outcome]


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
    assert len(pd.read_csv("run/kl.csv")) == 2 * 4  # additive and clean


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
        outcome = persona("resume", "run", "--ndif-host", "http://127.0.0.1:9/")
    assert outcome.code == 2
    assert "http://127.0.0.1:9 does not answer" in outcome.err
    assert fake.posts == 2


def change_host(host: str) -> None:
    change_pending(lambda pending: pending["state"].update(host=host))


def test_a_directory_does_not_say_where_the_key_goes(
    command: Command, fake: FakeNdif, persona: Persona
) -> None:
    """Nor to which port of this machine, where other users can listen."""
    fake.scripts = [(QUEUED,), DONE]
    assert command("--detach").code == 0
    with FakeNdif() as other:
        for host in ("https://elsewhere.invalid", other.url, "http://localhost:1; touch ran"):
            change_host(host)
            assert_one_sentence(outcome := persona("resume", "run"))
            assert f"add --ndif-host {shlex.quote(host)}" in outcome.err
            assert_one_sentence(persona("resume", "run", "--ndif-host", fake.url), "--ndif-host")
        assert not other.seen


def test_a_host_that_is_not_configured_is_in_the_hint(
    command: Command, fake: FakeNdif, persona: Persona, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://configured.example.org")
    fake.scripts = [(QUEUED, *DONE), DONE]
    sent = command("--detach")
    assert f"`persona resume run --ndif-host {fake.url}` collects them" in sent.err
    assert persona("resume", "run", "--ndif-host", f"{fake.url}/").code == 0


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
