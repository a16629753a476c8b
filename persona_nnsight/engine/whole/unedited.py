"""Unedited runs of whole rows: residuals of every prompt, and what XY predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.clean import Clean
from persona_nnsight.engine.decode import Decoded
from persona_nnsight.engine.plain import last_logits, plain_inputs
from persona_nnsight.engine.read import Sites, read_sites
from persona_nnsight.engine.record import other_keys
from persona_nnsight.engine.whole.batches import in_even_batches
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.costs import Limits


@dataclass(frozen=True)
class PlainRow:
    """A prompt of the plan, and the tokens that follow it."""

    prompt: int
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Unedited:
    """What the unedited runs of a chunk left.

    Attributes:
        xy: the sites of XY, a row for each cell. They come from runs of the shape in which XY is
            edited, so that what is written back of them is what was there, to the last bit.
        others: those of the other prompts (`other_keys`), rows key by key.
        clean: what XY predicts, where something is scored.
    """

    xy: Sites
    others: Sites
    clean: Clean | None


def run_unedited(chunk: Chunk, decoded: Decoded, limits: Limits, *, scored: bool) -> Unedited:
    """Run every prompt of the cells on XY's continuation.

    Args:
        chunk, decoded: the cells, and what XY goes on with.
        limits: batch sizes.
        scored: whether a KL is taken from what XY predicts.
    """
    plan = chunk.plan
    continuations = decoded.token_ids()
    # Prompts are shared by cells, and differ from cell to cell only in what they are followed by.
    follows = plan.last_generated > 0 or not limits.path.causal
    xy = [
        PlainRow(cell.prompts["XY"], own)
        for cell, own in zip(chunk.cells, continuations, strict=True)
    ]
    others = [
        PlainRow(cell.prompts[key], own if follows else ())
        for key in other_keys(plan)
        for cell, own in zip(chunk.cells, continuations, strict=True)
    ]
    found = _run(chunk, limits, list(dict.fromkeys(xy)), logits=scored)
    rest = _run(chunk, limits, list(dict.fromkeys(others)), logits=False)
    clean = None
    if scored:
        width = plan.reference_tokens
        each = [found[row].logits for row in xy]
        padded = [torch.nn.functional.pad(one, (0, 0, 0, width - len(one))) for one in each]
        clean = Clean.of(torch.stack(padded))
    sites = [(name, layer) for name in plan.positions for layer in plan.layers]
    return Unedited(
        _stacked(chunk, sites, [found[row] for row in xy]),
        _stacked(chunk, sites, [rest[row] for row in others]),
        clean,
    )


@dataclass(frozen=True)
class _Found:
    """What one run left: sites as in `Sites`, [d_model] each, and logits [continuation, vocab]."""

    residuals: dict[tuple[str, int], Tensor]
    normed: dict[tuple[str, int], Tensor]
    logits: Tensor


def _run(
    chunk: Chunk, limits: Limits, rows: Sequence[PlainRow], *, logits: bool
) -> dict[PlainRow, _Found]:
    lm, plan = chunk.lm, chunk.plan

    def shape(row: PlainRow) -> tuple[int, ...]:
        return len(plan.prompts[row.prompt].ids), len(row.continuation)

    def work(batch: Sequence[PlainRow]) -> list[_Found]:
        length, followed = shape(batch[0])
        ids = [[*plan.prompts[row.prompt].ids, *row.continuation] for row in batch]
        # `token_offsets` counts from the beginning of the tail.
        where = {
            name: chunk.token_offsets([row.prompt for row in batch], name) + length - plan.tail
            for name in plan.positions
            if generated_index(name) <= followed
        }
        kept = followed + 1 if logits else 0
        inputs = plain_inputs(lm, torch.tensor(ids, device=chunk.device), kept)
        with lm.trace(**inputs):
            residuals = nnsight.save({})
            normed = nnsight.save({})
            read_sites(chunk, Sites(residuals, normed), where)
            if kept:
                # What follows the last token is of no interest.
                predicted = nnsight.save(last_logits(lm, kept)[:, :-1].clone())
        return [
            _Found(
                {site: value[number] for site, value in residuals.items()},
                {site: value[number] for site, value in normed.items()},
                predicted[number] if kept else torch.empty(0),
            )
            for number in range(len(batch))
        ]

    done: dict[PlainRow, _Found] = {}
    for batch, results in in_even_batches(
        rows, shape, lambda lengths: limits.rows_of(sum(lengths)), work
    ):
        done.update(zip(batch, results, strict=True))
    return done


def _stacked(chunk: Chunk, sites: Sequence[tuple[str, int]], found: Sequence[_Found]) -> Sites:
    """Sites of several rows; 0 where a row's continuation ended before the position."""
    nothing = torch.zeros(chunk.tree.d_model, device=chunk.device)

    def stack(of: Sequence[dict[tuple[str, int], Tensor]]) -> dict[tuple[str, int], Tensor]:
        return {site: torch.stack([one.get(site, nothing) for one in of]) for site in sites}

    residuals = stack([one.residuals for one in found])
    has_norm = chunk.tree.input_norm is not None
    return Sites(residuals, stack([one.normed for one in found]) if has_norm else {})
