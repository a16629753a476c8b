"""Runs that are stopped and gone on with: the tables are the same bytes, nothing is mixed up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Persona, assert_one_sentence, contents, facts
from tiny import DATED, TinyDir, make_model_dir
from zones import EARLY, LATE, zone

from persona_nnsight.engine.run import run as engine
from persona_nnsight.errors import OutOfMemoryError, PersonaError
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.events import Done, Event, Recorded, Scored, Written
from persona_nnsight.storage import kept_events
from persona_nnsight.storage.journal import Journal
from persona_nnsight.storage.lock import hold

#: Chunks of two cells and batches of three rows: a stop falls within each.
SMALL = Limits(cells=2, rows=3, tokens=64)
#: What another moment's free memory would give.
OTHER = Limits(cells=6, rows=18, tokens=1024)

#: Some cells of the built-in long grid, whose personas have markers.
PART = ("--personas", "engineer,chef", "--tasks", "plan,arch")

COMMANDS: dict[str, tuple[str, ...]] = {
    "substitute": (
        "-p",
        "p_last,g1",
        "-l",
        "1,3",
        "--conditions",
        "additive,bb",
        "--generate",
        "3",
    ),
    "inject": ("-l", "1;1,3"),
    "capture": ("-p", "p_last,g1", "-l", "all"),
    "markers": ("-l", "3", "--tokens", "4", "-g", "long", *PART),
    "steer": ("-l", "1", "--alpha", "0,1", "--generate", "3"),
}


@pytest.fixture(autouse=True)
def small_and_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_nnsight.backends.local.fit_limits", lambda *_, **__: SMALL)
    monkeypatch.setattr(kept_events, "_INTERVAL", 0.0)
    for module in ("run_directory", "files"):  # a disk takes its time
        monkeypatch.setattr(f"persona_nnsight.storage.{module}.sync", lambda _: None)


def cut_off(after: int, error: BaseException, seen: list[Event]) -> Callable[..., Any]:
    """The engine, stopped by an error after so many events."""

    def stopped(*arguments: Any) -> Any:
        for event in engine(*arguments):
            if len(seen) == after:
                raise error
            seen.append(event)
            yield event

    return stopped


def command(name: str, model: Path, out: object) -> tuple[object, ...]:
    options = COMMANDS[name]
    grid = () if "-g" in options else ("-g", "grid.yaml")
    return (name, "-m", model, *grid, *options, "-o", out)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_bytes_wherever_it_stops(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tiny_dir("llama")
    seen: list[Event] = []
    with monkeypatch.context() as watched:
        watched.setattr(
            "persona_nnsight.experiments.execution.run", cut_off(-1, KeyboardInterrupt(), seen)
        )
        assert persona(*command(name, model, "whole")).code == 0
    whole, said = contents(Path("whole")), facts(Path("whole"))
    stops = {1, len(seen) // 2, len(seen) - 1} - {0, len(seen)}
    for stop in sorted(stops):
        out = Path(f"cut{stop}")
        with monkeypatch.context() as stopped:
            until = cut_off(stop, KeyboardInterrupt(), [])
            stopped.setattr("persona_nnsight.experiments.execution.run", until)
            outcome = persona(*command(name, model, out))
        assert outcome.code == 130
        assert "Interrupted" in outcome.err
        assert f"`persona resume {out}` goes on" in outcome.err
        assert sorted(path.name for path in out.iterdir()) == ["parts", "pending.json"]
        again: list[Event] = []
        with monkeypatch.context() as watched:
            watched.setattr("persona_nnsight.backends.local.fit_limits", lambda *_, **__: OTHER)
            watched.setattr(
                "persona_nnsight.experiments.execution.run", cut_off(-1, ValueError(), again)
            )
            outcome = persona("resume", out)
        assert outcome.code == 0, outcome.err
        assert contents(out) == whole
        resumed = facts(out)
        assert resumed["argv"][-1] == str(out)
        assert {**resumed, "argv": None} == {**said, "argv": None}
        # Only what was missing was computed: near the end, that is the last chunk.
        assert len(again) <= len(seen) / (2 if stop == len(seen) - 1 else 1)


def test_a_resumed_run_keeps_its_batch_sizes(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last digits depend on them with some kernels: the bytes above, on some processors."""
    used: list[Limits] = []

    def watched(stop: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            used.append(next(one for one in arguments if isinstance(one, Limits)))
            return stop(*arguments)

        return run

    stopped = watched(cut_off(3, KeyboardInterrupt(), []))
    monkeypatch.setattr("persona_nnsight.experiments.execution.run", stopped)
    assert persona(*command("substitute", tiny_dir("llama"), "run")).code == 130
    monkeypatch.setattr("persona_nnsight.experiments.execution.run", watched(engine))
    monkeypatch.setattr("persona_nnsight.backends.local.fit_limits", lambda *_, **__: OTHER)
    assert persona("resume", "run").code == 0
    assert persona(*command("substitute", tiny_dir("llama"), "other")).code == 0
    assert used == [SMALL, SMALL, OTHER]


def test_stopped_again_and_again(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_dir("llama")
    assert persona(*command("substitute", model, "whole")).code == 0
    arguments: tuple[object, ...] = command("substitute", model, "run")
    times = 0
    while not Path("run/run.json").exists():
        with monkeypatch.context() as stopped:
            until = cut_off(20, KeyboardInterrupt(), [])
            stopped.setattr("persona_nnsight.experiments.execution.run", until)
            outcome = persona(*arguments)
        assert outcome.code in (0, 130), outcome.err
        arguments = ("resume", "run")
        times += 1
    assert times > 3
    assert contents(Path("run")) == contents(Path("whole"))
    assert_one_sentence(persona("resume", "run"), "is finished")


def test_before_anything_is_finished(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "persona_nnsight.experiments.execution.run", cut_off(0, KeyboardInterrupt(), [])
    )
    outcome = persona(*command("capture", tiny_dir("llama"), "run"))
    assert outcome.code == 130
    assert "nothing was written" in outcome.err
    assert not Path("run").exists()


def test_memory_that_runs_out_keeps_what_is_finished(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_dir("llama")
    assert persona(*command("inject", model, "whole")).code == 0
    error = OutOfMemoryError("Memory ran out with a single row (9 GB); free some.")
    with monkeypatch.context() as stopped:
        stopped.setattr("persona_nnsight.experiments.execution.run", cut_off(9, error, []))
        outcome = persona(*command("inject", model, "run"))
    assert_one_sentence(outcome, "9 GB", "What was finished is kept: `persona resume run`.")
    assert persona("resume", "run").code == 0
    assert contents(Path("run")) == contents(Path("whole"))


def test_an_error_that_would_come_again_leaves_nothing(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PersonaError("The residual is not finite at layer 3.")
    monkeypatch.setattr("persona_nnsight.experiments.execution.run", cut_off(9, error, []))
    outcome = persona(*command("inject", tiny_dir("llama"), "run"))
    assert_one_sentence(outcome, "not finite at layer 3")
    assert "resume" not in outcome.err
    assert not Path("run").exists()


@pytest.mark.parametrize("kept", [0, 3])
def test_a_disk_that_is_full(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """While it runs: nothing is left where nothing was finished, and otherwise it goes on."""
    model = tiny_dir("llama")
    replace_file = os.replace
    parts_written: list[Path] = []

    def full(source: Path, target: Path) -> None:
        if Path(target).suffix == ".safetensors":
            if len(parts_written) == kept:
                raise OSError(28, "No space left on device")
            parts_written.append(Path(target))
        replace_file(source, target)

    with monkeypatch.context() as small_disk:
        small_disk.setattr(os, "replace", full)
        outcome = persona(*command("inject", model, "run"))
    assert_one_sentence(outcome, "cannot be recorded in 'run' (No space left on device)")
    assert ("`persona resume run`" in outcome.err) == bool(kept)
    assert Path("run").exists() == bool(kept)
    if kept:
        assert len(list(Path("run/parts").iterdir())) == kept
        assert persona("resume", "run").code == 0
        assert persona(*command("inject", model, "whole")).code == 0
        assert contents(Path("run")) == contents(Path("whole"))


def test_a_disk_that_is_full_at_the_end(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is computed; with room, the tables are written and nothing is computed again."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as small_disk:
        small_disk.setattr("persona_nnsight.experiments.results.run_manifest", full)
        outcome = persona(*command("inject", tiny_dir("llama"), "run"))
    assert_one_sentence(outcome, "No space left on device", "make room and `persona resume run`")
    assert sorted(path.name for path in Path("run").iterdir()) == ["parts", "pending.json"]
    seen: list[Event] = []
    monkeypatch.setattr(
        "persona_nnsight.experiments.execution.run", cut_off(-1, ValueError(), seen)
    )
    assert persona("resume", "run").code == 0
    assert not seen


def started(persona: Persona, monkeypatch: pytest.MonkeyPatch, model: Path, *more: object) -> None:
    """A run in ``run`` that was interrupted half-way."""
    with monkeypatch.context() as stopped:
        stopped.setattr(
            "persona_nnsight.experiments.execution.run", cut_off(9, KeyboardInterrupt(), [])
        )
        assert persona(*command("inject", model, "run"), *more).code == 130


def edit_pending(change: Callable[[dict[str, Any]], object]) -> None:
    path = Path("run/pending.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def subject(**changes: str) -> Callable[[], None]:
    return lambda: edit_pending(lambda data: data["origin"]["subject"].update(changes))


def other_grid() -> None:
    text = Path("grid.yaml").read_text(encoding="utf-8")
    Path("grid.yaml").write_text(text.replace("a head chef", "a cook"), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_grid, "grid 1 personas chef was 'a head chef', is 'a cook'; plan 1 was 'inject "),
        (subject(dtype="bfloat16"), "dtype was 'bfloat16', is 'float32'"),
        (subject(device="cuda:0"), "device was 'cuda:0', is 'cpu'"),
        (subject(torch="1.0"), "torch was '1.0', is '2."),
        (subject(transformers="4.0"), "transformers was '4.0', is '"),
        (subject(**{"persona-nnsight": "0.0.1"}), "persona-nnsight was '0.0.1', is '"),
        (subject(attention="eager"), "attention was 'eager', is 'sdpa'"),
        (subject(seed="7"), "seed was '7', is not there"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    persona: Persona,
    tiny_dir: TinyDir,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[], None],
    said: str,
) -> None:
    started(persona, monkeypatch, tiny_dir("llama"))
    change()
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert_one_sentence(persona("resume", "run"), "cannot be gone on with", said)
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert after == before


def test_a_run_that_is_gone_on_with_on_another_day(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts have the day on which it began, here or in another time zone."""
    model = tiny_dir("llama", chat_template=DATED)
    with zone(monkeypatch, EARLY):
        assert persona(*command("inject", model, "whole")).code == 0
        started(persona, monkeypatch, model)
    with zone(monkeypatch, LATE):
        assert persona(*command("inject", model, "later")).code == 0
        assert persona("resume", "run").code == 0
    assert contents(Path("run")) == contents(Path("whole")) != contents(Path("later"))
    days = [facts(Path(name))["rendering"]["date"] for name in ("whole", "run", "later")]
    assert days[0] == days[1] < days[2]
    assert facts(Path("run"))["argv"] == [str(word) for word in command("inject", model, "run")]


@pytest.mark.parametrize("rendering", ["2024-07-26", {"date": 5}, {"date": "--out=x"}, [], None])
def test_a_date_in_the_journal_that_is_none(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, rendering: object
) -> None:
    started(persona, monkeypatch, tiny_dir("llama", chat_template=DATED))
    edit_pending(lambda data: data["origin"]["subject"].update(rendering=rendering))
    said = "cannot be gone on with" if not isinstance(rendering, dict) else "is no day"
    assert_one_sentence(persona("resume", "run"), said)


def test_another_model_is_refused(
    persona: Persona, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights in the directory of the same name."""
    model = make_model_dir("llama", tmp_path / "model")
    started(persona, monkeypatch, model)
    monkeypatch.setattr("tiny.SEED", 7)
    make_model_dir("llama", model)
    assert_one_sentence(persona("resume", "run"), "model was 'model ", "', is 'model ")


def test_one_process_at_a_time(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(persona, monkeypatch, tiny_dir("llama"))
    with hold(Path("run/.lock")):
        outcome = persona("resume", "run")
        assert_one_sentence(outcome, f"being worked on by process {os.getpid()}; wait for it")
    assert persona("resume", "run").code == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_damaged_parts_are_computed_again(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    model = tiny_dir("llama")
    assert persona(*command("inject", model, "whole")).code == 0
    started(persona, monkeypatch, model)
    path = sorted(Path("run/parts").iterdir())[1]
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-9], "empty": b"", "gone": b"", "other": b"\x80\x04N."}[damage])
    if damage == "gone":
        path.unlink()
    outcome = persona("resume", "run")
    assert outcome.code == 0, outcome.err
    assert contents(Path("run")) == contents(Path("whole"))


def test_what_a_killed_process_leaves(persona: Persona, tiny_dir: TinyDir) -> None:
    """Before the first word on how to go on: the directory can be taken again."""
    Path("run").mkdir()
    Path("run/.lock").write_text("1")
    Path("run/.partial-x").mkdir()
    Path("run/.partial-x/pending.json").write_text("{}")
    assert persona(*command("inject", tiny_dir("llama"), "run")).code == 0
    # After the last file, before the journal is gone.
    Path("run/parts").mkdir()
    Path("run/pending.json").write_text("{}")
    assert_one_sentence(persona("resume", "run"), "is finished")
    contents(Path("run"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--detach",), "--detach is for jobs on a server"),
        (("--ndif-host", "http://127.0.0.1:9"), "--ndif-host is for jobs on a server"),
    ],
)
def test_options_of_a_server(
    persona: Persona,
    tiny_dir: TinyDir,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    started(persona, monkeypatch, tiny_dir("llama"))
    assert_one_sentence(persona("resume", "run", *arguments), said)
    assert_one_sentence(persona("jobs", "run"), "no jobs with a server", "`persona resume run`")


def test_it_does_not_matter_where_it_is_resumed(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Relative paths on the command line are of the directory where it was typed."""
    started(persona, monkeypatch, tiny_dir("llama"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    outcome = persona("resume", "../run")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_directory_of_an_unfinished_run_is_taken(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(persona, monkeypatch, tiny_dir("llama"))
    outcome = persona(*command("inject", tiny_dir("llama"), "run"))
    assert_one_sentence(outcome, "holds a run that is not finished", "`persona resume run`")
    assert_one_sentence(persona("report", "run"), "is not finished", "`persona resume run`")


def test_interrupted_as_json(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(
            "persona_nnsight.experiments.execution.run", cut_off(9, KeyboardInterrupt(), [])
        )
        outcome = persona(*command("inject", tiny_dir("llama"), "run"), "--json")
    assert outcome.code == 130
    assert json.loads(outcome.out) == {"complete": False, "out": "run", "jobs": []}


def test_done() -> None:
    """Events count once, each kind by itself."""
    done = Done()
    scored = Scored(0, 1, 0.5, 2)
    events: list[Event] = [
        Recorded((0, 1), ((), ()), ((), ()), {}, None),
        scored,
        Written(0, 1, (3,)),
    ]
    assert [done.add(event) for event in events] == [True] * 3
    assert [done.add(event) for event in events] == [False] * 3
    assert done.add(replace(scored, cell=1))


def test_parts_are_written_through_before_they_have_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, synced, renamed, and the directory synced: in this order."""
    steps: list[tuple[str, str]] = []
    rename = os.replace

    def renamed(source: Path, target: Path) -> None:
        steps.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(
        "persona_nnsight.storage.files.sync", lambda path: steps.append(("sync", path.name))
    )
    monkeypatch.setattr(os, "replace", renamed)
    Journal(tmp_path, "local").keep("a", "{}", {})
    assert steps == [("sync", "a.safetensors"), ("rename", "a.safetensors"), ("sync", "parts")]


def test_a_journal_is_what_it_was(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", "local", state={"limits": {"a": {"cells": 1}}})
    journal.claim()
    assert Journal.load(tmp_path / "run") == journal
    for name in ("b-000001", "a-000010", "a-000002"):
        journal.keep(name, "{}", {})
    assert list(journal.parts("a-")) == ["a-000002", "a-000010"]
    journal.discard()
    assert not (tmp_path / "run").exists()
