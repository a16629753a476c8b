"""How the engine decodes: plain argmax for a fixed number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persona_nnsight.engine.prefill import Chunk, grown_mask, select_rows

#: Whatever a checkpoint's own generation settings say (some penalise repetition even when not
#: sampling). The end of a continuation is found afterwards, so that every row of a batch takes
#: the same steps.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "eos_token_id": None,
    "use_cache": True,
}


def prompt_inputs(chunk: Chunk, rows: Tensor, n_tokens: int) -> dict[str, Any]:
    """Arguments of a ``generate`` that decodes `n_tokens` from whole prompts, tails first."""
    prefix = chunk.prefix
    return {
        "input_ids": torch.cat([prefix.opening[rows], prefix.tails[rows]], dim=1),
        "attention_mask": grown_mask(prefix.mask[rows], chunk.plan.tail),
        "past_key_values": select_rows(prefix.cache, rows),
        "max_new_tokens": n_tokens,
        "pad_token_id": chunk.plan.pad_id,
        **GREEDY,
    }


def lengths_to_eos(tokens: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Tokens of each row up to and including the first end-of-sequence token, int [rows]."""
    eos = torch.tensor(eos_ids, dtype=tokens.dtype, device=tokens.device)
    ended = torch.isin(tokens, eos)
    full = torch.full((len(ended),), ended.shape[1], device=ended.device)
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, full)


def cut_rows(tokens: Tensor, lengths: Tensor) -> tuple[tuple[int, ...], ...]:
    """The first `lengths` tokens of every row."""
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return tuple(tuple(row[:length]) for row, length in pairs)
