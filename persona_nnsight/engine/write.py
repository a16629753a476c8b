"""Write: greedy text under edits."""

from __future__ import annotations

from collections.abc import Sequence

import nnsight
from torch import Tensor

from persona_nnsight.engine.inputs import prompt_inputs
from persona_nnsight.engine.prefill import Chunk
from persona_nnsight.engine.record import Record, cut_rows, lengths_to_eos
from persona_nnsight.engine.score import written_vectors
from persona_nnsight.sites import generated_index


def write(
    chunk: Chunk, recorded: Record, batch: Sequence[tuple[int, int | None]]
) -> tuple[tuple[int, ...], ...]:
    """Greedy token ids of each row, up to and including the end of the text.

    Args:
        chunk, recorded: the chunk and its clean runs.
        batch: rows (cell within the chunk, edit of the plan); edit None is the unedited XY prompt,
            any other runs on the plan's host. Edits need not share anything.
    """
    lm, plan, layers = chunk.lm, chunk.plan, chunk.layers
    prompts = [
        chunk.cells[cell].prompts["XY" if edit is None else plan.host] for cell, edit in batch
    ]
    # (decode step, layer) -> what is written there: row, index within the fed tokens, vector
    writes: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = {}
    for row, (cell, edit) in enumerate(batch):
        if edit is not None:
            position = plan.edits[edit].position
            step = generated_index(position)
            where = 0 if step else int(chunk.tail_offsets([prompts[row]], position))
            for layer, vector in written_vectors(chunk, recorded, [(cell, edit)]).items():
                writes.setdefault((step, layer), []).append((row, where, vector[0]))
    steps = min(max((step for step, _ in writes), default=-1) + 1, plan.generate)
    with lm.generate(**prompt_inputs(chunk, chunk.rows(prompts), plan.generate)) as tracer:
        for step in tracer.iter[:steps]:
            for layer in plan.layers:
                for row, where, vector in writes.get((step, layer), ()):
                    hidden = layers[layer].input
                    hidden[row, where] = vector.to(hidden.device, hidden.dtype)
        ids = nnsight.save(tracer.result)
    tokens = ids[:, -plan.generate :]
    return cut_rows(tokens, lengths_to_eos(tokens, plan.eos_ids))
