"""Score: edited runs of a host prompt, and their KL from the clean one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import nnsight

from persona_nnsight.engine.acts import ACTS
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.extend import Clean, HostRun, entry_layer
from persona_nnsight.engine.finite import edited_not_finite
from persona_nnsight.engine.inputs import forward_inputs, last_tokens
from persona_nnsight.engine.record import Record
from persona_nnsight.method.kl import window_kl
from persona_nnsight.method.sites import generated_index
from persona_nnsight.models.module_tree import has_few_bits
from persona_nnsight.plan.plan import Edit


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
        batch: rows (cell within the chunk, edit of the plan); the edits share a batch key.

    In a dtype of fewer bits than float32 the same row comes out otherwise in a batch of another
    shape. An edited run of XY is then set against an unedited row of its own batch. An unedited run
    that is scored, and a BY host, are set against `clean`: what that leaves is its KL's floor.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    edit = plan.edits[batch[0][1]]
    shared = edit.intervention
    entry = entry_layer(plan, edit)
    cells = [cell for cell, _ in batch]
    k = generated_index(shared.anchor)
    end = plan.tail - 1 + k + plan.window
    # Unedited rows at the end of the batch, one for each of its cells.
    beside = list(dict.fromkeys(cells)) if has_own_reference(chunk, edit) else []
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
        every, length=host.opening + start, first_layer=entry, room=chunk.room(end - start)
    )
    inputs = forward_inputs(before, host.ids[every, start:end])
    with lm.trace(**inputs, logits_to_keep=last_tokens(end - start, plan.window)):
        for skipped in layers[:entry]:
            skipped.skip(feed)
        layers[entry].input = feed
        for layer, change in changes.items():
            change(layers[layer].input)
        logits = lm.output.logits
        reference, against, window = clean, cells, slice(k, k + plan.window)
        if beside:
            reference, window = Clean.of(logits[len(cells) :]), slice(None)
            against = [beside.index(cell) for cell in cells]
        kl = nnsight.save(
            window_kl(
                reference.logprobs[:, window],
                reference.probs[:, window],
                logits[: len(cells)],
                against,
                n_tokens,
            )
        )
    results = list(zip(kl.tolist(), n_tokens.tolist(), strict=True))
    for (cell, index), (value, count) in zip(batch, results, strict=True):
        if count and not math.isfinite(value):
            raise edited_not_finite(chunk, cell, index, recorded.decoded.continuations[cell])
    return results


def has_own_reference(chunk: Chunk, edit: Edit) -> bool:
    """Whether a batch of such edits holds the unedited rows that its KLs are taken from."""
    return has_few_bits(chunk.dtype) and edit.host == "XY" and not edit.is_unedited
