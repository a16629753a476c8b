"""What all runs of some cells share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_nnsight.errors import PersonaError
from persona_nnsight.method.sites import generated_index
from persona_nnsight.models.module_tree import ModuleTree
from persona_nnsight.plan.plan import CellPlan, Plan
from persona_nnsight.prompts.prompt import user_last


@dataclass(frozen=True)
class Chunk:
    """The model, the plan, and the cells that are worked on together.

    Attributes:
        lm, tree, plan: the model, and what is done with it.
        cells: cells of the plan.
        device: where token ids, row numbers and recorded residuals are kept.
    """

    lm: Any
    tree: ModuleTree
    plan: Plan
    cells: Sequence[CellPlan]
    device: torch.device

    @property
    def layers(self) -> Any:
        """The decoder layers, as nnsight envoys."""
        return self.lm.get(self.tree.layers)

    def residual(self, layer: int) -> Tensor:
        """The residual at a layer, inside a trace: the input of the decoder layer.

        In a server's sandbox it is read from the norm that it goes through first, where there is
        one: a sandbox hands out copies of a module's arguments and puts them in their place, and a
        decoder layer has the cache among its arguments, which would stay behind.

        Raises:
            PersonaError: layer 0 in a sandbox, of a model without such a norm.
        """
        norm = self.tree.input_norm
        if norm is None or not is_far(self.lm):
            return self.editable_residual(layer)
        read: Tensor = self.layers[layer].get(norm).input
        return read

    def editable_residual(self, layer: int) -> Tensor:
        """The same, to be edited in place; in a sandbox what the layer below leaves.

        Raises:
            PersonaError: layer 0 in a sandbox.
        """
        if not is_far(self.lm):
            own: Tensor = self.layers[layer].input
            return own
        if layer == 0:
            raise PersonaError(
                "A server that runs jobs in a sandbox cannot do this at layer 0; leave layer 0 out "
                "(--layers 1-... in place of all)."
            )
        below = self.layers[layer - 1].output
        hidden: Tensor = below[0] if isinstance(below, tuple) else below
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's activations."""
        dtype: torch.dtype = self.lm._module.dtype
        return dtype

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
