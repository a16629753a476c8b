"""`persona grids show --tokens`: which tokens of a prompt belong to what."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from commands import Persona, assert_one_sentence
from tiny import CHATML, TinyDir
from transformers import ByT5Tokenizer

GROUPS = ("frame", "persona", "task", "header", "answer")
SHOW = ("grids", "show", "grid.yaml", "--tokens")


def shown(out: str) -> dict[str, list[tuple[str, int, str]]]:
    """(group, number of tokens, tokens) of every prompt, by its title."""
    found: dict[str, list[tuple[str, int, str]]] = {}
    for line in out.splitlines():
        if title := re.fullmatch(r"(\w\w of [\w-]+, [\w-]+)", line.strip()):
            found[title[1]] = []
        elif row := re.match(rf"({'|'.join(GROUPS)}) +(\d+)  (.*?) *$", line):
            found[list(found)[-1]].append((row[1], int(row[2]), row[3]))
    return found


@pytest.fixture
def model(tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of which only the tokenizer can be loaded."""
    monkeypatch.delattr("persona_nnsight.models.loading.load_model")
    return tiny_dir("llama")


def test_the_first_cell(persona: Persona, model: Path) -> None:
    outcome = persona(*SHOW, "-m", model)
    assert outcome.code == 0, outcome.err
    assert "\x1b" not in outcome.out
    found = shown(outcome.out)
    assert list(found) == [f"{key} of yoda, haiku" for key in ("BB", "XB", "BY", "XY")]
    assert all([group for group, _, _ in rows] == list(GROUPS) for rows in found.values())
    texts = {
        key[:2]: {group: text.replace("│", "") for group, _, text in rows}
        for key, rows in found.items()
    }
    assert {key: (row["persona"], row["task"]) for key, row in texts.items()} == {
        "BB": ("someone", ", give some advice."),
        "XB": ("Yoda", ", give some advice."),
        "BY": ("someone", ", write a haiku."),
        "XY": ("Yoda", ", write a haiku."),
    }
    assert found["XY of yoda, haiku"][0] == ("frame", 9, r"<|im_start|>│u│s│e│r│\n│A│s│")
    assert found["XY of yoda, haiku"][1] == ("persona", 4, "Y│o│d│a")
    assert found["XY of yoda, haiku"][-1] == ("answer", 1, r"\n")


def test_chosen_cells(persona: Persona, model: Path) -> None:
    outcome = persona(*SHOW, "-m", model, "--personas", "chef,yoda", "--tasks", "review")
    titles = list(shown(outcome.out))
    assert titles[3::4] == ["XY of yoda, review", "XY of chef, review"]
    assert len(titles) == 8


def test_the_task_first(persona: Persona, model: Path) -> None:
    Path("grid.yaml").write_text(
        "name: x\ntemplate: '{task} As {persona}'\npersonas: {a: ☃}\ntasks: {b: '[b]say'}\n",
        encoding="utf-8",
    )
    found = shown(persona(*SHOW, "-m", model).out)
    rows = {group: (n, text) for group, n, text in found["XY of a, b"]}
    assert list(rows) == ["frame", "task", "persona", "header", "answer"]
    assert rows["task"] == (6, "[│b│]│s│a│y")
    assert rows["persona"] == (7, " │A│s│ │☃││")  # of three bytes


def test_colours(persona: Persona, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group has its own; without colours its name says as much."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    coloured = persona(*SHOW, "-m", model).out
    row = next(line for line in coloured.splitlines() if "persona" in line)
    (style,) = set(re.findall(r"\x1b\[(3\d)m", row))
    others = "".join(line for line in coloured.splitlines() if "task" in line)
    assert f"\x1b[{style}m" not in others
    monkeypatch.setenv("NO_COLOR", "1")
    plain = persona(*SHOW, "-m", model).out
    assert not re.search(r"\x1b\[(3|9)\dm", plain)
    assert len(shown(re.sub(r"\x1b\[\d*m", "", plain))) == 4


def test_options_without_effect(persona: Persona) -> None:
    for option in (("-m", "x"), ("--personas", "yoda"), ("--tasks", "haiku")):
        outcome = persona("grids", "show", "grid.yaml", *option)
        assert_one_sentence(outcome, "is for tokens; add --tokens")
    assert_one_sentence(persona(*SHOW, "--yaml"), "--yaml", "--tokens", "use one of them")


def test_unknown_keys_and_models(persona: Persona, model: Path) -> None:
    assert_one_sentence(persona(*SHOW, "-m", model, "--personas", "yda"), "'yda'", "'yoda'")
    assert_one_sentence(persona(*SHOW, "-m", "./none"), "'./none'")


def test_a_tokenizer_that_does_not_tell(persona: Persona, tiny_dir: TinyDir) -> None:
    """One that is written in Python; what needs no groups takes it."""
    shutil.copytree(tiny_dir("llama"), "byt5")
    for file in Path("byt5").glob("*token*"):
        file.unlink()
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained("byt5")
    assert_one_sentence(
        persona(*SHOW, "-m", "byt5"), "does not tell which characters its tokens stand for"
    )
