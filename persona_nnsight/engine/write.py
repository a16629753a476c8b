"""Write: greedy text under edits."""

from __future__ import annotations

from collections.abc import Sequence

import nnsight
import torch

from persona_nnsight.engine.act import Change
from persona_nnsight.engine.acts import ACTS
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import cut_rows, lengths_to_eos
from persona_nnsight.engine.finite import edited_not_finite, overflowed
from persona_nnsight.engine.inputs import prompt_inputs
from persona_nnsight.engine.record import Record


def write(
    chunk: Chunk, recorded: Record, batch: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Greedy token ids of each row, up to and including the end of the text.

    Args:
        chunk, recorded: the chunk and its clean runs.
        batch: rows (cell within the chunk, edit of the plan); the edits share the length of their
            text and need not share anything else.

    Raises:
        PersonaError: logits that are not finite.
    """
    lm, plan = chunk.lm, chunk.plan
    length = plan.edits[batch[0][1]].generate
    prompts = [chunk.cells[cell].prompts[plan.edits[edit].host] for cell, edit in batch]
    # By decoding step and layer.
    changes: dict[tuple[int, int], list[tuple[int, Change]]] = {}
    for row, (cell, index) in enumerate(batch):
        intervention = plan.edits[index].intervention
        act = ACTS[intervention.kind]
        own = act.decoded(chunk, recorded, (cell, intervention), prompts[row])
        for at, change in own.items():
            changes.setdefault(at, []).append((row, change))
    with lm.generate(**prompt_inputs(chunk, chunk.rows(prompts), length)) as tracer:
        broken = nnsight.save([])
        for step in tracer.iter[:length]:
            for layer in plan.layers:
                for row, change in changes.get((step, layer), ()):
                    change(chunk.editable_residual(layer)[row : row + 1])
            broken.append(overflowed(lm.output.logits[:, -1]))
        ids = nnsight.save(tracer.result)
    tokens = ids[:, -length:]
    lengths = lengths_to_eos(tokens, plan.eos_ids)
    exists = torch.arange(length, device=tokens.device) < lengths[:, None]
    bad = (torch.stack(list(broken), dim=1).to(tokens.device) & exists).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise edited_not_finite(chunk, *batch[row], tokens[row])
    return cut_rows(tokens, lengths)
