"""Record: residuals of the clean runs, on XY's greedy continuation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import Decoded
from persona_nnsight.engine.finite import (
    geometry_not_finite,
    output_not_finite,
    residual_not_finite,
)
from persona_nnsight.engine.read import Sites
from persona_nnsight.method.conditions import RESIDUAL_KEYS
from persona_nnsight.method.geometry import decompose
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.plan import Plan


@dataclass(frozen=True)
class Record:
    """What the clean runs of a chunk left.

    Attributes:
        residuals: by residual key, float32 [cells, positions, layers, d_model].
        geometry: measures of `decompose` and ``inter_over_xy_normed``, the same ratio after the
            layer's input norm (left out in architectures without one), each float32
            [cells, positions, layers]; NaN where a continuation ended before the position.
        decoded: the continuation that they follow.
    """

    residuals: dict[str, Tensor]
    geometry: dict[str, Tensor]
    decoded: Decoded

    def reaches(self, plan: Plan) -> Tensor:
        """Whether each continuation is long enough for each position, bool [cells, positions]."""
        needed = [generated_index(name) for name in plan.positions]
        lengths = self.decoded.lengths
        return lengths[:, None] >= torch.tensor(needed, device=lengths.device)


def record(chunk: Chunk, decoded: Decoded, xy: Sites, others: Sites) -> Record:
    """What the clean runs left, from their sites.

    Args:
        chunk, decoded: the cells, and the continuation that the runs follow.
        xy: the sites of XY, a row for each cell.
        others: those of the other prompts (`other_keys`), rows key by key.

    Raises:
        PersonaError: a residual or an output that is not finite.
    """
    plan = chunk.plan
    keys = other_keys(plan)
    found = [xy, others]
    residuals = _by_key(chunk, keys, [sites.residuals for sites in found])
    # A given Δ_X has no prompt XB beside it whose residual it could be taken from.
    geometry = decompose(residuals) if "XB" in residuals else {}
    if geometry and xy.normed:
        after_norm = decompose(_by_key(chunk, keys, [sites.normed for sites in found]))
        geometry["inter_over_xy_normed"] = after_norm["inter_over_xy"]
    if plan.given_x is not None:
        effects = [plan.given_x[cell.persona] for cell in chunk.cells]
        given = torch.tensor(effects, dtype=torch.float32)
        residuals["XB"] = residuals["BB"] + given.to(chunk.device)
    recorded = Record(residuals=residuals, geometry=geometry, decoded=decoded)
    _check_finite(chunk, recorded)
    return recorded


def other_keys(plan: Plan) -> list[str]:
    """The prompts of every cell beside XY whose residuals are asked for."""
    return [key for key in plan.roles if key != "XY"]


def _by_key(
    chunk: Chunk,
    keys: Sequence[str],
    found: Sequence[Mapping[tuple[str, int], Tensor]],
) -> dict[str, Tensor]:
    """Sites of XY, and of `keys` one after the other, as [cells, positions, layers, d_model]."""
    plan = chunk.plan
    shape = (-1, len(chunk.cells), len(plan.positions), len(plan.layers), chunk.tree.d_model)
    xy, baselines = (
        torch.stack(
            [sites[name, layer] for name in plan.positions for layer in plan.layers], dim=1
        ).reshape(shape)
        for sites in found
    )
    return {"XY": xy[0], **dict(zip(keys, baselines, strict=True))}


def public_residuals(chunk: Chunk, recorded: Record) -> dict[str, Tensor]:
    """The residuals on the CPU, NaN where a continuation ended before the position."""
    missing = ~recorded.reaches(chunk.plan)[:, :, None, None]
    return {
        key: recorded.residuals[key].masked_fill(missing, torch.nan).cpu() for key in RESIDUAL_KEYS
    }


def public_geometry(chunk: Chunk, recorded: Record) -> dict[str, Tensor]:
    """The geometry on the CPU, NaN where a continuation ended before the position."""
    missing = ~recorded.reaches(chunk.plan)[:, :, None]
    return {
        name: value.masked_fill(missing, torch.nan).cpu()
        for name, value in recorded.geometry.items()
    }


def _check_finite(chunk: Chunk, recorded: Record) -> None:
    """Refuse residuals and geometry that are not finite, and tokens from logits that overflowed."""
    plan = chunk.plan
    exists = recorded.reaches(plan)[:, :, None]
    for key, value in recorded.residuals.items():
        bad = (~value.isfinite().all(-1) & exists).nonzero()
        if len(bad):
            cell, position, layer = bad[0].tolist()
            layer, name = plan.layers[layer], plan.positions[position]
            raise residual_not_finite(chunk, key, cell, layer, name)
    for name, measure in recorded.geometry.items():
        bad = (~measure.isfinite() & exists).nonzero()
        if len(bad):
            cell, position, layer = bad[0].tolist()
            at = plan.layers[layer], plan.positions[position]
            raise geometry_not_finite(chunk, name, cell, *at)
    decoded = recorded.decoded
    for cell, length in enumerate(decoded.lengths.tolist()):
        if decoded.margins[cell, :length].isnan().any():
            raise output_not_finite(chunk, "XY", cell, decoded.continuations[cell])
