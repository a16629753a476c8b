"""Ways to spoil the files of a model, of saved vectors or of a run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

Change = Callable[[Path], object]


class Touch:
    """What a malicious pickle holds: unpickling it writes a file."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, ("pwned",)  # type: ignore[return-value]


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
