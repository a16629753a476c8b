"""Options, command lines and texts that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from cells import TINY_GRID
from commands import OUT, Persona, refused
from tiny import TinyDir

from persona_nnsight import Grid

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
    "margin": ("steer", ["--margin", "-0.1"], "A margin of -0.1 is no share of a KL"),
    "margin nan": ("inject", ["--margin", "nan"], "A margin of nan is no share of a KL"),
    "margin infinite": ("substitute", ["--margin", "inf"], "A margin of inf is no share of a KL"),
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
