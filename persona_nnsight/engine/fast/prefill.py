"""Prefill: the openings of all prompts of a chunk as a KV cache, shared text once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from persona_nnsight.engine.chunk import is_far
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.fast.kv_cache import KVCache, gather
from persona_nnsight.engine.plain import last_tokens
from persona_nnsight.errors import PersonaError
from persona_nnsight.plan.plan import Plan
from persona_nnsight.plan.prefix_tree import PrefixTree, Segment


@dataclass(frozen=True)
class Prefix:
    """The prompts of a chunk, each once: their openings as a KV cache, and their last tokens.

    Attributes:
        kv: the openings, padded on the left.
        opening: their token ids, int [prompts, length].
        tails: the last tokens of every prompt, which are not in the cache, int [prompts, tail].
        row: from an index into `Plan.prompts` to a row.
    """

    kv: KVCache
    opening: Tensor
    tails: Tensor
    row: dict[int, int]

    def rows(self, prompts: Sequence[int]) -> list[int]:
        """Rows that hold these prompts of the plan."""
        return [self.row[prompt] for prompt in prompts]


def room(lm: Any, tokens: int) -> int:
    """The room to ask of `KVCache.select` for so many tokens to come.

    A sandbox, which has the weights in another process, knows transformers' own caches only.
    """
    return 0 if is_far(lm) else tokens


def prefill(lm: Any, plan: Plan, tree: PrefixTree) -> Prefix:
    """Run the opening of every prompt.

    Raises:
        PersonaError: a model that keeps something else than a KV cache between tokens.
    """
    # Far from the weights, the forward's own output says where tensors live.
    device = torch.device("cpu") if is_far(lm) else lm.device
    done: dict[int, tuple[KVCache, int]] = {}
    for batch in tree.batches:
        kv = _run(lm, plan.pad_id, [tree.segments[number] for number in batch], done, device)
        done.update({number: (kv, row) for row, number in enumerate(batch)})
    place = {number: at for at, number in enumerate(done)}
    order = sorted(range(len(tree.prompts)), key=lambda index: place[tree.last[index]])
    found = [done[tree.last[index]] for index in order]
    # Caches with sliding windows, which cannot be gathered, come in one batch.
    kv = gather(found) if len(tree.batches) > 1 else kv.select([row for _, row in found])
    device, length = kv.mask.device, kv.mask.shape[1]
    prompts = [tree.prompts[index] for index in order]
    ids = [plan.prompts[prompt].ids for prompt in prompts]
    padding = [length - len(own) + plan.tail for own in ids]
    padded = [
        [plan.pad_id] * n + list(own[: -plan.tail]) for n, own in zip(padding, ids, strict=True)
    ]
    return Prefix(
        kv=kv,
        opening=torch.tensor(padded, device=device),
        tails=torch.tensor([own[-plan.tail :] for own in ids], device=device),
        row={prompt: row for row, prompt in enumerate(prompts)},
    )


def _run(
    lm: Any,
    pad_id: int,
    segments: Sequence[Segment],
    done: Mapping[int, tuple[KVCache, int]],
    device: torch.device,
) -> KVCache:
    """Run segments of one depth; what stands before them is `done`, by segment."""
    length = max(len(segment.ids) for segment in segments)
    padding = [length - len(segment.ids) for segment in segments]
    ids = [[pad_id] * n + list(own.ids) for n, own in zip(padding, segments, strict=True)]
    seen = [[0] * n + [1] * (length - n) for n in padding]
    parents = [done[segment.parent] for segment in segments if segment.parent is not None]
    before = gather(parents) if parents else None
    device = device if before is None else before.mask.device
    inputs = forward_inputs(
        before, torch.tensor(ids, device=device), seen=torch.tensor(seen, device=device)
    )
    with lm.trace(**inputs, logits_to_keep=last_tokens(length, 0)):
        cache = nnsight.save(lm.output.past_key_values)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer):
            raise PersonaError(
                f"it keeps a {type(layer).__name__} between tokens, which rows cannot share"
            )
    mask: Tensor = inputs["attention_mask"]
    return KVCache(cache, mask.to(cache.layers[0].keys.device))
