"""Reading residuals in a traced forward, as they are and after the norm they go through first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk


@dataclass(frozen=True)
class Sites:
    """What was read of some rows, by (position, layer): float32 [rows, d_model] each.

    `normed` is the same after the layer's input norm, and empty in architectures without one.
    """

    residuals: dict[tuple[str, int], Tensor]
    normed: dict[tuple[str, int], Tensor]


def read_sites(chunk: Chunk, sites: Sites, where: Mapping[str, Tensor]) -> None:
    """Read the tokens `where` in every row of a traced forward, by position, at every layer."""
    for layer in chunk.plan.layers if where else ():
        read_layer(chunk, sites, layer, where)


def read_layer(chunk: Chunk, sites: Sites, layer: int, where: Mapping[str, Tensor]) -> None:
    """Read the tokens `where`, int [rows] each, at one layer."""
    _keep(chunk, sites.residuals, layer, chunk.residual(layer), where)
    if (norm := chunk.tree.input_norm) is not None:
        _keep(chunk, sites.normed, layer, chunk.layers[layer].get(norm).output, where)


def _keep(
    chunk: Chunk,
    kept: dict[tuple[str, int], Tensor],
    layer: int,
    hidden: Tensor,
    where: Mapping[str, Tensor],
) -> None:
    every = torch.arange(len(hidden), device=hidden.device)
    for name, token in where.items():
        kept[name, layer] = hidden[every, token.to(hidden.device)].float().to(chunk.device)
