"""Greedy decoding, and XY's continuation, which every other run follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers import GenerationConfig

from persona_nnsight.engine.finite import overflowed
from persona_nnsight.engine.plain import forget
from persona_nnsight.plan.plan import Plan


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


def decoding(plan: Plan, n_tokens: int) -> dict[str, Any]:
    """Settings of a ``generate`` that decodes `n_tokens`, whether the text ends or not.

    Every setting that there is gets a value, as one that is left out would be the checkpoint's: the
    largest logit wins, whatever it suppresses, penalises or stops at. The end of a text is found
    afterwards, so that every row of a batch takes the same steps.

    Args:
        plan: has the settings of the checkpoint that were asked for.
        n_tokens: how many tokens.
    """
    settings = dict.fromkeys(GenerationConfig().to_dict())
    settings.pop("transformers_version", None)  # no setting
    return {
        **settings,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "use_cache": True,
        **plan.decoding,
        "max_new_tokens": n_tokens,
        "pad_token_id": plan.pad_id,
    }


def generate(lm: Any, inputs: Mapping[str, Any], n_tokens: int) -> tuple[Tensor, Tensor]:
    """Decode.

    Args:
        lm: the model.
        inputs: arguments of its ``generate``.
        n_tokens: how many tokens they ask for.

    Returns:
        Tokens, int [rows, n_tokens], and their margins (`Decoded`).
    """
    forget(lm)
    with lm.generate(**inputs) as tracer:
        margins = nnsight.save([])
        for _ in tracer.iter[:n_tokens]:
            margins.append(margin(lm.output.logits[:, -1]))
        ids = nnsight.save(tracer.result)
    return ids[:, -n_tokens:], torch.stack(list(margins), dim=1)


def margin(logits: Tensor) -> Tensor:
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
