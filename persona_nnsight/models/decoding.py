"""Decoding as a checkpoint's own settings have it, as far as it comes out the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persona_nnsight.errors import PersonaError

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
        settings: the checkpoint's, as its generation_config.json has them: transformers reads it
            for a model with weights only, and refuses what contradicts itself.
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
