"""Runs that no report can be made of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import OUT, Persona, refused
from spoil import Change, remove, to_directory


def edit(name: str, change: Callable[[str], str]) -> Change:
    """Change the text of a file, which must be changed by it."""

    def apply(run: Path) -> None:
        before = (run / name).read_text(encoding="utf-8")
        assert change(before) != before
        (run / name).write_text(change(before), encoding="utf-8")

    return apply


def append(name: str, line: str) -> Change:
    return edit(name, lambda text: text + line + "\n")


def entry(name: str, value: object) -> Change:
    """Change an entry of run.json."""
    return edit("run.json", lambda text: json.dumps({**json.loads(text), name: value}))


def header_only(text: str) -> str:
    return text.splitlines()[0] + "\n"


ROW = "yoda,haiku,additive,XY,p_last,2,0.1,10"

REPORTS: dict[str, tuple[Change, str]] = {
    "a column missing": (edit("kl.csv", lambda t: t.replace("n_tokens", "n")), "no column 'n_tok"),
    "a text for a number": (
        edit("kl.csv", lambda t: t.replace(",10\n", ",ten\n", 1)),
        "has 'ten' in row 2, column 'n_tokens', where a number belongs",
    ),
    "a row of another persona": (append("kl.csv", f"zorro{ROW[4:]}"), "the persona 'zorro' in row"),
    "a row of another task": (append("kl.csv", ROW.replace("haiku", "ode")), "the task 'ode' in"),
    "a row of another position": (append("kl.csv", ROW.replace("p_last", "p_x")), "position 'p_x'"),
    "a row twice": (edit("kl.csv", lambda t: t + t.splitlines()[-1] + "\n"), "repeats an earlier"),
    "an empty row": (append("kl.csv", "," * 7), "the persona ''"),
    "a value missing": (
        edit("kl.csv", lambda t: t.replace(",haiku,", ",,", 1)),
        "the task '' in row 2",
    ),
    "a layer in words": (
        edit("geometry.csv", lambda t: t.replace(",2,", ",two,", 1)),
        "has 'two' in row 2, column 'layer'",
    ),
    "no rows": (edit("kl.csv", header_only), "kl.csv' has no rows"),
    "no rows in the summary": (edit("summary.csv", header_only), "summary.csv' has no rows"),
    "an empty table": (edit("kl.csv", lambda t: ""), "cannot be read (No columns to parse"),
    "NUL bytes": (edit("kl.csv", lambda t: "\0" * 999), "no column 'persona'"),
    "an open quote": (edit("kl.csv", lambda t: t.replace("yoda", '"yoda', 1)), "cannot be read"),
    "a table missing": (remove("summary.csv"), "summary.csv' is missing"),
    "a directory as a table": (
        to_directory("kl.csv"),
        "kl.csv' cannot be read (Is a directory)",
    ),
    "no run.json": (remove("run.json"), "is no run directory"),
    "run.json no JSON": (edit("run.json", lambda t: t[:-9]), "is damaged: it is not valid JSON"),
    "run.json a list": (edit("run.json", lambda t: "[]"), "it holds no JSON object"),
    "run.json of nesting": (edit("run.json", lambda t: "[" * 10**5), "it is not valid JSON"),
    "a newer format": (entry("format", 99), "is in format 99, and this version reads formats up"),
    "a format in words": (entry("format", "two"), "is in format 'two'"),
    "an unknown command": (entry("command", "dance"), "its command is 'dance'"),
    "another command": (entry("command", "markers"), "no column 'any'"),
    "a number as the backend": (entry("backend", 5), "its 'backend' is no JSON object"),
    "a number as the model": (entry("model", 5), "its 'model' is no JSON object"),
    "a grid that is none": (entry("grid", {"name": "x"}), "the grid has no 'personas'"),
    "half a text": (append("text.jsonl", "{"), "text.jsonl' is no JSON object"),
    "a text without words": (append("text.jsonl", "5"), "text.jsonl' is no JSON object"),
    "a list as a position": (
        append("text.jsonl", '{"persona": "", "task": "", "condition": "", "text": "", '
               '"position": []}'),
        "text.jsonl' is no JSON object",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REPORTS)
def test_reports(persona: Persona, saved: Path, case: str) -> None:
    change, says = REPORTS[case]
    shutil.copytree(saved / "substituted", "run")
    change(Path("run"))
    before = sorted(Path("run").rglob("*"))
    outcome = persona("report", "run", "--out", OUT)
    refused(outcome, says)
    assert sorted(Path("run").rglob("*")) == before


def test_the_report_that_these_cases_spoil_works(persona: Persona, saved: Path) -> None:
    outcome = persona("report", saved / "substituted", "--out", OUT)
    assert outcome.code == 0, outcome.err
    assert Path(OUT, "report.html").exists()


@pytest.mark.parametrize("place", ["empty", "nowhere", "grid.yaml"])
def test_reports_on_no_run(persona: Persona, place: str) -> None:
    Path("empty").mkdir()
    refused(persona("report", place), f"{place!r} is no run directory")
    assert not list(Path("empty").iterdir())
