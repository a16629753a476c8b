"""Extend: a host prompt over the clean continuation, unedited."""

from __future__ import annotations

from dataclasses import dataclass

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.finite import output_not_finite
from persona_nnsight.engine.inputs import forward_inputs, last_tokens
from persona_nnsight.engine.kv_cache import KVCache
from persona_nnsight.engine.record import Record
from persona_nnsight.plan.plan import Edit, Plan


@dataclass(frozen=True)
class Clean:
    """What the unedited role prompt predicts, which every KL is taken from.

    Attributes:
        logprobs: of the continuation's tokens, float32 [cells, reference_tokens, vocab].
        probs: their exponentials, which cost as much as the rest of a KL if taken for every row.
    """

    logprobs: Tensor
    probs: Tensor


@dataclass(frozen=True)
class HostRun:
    """One unedited, teacher-forced run of a host prompt; a row is a cell.

    Attributes:
        key: the prompt, XY or BY.
        ids: its tail and the continuation but for the last token, int [cells, fed].
        opening: columns of `kv` before them.
        kv: the KV cache of its opening and these tokens; of the opening alone where a sliding
            window has let go of some.
        residuals: by layer at which an edited run may begin, [cells, fed, d_model] in the model's
            dtype.
        clean: of XY alone.
    """

    key: str
    ids: Tensor
    opening: int
    kv: KVCache
    residuals: dict[int, Tensor]
    clean: Clean | None

    @property
    def holds_tail(self) -> bool:
        """Whether an edited run can begin at any token: `kv` holds those before it."""
        return self.kv.mask.shape[1] > self.opening


def extend(chunk: Chunk, recorded: Record, key: str) -> HostRun:
    """Run the prompts `key` of all cells over XY's continuation.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan, layers, prefix = chunk.lm, chunk.plan, chunk.layers, chunk.prefix
    rows = chunk.rows([cell.prompts[key] for cell in chunk.cells])
    fed = plan.tail + plan.reference_tokens - 1
    ids = torch.cat([prefix.tails[rows], recorded.continuations], dim=1)[:, :fed]
    entries = sorted(
        {entry_layer(plan, edit) for edit in plan.edits if edit.scored and edit.host == key}
    )
    inputs = forward_inputs(prefix.kv.select(rows, room=chunk.room(fed)), ids)
    is_clean = key == "XY"
    kept = plan.reference_tokens if is_clean else 0
    with lm.trace(**inputs, logits_to_keep=last_tokens(fed, kept)):
        residuals = nnsight.save({})
        for layer in entries:
            residuals[layer] = layers[layer].input.clone()
        logprobs = nnsight.save(lm.output.logits.float().log_softmax(-1))
        cache = nnsight.save(lm.output.past_key_values)
    kv = KVCache(cache, inputs["attention_mask"])
    if not kv.is_whole:
        kv = prefix.kv.select(rows)
    opening = prefix.opening.shape[1]
    if not is_clean:
        return HostRun(key, ids, opening, kv, residuals, None)
    for cell, length in enumerate(recorded.lengths.tolist()):
        if logprobs[cell, :length].isnan().any():
            raise output_not_finite(chunk, key, cell, recorded.continuations[cell])
    return HostRun(key, ids, opening, kv, residuals, Clean(logprobs, logprobs.exp()))


def entry_layer(plan: Plan, edit: Edit) -> int:
    """The layer at which stored residuals enter: everything below is as in the unedited run."""
    lowest = edit.intervention.lowest_layer
    return max(plan.layers) if lowest is None else lowest
