"""Score: edited runs of a host prompt, and their KL from the clean one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import nnsight
import torch
from torch import Tensor

from persona_nnsight.costs import fed_tokens
from persona_nnsight.engine.extend import HostRun, entry_layer
from persona_nnsight.engine.finite import edited_not_finite
from persona_nnsight.engine.inputs import continuation_inputs
from persona_nnsight.engine.prefill import Chunk
from persona_nnsight.engine.record import Record
from persona_nnsight.interventions import edit_vector, seeded_noise
from persona_nnsight.measures import window_kl
from persona_nnsight.sites import generated_index


def score(
    chunk: Chunk,
    recorded: Record,
    clean: Tensor,
    host: HostRun,
    batch: Sequence[tuple[int, int]],
) -> list[tuple[float, int]]:
    """KL (nats) and number of tokens of each row.

    Args:
        chunk, recorded: the chunk and its clean runs.
        clean: XY's log-probabilities, float32 [cells, reference_tokens, vocab].
        host: the unedited run of the prompt that is edited.
        batch: rows (cell within the chunk, edit of the plan); the edits share positions and layers.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    edit = plan.edits[batch[0][1]]
    entry = entry_layer(plan, edit)
    # The window follows the first site that is written.
    k = generated_index(edit.positions[0])
    fed = fed_tokens(plan, edit.positions)
    prompts = [chunk.cells[cell].prompts[host.key] for cell, _ in batch]
    of_cell = torch.tensor([cell for cell, _ in batch], device=chunk.device)
    in_batch = torch.arange(len(batch), device=chunk.device)
    # A site that lies beyond the window cannot touch its logits, and is not fed.
    reached = [name for name in edit.positions if generated_index(name) < k + plan.window]
    offsets = {name: _fed_offsets(chunk, prompts, name) for name in reached}
    stored = host.residuals[entry]
    feed = stored[of_cell.to(stored.device), :fed]
    vectors = written_vectors(chunk, recorded, batch)
    at_entry = vectors.pop(entry, {})
    for name in reached if at_entry else ():
        where = (in_batch.to(feed.device), offsets[name].to(feed.device))
        feed[where] = at_entry[name].to(feed.device, feed.dtype)
    n_tokens = (recorded.lengths[of_cell] - k).clamp(0, plan.window)
    continuations = recorded.continuations[of_cell]
    with lm.trace(
        **continuation_inputs(chunk, chunk.rows(prompts), continuations, fed, first_layer=entry),
        logits_to_keep=plan.window,
    ):
        for skipped in layers[:entry]:
            skipped.skip(feed)
        layers[entry].input = feed
        for layer, written in vectors.items():
            hidden = layers[layer].input
            for name in reached:
                where = (in_batch.to(hidden.device), offsets[name].to(hidden.device))
                hidden[where] = written[name].to(hidden.device, hidden.dtype)
        expected = clean[of_cell.to(clean.device), k : k + plan.window]
        kl = nnsight.save(window_kl(expected, lm.output.logits, n_tokens))
    results = list(zip(kl.tolist(), n_tokens.tolist(), strict=True))
    for (cell, index), (value, count) in zip(batch, results, strict=True):
        if count and not math.isfinite(value):
            raise edited_not_finite(chunk, cell, index)
    return results


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


def _fed_offsets(chunk: Chunk, prompts: Sequence[int], position: str) -> Tensor:
    """Index of `position` within tail and continuation, int [prompts]."""
    if k := generated_index(position):
        return torch.full((len(prompts),), chunk.plan.tail - 1 + k, device=chunk.device)
    return chunk.tail_offsets(prompts, position)
