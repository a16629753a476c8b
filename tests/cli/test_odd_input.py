"""Input that looks odd and works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from cells import GRID_TEXT
from commands import OUT, WHERE, Persona
from tiny import TinyDir

PERSONAS = {
    "emoji": "🧙‍♀️ Gandalf 👨‍👩‍👧‍👦",
    "right to left": "معلّم حكيم",
    "Hebrew with marks of direction": "\u200fמוֹרֶה\u200e Levi",
    "Chinese": "一位老师",
    "braces": "{x} and {{y}} and {persona}",
    "percent and backslash": r"50 % \n %s $HOME `id`",
    "quotes": "\"Yoda\" 'the' «Master»",
    "a leading dash": "- a list\n- of things",
    "HTML": "<b>bold</b> & [1] </div>",
    "words of the template": "the user's assistant, system",
    "combining": "e\u0301\u0301\u0301",
}


@pytest.mark.parametrize("case", PERSONAS)
def test_odd_texts_work(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    text = PERSONAS[case]
    base = ("capture", "-m", tiny_dir("llama"), "-o", OUT, *WHERE)
    outcome = persona(*base, f"--persona={text}", "--task", "write {task}.")
    assert outcome.code == 0, outcome.err
    prompts = json.loads(Path(OUT, "run.json").read_text("utf-8"))["prompts"]
    assert f"As {text}, write {{task}}." in [prompt["text"] for prompt in prompts]
    assert pd.read_csv(Path(OUT, "geometry.csv"))["cos_xy_sum"].notna().all()


def test_odd_paths_work(persona: Persona, tiny_dir: TinyDir) -> None:
    """Relative paths, links to the model and above the output, blanks and letters of any kind."""
    Path("model").symlink_to(tiny_dir("llama"))
    Path("elsewhere").mkdir()
    Path("link").symlink_to("elsewhere")
    shutil.copy("grid.yaml", "ein Gitter 🙂.yaml")
    for model, source, out in (
        ("./model", "./grid.yaml", "link/run"),
        ("model/", "ein Gitter 🙂.yaml", "link/../ein Lauf é"),
        ("elsewhere/../model", Path("grid.yaml").absolute(), Path("deep/er/run").absolute()),
    ):
        outcome = persona("capture", "-m", model, "-g", source, "-o", out, *WHERE)
        assert outcome.code == 0, outcome.err
        assert Path(out, "run.json").exists()
    assert Path("elsewhere/run/run.json").exists()


def test_a_grid_in_odd_clothes_works(persona: Persona) -> None:
    """A byte order mark, line ends of Windows, JSON, quotes and block texts."""
    for content in (
        b"\xef\xbb\xbf" + GRID_TEXT.replace("\n", "\r\n").encode(),
        json.dumps({"name": "x", "personas": {"a": "1"}, "tasks": {"b": "yes"}}).encode(),
        b"name: x\npersonas:\n  a: |\n    two\n    lines\ntasks: {b: 'a: b # c {d}'}\n",
    ):
        Path("odd.yaml").write_bytes(content)
        outcome = persona("grids", "check", "odd.yaml")
        assert outcome.code == 0, outcome.err
