"""Decoding as a checkpoint's own settings have it, as far as it comes out the same every time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.models.weights.model_files import GENERATION_CONFIG

#: The largest logit wins, or the largest after what the checkpoint does to logits.
GREEDY, CHECKPOINT = "greedy", "checkpoint"

#: Settings that change logits, each the same way every time, and what leaves logits as they are.
_CHANGES_LOGITS: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def decoding_of(settings: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """Settings to decode with, beside the largest logit.

    Args:
        settings: the checkpoint's (`generation_settings`).
        asked: ``greedy`` for none, or ``checkpoint``.

    Raises:
        PersonaError: another word.
    """
    if asked not in (GREEDY, CHECKPOINT):
        raise PersonaError(
            f"Decoding {asked!r} is not known; use greedy (the largest logit wins) or checkpoint "
            "(after what its generation_config.json does to logits)."
        )
    if asked == GREEDY:
        return {}
    found = {name: settings.get(name) for name in _CHANGES_LOGITS}
    return {
        name: value
        for name, value in found.items()
        if value is not None and value != _CHANGES_LOGITS[name]
    }


def generation_settings(directory: Path) -> dict[str, Any]:
    """What a checkpoint's generation_config.json says, as it stands there; nothing without one.

    transformers reads it for a model with weights only, and refuses what contradicts itself.
    """
    try:
        found = json.loads((directory / GENERATION_CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        return {}
    settings: dict[str, Any] = found  # an object: `model_files.unreadable` has seen to it
    return settings
