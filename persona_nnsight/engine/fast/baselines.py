"""Baselines: the other prompts of a cell, on XY's greedy continuation."""

from __future__ import annotations

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.fast.kv_cache import KVCache
from persona_nnsight.engine.fast.prefill import Prefix
from persona_nnsight.engine.plain import last_tokens
from persona_nnsight.engine.read import Sites, read_sites
from persona_nnsight.engine.record import other_keys
from persona_nnsight.method.sites import generated_index


def baselines(chunk: Chunk, prefix: Prefix, continuations: Tensor) -> Sites:
    """The sites of `other_keys` of every cell, on XY's continuation: rows key by key."""
    lm, plan = chunk.lm, chunk.plan
    keys = other_keys(plan)
    prompts = [cell.prompts[key] for key in keys for cell in chunk.cells]
    # Cells share baselines, which differ from cell to cell only once they follow a continuation.
    unique = list(dict.fromkeys(prompts))
    rows = prefix.rows(unique)
    where = {
        name: chunk.token_offsets(unique, name)
        for name in plan.positions
        if not generated_index(name)
    }
    inputs = forward_inputs(prefix.kv.select(rows), prefix.tails[rows])
    with lm.trace(**inputs, logits_to_keep=last_tokens(plan.tail, 0)):
        residuals = nnsight.save({})
        normed = nnsight.save({})
        read_sites(chunk, Sites(residuals, normed), where)
        cache = nnsight.save(lm.output.past_key_values)
    own = [unique.index(prompt) for prompt in prompts]
    sites = Sites(
        {site: value[own] for site, value in residuals.items()},
        {site: value[own] for site, value in normed.items()},
    )
    if not plan.last_generated:
        return sites
    where = {
        name: torch.full((len(own),), k - 1)
        for name in plan.positions
        if (k := generated_index(name))
    }
    after = KVCache(cache, inputs["attention_mask"]).select(own)
    ids = continuations[:, : plan.last_generated].repeat(len(keys), 1)
    with lm.trace(**forward_inputs(after, ids), logits_to_keep=last_tokens(plan.last_generated, 0)):
        residuals = nnsight.save({})
        normed = nnsight.save({})
        read_sites(chunk, Sites(residuals, normed), where)
    return Sites({**sites.residuals, **residuals}, {**sites.normed, **normed})
