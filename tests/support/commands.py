"""What a command of the program leaves: its exit code and streams."""

from __future__ import annotations

import json
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
    (sentence,) = outcome.err.strip().splitlines()
    assert sentence.startswith("persona: ")
    for word in words:
        assert word in sentence


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
