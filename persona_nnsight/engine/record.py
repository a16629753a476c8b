"""Record: residuals of the clean runs, and XY's greedy continuation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.finite import (
    geometry_not_finite,
    output_not_finite,
    overflowed,
    residual_not_finite,
)
from persona_nnsight.engine.inputs import forward_inputs, last_tokens, prompt_inputs
from persona_nnsight.engine.kv_cache import KVCache
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
        continuations: XY's greedy tokens, int [cells, reference_tokens].
        lengths: how many of them there are before the text ends, int [cells].
        margins: by how much the logit of each of these tokens is above the next one's, float32
            [cells, reference_tokens]; 0 where they are equal.
    """

    residuals: dict[str, Tensor]
    geometry: dict[str, Tensor]
    continuations: Tensor
    lengths: Tensor
    margins: Tensor

    def token_margins(self) -> tuple[tuple[float, ...], ...]:
        """The margins of `token_ids`."""
        return cut_rows(self.margins, self.lengths)

    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """The continuations as plain numbers, each as long as it is."""
        return cut_rows(self.continuations, self.lengths)

    def reaches(self, plan: Plan) -> Tensor:
        """Whether each continuation is long enough for each position, bool [cells, positions]."""
        needed = [generated_index(name) for name in plan.positions]
        return self.lengths[:, None] >= torch.tensor(needed, device=self.lengths.device)


def record(chunk: Chunk) -> Record:
    """Decode XY's continuation, and read every asked site of all conditions.

    Raises:
        PersonaError: a residual or an output that is not finite.
    """
    plan = chunk.plan
    continuations, margins, xy = _decode(chunk)
    keys = [key for key in plan.roles if key != "XY"]
    found = [xy, _baselines(chunk, keys, continuations)]
    residuals = _by_key(chunk, keys, [sites.residuals for sites in found])
    # A given Δ_X has no prompt XB beside it whose residual it could be taken from.
    geometry = decompose(residuals) if "XB" in residuals else {}
    if geometry and xy.normed:
        after_norm = decompose(_by_key(chunk, keys, [sites.normed for sites in found]))
        geometry["inter_over_xy_normed"] = after_norm["inter_over_xy"]
    if plan.given_x is not None:
        given = torch.tensor([plan.given_x[cell.persona] for cell in chunk.cells])
        residuals["XB"] = residuals["BB"] + given.to(chunk.device)
    recorded = Record(
        residuals=residuals,
        geometry=geometry,
        continuations=continuations,
        lengths=lengths_to_eos(continuations, plan.eos_ids),
        margins=margins,
    )
    _check_finite(chunk, recorded)
    return recorded


@dataclass(frozen=True)
class _Sites:
    """What was read of some rows, by (position, layer): float32 [rows, d_model] each.

    `normed` is the same after the layer's input norm, and empty in architectures without one.
    """

    residuals: dict[tuple[str, int], Tensor]
    normed: dict[tuple[str, int], Tensor]


def _read(chunk: Chunk, sites: _Sites, where: Mapping[str, Tensor | int]) -> None:
    """Read the tokens `where` in every row of a traced forward, by position, at every layer."""
    norm = chunk.tree.input_norm
    for layer in chunk.plan.layers if where else ():
        _keep(chunk, sites.residuals, layer, chunk.residual(layer), where)
        if norm is not None:
            _keep(chunk, sites.normed, layer, chunk.layers[layer].get(norm).output, where)


def _keep(
    chunk: Chunk,
    kept: dict[tuple[str, int], Tensor],
    layer: int,
    hidden: Tensor,
    where: Mapping[str, Tensor | int],
) -> None:
    every = torch.arange(len(hidden), device=hidden.device)
    for name, token in where.items():
        column = token.to(hidden.device) if isinstance(token, Tensor) else token
        kept[name, layer] = hidden[every, column].float().to(chunk.device)


def _decode(chunk: Chunk) -> tuple[Tensor, Tensor, _Sites]:
    """XY's greedy tokens, their margins, and the sites of XY.

    Returns:
        int [cells, reference_tokens], float32 [cells, reference_tokens], NaN where the logits
        overflowed, and sites of every cell.
    """
    lm, plan = chunk.lm, chunk.plan
    prompts = [cell.prompts["XY"] for cell in chunk.cells]
    # The forward of step k feeds the k-th generated token; step 0 feeds the tails.
    where: list[dict[str, Tensor | int]] = [{} for _ in range(plan.reference_tokens)]
    for name in plan.positions:
        k = generated_index(name)
        where[k][name] = -1 if k else chunk.token_offsets(prompts, name)
    inputs = prompt_inputs(chunk, chunk.rows(prompts), plan.reference_tokens)
    with lm.generate(**inputs) as tracer:
        residuals = nnsight.save({})
        normed = nnsight.save({})
        margins = nnsight.save([])
        for step in tracer.iter[: plan.reference_tokens]:
            _read(chunk, _Sites(residuals, normed), where[step])
            margins.append(_margin(lm.output.logits[:, -1]))
        ids = nnsight.save(tracer.result)
    sites = _Sites(residuals, normed)
    return ids[:, -plan.reference_tokens :], torch.stack(list(margins), dim=1), sites


def _margin(logits: Tensor) -> Tensor:
    """The largest logit less the next, float32 [rows]; NaN where a row holds NaN or +inf."""
    first, second = logits.topk(2).values.float().unbind(-1)
    return (first - second).masked_fill(overflowed(logits), torch.nan)


def _baselines(chunk: Chunk, keys: Sequence[str], continuations: Tensor) -> _Sites:
    """The sites of the prompts `keys` of every cell, on XY's continuation: rows key by key."""
    lm, plan, prefix = chunk.lm, chunk.plan, chunk.prefix
    prompts = [cell.prompts[key] for key in keys for cell in chunk.cells]
    # Cells share baselines, which differ from cell to cell only once they follow a continuation.
    unique = list(dict.fromkeys(prompts))
    rows = chunk.rows(unique)
    where: dict[str, Tensor | int] = {
        name: chunk.token_offsets(unique, name)
        for name in plan.positions
        if not generated_index(name)
    }
    inputs = forward_inputs(prefix.kv.select(rows), prefix.tails[rows])
    with lm.trace(**inputs, logits_to_keep=last_tokens(plan.tail, 0)):
        residuals = nnsight.save({})
        normed = nnsight.save({})
        _read(chunk, _Sites(residuals, normed), where)
        cache = nnsight.save(lm.output.past_key_values)
    own = [unique.index(prompt) for prompt in prompts]
    sites = _Sites(
        {site: value[own] for site, value in residuals.items()},
        {site: value[own] for site, value in normed.items()},
    )
    if not plan.last_generated:
        return sites
    where = {name: k - 1 for name in plan.positions if (k := generated_index(name))}
    after = KVCache(cache, inputs["attention_mask"]).select(own)
    ids = continuations[:, : plan.last_generated].repeat(len(keys), 1)
    with lm.trace(**forward_inputs(after, ids), logits_to_keep=last_tokens(plan.last_generated, 0)):
        residuals = nnsight.save({})
        normed = nnsight.save({})
        _read(chunk, _Sites(residuals, normed), where)
    return _Sites({**sites.residuals, **residuals}, {**sites.normed, **normed})


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
    for cell, length in enumerate(recorded.lengths.tolist()):
        if recorded.margins[cell, :length].isnan().any():
            raise output_not_finite(chunk, "XY", cell, recorded.continuations[cell])


def lengths_to_eos(tokens: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Tokens of each row up to and including the first end-of-sequence token, int [rows]."""
    eos = torch.tensor(eos_ids, dtype=tokens.dtype, device=tokens.device)
    ended = torch.isin(tokens, eos)
    full = torch.full((len(ended),), ended.shape[1], device=ended.device)
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, full)


def cut_rows(values: Tensor, lengths: Tensor) -> tuple[tuple[Any, ...], ...]:
    """The first `lengths` values of every row, as plain numbers."""
    pairs = zip(values.tolist(), lengths.tolist(), strict=True)
    return tuple(tuple(row[:length]) for row, length in pairs)
