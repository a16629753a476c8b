"""Extend: a host prompt over the clean continuation, unedited."""

from __future__ import annotations

from dataclasses import dataclass

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.clean import Clean
from persona_nnsight.engine.decode import Decoded
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.fast.kv_cache import KVCache
from persona_nnsight.engine.fast.prefill import Prefix, room
from persona_nnsight.engine.plain import last_tokens
from persona_nnsight.engine.read import Sites, read_layer
from persona_nnsight.plan.plan import Edit, Plan


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


def extend(chunk: Chunk, prefix: Prefix, decoded: Decoded, key: str, deepest: int) -> HostRun:
    """Run the prompts `key` of all cells over XY's continuation.

    Args:
        chunk, prefix, decoded: the cells, their prompts, and what XY goes on with.
        key: the prompt, XY or BY.
        deepest: the highest layer at which an edited run may begin.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    prompts = [cell.prompts[key] for cell in chunk.cells]
    rows = prefix.rows(prompts)
    fed = plan.tail + plan.continued
    ids = torch.cat([prefix.tails[rows], decoded.continuations], dim=1)[:, :fed]
    scored = [edit for edit in plan.edits if edit.scored and edit.host == key]
    entries = {entry_layer(plan, edit, deepest) for edit in scored}
    inputs = forward_inputs(prefix.kv.select(rows, room=room(lm, fed)), ids)
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


def entry_layer(plan: Plan, edit: Edit, deepest: int) -> int:
    """The layer at which stored residuals enter: everything below is as in the unedited run.

    At most `deepest`: later layers may need what those below leave besides the residual.
    """
    lowest = edit.intervention.lowest_layer
    return min(deepest, max(plan.layers) if lowest is None else lowest)
