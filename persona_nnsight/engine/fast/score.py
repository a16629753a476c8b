"""Score: edited runs of a host prompt, and their KL from the clean one."""

from __future__ import annotations

from collections.abc import Sequence

import nnsight

from persona_nnsight.engine.acts import ACTS
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.clean import Clean, batch_kl, checked_scores, references
from persona_nnsight.engine.fast.extend import HostRun, entry_layer
from persona_nnsight.engine.fast.inputs import forward_inputs
from persona_nnsight.engine.fast.prefill import room
from persona_nnsight.engine.plain import last_tokens
from persona_nnsight.engine.record import Record
from persona_nnsight.method.sites import generated_index


def score(
    chunk: Chunk,
    recorded: Record,
    clean: Clean,
    host: HostRun,
    batch: Sequence[tuple[int, int]],
    deepest: int,
) -> list[tuple[float, int]]:
    """See `Runs.score`.

    Args:
        chunk, recorded: the chunk and its clean runs.
        clean: what XY predicts.
        host: the unedited run of the prompt that is edited.
        batch: rows (cell within the chunk, edit of the plan); the edits share a batch key.
        deepest: the highest layer at which an edited run may begin.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    edit = plan.edits[batch[0][1]]
    shared = edit.intervention
    entry = entry_layer(plan, edit, deepest)
    cells = [cell for cell, _ in batch]
    k = generated_index(shared.anchor)
    end = plan.tail - 1 + k + plan.window
    # Unedited rows at the end of the batch, one for each of its cells.
    beside = references(chunk, edit, cells)
    every = [*cells, *beside]
    prompts = [chunk.cells[cell].prompts[host.key] for cell in cells]
    # Tokens before the first that is touched are as in the unedited run, whose KV cache has them.
    first = chunk.token_offsets(prompts, shared.first)
    start = int(first.min()) if host.holds_tail else 0
    feed = host.residuals[entry][every, start:end]
    rows = [(cell, plan.edits[index].intervention) for cell, index in batch]
    changes = ACTS[shared.kind].forced(chunk, recorded, rows, prompts, range(start, end))
    if entry in changes:
        changes.pop(entry)(feed)
    n_tokens = (recorded.decoded.lengths[cells] - k).clamp(0, plan.window)
    before = host.kv.select(
        every, length=host.opening + start, first_layer=entry, room=room(lm, end - start)
    )
    inputs = forward_inputs(before, host.ids[every, start:end])
    with lm.trace(**inputs, logits_to_keep=last_tokens(end - start, plan.window)):
        for skipped in layers[:entry]:
            skipped.skip(feed)
        layers[entry].input = feed
        for layer, change in changes.items():
            change(layers[layer].input)
        logits = lm.output.logits
        window = slice(k, k + plan.window)
        kl = nnsight.save(batch_kl(clean, logits, cells, beside, window, n_tokens))
    return checked_scores(chunk, recorded.decoded, batch, kl.tolist(), n_tokens.tolist())
