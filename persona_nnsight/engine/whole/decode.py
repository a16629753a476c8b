"""Decoding from whole prompts of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import Decoded, decoding, generate, lengths_to_eos, margin
from persona_nnsight.engine.finite import overflowed
from persona_nnsight.engine.plain import last_logits, plain_inputs
from persona_nnsight.engine.texts import Changes, generate_edited
from persona_nnsight.engine.whole.batches import in_even_batches
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.plan import Plan


def decode(chunk: Chunk, limits: Limits) -> Decoded:
    """XY's continuations, as long as the windows of all positions need."""
    plan = chunk.plan
    n_tokens = plan.reference_tokens
    prompts = [plan.prompts[cell.prompts["XY"]].ids for cell in chunk.cells]

    def work(cells: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([prompts[cell] for cell in cells], device=chunk.device)
        if recomputes(chunk, limits):
            tokens, _, margins = recomputed(chunk, ids, n_tokens, {})
            return tokens, margins
        return generate(chunk.lm, whole_inputs(plan, ids, n_tokens), n_tokens)

    cells: list[int] = []
    found: list[tuple[Tensor, Tensor]] = []
    every = range(len(prompts))
    for batch, result in in_even_batches(
        every, lambda cell: (len(prompts[cell]),), lambda shape: limits.rows_of(*shape), work
    ):
        cells += batch
        found.append(result)
    order = torch.tensor(cells).argsort()
    tokens, margins = (
        torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*found, strict=True)
    )
    return Decoded(tokens, lengths_to_eos(tokens, plan.eos_ids), margins)


def edited_texts(
    chunk: Chunk, limits: Limits, ids: Tensor, n_tokens: int, changes: Changes
) -> tuple[Tensor, Tensor]:
    """Text under edits: what `generate_edited` returns.

    Args:
        chunk, limits: the chunk, and the path that rows take.
        ids: whole prompts, int [rows, length].
        n_tokens: how many tokens.
        changes: the edits.
    """
    if recomputes(chunk, limits):
        tokens, broken, _ = recomputed(chunk, ids, n_tokens, changes)
        return tokens, broken
    inputs = whole_inputs(chunk.plan, ids, n_tokens)
    return generate_edited(chunk, inputs, n_tokens, changes)


def whole_inputs(plan: Plan, ids: Tensor, n_tokens: int) -> dict[str, Any]:
    """Arguments of a ``generate`` from whole prompts of one length, int [rows, length]."""
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, **decoding(plan, n_tokens)}


def recomputes(chunk: Chunk, limits: Limits) -> bool:
    """Whether every token is a forward of all before it.

    What a checkpoint does to logits is transformers' own, in its ``generate``.
    """
    return not limits.path.keeps_cache and not chunk.plan.decoding


def recomputed(
    chunk: Chunk, ids: Tensor, n_tokens: int, changes: Changes
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode with a plain forward for every token.

    Args:
        chunk: the chunk.
        ids: whole prompts, int [rows, length].
        n_tokens: how many tokens.
        changes: the edits.

    Returns:
        Tokens, whether the logits of each overflowed, and their margins, [rows, n_tokens] each.
    """
    lm, length = chunk.lm, ids.shape[1]
    broken, margins = [], []
    for step in range(n_tokens):
        with lm.trace(**plain_inputs(lm, ids, kept=1)):
            for layer in chunk.plan.layers:
                for fed in range(step + 1):
                    # The tokens that this step fed, where the earlier ones were kept.
                    own = slice(length - 1 + fed, length + fed) if fed else slice(0, length)
                    for row, change in changes.get((fed, layer), ()):
                        change(chunk.editable_residual(layer)[row : row + 1, own])
            logits = nnsight.save(last_logits(lm, 1)[:, -1])
        broken.append(overflowed(logits))
        margins.append(margin(logits))
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True).to(ids.device)], dim=1)
    return ids[:, length:], torch.stack(broken, 1).to(ids.device), torch.stack(margins, 1)
