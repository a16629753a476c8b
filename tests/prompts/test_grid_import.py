"""Grids out of scripts: what is found, what is refused, and that nothing runs."""

from pathlib import Path

import pytest

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.grid_import import grid_from_script
from persona_nnsight.prompts.grids import Grid, Persona, Task

P = "PERSONAS = {'a': 'Ada', 'b': 'Bob'}\n"
T = "TASKS = {'t': 'Go.', 'u': 'Stop.'}\n"


def read(folder: Path, source: str | bytes) -> Grid:
    path = folder / "My study.py"
    path.write_bytes(source.encode() if isinstance(source, str) else source)
    return grid_from_script(path)


def test_a_typical_script(tmp_path: Path) -> None:
    source = '''
"""Docstring with a PERSONAS word."""
import torch
raise SystemExit("never run")

EMPTY_PERSONA_CACHE = {}
long_personas: dict[str, str] = {
    "engineer": "an engineer with ten years "
    "of practice, who tests first",
    "The Chef": {"description": "a chef" + " of renown", "seat": 3},
    "x": ("a tuple", 1),
}
REVIEW_TASKS = dict(arch="Review this.", haiku="Write a haiku.")
PERSONA_MARKERS = {"engineer": ["test", "Load"], "The Chef": ("simmer",), "baseline": []}
TASK_MARKERS = {"arch": ["service"]}
BASE_PERSONA = "a kind person"
N_TASKS = 2

def main():
    PERSONAS = {"not": "seen"}
    long_personas["local"] = "not seen either"
    return [long_personas[k] for k in long_personas]
'''
    grid = read(tmp_path, source)
    assert grid.name == "my-study"
    assert grid.personas == (
        Persona(
            "engineer",
            "an engineer with ten years of practice, who tests first",
            ("test", "load"),
        ),
        Persona("the-chef", "a chef of renown", ("simmer",)),
        Persona("x", "a tuple"),
    )
    assert grid.tasks == (Task("arch", "Review this."), Task("haiku", "Write a haiku."))
    assert grid.baseline_persona == "a kind person"
    assert grid.baseline_task == Grid.load("short").baseline_task


@pytest.mark.parametrize(
    ("source", "persona", "task"),
    [
        (P + T + "BASE_PERSONA, BASE_TASK = 'someone', 'Do.'\n", "someone", "Do."),
        (P + T + "persona_baseline: str = 'some' 'one'\n", "someone", None),
        (P + "tasks = {'Baseline': 'Do.', 't': 'Go.'}\n", None, "Do."),
        ("PERSONAS = {'base': {'text': 'someone'}, 'a': 'Ada'}\n" + T, "someone", None),
        ("P = PERSONAS = {'base': 'someone', 'a': 'Ada'}\nPERSONA_BASE='someone'\n" + T,
         "someone", None),
        (P + T + "PERSONA_MARKER_BASE = 'no'\nBASE_PERSONA_TASK = 'no'\n", None, None),
    ],
)  # fmt: skip
def test_baselines(source: str, persona: str | None, task: str | None, tmp_path: Path) -> None:
    grid, short = read(tmp_path, source), Grid.load("short")
    assert grid.baseline_persona == (persona or short.baseline_persona)
    assert grid.baseline_task == (task or short.baseline_task)
    assert not {"base", "baseline", "Baseline"} & {*grid.persona_keys, *grid.task_keys}


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("PERSONAS = {'a b': 'x', 'a-b': 'y', 'A B!': 'z'}\n", ("a-b-2", "a-b", "a-b-3")),
        ("PERSONAS = {1: 'x', 2: 'y'}\n", ("1", "2")),
        ("PERSONAS = {'孔子': 'x', '老子': 'y'}\n", ("persona", "persona-2")),
        ("PERSONAS = {'Keep.This_1': 'x'}\n", ("Keep.This_1",)),
        # the later assignment counts, as when the script runs
        ("PERSONAS = {'old': 'x'}\nPERSONAS = {'new': 'y'}\n", ("new",)),
        # of several, the only one that maps two keys or more to texts
        (P + "PERSONA_LAYERS = {'a': 3, 'b': 4}\n", ("a", "b")),
        (P + "PERSONA_WORDS = {'a': ['x'], 'b': ['y']}\n", ("a", "b")),
        (P + "ONE_PERSONA = {'z': 'Zoe'}\n", ("a", "b")),
    ],
)
def test_persona_keys(source: str, keys: tuple[str, ...], tmp_path: Path) -> None:
    assert read(tmp_path, source + T).persona_keys == keys


def test_nested_markers_and_tags_are_kept(tmp_path: Path) -> None:
    grid = read(
        tmp_path,
        "PERSONAS = {'a': {'text': 'Ada', 'markers': ['sea']},\n"
        "            'b': {'text': 'Bob', 'markers': 1}}\n"
        "TASKS = {'t': {'prompt': 'Go.', 'tags': ('review',)}}\n",
    )
    assert [p.markers for p in grid.personas] == [("sea",), ()]
    assert grid.tasks == (Task("t", "Go.", ("review",)),)


def test_marker_dictionary_wins_over_nested_markers(tmp_path: Path) -> None:
    source = "PERSONAS = {'a': {'text': 'Ada', 'markers': ['sea']}}\nMARKERS = {'a': {'tide'}}\n"
    assert read(tmp_path, source + T).personas[0].markers == ("tide",)


def test_declared_encoding_is_honoured_and_warnings_are_not_shown(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    source = "# -*- coding: latin-1 -*-\nPERSONAS = {'a': 'René \\d'}\n".encode("latin-1")
    assert read(tmp_path, source + T.encode()).personas[0].text == "René \\d"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", ["no personas found", "no dictionary at its top level", "PERSONAS = {"]),
        ("ROLES = {'a': 'x'}\n", ["no personas found", "ROLES (line 1)"]),
        (P, ["no tasks found", "PERSONAS (line 1)", "TASKS = {"]),
        ("\nPERSONAS = load()\n" + T, ["PERSONAS (line 2) is not a dictionary"]),
        ("PERSONAS = ['Ada']\n" + T, ["PERSONAS (line 1) is not a dictionary"]),
        ("PERSONAS = {}\n" + T, ["PERSONAS (line 1) is not a dictionary with its entries"]),
        (P + "TASKS = {'t': 'Go.'\n", ["line 2 is not valid Python"]),
        (b"PERSONAS = '\xff'\n", ["not valid Python"]),
        (b"a = 1\x00\n", ["Python"]),
        ("x = " + "(" * 3000 + ")" * 3000, ["Python"]),
        ("PERSONAS = {'a': " + "+".join(["'x'"] * 5000) + "}\n" + T, ["nested too deep"]),
        (
            "PERSONAS = {\n  'a': 'x',\n  'b': make('y'),\n}\n" + T,
            ["line 3: PERSONAS holds \"make('y')\"", "plain literal"],
        ),
        ("PERSONAS = {'a': f'{x}'}\n" + T, ["line 1: PERSONAS holds"]),
        ("PERSONAS = {'a': NAME}\n" + T, ["line 1: PERSONAS holds 'NAME'"]),
        ("PERSONAS = {KEY: 'x'}\n" + T, ["line 1: PERSONAS holds 'KEY'"]),
        ("PERSONAS = {('a', 'b'): 'x'}\n" + T, ["PERSONAS holds \"('a', 'b')\""]),
        ("MORE = {'c': 'x'}\nPERSONAS = {'a': 'x', **MORE}\n" + T, ["line 2: PERSONAS", "MORE"]),
        (P + "TASKS = dict([('t', 'Go.')])\n", ["line 2: TASKS holds"]),
        (P + "TASKS = dict(t='Go.', **more)\n", ["line 2: TASKS holds 'more'"]),
        (
            P + "OTHER_PERSONAS = {'c': 'x', 'd': 'y'}\n" + T,
            ["several", "personas", "PERSONAS (line 1), OTHER_PERSONAS (line 2)", "keep one"],
        ),
        (P + "persona_names = {'a': {'text': 'x'}, 'b': 'y'}\n" + T, ["persona_names (line 2)"]),
        (P + "PERSONA_FNS = {'a': run}\n" + T, ["line 2: PERSONA_FNS holds 'run'"]),
        ("PERSONAS = {'a': 'x', 'b': 3}\n" + T, ["PERSONAS (line 1) has no text for 'b'"]),
        ("PERSONAS = {'a': {'name': 'x'}}\n" + T, ["no text for 'a'", "text, description, prompt"]),
        ("PERSONAS = {'a': ' '}\n" + T, ["'personas.a.text' is empty"]),
        ("PERSONAS = {'base': 'x'}\n" + T, ["no persona other than the baseline"]),
        (
            P + T + "BASE_TASK = 'Do.'\nTASK_BASELINE = 'Sing.'\n",
            ["several texts", "baseline task", "BASE_TASK (line 3), TASK_BASELINE (line 4)"],
        ),
        (
            "PERSONAS = {'base': 'x', 'a': 'Ada'}\nBASE_PERSONA = 'y'\n" + T,
            ["BASE_PERSONA (line 2), the persona 'base'"],
        ),
        (P + T + "PERSONAS['c'] = 'x'\n", ["line 3: PERSONAS is changed"]),
        (P + T + "for k in TASKS:\n    TASKS[k] += '!'\n", ["line 4: TASKS is changed"]),
        (P + T + "TASKS.update(t='x')\n", ["line 3: TASKS is changed"]),
        (P + T + "PERSONAS |= {'c': 'x'}\n", ["line 3: PERSONAS is changed"]),
        (P + T + "del PERSONAS['a']\n", ["line 3: PERSONAS is changed"]),
        (P + T + "if quick:\n    TASKS = {'t': 'x'}\n", ["line 4: TASKS is changed"]),
        (P + T + "MARKERS = {'c': ['x']}\n", ["MARKERS (line 3)", "'c'", "personas are 'a', 'b'"]),
        (P + T + "MARKERS = {'a': 'x'}\n", ["MARKERS (line 3)", "'a' a list of strings"]),
        (P + T + "MARKERS = {'a': ['x']}\nMARKERS_B = {'a': ['y']}\n", ["hold the markers"]),
        (P + T + "MARKERS = {'a': words}\n", ["line 3: MARKERS holds 'words'"]),
        (b"#" * (1024 * 1024 + 1), ["1 MiB"]),
    ],
)
def test_refused(source: str | bytes, says: list[str], tmp_path: Path) -> None:
    with pytest.raises(PersonaError) as caught:
        read(tmp_path, source)
    message = str(caught.value)
    assert all(part in message for part in [*says, "My study.py"]), message
    assert "\n" not in message


def test_missing_script(tmp_path: Path) -> None:
    with pytest.raises(PersonaError, match=r"no file .*none\.py"):
        grid_from_script(tmp_path / "none.py")


def test_nothing_is_executed(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    read(tmp_path, f"open({str(flag)!r}, 'w')\n" + P + T)
    assert not flag.exists()


def test_result_can_be_written_and_read_back(tmp_path: Path) -> None:
    grid = read(tmp_path, P + T)
    path = tmp_path / "out.yaml"
    path.write_text(grid.to_yaml(), encoding="utf-8")
    assert Grid.load(path) == grid
