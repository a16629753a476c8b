"""Work as it is counted here: tokens through decoder layers, and rows of the LM head.

FLOPs are those of the linear maps, two for a weight and token. Attention's own products (queries
with keys, weights with values) are left out everywhere: in what is computed and in the floor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from persona_nnsight import Model


@dataclass(frozen=True)
class Work:
    """`token_layers`: one token through one decoder layer. `head_rows`: one token's logits."""

    token_layers: int = 0
    head_rows: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.token_layers + other.token_layers, self.head_rows + other.head_rows)


@dataclass(frozen=True)
class Shapes:
    """The linear maps of a model.

    Attributes:
        n_layers: decoder layers.
        maps: how many maps of each (inputs, outputs) the decoder layers have, all together.
        head: (inputs, outputs) of the LM head.
    """

    n_layers: int
    maps: dict[tuple[int, int], int]
    head: tuple[int, int]

    def flops(self, work: Work) -> float:
        """FLOPs of the linear maps."""
        weights = sum(n * inputs * outputs for (inputs, outputs), n in self.maps.items())
        inputs, outputs = self.head
        return 2 * (weights / self.n_layers * work.token_layers + inputs * outputs * work.head_rows)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map: torch's, or GPT-2's."""
    return isinstance(module, nn.Linear | Conv1D)


def decoder_layers(model: Model) -> list[nn.Module]:
    return list(model.lm._module.get_submodule(model.tree.layers).children())


def lm_head(model: Model) -> nn.Linear:
    head = model.lm._module.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def shapes_of(model: Model) -> Shapes:
    """The linear maps of a model with or without weights."""
    maps: Counter[tuple[int, int]] = Counter()
    for layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                maps[module.in_features, module.out_features] += 1
            elif isinstance(module, Conv1D):
                maps[module.weight.shape[0], module.weight.shape[1]] += 1
    head = lm_head(model)
    return Shapes(model.tree.n_layers, dict(maps), (head.in_features, head.out_features))
