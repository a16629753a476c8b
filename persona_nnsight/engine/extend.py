"""Extend: a host prompt over the clean continuation, unedited."""

from __future__ import annotations

from dataclasses import dataclass

import nnsight
from torch import Tensor

from persona_nnsight.engine.finite import output_not_finite
from persona_nnsight.engine.inputs import continuation_inputs
from persona_nnsight.engine.prefill import Chunk
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
    entries = sorted(
        {entry_layer(plan, edit) for edit in plan.edits if edit.scored and edit.host == key}
    )
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
            raise output_not_finite(chunk, key, cell, recorded.continuations)
    return HostRun(key, logprobs, residuals)


def entry_layer(plan: Plan, edit: Edit) -> int:
    """The layer at which stored residuals enter: everything below is as in the unedited run."""
    return min(edit.layers) if edit.layers else max(plan.layers)
