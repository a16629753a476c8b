"""Small grids, and their cells for the oracle."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from reference import Reference, generated_index, kl
from tiny import IM_END_ID

from persona_nnsight import EditResult, Grid, Model
from persona_nnsight.prompts.grids import Cell

TINY_GRID = Grid.from_dict(
    {
        "name": "tiny",
        "baseline": {"persona": "someone", "task": "give some advice."},
        "personas": {"yoda": "Yoda", "marx": "Karl Marx, the author", "chef": "a head chef"},
        "tasks": {"haiku": "write a haiku.", "review": "review this very long plan in detail."},
    }
)

GRID_TEXT = "name: x\npersonas: {yoda: Yoda}\ntasks: {haiku: write a haiku.}\n"
"""A grid's file, as short as one can be."""


def reference_of(
    model: Model, eos: Collection[int] = (IM_END_ID,), layers: str | None = None
) -> Reference:
    """The oracle on the same weights; a tiny model ends its texts with one token."""
    return Reference(model.lm._module, model.tokenizer, eos, layers)


def cell_prompts(grid: Grid, cell: Cell) -> dict[str, str]:
    donor = grid.donor(cell.persona)
    prompts = {
        "BB": grid.prompt(None, None),
        "XB": grid.prompt(cell.persona, None),
        "BY": grid.prompt(None, cell.task),
        "XY": grid.prompt(cell.persona, cell.task),
    }
    return prompts if donor is None else {**prompts, "X'B": grid.prompt(donor, None)}


def lookup(result: EditResult) -> dict[tuple[str, str, str, str, str], tuple[float, int]]:
    return {
        (row["persona"], row["task"], row["condition"], row["position"], row["layers"]): (
            row["kl"],
            row["n_tokens"],
        )
        for row in result.frame().to_dict("records")
    }


def decode(model: Model, ids: list[int]) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


MARKED = Grid.from_dict(
    {
        **TINY_GRID.to_dict(),
        "personas": {
            "yoda": {"text": "Yoda", "markers": ["e", "the"]},
            "marx": {"text": "Karl Marx, the author", "markers": ["a", "of"]},
        },
    }
)


def steered_kl(
    reference: Reference,
    prompts: dict[str, str],
    host: str,
    positions: Sequence[str],
    layers: Sequence[int],
    alpha: float,
    beta: float,
) -> float:
    """h_BB + α·Δ_X + β·Δ_Y written at all the sites of one forward, one cell."""
    continuation = reference.continuation(prompts, positions)
    edits: dict[int, dict[int, torch.Tensor]] = {}
    for layer in layers:
        for position in positions:
            h = reference.cell_residuals(prompts, position, layer, continuation)
            site = reference.positions(prompts[host], position, continuation)
            written = h["BB"] + alpha * (h["XB"] - h["BB"]) + beta * (h["BY"] - h["BB"])
            edits.setdefault(layer, {})[site] = written
    k = generated_index(positions[0])
    target, run = reference.ids(prompts["XY"]), reference.ids(prompts[host])
    clean = reference.logprobs([*target, *continuation], len(target) + k, 10)
    return kl(clean, reference.logprobs([*run, *continuation], len(run) + k, 10, edits))
