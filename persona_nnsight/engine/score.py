"""Score: edited runs of a host prompt, and their KL from the clean one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.edits import token_offsets, written_vectors
from persona_nnsight.engine.extend import Clean, HostRun, entry_layer
from persona_nnsight.engine.finite import edited_not_finite
from persona_nnsight.engine.inputs import forward_inputs, last_tokens
from persona_nnsight.engine.record import Record
from persona_nnsight.method.kl import window_kl
from persona_nnsight.method.sites import generated_index


def score(
    chunk: Chunk,
    recorded: Record,
    clean: Clean,
    host: HostRun,
    batch: Sequence[tuple[int, int]],
) -> list[tuple[float, int]]:
    """KL (nats) and number of tokens of each row.

    Args:
        chunk, recorded: the chunk and its clean runs.
        clean: what XY predicts.
        host: the unedited run of the prompt that is edited.
        batch: rows (cell within the chunk, edit of the plan); the edits share positions and layers.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    edit = plan.edits[batch[0][1]]
    entry = entry_layer(plan, edit)
    cells = [cell for cell, _ in batch]
    in_batch = torch.arange(len(batch), device=chunk.device)
    # The window follows the first site that is written.
    k = generated_index(edit.positions[0])
    end = plan.tail - 1 + k + plan.window
    # A site that lies beyond the window cannot touch its logits, and is not fed.
    reached = [name for name in edit.positions if generated_index(name) < k + plan.window]
    prompts = [chunk.cells[cell].prompts[host.key] for cell in cells]
    offsets = {name: token_offsets(chunk, prompts, name) for name in reached}
    # Tokens before the first site are as in the unedited run, whose KV cache has them.
    start = int(offsets[reached[0]].min()) if host.holds_tail else 0
    feed = host.residuals[entry][cells, start:end]
    vectors = written_vectors(chunk, recorded, batch)

    def write(hidden: Tensor, written: dict[str, Tensor]) -> None:
        for name in reached:
            where = (in_batch.to(hidden.device), (offsets[name] - start).to(hidden.device))
            hidden[where] = written[name].to(hidden.device, hidden.dtype)

    if entry in vectors:
        write(feed, vectors.pop(entry))
    n_tokens = (recorded.lengths[cells] - k).clamp(0, plan.window)
    before = host.kv.select(
        cells, length=host.opening + start, first_layer=entry, room=chunk.room(end - start)
    )
    inputs = forward_inputs(before, host.ids[cells, start:end])
    with lm.trace(**inputs, logits_to_keep=last_tokens(end - start, plan.window)):
        for skipped in layers[:entry]:
            skipped.skip(feed)
        layers[entry].input = feed
        for layer, written in vectors.items():
            write(layers[layer].input, written)
        window = slice(k, k + plan.window)
        kl = nnsight.save(
            window_kl(
                clean.logprobs[:, window], clean.probs[:, window], lm.output.logits, cells, n_tokens
            )
        )
    results = list(zip(kl.tolist(), n_tokens.tolist(), strict=True))
    for (cell, index), (value, count) in zip(batch, results, strict=True):
        if count and not math.isfinite(value):
            raise edited_not_finite(chunk, cell, index, recorded.continuations[cell])
    return results
