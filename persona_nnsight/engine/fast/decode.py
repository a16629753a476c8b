"""Decoding from a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import Decoded, decoding, generate, lengths_to_eos
from persona_nnsight.engine.fast.prefill import Prefix, room


def prompt_inputs(
    chunk: Chunk, prefix: Prefix, rows: Sequence[int], n_tokens: int
) -> dict[str, Any]:
    """Arguments of a ``generate`` that decodes from whole prompts.

    Args:
        chunk: the chunk.
        prefix: its prompts.
        rows: of the prefix.
        n_tokens: how many tokens, whether the text ends or not.
    """
    tails = prefix.tails[rows]
    kv = prefix.kv.select(rows, room=room(chunk.lm, chunk.plan.tail + n_tokens))
    return {
        "input_ids": torch.cat([prefix.opening[rows], tails], dim=1),
        "attention_mask": torch.cat([kv.mask, torch.ones_like(tails)], dim=1),
        "past_key_values": kv.cache,
        "logits_to_keep": torch.tensor([-1]),
        **decoding(chunk.plan, n_tokens),
    }


def decode(chunk: Chunk, prefix: Prefix) -> Decoded:
    """XY's continuations, as long as the windows of all positions need."""
    n_tokens = chunk.plan.reference_tokens
    rows = prefix.rows([cell.prompts["XY"] for cell in chunk.cells])
    inputs = prompt_inputs(chunk, prefix, rows, n_tokens)
    tokens, margins = generate(chunk.lm, inputs, n_tokens)
    return Decoded(tokens, lengths_to_eos(tokens, chunk.plan.eos_ids), margins)
