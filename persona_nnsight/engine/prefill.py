"""Prefill: the openings of all prompts of a chunk, each unique prompt once, as a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from persona_nnsight.errors import PersonaError
from persona_nnsight.module_tree import ModuleTree
from persona_nnsight.plan import CellPlan, Plan, unique_prompts, user_last


@dataclass(frozen=True)
class Prefix:
    """KV caches of prompt openings, one row per unique prompt, padded on the left.

    Attributes:
        cache: the KV cache.
        opening, mask: token ids and attention mask, int [prompts, length].
        tails: the last tokens of every prompt, which are not in the cache, int [prompts, tail].
        row: from an index into `Plan.prompts` to a row.
    """

    cache: DynamicCache
    opening: Tensor
    mask: Tensor
    tails: Tensor
    row: dict[int, int]


@dataclass(frozen=True)
class Chunk:
    """What all steps on a chunk of cells share: the model, the plan, the cells, their prefix."""

    lm: Any
    tree: ModuleTree
    plan: Plan
    cells: Sequence[CellPlan]
    prefix: Prefix

    @property
    def layers(self) -> Any:
        """The decoder layers, as nnsight envoys."""
        return self.lm.get(self.tree.layers)

    def residual(self, layer: int) -> Tensor:
        """The residual at a layer, inside a trace of several forwards that share a KV cache.

        Where there is one, it is read from the norm that it goes through first: a server's sandbox
        hands out copies of a module's arguments and puts them in their place, and a decoder layer
        has the cache among its arguments, which would stay behind.

        Raises:
            PersonaError: layer 0 in a sandbox, of a model without such a norm.
        """
        norm = self.tree.input_norm
        if norm is None:
            return self.editable_residual(layer)
        read: Tensor = self.layers[layer].get(norm).input
        return read

    def editable_residual(self, layer: int) -> Tensor:
        """The same, to be edited in place: what the layer below leaves.

        Raises:
            PersonaError: layer 0 in a sandbox.
        """
        if layer == 0:
            if is_far(self.lm):
                raise PersonaError(
                    "A server that runs jobs in a sandbox cannot do this at layer 0; leave layer 0 "
                    "out (--layers 1-... in place of all)."
                )
            first: Tensor = self.layers[0].input
            return first
        below = self.layers[layer - 1].output
        hidden: Tensor = below[0] if isinstance(below, tuple) else below
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's activations."""
        dtype: torch.dtype = self.lm._module.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where token ids, row numbers and recorded residuals are kept."""
        return self.prefix.opening.device

    def rows(self, prompts: Sequence[int]) -> Tensor:
        """Rows of the prefix that hold these prompts of the plan, int [prompts]."""
        return torch.tensor([self.prefix.row[prompt] for prompt in prompts], device=self.device)

    def tail_offsets(self, prompts: Sequence[int], position: str) -> Tensor:
        """Index within the tail of a prompt position, int [prompts]."""
        tail = self.plan.tail
        if position == "p_last":
            return torch.full((len(prompts),), tail - 1, device=self.device)
        chosen = [self.plan.prompts[prompt] for prompt in prompts]
        return torch.tensor(
            [user_last(prompt) - (len(prompt.ids) - tail) for prompt in chosen],
            device=self.device,
        )


def prefill(lm: Any, plan: Plan, cells: Sequence[CellPlan]) -> Prefix:
    """Run the opening of every prompt of `cells` once.

    Raises:
        PersonaError: a model that keeps something else than a KV cache between tokens.
    """
    prompts = unique_prompts(plan, cells)
    openings = [plan.prompts[index].ids[: -plan.tail] for index in prompts]
    length = max(map(len, openings))
    padded = [[plan.pad_id] * (length - len(ids)) + list(ids) for ids in openings]
    seen = [[0] * (length - len(ids)) + [1] * len(ids) for ids in openings]
    # Far from the weights, the forward's own output says where tensors live.
    begin = torch.device("cpu") if is_far(lm) else lm.device
    opening = torch.tensor(padded, device=begin)
    mask = torch.tensor(seen, device=begin)
    with lm.trace(
        input_ids=opening,
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=True,
        logits_to_keep=1,
    ):
        cache = nnsight.save(lm.output.past_key_values)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin) or not isinstance(layer, DynamicLayer):
            raise PersonaError(
                f"This model keeps a {type(layer).__name__} between tokens, which cannot be shared "
                "by the rows of a batch; only models whose every layer has ordinary or "
                "sliding-window attention are supported."
            )
    device = cache.layers[0].keys.device
    tails = [plan.prompts[index].ids[-plan.tail :] for index in prompts]
    return Prefix(
        cache=cache,
        opening=opening.to(device),
        mask=mask.to(device),
        tails=torch.tensor(tails, device=device),
        row={index: row for row, index in enumerate(prompts)},
    )


def is_far(lm: Any) -> bool:
    """Whether the weights are in another process, as in a server's sandbox, where lm has none."""
    return bool(lm.device.type == "meta")


def select_rows(cache: DynamicCache, rows: Tensor, first_layer: int = 0) -> DynamicCache:
    """A cache of its own for `rows`; layers below `first_layer` are skipped, so not copied."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers[first_layer:]:
        assert isinstance(layer, DynamicLayer)  # prefill has refused all others
        assert layer.keys is not None
        assert layer.values is not None
        layer.keys = layer.keys.index_select(0, rows.to(layer.keys.device))
        layer.values = layer.values.index_select(0, rows.to(layer.values.device))
    return chosen


def position_ids(mask: Tensor) -> Tensor:
    """Positions that leave padding out of the count, int like `mask`."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
