"""Extend: a host prompt over the clean continuation, unedited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.finite import not_finite, residual_of
from persona_nnsight.engine.prefill import Chunk, grown_mask, position_ids, select_rows
from persona_nnsight.engine.record import Record
from persona_nnsight.plan import Edit, Plan


@dataclass(frozen=True)
class HostRun:
    """One unedited, teacher-forced run of a host prompt.

    Attributes:
        key: the prompt, XY or BY.
        logprobs: float32 [cells, reference_tokens, vocab], predicting the continuation's tokens.
        residuals: by layer at which an edited run may begin,
            [cells, tail + reference_tokens - 1, d_model] in the model's dtype.
    """

    key: str
    logprobs: Tensor
    residuals: dict[int, Tensor]


def extend(chunk: Chunk, recorded: Record, key: str) -> HostRun:
    """Run the prompts `key` of all cells over XY's continuation.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    rows = chunk.rows([cell.prompts[key] for cell in chunk.cells])
    fed = plan.tail + plan.reference_tokens - 1
    entries = sorted({entry_layer(plan, edit) for edit in plan.edits})
    with lm.trace(
        **continuation_inputs(chunk, rows, recorded.continuations, fed),
        logits_to_keep=plan.reference_tokens,
    ):
        residuals = nnsight.save({})
        for layer in entries:
            residuals[layer] = layers[layer].input.clone()
        logprobs = nnsight.save(lm.output.logits.float().log_softmax(-1))
    for cell, length in enumerate(recorded.lengths.tolist()):
        if logprobs[cell, :length].isnan().any():
            alone = torch.tensor([cell], device=lm.device)
            inputs = continuation_inputs(chunk, rows[alone], recorded.continuations[alone], fed)
            layer, position = _first_not_finite(chunk, inputs)
            raise not_finite(residual_of(key, chunk.cells[cell]), layer, position, chunk.dtype)
    return HostRun(key, logprobs, residuals)


def entry_layer(plan: Plan, edit: Edit) -> int:
    """The layer at which stored residuals enter: everything below is as in the unedited run."""
    return min(edit.layers) if edit.layers else max(plan.layers)


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


def _first_not_finite(chunk: Chunk, inputs: dict[str, Any]) -> tuple[int, str]:
    """The lowest layer whose input is not finite, and the first position where that is so.

    When every layer's input is finite the last layer's own output overflows: it is named instead.
    """
    lm, layers = chunk.lm, chunk.layers
    with lm.trace(**inputs):
        finite = nnsight.save([])
        for layer in layers:
            finite.append(layer.input[0].isfinite().all(-1))
    for number, row in enumerate(finite):
        if not row.all():
            k = int((~row).int().argmax()) - chunk.plan.tail + 1
            return number, f"g{k}" if k > 0 else "p_last" if k == 0 else f"p_last{k}"
    return chunk.tree.n_layers - 1, "p_last"
