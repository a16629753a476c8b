"""How a `Write` acts: residuals are overwritten, each by its own vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from persona_nnsight.engine.act import Act, Change
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.record import Record
from persona_nnsight.method.conditions import ROUNDED
from persona_nnsight.method.edit_vectors import edit_vector, seeded_noise
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.interventions import Write


class ResidualWrites(Act):
    """Writes at the sites of the clean runs' residuals."""

    def forced(
        self,
        chunk: Chunk,
        recorded: Record,
        rows: Sequence[tuple[int, Write]],
        prompts: Sequence[int],
        fed: range,
    ) -> dict[int, Change]:
        """See `Act`. A site that lies beyond the window cannot touch its logits, and is not fed."""
        where = {
            name: chunk.token_offsets(prompts, name) - fed.start
            for name in rows[0][1].positions
            if chunk.plan.tail - 1 + generated_index(name) < fed.stop
        }
        vectors = _vectors(chunk, recorded, rows)
        return {layer: partial(_write, where, written) for layer, written in vectors.items()}

    def decoded(
        self, chunk: Chunk, recorded: Record, row: tuple[int, Write], prompt: int, start: int
    ) -> dict[tuple[int, int], Change]:
        """See `Act`. A site that XY's own text ends before has no residuals, and is not written."""
        length = int(recorded.decoded.lengths[row[0]])
        # By step: where in the fed tokens each site is.
        steps: dict[int, dict[str, Tensor]] = {}
        for name in row[1].positions:
            if (step := generated_index(name)) <= length:
                offset = chunk.token_offsets([prompt], name)
                token = torch.tensor([0]) if step else offset - start
                steps.setdefault(step, {})[name] = token
        vectors = _vectors(chunk, recorded, [row])
        return {
            (step, layer): partial(_write, where, written)
            for layer, written in vectors.items()
            for step, where in steps.items()
        }


def _write(where: Mapping[str, Tensor], written: Mapping[str, Tensor], hidden: Tensor) -> None:
    """Write, at every position, a vector into each row: int [rows], [rows, d_model]."""
    for name, tokens in where.items():
        rows = torch.arange(len(tokens), device=hidden.device)
        hidden[rows, tokens.to(hidden.device)] = written[name].to(hidden.device, hidden.dtype)


def _vectors(
    chunk: Chunk, recorded: Record, rows: Sequence[tuple[int, Write]]
) -> dict[int, dict[str, Tensor]]:
    """What each row writes, by layer and position: float32 [rows, d_model]."""
    plan, sites = chunk.plan, rows[0][1]
    unit = torch.finfo(chunk.dtype).eps / 2
    columns = [plan.layers.index(layer) for layer in sites.layers]
    vectors: dict[int, dict[str, Tensor]] = {layer: {} for layer in sites.layers}
    for name in sites.positions:
        position = plan.positions.index(name)
        found = []
        for cell, write in rows:
            h = {key: value[cell, position, columns] for key, value in recorded.residuals.items()}
            noise = None
            if write.condition in ("random", ROUNDED):
                seed, d_model = chunk.cells[cell].seed, h["XY"].shape[-1]
                drawn = [seeded_noise(seed, name, layer, d_model) for layer in sites.layers]
                noise = torch.stack(drawn).to(h["XY"].device)
            factors = {"alpha": write.alpha, "beta": write.beta, "unit": unit}
            found.append(edit_vector(write.condition, h, noise=noise, **factors))
        for layer, written in zip(sites.layers, torch.stack(found, dim=1), strict=True):
            vectors[layer][name] = written
    return vectors
