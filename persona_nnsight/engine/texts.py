"""Greedy text under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.act import Change
from persona_nnsight.engine.acts import ACTS
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import cut_rows, lengths_to_eos
from persona_nnsight.engine.finite import edited_not_finite, overflowed
from persona_nnsight.engine.plain import forget
from persona_nnsight.engine.record import Record

#: What happens to rows of a batch, by decoding step and layer: the row, and the change.
Changes = dict[tuple[int, int], list[tuple[int, Change]]]


def changes_of(
    chunk: Chunk, recorded: Record, batch: Sequence[tuple[int, int]], *, from_tail: bool
) -> Changes:
    """What the edits of rows (cell within the chunk, edit of the plan) do.

    Args:
        chunk, recorded, batch: the rows, and the clean runs of their cells.
        from_tail: whether step 0 feeds the prompt's tail alone, and not all of it.
    """
    plan = chunk.plan
    changes: Changes = {}
    for row, (cell, index) in enumerate(batch):
        edit = plan.edits[index]
        prompt = chunk.cells[cell].prompts[edit.host]
        start = 0 if from_tail else plan.tail - len(plan.prompts[prompt].ids)
        act = ACTS[edit.intervention.kind]
        own = act.decoded(chunk, recorded, (cell, edit.intervention), prompt, start)
        for at, change in own.items():
            changes.setdefault(at, []).append((row, change))
    return changes


def generate_edited(
    chunk: Chunk, inputs: Mapping[str, Any], n_tokens: int, changes: Changes
) -> tuple[Tensor, Tensor]:
    """Decode under edits.

    Args:
        chunk: the chunk.
        inputs: arguments of the model's ``generate``.
        n_tokens: how many tokens they ask for.
        changes: the edits.

    Returns:
        Tokens, int [rows, n_tokens], and whether the logits of each overflowed, bool likewise.
    """
    lm = chunk.lm
    forget(lm)
    with lm.generate(**inputs) as tracer:
        broken = nnsight.save([])
        for step in tracer.iter[:n_tokens]:
            for layer in chunk.plan.layers:
                for row, change in changes.get((step, layer), ()):
                    change(chunk.editable_residual(layer)[row : row + 1])
            broken.append(overflowed(lm.output.logits[:, -1]))
        ids = nnsight.save(tracer.result)
    tokens = ids[:, -n_tokens:]
    return tokens, torch.stack(list(broken), dim=1).to(tokens.device)


def finished(
    chunk: Chunk, batch: Sequence[tuple[int, int]], tokens: Tensor, broken: Tensor
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each row, up to and including the end of its text.

    Args:
        chunk, batch: the rows (cell within the chunk, edit of the plan).
        tokens: decoded ones, int [rows, n].
        broken: whether the logits of each overflowed, bool [rows, n].

    Raises:
        PersonaError: logits that are not finite.
    """
    lengths = lengths_to_eos(tokens, chunk.plan.eos_ids)
    exists = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    bad = (broken & exists).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise edited_not_finite(chunk, *batch[row], tokens[row])
    return cut_rows(tokens, lengths)
