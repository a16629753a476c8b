"""Weights that lie in a model's directory and that nothing would read: an adapter, a stray shard.

transformers reads one file, or the shards of one index, and passes over the rest without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path

from persona_nnsight.errors import PersonaError, quoted
from persona_nnsight.models.weights.model_files import CONFIG, adapter, missing, weight_files

MERGE = "merge it into the model's weights first (merge_and_unload and save_pretrained, in peft)"
"""What makes an adapter part of a model."""

_OTHER_WEIGHTS = "transformers_weights"
"""The key of config.json by which transformers reads a file of another name."""


def refuse_adapter(directory: Path, spec: str) -> None:
    """Refuse an adapter, whether its model lies beside it or not.

    Raises:
        PersonaError: there is one.
    """
    if found := adapter(path.name for path in directory.iterdir()):
        raise PersonaError(
            f"{spec!r} holds an adapter ({found}), which would not be applied; {MERGE}, or take "
            "it away if the model is to be measured without it."
        )


def refuse_other_weights(directory: Path, spec: str) -> None:
    """Refuse safetensors beside those that are read, in a directory with a readable config.json.

    Whole copies of the model in another layout (Mistral's `consolidated.safetensors`) are told by
    how many numbers they hold, and may stay.

    Raises:
        PersonaError: there are some, or config.json names other weights.
    """
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    if named := config.get(_OTHER_WEIGHTS):
        raise PersonaError(
            f"The config.json of {spec!r} names its weights {quoted(named)} ({_OTHER_WEIGHTS}), "
            "and only model.safetensors or its index is read; rename them, and take the key out."
        )
    if missing(directory, weights=True):
        return  # a skeleton needs none
    read = weight_files(directory)
    others = sorted(set(directory.glob("*.safetensors")) - set(read))
    if others and not _are_copies(others, read):
        raise PersonaError(
            f"{spec!r} holds {len(others)} file{'s' * (len(others) > 1)} of weights that would not "
            f"be read ({others[0].name}) beside {read[0].name}; take what does not belong to the "
            f"model away, and of an adapter, {MERGE}."
        )


def _are_copies(others: Iterable[Path], read: Iterable[Path]) -> bool:
    """Whether files hold as many numbers as the weights that are read, once or several times."""
    try:
        extra, size = _numbers(others), _numbers(read)
    except Exception:  # whatever the reader meets in a file that is none
        return False
    return size > 0 and extra >= size and extra % size == 0


def _numbers(files: Iterable[Path]) -> int:
    """How many numbers safetensors hold, by their headers."""
    from safetensors import safe_open

    total = 0
    for path in files:
        with safe_open(path, "np") as stored:
            total += sum(prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
    return total
