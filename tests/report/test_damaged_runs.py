"""What is not a run: one sentence says so, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_runs import a_grid, capture, inject, manifest, write_run
from spoil import remove

from persona_nnsight import PersonaError
from persona_nnsight.report.write import write_report


def break_json(run: Path) -> None:
    (run / "run.json").write_text("{")


def set_json(**changed: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        data = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**data, **changed}))

    return change


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("run.json"), r"is no run directory: it has no run\.json"),
        (break_json, r"run\.json' is damaged: it is not valid JSON"),
        (lambda run: (run / "run.json").write_text("[]"), "holds no JSON object"),
        (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
        (set_json(command="dance"), "its command is 'dance', not one of capture"),
        (set_json(model="tiny"), "its 'model' is no JSON object"),
        (set_json(cells={}), "its 'cells' is no list"),
        (set_json(grid={"name": "x"}), "its grid is damaged: the grid has no 'personas'"),
        (remove("kl.csv"), r"kl\.csv' is missing"),
        (remove("summary.csv"), r"summary\.csv' is missing"),
        (edit("kl.csv", "n_tokens", "tokens"), r"kl\.csv' has no column 'n_tokens'"),
        (edit("summary.csv", "q25", "q"), r"summary\.csv' has no column 'q25'"),
        (edit("kl.csv", ",10,", ",ten,"), r"kl\.csv' has 'ten' in row 2, column 'n_tokens'"),
        (edit("summary.csv", "condition,", ""), "where a number belongs|has no column"),
        (edit("kl.csv", ",oracle,", ",<img src=x>,"), r"kl\.csv' has '<img src=x>' in row"),
        (edit("summary.csv", "oracle", "{0.__class__}"), r"summary\.csv' has '{0\.__class__}' in"),
        (edit("kl.csv", "10+12+14", "a b"), "column 'layers', where a name belongs"),
        (lambda run: (run / "kl.csv").write_text(""), r"kl\.csv' cannot be read"),
        (lambda run: (run / "kl.csv").write_bytes(b"\xff\xfe,"), r"kl\.csv' cannot be read"),
        (lambda run: (run / "text.jsonl").write_text('{"text": 1}'), r"Line 1 of .*text\.jsonl"),
        (
            lambda run: (run / "text.jsonl").write_text(
                '{"persona": "<b>", "task": "x", "condition": "clean", "text": ""}'
            ),
            r"Line 1 of .*text\.jsonl",
        ),
    ],
)
def test_what_is_no_run_is_said_in_one_sentence(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    run = inject(tmp_path / "run", a_grid(2, 3))
    damage(run)
    with pytest.raises(PersonaError, match=says) as caught:
        write_report([run])
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()
    assert not (run / "figures").exists()


def test_places_that_hold_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("file", "absent"):
        with pytest.raises(PersonaError, match="is no run directory"):
            write_report([tmp_path / name])
    run = capture(tmp_path / "run")
    with pytest.raises(PersonaError, match="cannot be written to"):
        write_report([run], tmp_path / "file")
    empty = write_run(tmp_path / "empty", manifest("reproduce", None))
    with pytest.raises(PersonaError, match="holds none of table1"):
        write_report([empty])
