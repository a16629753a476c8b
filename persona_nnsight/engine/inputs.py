"""Arguments of the model's forward and ``generate``, for rows that start from a prefix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persona_nnsight.engine.prefill import Chunk, position_ids, select_rows

#: Plain argmax decoding of a fixed number of tokens, whatever a checkpoint's own generation
#: settings say (some penalise repetition even when not sampling). The end of a continuation is
#: found afterwards, so that every row of a batch takes the same steps.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "eos_token_id": None,
    "cache_implementation": None,
    "use_cache": True,
}


def grown_mask(mask: Tensor, n: int) -> Tensor:
    """`mask` with `n` more tokens to attend to."""
    return torch.cat([mask, mask.new_ones(len(mask), n)], dim=1)


def prompt_inputs(chunk: Chunk, rows: Tensor, n_tokens: int) -> dict[str, Any]:
    """Arguments of a ``generate`` that decodes `n_tokens` from whole prompts.

    Args:
        chunk: the chunk.
        rows: rows of the prefix, int [rows].
        n_tokens: how many tokens, whether the text ends or not.
    """
    prefix = chunk.prefix
    return {
        "input_ids": torch.cat([prefix.opening[rows], prefix.tails[rows]], dim=1),
        "attention_mask": grown_mask(prefix.mask[rows], chunk.plan.tail),
        "past_key_values": select_rows(prefix.cache, rows),
        "max_new_tokens": n_tokens,
        "pad_token_id": chunk.plan.pad_id,
        **GREEDY,
    }


def continuation_inputs(
    chunk: Chunk, rows: Tensor, continuations: Tensor, fed: int, first_layer: int = 0
) -> dict[str, Any]:
    """Arguments of a forward over the first `fed` tokens of tail and continuation.

    Args:
        chunk: the chunk.
        rows: rows of the prefix, int [rows].
        continuations: int [rows, reference_tokens].
        fed: how many tokens.
        first_layer: layers below it will be skipped.
    """
    prefix = chunk.prefix
    mask = grown_mask(prefix.mask[rows], fed)
    return {
        "input_ids": torch.cat([prefix.tails[rows], continuations], dim=1)[:, :fed],
        "attention_mask": mask,
        "position_ids": position_ids(mask)[:, -fed:],
        "past_key_values": select_rows(prefix.cache, rows, first_layer),
        "use_cache": True,
    }
