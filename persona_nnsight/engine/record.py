"""Record: residuals of the clean runs, and XY's greedy continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nnsight
import torch
from torch import Tensor

from persona_nnsight.conditions import RESIDUAL_KEYS
from persona_nnsight.engine.finite import output_not_finite, residual_not_finite
from persona_nnsight.engine.inputs import GREEDY, grown_mask, prompt_inputs
from persona_nnsight.engine.prefill import Chunk, select_rows
from persona_nnsight.geometry import decompose
from persona_nnsight.plan import Plan
from persona_nnsight.sites import generated_index


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
    """

    residuals: dict[str, Tensor]
    geometry: dict[str, Tensor]
    continuations: Tensor
    lengths: Tensor

    def token_ids(self) -> tuple[tuple[int, ...], ...]:
        """The continuations as plain numbers, each as long as it is."""
        return cut_rows(self.continuations, self.lengths)

    def reaches(self, plan: Plan) -> Tensor:
        """Whether each continuation is long enough for each position, bool [cells, positions]."""
        needed = [generated_index(name) for name in plan.positions]
        return self.lengths[:, None] >= torch.tensor(needed, device=self.lengths.device)


def record(chunk: Chunk) -> Record:
    """Decode XY's continuation, and read every asked site of all conditions on the way.

    Raises:
        PersonaError: a residual or an output that is not finite.
    """
    lm, plan, layers, norm = chunk.lm, chunk.plan, chunk.layers, chunk.tree.input_norm
    keys = ["XY", *(key for key in plan.roles if key != "XY")]
    n_cells, n_keys = len(chunk.cells), len(keys)
    prompts = [cell.prompts[key] for key in keys for cell in chunk.cells]
    rows = chunk.rows(prompts)
    offsets = {
        name: chunk.tail_offsets(prompts, name)
        for name in plan.positions
        if generated_index(name) == 0
    }
    every = torch.arange(len(rows), device=chunk.device)
    steps = plan.last_generated + 1
    with lm.generate(**prompt_inputs(chunk, rows, steps)) as tracer:
        reads = nnsight.save([])
        norms = nnsight.save([])
        broken = nnsight.save([])
        for step in tracer.iter[:steps]:
            # The forward of step k feeds the k-th generated token; step 0 feeds the tails.
            names = [name for name in plan.positions if generated_index(name) == step]
            for layer in plan.layers:
                for name in names:
                    hidden = chunk.residual(layer)
                    where = offsets[name].to(hidden.device) if step == 0 else -1
                    read = hidden[every.to(hidden.device), where]
                    reads.append((name, layer, read.float().to(chunk.device)))
                if norm is not None and names:
                    normed = layers[layer].get(norm).output
                    for name in names:
                        where = offsets[name].to(normed.device) if step == 0 else -1
                        read = normed[every.to(normed.device), where]
                        norms.append((name, layer, read.float().to(chunk.device)))
            logits = lm.output.logits
            broken.append(_overflowed(logits[:n_cells, -1]))
            logits[n_cells:, -1] = logits[:n_cells, -1].repeat(n_keys - 1, 1)
            cache = nnsight.save(lm.output.past_key_values)
        ids = nnsight.save(tracer.result)
    continuations = ids[:n_cells, -steps:]
    if plan.window > 1:
        # XY goes on alone.
        own = torch.arange(n_cells, device=chunk.device)
        with lm.generate(
            input_ids=ids[:n_cells],
            attention_mask=grown_mask(chunk.prefix.mask[rows[:n_cells]], plan.tail + steps),
            past_key_values=select_rows(cache, own),
            max_new_tokens=plan.window - 1,
            pad_token_id=plan.pad_id,
            **GREEDY,
        ) as tracer:
            broken_later = nnsight.save([])
            for _ in tracer.iter[: plan.window - 1]:
                broken_later.append(_overflowed(lm.output.logits[:, -1]))
            more = nnsight.save(tracer.result)
        broken = [*broken, *broken_later]
        continuations = torch.cat([continuations, more[:, -(plan.window - 1) :]], dim=1)
    residuals = _by_key(chunk, keys, reads)
    geometry = decompose(residuals) if "XB" in residuals else {}
    if geometry and norms:
        after_norm = decompose(_by_key(chunk, keys, norms))
        geometry["inter_over_xy_normed"] = after_norm["inter_over_xy"]
    if plan.given_x is not None:
        given = torch.tensor([plan.given_x[cell.persona] for cell in chunk.cells])
        residuals["XB"] = residuals["BB"] + given.to(chunk.device)
    recorded = Record(
        residuals=residuals,
        geometry=geometry,
        continuations=continuations,
        lengths=lengths_to_eos(continuations, plan.eos_ids),
    )
    _check_finite(chunk, recorded, torch.stack(list(broken), dim=1))
    return recorded


def _by_key(
    chunk: Chunk, keys: Sequence[str], reads: Sequence[tuple[str, int, Tensor]]
) -> dict[str, Tensor]:
    """Reads (position, layer, [keys * cells, d_model]) as [cells, positions, layers, d_model]."""
    plan = chunk.plan
    found = {(name, layer): read for name, layer, read in reads}
    sites = [found[name, layer] for name in plan.positions for layer in plan.layers]
    stacked = torch.stack(sites, dim=1).reshape(
        len(keys), len(chunk.cells), len(plan.positions), len(plan.layers), -1
    )
    return dict(zip(keys, stacked, strict=True))


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


def _check_finite(chunk: Chunk, recorded: Record, broken: Tensor) -> None:
    """Refuse residuals that are not finite, and continuations from logits that overflowed.

    `broken` says which logits are: bool [cells, reference_tokens].
    """
    plan = chunk.plan
    exists = recorded.reaches(plan)[:, :, None]
    for key, value in recorded.residuals.items():
        bad = (~value.isfinite().all(-1) & exists).nonzero()
        if len(bad):
            cell, position, layer = bad[0].tolist()
            layer, name = plan.layers[layer], plan.positions[position]
            raise residual_not_finite(chunk, key, cell, layer, name)
    for cell, length in enumerate(recorded.lengths.tolist()):
        if broken[cell, :length].any():
            raise output_not_finite(chunk, "XY", cell, recorded.continuations)


def _overflowed(logits: Tensor) -> Tensor:
    """Whether a row holds NaN or +inf (-inf is how models forbid a token), bool [rows]."""
    return (~(logits < torch.inf)).any(-1)


def lengths_to_eos(tokens: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Tokens of each row up to and including the first end-of-sequence token, int [rows]."""
    eos = torch.tensor(eos_ids, dtype=tokens.dtype, device=tokens.device)
    ended = torch.isin(tokens, eos)
    full = torch.full((len(ended),), ended.shape[1], device=ended.device)
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, full)


def cut_rows(tokens: Tensor, lengths: Tensor) -> tuple[tuple[int, ...], ...]:
    """The first `lengths` tokens of every row, as plain numbers."""
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return tuple(tuple(row[:length]) for row, length in pairs)
