"""Extend: a host prompt over the clean continuation, unedited."""

from __future__ import annotations

from dataclasses import dataclass

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import Decoded
from persona_nnsight.engine.finite import output_not_finite
from persona_nnsight.engine.inputs import forward_inputs, last_tokens
from persona_nnsight.engine.kv_cache import KVCache
from persona_nnsight.engine.read import Sites, read_layer
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

    @classmethod
    def of(cls, logits: Tensor) -> Clean:
        """What logits of any dtype predict."""
        logprobs = logits.float().log_softmax(-1)
        return cls(logprobs, logprobs.exp())


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
        sites: of XY alone, the asked ones. They come from the run that is edited, so that what is
            written back of them is what was there, to the last bit.
        clean: of XY alone, where something is scored.
    """

    key: str
    ids: Tensor
    opening: int
    kv: KVCache
    residuals: dict[int, Tensor]
    sites: Sites
    clean: Clean | None

    @property
    def holds_tail(self) -> bool:
        """Whether an edited run can begin at any token: `kv` holds those before it."""
        return self.kv.mask.shape[1] > self.opening


def extend(chunk: Chunk, decoded: Decoded, key: str) -> HostRun:
    """Run the prompts `key` of all cells over XY's continuation."""
    lm, plan, layers, prefix = chunk.lm, chunk.plan, chunk.layers, chunk.prefix
    prompts = [cell.prompts[key] for cell in chunk.cells]
    rows = chunk.rows(prompts)
    fed = plan.tail + plan.continued
    ids = torch.cat([prefix.tails[rows], decoded.continuations], dim=1)[:, :fed]
    entries = {entry_layer(plan, edit) for edit in plan.edits if edit.scored and edit.host == key}
    inputs = forward_inputs(prefix.kv.select(rows, room=chunk.room(fed)), ids)
    is_clean = key == "XY"
    kept = plan.reference_tokens if is_clean and plan.is_scored else 0
    where = {name: chunk.token_offsets(prompts, name) for name in plan.positions if is_clean}
    # A site is read at the norm within its layer; without one, where the layer below ends.
    reads_below = chunk.tree.input_norm is None
    with lm.trace(**inputs, logits_to_keep=last_tokens(fed, kept)):
        residuals = nnsight.save({})
        sites = nnsight.save(Sites({}, {}))
        for layer in sorted({*entries, *(plan.layers if is_clean else ())}):
            asked = is_clean and layer in plan.layers
            if asked and reads_below:
                read_layer(chunk, sites, layer, where)
            if layer in entries:
                residuals[layer] = layers[layer].input.clone()
            if asked and not reads_below:
                read_layer(chunk, sites, layer, where)
        clean = nnsight.save(Clean.of(lm.output.logits))
        cache = nnsight.save(lm.output.past_key_values)
    kv = KVCache(cache, inputs["attention_mask"])
    if not kv.is_whole:
        kv = prefix.kv.select(rows)
    opening = prefix.opening.shape[1]
    return HostRun(key, ids, opening, kv, residuals, sites, clean if kept else None)


def check_clean(chunk: Chunk, decoded: Decoded, clean: Clean) -> None:
    """Refuse logits of the unedited role prompt that are not numbers.

    Raises:
        PersonaError: says where they come from.
    """
    for cell, length in enumerate(decoded.lengths.tolist()):
        if clean.logprobs[cell, :length].isnan().any():
            raise output_not_finite(chunk, "XY", cell, decoded.continuations[cell])


def entry_layer(plan: Plan, edit: Edit) -> int:
    """The layer at which stored residuals enter: everything below is as in the unedited run."""
    lowest = edit.intervention.lowest_layer
    return max(plan.layers) if lowest is None else lowest
