"""Write: greedy text under edits."""

from __future__ import annotations

from collections.abc import Sequence

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.edits import written_vectors
from persona_nnsight.engine.finite import edited_not_finite, overflowed
from persona_nnsight.engine.inputs import prompt_inputs
from persona_nnsight.engine.record import Record, cut_rows, lengths_to_eos
from persona_nnsight.method.sites import generated_index


def write(
    chunk: Chunk, recorded: Record, batch: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Greedy token ids of each row, up to and including the end of the text.

    A site in the continuation that XY's own text ends before has no residuals, and is not written.

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
    # (decode step, layer) -> what is written there: row, index within the fed tokens, vector
    writes: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = {}
    reached = recorded.lengths.tolist()
    for row, (cell, edit) in enumerate(batch):
        for layer, written in written_vectors(chunk, recorded, [(cell, edit)]).items():
            for position, vector in written.items():
                step = generated_index(position)
                if step > reached[cell]:
                    continue
                where = 0 if step else int(chunk.tail_offsets([prompts[row]], position))
                writes.setdefault((step, layer), []).append((row, where, vector[0]))
    with lm.generate(**prompt_inputs(chunk, chunk.rows(prompts), length)) as tracer:
        broken = nnsight.save([])
        for step in tracer.iter[:length]:
            for layer in plan.layers:
                for row, where, vector in writes.get((step, layer), ()):
                    hidden = chunk.editable_residual(layer)
                    hidden[row, where] = vector.to(hidden.device, hidden.dtype)
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
