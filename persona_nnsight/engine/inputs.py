"""Arguments of the model's forward and ``generate``, for rows that start from a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.kv_cache import KVCache

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


def prompt_inputs(chunk: Chunk, rows: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """Arguments of a ``generate`` that decodes `n_tokens` from whole prompts.

    Args:
        chunk: the chunk.
        rows: rows of the prefix.
        n_tokens: how many tokens, whether the text ends or not.
    """
    prefix = chunk.prefix
    tails = prefix.tails[rows]
    kv = prefix.kv.select(rows, room=chunk.room(chunk.plan.tail + n_tokens))
    return {
        "input_ids": torch.cat([prefix.opening[rows], tails], dim=1),
        "attention_mask": torch.cat([kv.mask, torch.ones_like(tails)], dim=1),
        "past_key_values": kv.cache,
        "max_new_tokens": n_tokens,
        "pad_token_id": chunk.plan.pad_id,
        "logits_to_keep": torch.tensor([-1]),
        **GREEDY,
    }


def forward_inputs(kv: KVCache | None, ids: Tensor, seen: Tensor | None = None) -> dict[str, Any]:
    """Arguments of a forward over tokens that follow those in a KV cache.

    Args:
        kv: what stands before; its rows are those of `ids`. The forward appends to it.
        ids: token ids, int [rows, tokens].
        seen: 0 at padding, int [rows, tokens]; None where there is none.
    """
    mask = torch.ones_like(ids) if seen is None else seen
    if kv is not None:
        mask = torch.cat([kv.mask, mask], dim=1)
    # Padding is left out of the count.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions[:, -ids.shape[1] :],
        "past_key_values": None if kv is None else kv.cache,
        "use_cache": True,
    }


def last_tokens(fed: int, kept: int) -> Tensor:
    """For ``logits_to_keep``: the last `kept` of `fed` tokens.

    Given as numbers, not as a count: transformers then copies these tokens together before the
    output embedding, and that product runs six times as fast as on a slice of every row.
    """
    return torch.arange(fed - kept, fed)
