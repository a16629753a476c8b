"""Where a report is written, what it replaces, and the command that writes it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import typer
from made_runs import FIGURES, a_grid, capture, inject, manifest
from persona_cli.commands import report as cli_report
from typer.testing import CliRunner

from persona_nnsight import PersonaError
from persona_nnsight.report import write as writing
from persona_nnsight.report.write import write_report


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_the_same_runs_give_the_same_bytes(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [runs["inject"], runs["capture"]]
    write_report(chosen, tmp_path / "one")
    before = dict(mpl.rcParams)
    # Neither the reader's own settings nor the date go into a figure.
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    monkeypatch.setitem(mpl.rcParams, "xtick.direction", "in")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    write_report(chosen, tmp_path / "two")
    monkeypatch.undo()
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert dict(mpl.rcParams) == before


def test_a_report_is_replaced_in_place(tmp_path: Path) -> None:
    run = inject(tmp_path / "run")
    first = write_report([run])
    (run / "figures" / "mine.png").write_bytes(b"mine")
    kept = everything(run)
    write_report([run])
    assert everything(run) == kept
    # A figure that the new report does not have goes, what others put there stays.
    capture(run)
    (run / "run.json").write_text(json.dumps(manifest("capture", a_grid())))
    assert write_report([run]) == first
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {
        "mine.png",
        *(f"{stem}.{kind}" for stem in FIGURES["capture"] for kind in ("png", "svg")),
    }


def test_a_page_of_someone_else_keeps_its_figures(tmp_path: Path) -> None:
    run = capture(tmp_path / "run")
    (run / "figures").mkdir()
    (run / "figures" / "old.svg").write_text("theirs")
    (run / "report.html").write_text('<figure data-file="old">')
    write_report([run])
    assert (run / "figures" / "old.svg").read_text() == "theirs"


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = inject(tmp_path / "run")
    write_report([run])
    kept = everything(run)
    calls = []

    def save(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save", save)
    with pytest.raises(PersonaError, match="No space left on device"):
        write_report([run])
    assert calls
    assert everything(run) == kept
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_several_runs_need_a_place_and_get_a_contents(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PersonaError, match="2 runs"):
        write_report([runs["inject"], runs["capture"]])
    with pytest.raises(PersonaError, match="No run"):
        write_report([])
    # The same run twice is two runs on the page.
    page = write_report([runs["inject"], runs["inject"]], tmp_path / "a" / "b").read_text("utf-8")
    assert re.findall(r'<a href="#([^"]+)">', page) == ["1-run", "2-run"]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert (tmp_path / "a" / "b" / "figures" / "2-injection.svg").exists()


def command_line() -> typer.Typer:
    app = typer.Typer()
    app.command()(cli_report.report)
    return app


def test_the_command_prints_where_the_report_is(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(runs["capture"])
    Path("outputs/report-1").mkdir(parents=True)
    result = CliRunner().invoke(command_line(), [run, run])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "outputs/report-2/report.html"
    assert Path("outputs/report-2/report.html").exists()
    result = CliRunner().invoke(command_line(), [run, "--out", "here"])
    assert result.stdout.splitlines() == ["here/report.html", "here/figures"]


def test_the_command_is_quick_to_import() -> None:
    code = (
        "import sys, persona_cli.commands.report\n"
        "print([m for m in ('torch', 'pandas', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
