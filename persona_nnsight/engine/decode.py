"""Decode: XY's greedy continuation, which every other run follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.finite import overflowed
from persona_nnsight.engine.inputs import prompt_inputs


@dataclass(frozen=True)
class Decoded:
    """The continuations of a chunk.

    Attributes:
        continuations: XY's greedy tokens, int [cells, reference_tokens].
        lengths: how many of them there are before the text ends, int [cells].
        margins: by how much the logit of each of these tokens is above the next one's, float32
            [cells, reference_tokens]; 0 where they are equal.
    """

    continuations: Tensor
    lengths: Tensor
    margins: Tensor

    def token_margins(self) -> tuple[tuple[float, ...], ...]:
        """The margins of `token_ids`."""
        return cut_rows(self.margins, self.lengths)

    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """The continuations as plain numbers, each as long as it is."""
        return cut_rows(self.continuations, self.lengths)


def decode(chunk: Chunk) -> Decoded:
    """Decode as many tokens as the windows of all positions need."""
    lm, plan = chunk.lm, chunk.plan
    prompts = [cell.prompts["XY"] for cell in chunk.cells]
    inputs = prompt_inputs(chunk, chunk.rows(prompts), plan.reference_tokens)
    with lm.generate(**inputs) as tracer:
        margins = nnsight.save([])
        for _ in tracer.iter[: plan.reference_tokens]:
            margins.append(_margin(lm.output.logits[:, -1]))
        ids = nnsight.save(tracer.result)
    tokens = ids[:, -plan.reference_tokens :]
    lengths = lengths_to_eos(tokens, plan.eos_ids)
    return Decoded(tokens, lengths, torch.stack(list(margins), dim=1))


def _margin(logits: Tensor) -> Tensor:
    """The largest logit less the next, float32 [rows]; NaN where a row holds NaN or +inf."""
    first, second = logits.topk(2).values.float().unbind(-1)
    return (first - second).masked_fill(overflowed(logits), torch.nan)


def lengths_to_eos(tokens: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Tokens of each row up to and including the first end-of-sequence token, int [rows]."""
    eos = torch.tensor(eos_ids, dtype=tokens.dtype, device=tokens.device)
    ended = torch.isin(tokens, eos)
    full = torch.full((len(ended),), ended.shape[1], device=ended.device)
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, full)


def cut_rows(values: Tensor, lengths: Tensor) -> tuple[tuple[Any, ...], ...]:
    """The first `lengths` values of every row, as plain numbers."""
    pairs = zip(values.tolist(), lengths.tolist(), strict=True)
    return tuple(tuple(row[:length]) for row, length in pairs)
