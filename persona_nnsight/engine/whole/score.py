"""Edited runs of whole rows, and their KL from the clean ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import nnsight
import torch

from persona_nnsight.engine.acts import ACTS
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.clean import Clean, batch_kl, checked_scores, references
from persona_nnsight.engine.plain import last_logits, plain_inputs
from persona_nnsight.engine.record import Record
from persona_nnsight.method.sites import generated_index


def score(
    chunk: Chunk, recorded: Record, clean: Clean, batch: Sequence[tuple[int, int]]
) -> list[tuple[float, int]]:
    """See `Runs.score`.

    Args:
        chunk, recorded: the chunk and its clean runs.
        clean: what XY predicts.
        batch: rows (cell within the chunk, edit of the plan) whose prompts have one length and
            whose continuations have one; the edits share a batch key.

    Raises:
        PersonaError: an output that is not finite.
    """
    lm, plan = chunk.lm, chunk.plan
    edit = plan.edits[batch[0][1]]
    cells = [cell for cell, _ in batch]
    k = generated_index(edit.intervention.anchor)
    followed = int(recorded.decoded.lengths[cells[0]])
    n_tokens = min(max(followed - k, 0), plan.window)
    if not n_tokens:
        return [(math.nan, 0)] * len(batch)
    # Unedited rows at the end of the batch, one for each of its cells.
    beside = references(chunk, edit, cells)
    prompts = [chunk.cells[cell].prompts[edit.host] for cell in [*cells, *beside]]
    continuations = recorded.decoded.continuations[[*cells, *beside], :followed].tolist()
    ids = [
        [*plan.prompts[prompt].ids, *own]
        for prompt, own in zip(prompts, continuations, strict=True)
    ]
    start = plan.tail - len(plan.prompts[prompts[0]].ids)
    rows = [(cell, plan.edits[index].intervention) for cell, index in batch]
    act = ACTS[edit.intervention.kind]
    changes = act.forced(
        chunk, recorded, rows, prompts[: len(cells)], range(start, plan.tail + followed)
    )
    counts = [n_tokens] * len(batch)
    kept = followed - k + 1
    with lm.trace(**plain_inputs(lm, torch.tensor(ids, device=chunk.device), kept)):
        for layer, change in sorted(changes.items()):
            change(chunk.editable_residual(layer))
        logits = last_logits(lm, kept)[:, :n_tokens]
        window = slice(k, k + n_tokens)
        kl = nnsight.save(batch_kl(clean, logits, cells, beside, window, torch.tensor(counts)))
    return checked_scores(chunk, recorded.decoded, batch, kl.tolist(), counts)
