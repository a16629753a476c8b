"""What all steps on a chunk of cells share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_nnsight.engine.kv_cache import KVCache
from persona_nnsight.errors import PersonaError
from persona_nnsight.method.sites import generated_index
from persona_nnsight.models.module_tree import ModuleTree
from persona_nnsight.plan.plan import CellPlan, Plan
from persona_nnsight.prompts.prompt import user_last


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


@dataclass(frozen=True)
class Chunk:
    """The model, the plan, the cells that are worked on together, and their prompts."""

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

    def rows(self, prompts: Sequence[int]) -> list[int]:
        """Rows of the prefix that hold these prompts of the plan."""
        return [self.prefix.row[prompt] for prompt in prompts]

    def room(self, tokens: int) -> int:
        """The room to ask of `KVCache.select` for so many tokens to come.

        A sandbox, which has the weights in another process, knows transformers' own caches only.
        """
        return 0 if is_far(self.lm) else tokens

    def token_offsets(self, prompts: Sequence[int], position: str) -> Tensor:
        """Index of a position within tail and continuation, int [prompts]."""
        tail = self.plan.tail
        if position != "p_user_last":
            last = tail - 1 + generated_index(position)
            return torch.full((len(prompts),), last, device=self.device)
        chosen = [self.plan.prompts[prompt] for prompt in prompts]
        return torch.tensor(
            [user_last(prompt) - (len(prompt.ids) - tail) for prompt in chosen],
            device=self.device,
        )


def is_far(lm: Any) -> bool:
    """Whether the weights are in another process, as in a server's sandbox, where lm has none."""
    return bool(lm.device.type == "meta")
