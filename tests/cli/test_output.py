"""What is printed: escaped where others wrote it, and on every stream, after the work is saved."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import pytest
from cells import TINY_GRID
from commands import WHERE, Outcome, Persona, assert_one_sentence
from fake_ndif import KEY, FakeNdif, Reply, share_ssl_context, stop_clocks
from persona_cli.app import app, main
from tiny import Tiny, TinyDir

from persona_nnsight import Grid, capture, read_table
from persona_nnsight.errors import escaped

#: What a terminal would obey: colours, a title, a cleared screen, C1, DEL, a turned line; markup.
POISON = "\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b5m\x7f\u202edetrevni\u2066[/x][bold]:smile:\ud800"
OBEYED = (*(chr(code) for code in range(32) if chr(code) not in "\n\t"), "\x7f", "\x9b", "\u202e")
OBEYED = (*OBEYED, "\u2066", "\ud800")


def harmless(outcome: Outcome) -> None:
    """Nothing that would be obeyed was printed, the brackets were, and there is no traceback."""
    for text in (outcome.out, outcome.err):
        assert not [letter for letter in OBEYED if letter in text]
        assert "Traceback" not in text


def test_what_is_escaped() -> None:
    assert not [letter for letter in OBEYED if letter in escaped(POISON)]
    assert "\\x1b[31mred" in escaped(POISON)
    assert escaped("‖Δ_X‖ é 一 🧙‍♀️ \u200fמוֹרֶה\u200e\n\t") == "‖Δ_X‖ é 一 🧙‍♀️ \u200fמוֹרֶה\u200e\n\t"
    assert escaped("a\r\nb\tc", keep="") == "a\\r\\nb\\tc"


# ------------------------------------------------------------------- what a server or others wrote


@pytest.fixture
def fake(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNdif]:
    share_ssl_context(monkeypatch)
    stop_clocks(monkeypatch)
    with FakeNdif(tiny("llama")) as server:
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", server.url)
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
        yield server


def there(fake: FakeNdif, model: Path) -> tuple[object, ...]:
    run = ("substitute", "-m", model, "-g", "grid.yaml", *WHERE, "--window", 2, "-o", "run")
    return (*run, "--conditions", "additive", "--personas", "yoda", "--backend", "ndif")


def test_words_of_a_server(persona: Persona, fake: FakeNdif, tiny_dir: TinyDir) -> None:
    run = there(fake, tiny_dir("llama"))
    fake.scripts = [((POISON, POISON), (POISON, POISON), (POISON, POISON), ("ERROR", POISON))]
    for command in (
        (*run, "--detach"),
        ("jobs", "run"),
        ("jobs", "run", "-v"),
        ("jobs", "run", "--json"),
        ("resume", "run"),
        ("jobs", "run", "-v"),
    ):
        outcome = persona(*command)
        harmless(outcome)
    assert "\\x1b[31mred" in outcome.out
    assert "[/x][bold]:smile:" in outcome.out


@pytest.mark.parametrize("identity", ["[/x]", POISON[:-1], "../../status?x#y", "a b"])
def test_an_id_of_a_server(
    persona: Persona, fake: FakeNdif, tiny_dir: TinyDir, identity: str
) -> None:
    fake.replies = {"/request": [Reply(200, {"id": identity})]}
    sent = persona(*there(fake, tiny_dir("llama")), "--detach")
    assert sent.code == 0, sent.err
    for command in (("jobs", "run"), ("jobs", "run", "-v"), ("jobs", "run", "--json")):
        outcome = persona(*command)
        assert outcome.code == 0, outcome.err
        harmless(outcome)
    assert json.loads(outcome.out)["jobs"][0]["id"] == identity
    asked = [seen.path for seen in fake.seen if seen.method == "GET"]
    assert [path for path in asked if path.startswith("/response/")]
    assert not [path for path in asked if path.startswith("/status?")]


def test_refusals_of_a_server(persona: Persona, fake: FakeNdif, tiny_dir: TinyDir) -> None:
    run = there(fake, tiny_dir("llama"))
    for status in (400, 401):
        fake.replies = {"/request": [Reply(status, {"detail": POISON})]}
        assert_one_sentence(refused := persona(*run), "\\x1b[31mred")
        harmless(refused)
        assert not Path("run").exists()


def test_doctor(persona: Persona, fake: FakeNdif, tiny_dir: TinyDir) -> None:
    fake.packages = {"nnsight": POISON, "torch": "[/x]", "transformers": POISON}
    fake.deployments = {POISON: [POISON], "[/x]": ["[/x]"]}
    fake.replies = {"/whoami": [Reply(200, {"email": POISON})] * 2}
    for more in ((), ("--json",)):
        outcome = persona("doctor", "-m", tiny_dir("llama"), "--backend", "ndif", *more)
        assert outcome.code in (0, 1), outcome.err
        harmless(outcome)
        assert "[/x]" in outcome.out


@pytest.fixture(scope="module")
def a_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    result = capture(tiny("llama"), TINY_GRID, layers=[2], positions="p_last")
    result.vectors().save(root / "vectors.safetensors")
    return result.save(root / "run")


JOB: dict[str, Any] = {"key": "k", "cells": 1, "state": "done", "id": POISON, "status": "[/x]"}


@pytest.mark.parametrize(
    "jobs",
    [
        *([{}], [[]], [1], [None], {}, 1, "x", None, [{**JOB, "cells": "x"}], [{**JOB, "id": []}]),
        *([{**JOB, "sent": "now"}], [{**JOB, "bytes_up": None}], [{**JOB, "description": {}}]),
        *([{**JOB, "odd": 1}], [{**JOB, "state": POISON}], [{**JOB, "sent": float("nan")}]),
    ],
)
def test_records_that_are_none(persona: Persona, a_run: Path, jobs: object) -> None:
    """A sentence where there is no table, from a finished run and from one that is not."""
    shutil.copytree(a_run, "run")
    change(Path("run/run.json"), lambda data: data.update(backend={"host": POISON, "jobs": jobs}))
    Path("open").mkdir()
    state = {"host": POISON, "server": {}, "jobs": jobs}
    pending = {"format": 2, "backend": "ndif", "origin": None, "state": state}
    Path("open/pending.json").write_text(json.dumps(pending))
    for directory in ("run", "open"):
        if jobs == {} and directory == "run":
            continue  # no jobs
        for more in ((), ("-v",), ("--json",)):
            outcome = persona("jobs", directory, *more)
            harmless(outcome)
            assert_one_sentence(outcome)


def change(path: Path, how: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    how(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("sent", [1e300, -1e18, 0, 1.5])
def test_records_of_others(persona: Persona, a_run: Path, sent: float) -> None:
    shutil.copytree(a_run, "run")
    job = {**JOB, "sent": sent, "description": POISON}
    change(Path("run/run.json"), lambda data: data.update(backend={"host": POISON, "jobs": [job]}))
    for more in ((), ("-v",), ("--json",)):
        outcome = persona("jobs", "run", *more)
        assert outcome.code == 0, outcome.err
        harmless(outcome)
    assert json.loads(outcome.out)["host"] == POISON


def poison(data: Any) -> Any:
    """Every text, and the names in grids are kept: only those make a run unreadable."""
    if isinstance(data, dict):
        return {key: value if key == "format" else poison(value) for key, value in data.items()}
    if isinstance(data, list):
        return [poison(value) for value in data]
    return f"{data}{POISON}<script>" if isinstance(data, str) else data


def test_a_page_about_a_poisoned_run(persona: Persona, a_run: Path) -> None:
    shutil.copytree(a_run, "run")

    def spoil(data: dict[str, Any]) -> None:
        for name in ("model", "versions", "argv", "finished", "backend"):
            data[name] = poison(data[name]) if data[name] else [POISON, "<script>"]
        data["backend"]["host"] = POISON

    change(Path("run/run.json"), spoil)
    outcome = persona("report", "run")
    harmless(outcome)
    assert outcome.code == 0, outcome.err
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert not [letter for letter in OBEYED if letter in page]
    assert "\\x1b[31mred" in page
    assert "<script" not in page


@pytest.mark.parametrize("name", ["command", "format", "grid", "argv", "model", "arguments"])
def test_a_run_that_is_refused_for_its_words(persona: Persona, a_run: Path, name: str) -> None:
    shutil.copytree(a_run, "run")
    for value in (POISON, {POISON: POISON}, [POISON]):
        change(Path("run/run.json"), lambda data, value=value: data.update({name: value}))
        harmless(persona("report", "run"))
    Path("run/pending.json").write_text(json.dumps({"format": POISON}))
    Path("run/run.json").unlink()
    for command in (("resume", "run"), ("jobs", "run"), ("report", "run")):
        assert_one_sentence(outcome := persona(*command))
        harmless(outcome)


def test_grids_and_vectors(persona: Persona, a_run: Path, tiny_dir: TinyDir) -> None:
    for text in ("a \u202e b", "[/x] :smile: [bold]b"):
        Path("odd.yaml").write_text(
            f'name: x\npersonas: {{a: "{text}"}}\ntasks: {{b: "{text}"}}\n', encoding="utf-8"
        )
        for command in (
            ("show", "odd.yaml"),
            ("show", "odd.yaml", "--yaml"),
            ("show", "odd.yaml", "--tokens", "-m", tiny_dir("llama")),
            ("check", "odd.yaml"),
        ):
            outcome = persona("grids", *command)
            harmless(outcome)
        shown = persona("grids", "show", "odd.yaml", "--yaml")
        if shown.code == 0:
            Path("again.yaml").write_text(shown.out, encoding="utf-8")
            assert Grid.load("again.yaml") == Grid.load("odd.yaml")
    assert ":smile: [bold]b" in persona("grids", "show", "odd.yaml").out
    Path("bad.yaml").write_bytes(b"name: '\x1b[31m'\n\x1b[2J: 1\n")
    assert_one_sentence(outcome := persona("grids", "check", "bad.yaml"))
    harmless(outcome)
    assert persona("vectors", a_run.parent / "vectors.safetensors").code == 0


def test_a_name_that_is_no_text(persona: Persona, tiny_dir: TinyDir) -> None:
    """A path with a byte that is no UTF-8, as the system hands it over."""
    out = os.fsdecode(b"run\xff")
    run = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE, "-o", out)
    outcome = persona(*run)
    assert outcome.code == 0, outcome.err
    harmless(outcome)
    assert json.loads(Path(out, "run.json").read_text("utf-8"))["argv"][-1] == out
    harmless(persona("report", out))


def test_names_on_the_command_line(persona: Persona, tiny_dir: TinyDir) -> None:
    Path("a\x1b[31m[x]").symlink_to(tiny_dir("llama"))
    run = ("-g", "grid.yaml", *WHERE, "-o", "o\x1b[2J[x]", "--dry-run")
    for command in (
        ("capture", "-m", "./a\x1b[31m[x]", *run),
        ("capture", "-m", "./none\x1b[31m[x]", *run),
        ("jobs", "none\x1b[31m[x]"),
        ("grids", "show", "\x1b[31m[x]"),
        ("capture", "--backend", "\x1b[31m[x]"),
        ("\x1b[31m[x]",),
        ("capture", "--\x1b[31m"),
    ):
        harmless(persona(*command))


# ------------------------------------------------------------------------------ streams of any kind

ENCODINGS = ["ascii", "cp1252", "latin-1", "utf-8"]


def printed(encoding: str, *arguments: object) -> tuple[int, bytes, bytes]:
    """A command whose streams have an encoding, as a terminal's or as PYTHONIOENCODING says."""
    before = sys.stdout, sys.stderr
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in before]
    sys.stdout, sys.stderr = streams
    try:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
    finally:
        sys.stdout, sys.stderr = before
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue() for stream in streams)
    return int(stopped.value.code or 0), out, err


@pytest.mark.usefixtures("persona")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help(encoding: str) -> None:
    names = [command.name or "" for command in app.registered_commands]
    for command in ([], *([name] for name in (*names, "grids", "models"))):
        code, out, err = printed(encoding, *command, "--help")
        assert code == 0, err
        assert b"Usage: persona" in out
        out.decode(encoding)


#: A cell whose texts no ASCII has; markers are of a grid that has some.
CELL = ("--persona", "a ☃ é", "--task", "say ‖Δ‖", "-l", "2")
AT, SHORT = ("-p", "p_last"), ("--window", "2")
RUNS: dict[str, tuple[str, ...]] = {
    "capture": (*CELL, *AT),
    "substitute": (*CELL, *AT, *SHORT, "--conditions", "additive"),
    "inject": (*CELL, *SHORT),
    "steer": (*CELL, *AT, *SHORT, "--alpha", "1", "--beta", "1"),
    "markers": ("-g", "long", "--personas", "chef", "--tasks", "haiku", "-l", "2", "--tokens", "2"),
}


@pytest.mark.usefixtures("persona")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run(name: str, encoding: str, tiny_dir: TinyDir) -> None:
    """Its results in words and as JSON, and its plan."""
    for more in (("-v",), ("--json",), ("--dry-run",), ("--dry-run", "--json")):
        out = "-".join(more).replace("--", "")
        run = (name, "-m", tiny_dir("llama"), *RUNS[name], *more, "-o", out)
        code, words, err = printed(encoding, *run)
        assert code == 0, err
        words.decode(encoding)
        assert "--dry-run" in more or Path(out, "run.json").exists()
        if "--json" in more:
            json.loads(words.decode("ascii"))


@pytest.mark.usefixtures("persona")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_other_commands(encoding: str, tiny_dir: TinyDir, a_run: Path) -> None:
    shutil.copytree(a_run, "finished")
    vectors = a_run.parent / "vectors.safetensors"
    for command in (
        *(("grids", "show", "long"), ("grids", "list"), ("grids", "show", "short", "--yaml")),
        *(("vectors", vectors), ("vectors", vectors, "--gguf", "control"), ("models",)),
        *(("doctor", "-m", tiny_dir("llama")), ("report", "finished"), ("--version",)),
        ("grids", "show", "short", "--tokens", "-m", tiny_dir("llama")),
    ):
        code, words, err = printed(encoding, *command)
        assert code == 0, (command, err)
        words.decode(encoding)
    for command in (("resume", "finished"), ("jobs", "finished"), ("grids", "show", "‖Δ‖ ☃")):
        code, words, err = printed(encoding, *command)
        assert code == 2
        assert err.decode(encoding).count("\n") == 1


@pytest.mark.usefixtures("persona")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_grid_is_read_back_from_any_stream(encoding: str) -> None:
    Path("odd.yaml").write_text(
        "name: x\npersonas: {a: 'é ☃ 🙂'}\ntasks: {b: say …}\n", encoding="utf-8"
    )
    code, words, err = printed(encoding, "grids", "show", "odd.yaml", "--yaml")
    assert code == 0, err
    Path("again.yaml").write_bytes(words)
    assert Grid.load("again.yaml") == Grid.load("odd.yaml")


class Failing(io.StringIO):
    """A stream that takes nothing more."""

    def __init__(self, code: int, after: int = 0) -> None:
        super().__init__()
        self.code, self.after = code, after

    def write(self, text: str) -> int:
        if self.tell() >= self.after:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


@pytest.mark.usefixtures("persona")
@pytest.mark.parametrize("more", [(), ("--json",), ("-v",)])
@pytest.mark.parametrize(
    ("code", "expected"), [(errno.EPIPE, 0), (errno.ENOSPC, 1), (errno.EIO, 1)]
)
def test_a_run_is_saved_whatever_becomes_of_its_words(
    tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch, code: int, expected: int, more: Any
) -> None:
    run = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE, "-o", "run", *more)
    monkeypatch.setattr(sys, "stdout", Failing(code))
    monkeypatch.setattr(sys, "stderr", err := io.StringIO())
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in run])
    assert int(stopped.value.code or 0) == expected
    assert len(read_table("run/geometry.csv"))
    assert ("Standard output cannot be written" in err.getvalue()) == bool(expected)
    assert "Traceback" not in err.getvalue()


@pytest.mark.usefixtures("persona")
def test_notes_that_cannot_be_written_stop_nothing(
    tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE, "-o", "run", "-v")
    monkeypatch.setattr(sys, "stderr", Failing(errno.EPIPE))
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in run])
    assert not stopped.value.code
    assert Path("run/run.json").exists()


RUN = "import sys; from persona_cli.app import main; main(sys.argv[1:])"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        (">/dev/full", 1, "Standard output cannot be written (No space left on device)"),
        (">&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_streams_of_a_real_process(redirection: str, code: int, says: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -c '{RUN}' grids show long {redirection}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == bool(says)
