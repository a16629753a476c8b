"""What a command of the program leaves: its exit code and streams."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Persona = Callable[..., "Outcome"]


class Outcome:
    """Exit code and streams of one command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def assert_one_sentence(outcome: Outcome, *words: str) -> None:
    """Exit code 2, nothing on standard output, and on standard error one sentence with `words`."""
    assert outcome.code == 2, outcome.out + outcome.err
    assert outcome.out == ""
    assert outcome.err.endswith("\n")
    (sentence,) = outcome.err.splitlines()
    assert sentence.startswith("persona: ")
    for word in words:
        assert word in sentence


OUT = "out"
"""The place of a run that is refused."""
WHERE = ("-l", "2", "-p", "p_last")
"""The options for one site."""


def refused(outcome: Outcome, says: str) -> None:
    """One sentence, after steps that may be told, says it and names no class; no run is left."""
    steps = re.compile(r"^(reading|converting|fetching) .* …\n", re.MULTILINE)
    sentence = steps.sub("", outcome.err)
    assert_one_sentence(Outcome(outcome.code, outcome.out, sentence), says)
    assert "Traceback" not in sentence
    assert not re.search(r"\b[A-Z][A-Za-z]*(Error|Exception)\b", sentence), sentence
    assert len(sentence) < 1000
    assert not Path(OUT).exists()
    assert not list(Path().glob("**/.partial*"))


def contents(directory: Path) -> dict[str, bytes]:
    """All files but run.json, which tells the time."""
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert "run.json" in found
    assert not [name for name in found if name.startswith(".") or name == "pending.json"]
    assert not (directory / "parts").exists()
    return {name: data for name, data in found.items() if name != "run.json"}


def facts(directory: Path) -> dict[str, Any]:
    """What run.json says but for time and memory."""
    data = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    return {k: v for k, v in data.items() if k not in ("finished", "seconds", "peak_memory_bytes")}
