"""Grids and scripts of personas that are refused."""

from __future__ import annotations

import errno
import tracemalloc
from pathlib import Path

import pytest
from cells import GRID_TEXT
from commands import OUT, WHERE, Persona, refused
from spoil import Change
from tiny import TinyDir


def grid(**changed: str) -> str:
    """A grid file with lines changed or added; `personas="a: b"` replaces that field."""
    fields = {"name": "x", "personas": "{yoda: Yoda}", "tasks": "{haiku: write a haiku.}"}
    return "".join(f"{name}: {value}\n" for name, value in {**fields, **changed}.items())


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

GRIDS: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", "the file is empty"),
    "comments only": ("# nothing\n", "the file is empty"),
    "a byte order mark only": (b"\xef\xbb\xbf", "the file is empty"),
    "empty mapping": ("{}", "the grid has no 'name'"),
    "a list": ("[a, b]", "the grid must be a mapping with name, template"),
    "a text": ("hello", "not a text"),
    "no personas": ("name: x\ntasks: {a: b}\n", "the grid has no 'personas'"),
    "no tasks": ("name: x\npersonas: {a: b}\n", "the grid has no 'tasks'"),
    "empty personas": (grid(personas="{}"), "'personas' is empty"),
    "personas as a list": (grid(personas="[Yoda]"), "'personas' must be a mapping"),
    "personas left out": (grid(personas=""), "line 2: the value is missing"),
    "ten megabytes": (b"a" * 10_000_000, "larger than 1 MiB"),
    "a billion laughs": (BOMB, "line 1: anchors (&) and aliases (*)"),
    "a merge key": (grid(**{"<<": "{a: b}"}), "'<<' is read by YAML as a merge"),
    "a Python object": (
        grid(x="!!python/object/apply:os.mkdir [pwned]"),
        "tags such as '!!python/object/apply:os.mkdir' are not allowed",
    ),
    "a Python name": (grid(name="!!python/name:os.system x"), "'!!python/name:os.system'"),
    "a tag of one's own": (grid(name="!mine x"), "tags such as '!mine'"),
    "a tagged text": (grid(name="!!str x"), "tags such as '!!str'"),
    "a set": (grid(personas="!!set {a, b}"), "tags such as '!!set'"),
    "binary": (grid(name="!!binary aGk="), "tags such as '!!binary'"),
    "latin-1": (grid(name="José").encode("latin-1"), "line 1 is not UTF-8"),
    "utf-16": (GRID_TEXT.encode("utf-16"), "is not UTF-8"),
    "a NUL byte": (grid(name="a\0b"), "character #x0000"),
    "an escaped NUL": (grid(personas='{a: "b\\0c"}'), "'personas.a' contains the character U+0000"),
    "half a surrogate": (grid(personas='{a: "\\ud800"}'), "the character U+D800"),
    "an escape sequence": (grid(personas='{a: "\\e[31m"}'), "the character U+001B"),
    "a number beyond Unicode": (grid(personas='{a: "\\U99999999"}'), "not a YAML text"),
    "a field twice": (GRID_TEXT + "name: y\n", "the key 'name' is there twice"),
    "a persona twice": (grid(personas="{a: b, a: c}"), "the key 'a' is there twice"),
    "an unknown field": (grid(persona="{a: b}"), "unknown field 'persona'"),
    "an unknown field of a persona": (grid(personas="{a: {text: b, marker: [c]}}"), "'marker'"),
    "template without task": (grid(template="As {persona}"), "is 'As {persona}', but must"),
    "template without persona": (grid(template="'Do {task}'"), "is 'Do {task}', but must"),
    "template with one twice": (grid(template="'{task}{task}{persona}'"), "once each"),
    "template with another brace": (
        grid(template="'{{persona}}{x}'"),
        "but must contain {persona}",
    ),
    "empty template": (grid(template="''"), "'template' is empty"),
    "a long template": (grid(template="k" * 50_000), "kkk…kkk"),
    "a long name": (grid(name="k" * 50_000), "kkk…kkk"),
    "deep lists": (grid(x="[" * 5_000), "line 4: the nesting is too deep"),
    "deep mappings": ("".join(" " * i + "a:\n" for i in range(99)), "the nesting is too deep"),
    "a number as a key": (grid(personas="{1: x}"), "the key '1' is read by YAML as a number"),
    "a list as a key": (grid(personas="{[a]: x}"), "the key is not a text"),
    "a long key": (grid(personas="{" + "k" * 900 + ": x}"), "use at most 64 ASCII letters"),
    "a key with a line break": (grid(personas='{"yo\\nda": x}'), "the key 'yo\\nda'"),
    "a key with a slash": (grid(personas="{yo/da: x}"), "the key 'yo/da'"),
    "a key that leads out": (grid(personas="{../../etc: x}"), "the key '../../etc'"),
    "a key that is an option": (grid(personas="{--out: x}"), "the key '--out'"),
    "true": (grid(personas="{a: yes}"), "'yes' is read by YAML as true or false"),
    "a date": (grid(personas="{a: 2020-01-01}"), "'2020-01-01' is read by YAML as a date"),
    "a number": (grid(personas="{a: 1.5}"), "'1.5' is read by YAML as a number"),
    "a list as a text": (grid(personas="{a: [b]}"), "'personas.a' must be a text or a mapping"),
    "no text": (grid(personas="{a: {markers: [b]}}"), "'personas.a' has no 'text'"),
    "markers as a text": (grid(personas="{a: {text: b, markers: c}}"), "must be a list of texts"),
    "an empty text": (grid(personas="{a: ' '}"), "'personas.a' is empty"),
    "a text of no width": (grid(personas='{a: "\\u200b\\u202e"}'), "'personas.a' is empty"),
    "an empty baseline": (grid(baseline="{persona: ''}"), "'baseline.persona' is empty"),
    "two documents": (f"{GRID_TEXT}---\n{GRID_TEXT}", "line 4: but found another document"),
    "a tab": ("name: x\npersonas:\n\ta: b\n", "line 3: found character '\\t'"),
    "an open bracket": ("name: x\npersonas: {a: b\n", "line 3"),
    "an executable": (b"\x7fELF\x02\x01\x01\0\0\0", "character #x007f"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_grids(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    content, says = GRIDS[case]
    path = Path("bad.yaml")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    outcome = persona("capture", "-m", tiny_dir("llama"), "-g", path, "-o", OUT, *WHERE)
    refused(outcome, says)
    assert "bad.yaml" in outcome.err
    assert not Path("pwned").exists()


@pytest.mark.parametrize("case", ["ten megabytes", "a billion laughs", "deep lists"])
def test_a_grid_that_wants_memory_gets_little(persona: Persona, case: str) -> None:
    content, says = GRIDS[case]
    Path("bad.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    tracemalloc.start()
    try:
        outcome = persona("grids", "check", "bad.yaml")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    refused(outcome, says)
    assert peak < 30 * 2**20


def no_file(path: Path) -> None:
    assert not path.exists()


GRID_PATHS: dict[str, tuple[Change, str]] = {
    "missing": (no_file, "no file is called 'bad.yaml'"),
    "a directory": (Path.mkdir, "'bad.yaml' cannot be read (Is a directory)"),
    "a link to nowhere": (lambda path: path.symlink_to("gone"), "no file is called 'bad.yaml'"),
    "a link to itself": (lambda path: path.symlink_to(path), "no file is called 'bad.yaml'"),
    "without end": (lambda path: path.symlink_to("/dev/zero"), "larger than 1 MiB"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "the file is empty"),
}


@pytest.mark.parametrize("case", GRID_PATHS)
def test_paths_of_grids(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    make, says = GRID_PATHS[case]
    make(Path("bad.yaml"))
    refused(persona("capture", "-m", tiny_dir("llama"), "-g", "bad.yaml", "-o", OUT), says)


def test_an_unreadable_grid(persona: Persona, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    refused(
        persona("grids", "check", "grid.yaml"), "'grid.yaml' cannot be read (Permission denied)"
    )


SCRIPTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "no personas found in the script"),
    "no Python": ("personas = (", "line 1 is not valid Python"),
    "a call": (
        "import os\nPERSONAS = {'a': os.mkdir('pwned')}\nTASKS = {'b': 'c'}\n",
        "PERSONAS holds \"os.mkdir('pwned')\", which is not a plain literal",
    ),
    "a huge power": ("PERSONAS = {'a': 9**9**9}\nTASKS = {'b': 'c'}\n", "'9 ** 9 ** 9'"),
    "a long sum": ("PERSONAS = {'a': " + "'x'+" * 20_000 + "'y'}\n", "nested too deep"),
    "many signs": ("PERSONAS = {'a': " + "-" * 50_000 + "1}\n", "nested too deep"),
    "brackets": ("P = " + "(" * 5000, "line 1 is not valid Python"),
    "a NUL byte": ("x = 1\0", "null bytes"),
    "an unknown encoding": (b"# coding: zzz\n", "unknown encoding: zzz"),
    "two megabytes": (b"#" * 2_000_000, "larger than 1 MiB"),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_scripts_to_import(persona: Persona, case: str) -> None:
    content, says = SCRIPTS[case]
    Path("bad.py").write_bytes(content.encode() if isinstance(content, str) else content)
    refused(persona("grids", "import", "bad.py"), says)
    assert not Path("pwned").exists()
