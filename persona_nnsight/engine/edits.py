"""What an edit writes, and at which token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.record import Record
from persona_nnsight.method.edit_vectors import edit_vector, seeded_noise
from persona_nnsight.method.sites import generated_index


def written_vectors(
    chunk: Chunk, recorded: Record, batch: Sequence[tuple[int, int]]
) -> dict[int, dict[str, Tensor]]:
    """What each row (cell, edit) writes, by layer and position: float32 [rows, d_model].

    The edits share positions and layers; one of no layers writes nothing.
    """
    plan = chunk.plan
    edit = plan.edits[batch[0][1]]
    if not edit.layers:
        return {}
    columns = [plan.layers.index(layer) for layer in edit.layers]
    vectors: dict[int, dict[str, Tensor]] = {layer: {} for layer in edit.layers}
    for name in edit.positions:
        position = plan.positions.index(name)
        rows = []
        for cell, index in batch:
            h = {key: value[cell, position, columns] for key, value in recorded.residuals.items()}
            chosen = plan.edits[index]
            noise = None
            if chosen.condition == "random":
                seed, d_model = chunk.cells[cell].seed, h["XY"].shape[-1]
                drawn = [seeded_noise(seed, name, layer, d_model) for layer in edit.layers]
                noise = torch.stack(drawn).to(h["XY"].device)
            rows.append(
                edit_vector(chosen.condition, h, alpha=chosen.alpha, beta=chosen.beta, noise=noise)
            )
        for layer, written in zip(edit.layers, torch.stack(rows, dim=1), strict=True):
            vectors[layer][name] = written
    return vectors


def token_offsets(chunk: Chunk, prompts: Sequence[int], position: str) -> Tensor:
    """Index of `position` within tail and continuation, int [prompts]."""
    if k := generated_index(position):
        return torch.full((len(prompts),), chunk.plan.tail - 1 + k, device=chunk.device)
    return chunk.tail_offsets(prompts, position)
