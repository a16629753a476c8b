"""Grids: what is accepted, what is refused and in which words; the `persona grids` commands."""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from persona_cli.commands.grids import app as grids_app
from typer.testing import CliRunner

from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts.grids import Grid, Persona, Task, slug
from persona_nnsight.prompts.strict_yaml import read_small_file


def plain(**changes: Any) -> dict[str, Any]:
    """A small valid grid as plain data, with changes; None removes a field."""
    data: dict[str, Any] = {
        "name": "mine",
        "personas": {"a": "Ada", "b": {"text": "Bob", "markers": ["Sea", "tide pool", "sea"]}},
        "tasks": {"one": "Do it.", "two": {"text": "Undo it.", "tags": ["review"]}},
    }
    data.update(changes)
    return {key: value for key, value in data.items() if value is not None}


@pytest.fixture
def mine() -> Grid:
    return Grid.from_dict(plain())


def write(folder: Path, text: str | bytes, name: str = "grid.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# The built-in grids


def test_short_grid_has_the_published_texts() -> None:
    grid = Grid.load("short")
    assert [p.text for p in grid.personas] == [
        "Warren Buffett",
        "Karl Marx",
        "Yoda",
        "Maya Angelou",
    ]
    assert {t.key: t.text for t in grid.tasks} == {
        "policy": "Comment on whether universal basic income is a good policy.",
        "haiku": "Write a haiku about Monday mornings.",
        "recommend": "Recommend a book worth reading and explain why.",
    }
    assert grid.template == "As {persona}, {task}"
    assert grid.baseline_persona == "a thoughtful person"
    assert grid.baseline_task == "Give advice to someone facing a difficult decision."
    assert len(grid.cells) == 12


def test_long_grid_shape() -> None:
    grid, short = Grid.load("long"), Grid.load("short")
    assert grid.persona_keys == (
        "engineer",
        "counselor",
        "founder",
        "teacher",
        "journalist",
        "doctor",
        "lawyer",
        "chef",
    )
    assert grid.task_keys == ("arch", "plan", "proposal", "policy", "haiku", "recommend")
    assert len(grid.cells) == 48
    assert grid.tasks[3:] == short.tasks
    assert [t.key for t in grid.tasks if t.tags == ("review",)] == ["arch", "plan", "proposal"]
    unique = {grid.prompt(p, t) for p in (None, *grid.personas) for t in (None, *grid.tasks)}
    assert len(unique) == 63


@pytest.mark.parametrize("persona", Grid.load("long").personas, ids=lambda p: p.key)
def test_long_grid_personas_fit_the_template_and_have_their_own_markers(persona: Persona) -> None:
    assert persona.text.startswith(("a ", "an "))
    assert persona.text[-1].isalpha()
    assert "\n" not in persona.text
    assert 12 <= len(persona.markers) <= 16
    others = {m for p in Grid.load("long").personas if p != persona for m in p.markers}
    tasks = " ".join(t.text.lower() for t in Grid.load("long").tasks)
    for marker in persona.markers:
        assert marker == marker.lower()
        assert marker not in others
        assert not re.search(rf"\b{re.escape(marker)}\b", tasks), "a task must not give it away"


def test_every_builtin_file_is_listed_and_named_after_itself() -> None:
    stored = {f.name for f in (files("persona_nnsight.prompts") / "builtin_grids").iterdir()}
    assert stored == {f"{name}.yaml" for name in Grid.builtin_names()}
    assert [Grid.load(name).name for name in Grid.builtin_names()] == list(Grid.builtin_names())


def test_importing_grids_loads_no_model_library() -> None:
    code = "import sys, persona_nnsight.prompts.grids; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Prompts, cells, selection, donors


def test_defaults_and_normalised_extras(mine: Grid) -> None:
    short = Grid.load("short")
    assert mine.template == short.template
    assert mine.baseline_persona == short.baseline_persona
    assert mine.baseline_task == short.baseline_task
    assert mine.personas == (Persona("a", "Ada"), Persona("b", "Bob", ("sea", "tide pool")))
    assert mine.tasks == (Task("one", "Do it."), Task("two", "Undo it.", ("review",)))


def test_cells_go_persona_by_persona(mine: Grid) -> None:
    pairs = [(cell.persona.key, cell.task.key) for cell in mine.cells]
    assert pairs == [("a", "one"), ("a", "two"), ("b", "one"), ("b", "two")]


def test_the_four_prompts_of_a_cell(mine: Grid) -> None:
    x, y = mine.personas[0], mine.tasks[0]
    assert mine.prompt(x, y) == "As Ada, Do it."
    assert mine.prompt(x, None) == f"As Ada, {mine.baseline_task}"
    assert mine.prompt(None, y) == "As a thoughtful person, Do it."
    assert mine.prompt(None, None) == f"As a thoughtful person, {mine.baseline_task}"


def test_template_is_filled_literally_and_in_one_pass() -> None:
    grid = Grid.from_dict(
        plain(
            template=r"{task} <{persona}> {x} {{}} \1",
            personas={"a": r"{task} {0} \g<1>"},
            tasks={"t": "{persona}"},
        )
    )
    filled = grid.prompt(grid.personas[0], grid.tasks[0])
    assert filled == r"{persona} <{task} {0} \g<1>> {x} {{}} \1"


def test_select_uses_file_order_and_keeps_what_is_not_named() -> None:
    grid = Grid.load("short")
    chosen = grid.select(personas=["yoda", "buffett", "yoda"]).select(tasks=["haiku"])
    assert chosen.persona_keys == ("buffett", "yoda")
    assert [(c.persona.key, c.task.key) for c in chosen.cells] == [
        ("buffett", "haiku"),
        ("yoda", "haiku"),
    ]
    assert chosen.select(personas=["marx"]).persona_keys == ("marx",), "out of the whole grid"
    assert chosen.personas == grid.personas
    assert grid.select() == grid


@pytest.mark.parametrize(
    ("personas", "tasks", "says"),
    [
        (["yodda"], None, ["'yodda'", "'short'", "buffett, marx, yoda, angelou", "mean 'yoda'"]),
        (["yoda", "kant", "hume"], None, ["no persona 'kant', 'hume'"]),
        (None, ["poem"], ["no task 'poem'", "policy, haiku, recommend"]),
        ([], None, ["no persona is selected", "buffett"]),
        (None, "haiku", ["list of keys", "['haiku']"]),
    ],
)
def test_select_refuses(personas: Any, tasks: Any, says: list[str]) -> None:
    with pytest.raises(PersonaError) as caught:
        Grid.load("short").select(personas, tasks)
    assert all(part in str(caught.value) for part in says), caught.value


def test_donor_is_the_next_of_the_whole_grid() -> None:
    grid = Grid.load("short").select(personas=["yoda"])
    donors = [grid.donor(persona) for persona in grid.personas]
    assert [donor.key for donor in donors if donor] == ["marx", "yoda", "angelou", "buffett"]


def test_donor_of_a_lone_persona_and_of_a_stranger() -> None:
    grid = Grid.single("Yoda", "Sing.")
    assert grid.donor(grid.personas[0]) is None
    with pytest.raises(PersonaError, match="no persona 'kant' in the grid 'single'"):
        grid.donor(Persona("kant", "Immanuel Kant"))


def test_single() -> None:
    grid = Grid.single(" Maya Angelou ", "Write a haiku about Monday mornings.")
    (cell,) = grid.cells
    assert (grid.name, cell.persona.key, cell.task.key) == (
        "single",
        "maya-angelou",
        "write-a-haiku-about",
    )
    assert grid.prompt(cell.persona, cell.task) == (
        "As Maya Angelou, Write a haiku about Monday mornings."
    )
    assert Grid.single("孔子", "写诗。").cells[0].persona.key == "persona"


@pytest.mark.parametrize(("persona", "task", "what"), [(" ", "x", "persona"), ("x", "", "task")])
def test_single_refuses_empty_texts(persona: str, task: str, what: str) -> None:
    with pytest.raises(PersonaError, match=f"the {what} is empty"):
        Grid.single(persona, task)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Warren Buffett", "warren-buffett"),
        ("  José's café! ", "jose-s-cafe"),
        ("Comment on whether universal basic income", "comment-on-whether"),
        ("x" * 40, "x" * 24),
        ("123456789 123456789 1234", "123456789-123456789-1234"),
        ("???", "fallback"),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text, "fallback") == expected


# There and back


@pytest.mark.parametrize("name", Grid.builtin_names())
def test_round_trip_of_the_builtin_grids(name: str, tmp_path: Path) -> None:
    grid = Grid.load(name)
    chosen = grid.select(personas=[grid.persona_keys[1]])
    assert Grid.from_dict(chosen.to_dict()) == grid
    assert Grid.load(write(tmp_path, chosen.to_yaml())) == grid


@pytest.mark.parametrize(
    "text",
    [
        *("yes", "12", "null", "~", "2020-01-01", "- a: b", "a: b #c", "# no", "&x", "*x", "%"),
        *("'", '"', "=", "<<", "[a]", "{persona}"),
        *("a\nb\n\n c", "tab\tbed", "é 😀 \u2028x", "word " * 60),
    ],
)
def test_round_trip_of_awkward_texts(text: str, tmp_path: Path) -> None:
    grid = Grid.from_dict(
        plain(personas={"yes": text, "1": {"text": text, "markers": [text]}, "1.5": "x"})
    )
    assert Grid.load(write(tmp_path, grid.to_yaml())) == grid
    assert grid.personas[0].text == text.strip()


def test_file_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    text = "\ufeff" + yaml.safe_dump(plain()).replace("\n", "\r\n")
    assert [p.text for p in Grid.load(write(tmp_path, text)).personas] == ["Ada", "Bob"]


def test_block_scalars_lose_their_last_line_break(tmp_path: Path) -> None:
    text = "name: g\npersonas:\n  a: >\n    Ada\n    Lovelace\ntasks: {t: Go.}\n"
    assert Grid.load(write(tmp_path, text)).personas[0].text == "Ada Lovelace"


def test_a_path_is_never_a_builtin_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Grid
) -> None:
    write(tmp_path, mine.to_yaml(), "short")
    monkeypatch.chdir(tmp_path)
    assert Grid.load(Path("short")) == mine
    assert Grid.load("short").name == "short"


# What is refused in the data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], ["the grid must be a mapping", "not a list"]),
        ("text", ["not a text"]),
        (plain(name=None), ["no 'name'", "'personas'"]),
        (plain(personas=None), ["no 'personas'"]),
        (plain(tasks=None), ["no 'tasks'"]),
        (plain(persona={}), ["unknown field 'persona'", "mean 'personas'"]),
        (plain(name=5), ["'name' must be a text, not a number"]),
        (plain(name="a b"), ["'name' is 'a b'", "letters, digits"]),
        (plain(template="As {persona}"), ["'As {persona}'", "{persona} and {task} once each"]),
        (plain(template="{persona}{task}{task}"), ["once each"]),
        (plain(template=True), ["'template' must be a text, not true or false"]),
        (plain(baseline="x"), ["'baseline' must be a mapping with persona, task, not a text"]),
        (plain(baseline={"who": "x"}), ["'baseline' has an unknown field 'who'"]),
        (plain(baseline={"task": " \n"}), ["'baseline.task' is empty"]),
        (plain(baseline={"persona": ["x"]}), ["'baseline.persona' must be a text, not a list"]),
        (plain(personas={}), ["'personas' is empty"]),
        (plain(tasks={}), ["'tasks' is empty"]),
        (plain(tasks=["Go."]), ["'tasks' must be a mapping of key to text, not a list"]),
        (plain(personas={1: "x"}), ["key 1", "a number", "quotes", "'1'"]),
        (plain(personas={True: "x"}), ["key True", "true or false"]),
        (plain(personas={None: "x"}), ["key None", "nothing"]),
        (plain(personas={"a b": "x"}), ["'personas' has the key 'a b'", "'-' or '.'"]),
        (plain(personas={"../x": "x"}), ["'../x'"]),
        (plain(personas={"-x": "x"}), ["'-x'", "starting with a letter"]),
        (plain(personas={"é": "x"}), ["ASCII"]),
        (plain(personas={"": "x"}), ["the key ''"]),
        (plain(personas={"a\n": "x"}), ["the key 'a\\n'"]),
        (plain(personas={"a" * 65: "x"}), ["at most 64"]),
        (plain(personas={"a": ""}), ["'personas.a' is empty"]),
        (plain(personas={"a": "\t "}), ["'personas.a' is empty"]),
        (plain(personas={"a": 3}), ["'personas.a' must be a text or a mapping", "not a number"]),
        (plain(personas={"a": None}), ["'personas.a'", "not nothing"]),
        (plain(personas={"a": {}}), ["'personas.a' has no 'text'", "markers: [...]"]),
        (plain(personas={"a": {"text": 1}}), ["'personas.a.text' must be a text"]),
        (plain(personas={"a": {"text": "x", "marker": []}}), ["'marker'", "mean 'markers'"]),
        (plain(tasks={"a": {"text": "x", "markers": []}}), ["'markers'", "text, tags"]),
        (plain(personas={"a": {"text": "x", "markers": "sea"}}), ["must be a list of texts"]),
        (plain(personas={"a": {"text": "x", "markers": ["sea", 1]}}), ["markers[1]", "number"]),
        (
            plain(personas={"a": {"text": "x", "markers": ["sea", "\ufe0f"]}}),
            ["'personas.a.markers[1]' is empty"],
        ),
        (plain(tasks={"a": {"text": "x", "tags": [" "]}}), ["'tasks.a.tags[0]' is empty"]),
        (plain(personas={"a": "x\x1b[31m"}), ["'personas.a' contains", "U+001B"]),
        (plain(personas={"a": "x\ud800y"}), ["U+D800"]),
    ],
)
def test_from_dict_refuses(data: Any, says: list[str]) -> None:
    with pytest.raises(PersonaError) as caught:
        Grid.from_dict(data)
    message = str(caught.value)
    assert all(part in message for part in says), message
    assert "\n" not in message


def test_markers_are_kept_as_texts_are_compared() -> None:
    written = ["Straße", "STRASSE", "ＡＩ", "ai", "cafe\u0301", "Café", "ﾗｰﾒﾝ", "\u00a8x"]
    grid = Grid.from_dict(plain(personas={"a": {"text": "Ada", "markers": written}}))
    assert grid.personas[0].markers == ("strasse", "ai", "café", "ラーメン", "\u0308x")
    assert Grid.from_dict(grid.to_dict()) == grid


# What is refused in a file

HEAD = "name: g\n"
TAIL = "tasks: {t: Go.}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["the file is empty"]),
        ("# only a comment\n", ["the file is empty"]),
        ("- a\n", ["must be a mapping with name, template", "not a list"]),
        ("just text", ["not a text"]),
        (b"name: caf\xe9\n", ["line 1 is not UTF-8"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ["not UTF-8"]),
        ("name: \x00\n", ["not a YAML text"]),
        ('name: "\\UFFFFFFFF"\n', ["not a YAML text"]),
        ("name: g\npersonas: [\n", ["line 3", "quotes"]),
        (HEAD + "personas:\n  a: Review: this\n", ["line 3: mapping values", "quotes"]),
        (HEAD + "---\n" + HEAD, ["line 2", "document"]),
        (HEAD + "name: h\n", ["line 2: the key 'name' is there twice"]),
        (HEAD + "personas:\n  a: x\n  b: y\n  a: z\n" + TAIL, ["line 5", "'a' is there twice"]),
        (HEAD + "personas: {1: x}\n" + TAIL, ["line 2: the key '1'", "a number", 'quotes: "1"']),
        (HEAD + "personas:\n  yes: x\n" + TAIL, ["line 3: the key 'yes'", "true or false"]),
        (HEAD + "personas: {2020-01-01: x}\n" + TAIL, ["read by YAML as a date"]),
        (HEAD + "personas: {null: x}\n" + TAIL, ["'null' is read by YAML as nothing"]),
        (HEAD + "personas: {[a]: x}\n" + TAIL, ["line 2: the key", "not a text"]),
        (HEAD + "personas: {<<: {a: x}}\n" + TAIL, ["'<<'", "a merge"]),
        (HEAD + "personas: {a: 2020-99-99}\n" + TAIL, ["the value '2020-99-99'", "a date"]),
        (HEAD + "personas: {a: 1.5}\n" + TAIL, ["the value '1.5' is read by YAML as a number"]),
        (HEAD + "personas:\n" + TAIL, ["line 2: the value is missing here"]),
        (HEAD + "personas: {a: !!python/name:os.system x}\n" + TAIL, ["'!!python/name:os"]),
        (HEAD + "personas: !!set {a, b}\n" + TAIL, ["tags such as '!!set' are not"]),
        (HEAD + "personas: &p {a: x}\ntasks: *p\n", ["line 2: anchors (&) and aliases (*)"]),
        (HEAD + "personas: {a: &x hello}\n" + TAIL, ["anchors"]),
        (HEAD + "personas: {a: *x }\n" + TAIL, ["aliases"]),
        (HEAD + "personas: " + "[" * 5000, ["line 2: the nesting is too deep"]),
        (HEAD + "personas: {a: x}\ntask: {t: Go.}\n", ["'task'", "mean 'tasks'"]),
        (b"#" * (1024 * 1024 + 1), ["larger than 1 MiB"]),
    ],
)
def test_load_refuses(text: str | bytes, says: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PersonaError) as caught:
        Grid.load(str(path))
    message = str(caught.value)
    assert all(part in message for part in [*says, str(path)]), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("shrot", ["'shrot'", "short, long", "did you mean 'short'", "path"]),
        ("no/such.yaml", ["'no/such.yaml'"]),
        ("", ["''"]),
        ("x" * 5000, ["no built-in grid"]),
        ("a\0b", ["no built-in grid"]),
        (Path("short"), ["no file 'short'"]),
        (Path("/"), ["'/' cannot be read", "directory"]),
    ],
)
def test_load_names_what_is_not_there(source: str | Path, says: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(PersonaError) as caught:
            Grid.load(source)
    assert all(part in str(caught.value) for part in says), caught.value


def test_file_of_exactly_one_mebibyte_is_read(tmp_path: Path) -> None:
    raw = b"#" * 1024 * 1024
    assert read_small_file(write(tmp_path, raw)) == raw


# The commands

root = typer.Typer()
root.add_typer(grids_app, name="grids")
runner = CliRunner(env={"COLUMNS": "200"})


@root.callback()
def _root() -> None:
    """The command that mounts the others."""


@pytest.mark.parametrize("args", [["grids"], ["grids", "list"]])
def test_cli_lists_the_builtin_grids(args: list[str]) -> None:
    result = runner.invoke(root, args)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["short", "4", "3", "12"] in rows
    assert ["long", "8", "6", "48"] in rows


def test_cli_show_prints_user_text_as_it_is(tmp_path: Path) -> None:
    data = plain(personas={"a": {"text": "[bold]Ada[/] :smile:", "markers": ["[red]sea"]}})
    path = write(tmp_path, yaml.safe_dump(data))
    result = runner.invoke(root, ["grids", "show", str(path)])
    assert result.exit_code == 0, result.output
    for part in ("[bold]Ada[/] :smile:", "[red]sea", "a thoughtful person", "Undo it.", "review"):
        assert part in result.stdout


def test_cli_show_yaml_is_a_grid(tmp_path: Path) -> None:
    result = runner.invoke(root, ["grids", "show", "long", "--yaml"])
    assert Grid.load(write(tmp_path, result.stdout)) == Grid.load("long")


def test_cli_check(tmp_path: Path) -> None:
    path = write(tmp_path, Grid.load("long").to_yaml())
    result = runner.invoke(root, ["grids", "check", str(path)])
    assert result.stdout == "ok: long, 8 personas x 6 tasks = 48 cells\n"
    path = write(tmp_path, Grid.single("Yoda", "Sing.").to_yaml())
    result = runner.invoke(root, ["grids", "check", str(path)])
    assert result.stdout == "ok: single, 1 persona x 1 task = 1 cell\n"


@pytest.mark.parametrize("args", [["check", "none.yaml"], ["show", "shrot"], ["import", "no.py"]])
def test_cli_leaves_errors_to_the_main_program(args: list[str]) -> None:
    result = runner.invoke(root, ["grids", *args])
    assert isinstance(result.exception, PersonaError)


def test_cli_import(tmp_path: Path) -> None:
    script = write(tmp_path, "PERSONAS = {'a': 'Ada'}\nTASKS = {'t': 'Go.'}\n", "study.py")
    out = tmp_path / "study.yaml"
    printed = runner.invoke(root, ["grids", "import", str(script)])
    written = runner.invoke(root, ["grids", "import", str(script), "--out", str(out)])
    assert written.exit_code == 0, written.output
    assert "study, 1 persona x 1 task = 1 cell" in written.stdout
    assert out.read_text(encoding="utf-8") == printed.stdout
    assert Grid.load(out).personas == (Persona("a", "Ada"),)

    again = runner.invoke(root, ["grids", "import", str(script), "--out", str(out)])
    assert isinstance(again.exception, PersonaError)
    assert "not overwritten" in str(again.exception)
    astray = runner.invoke(root, ["grids", "import", str(script), "--out", str(out / "x.yaml")])
    assert isinstance(astray.exception, PersonaError)
    assert "Cannot create" in str(astray.exception)
