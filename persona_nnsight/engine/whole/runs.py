"""The runs of a chunk on the whole-row path."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.clean import Clean, check_clean, has_own_reference
from persona_nnsight.engine.record import record
from persona_nnsight.engine.runs import Row, Runs
from persona_nnsight.engine.texts import changes_of, finished
from persona_nnsight.engine.whole.decode import decode, edited_texts
from persona_nnsight.engine.whole.score import score
from persona_nnsight.engine.whole.unedited import run_unedited
from persona_nnsight.engine.wide_logits import wide_logits
from persona_nnsight.plan.costs import Limits


class WholeRuns(Runs):
    """What `Runs` asks for, with a full forward for every number.

    Args:
        chunk: the cells.
        limits: batch sizes.
        scored: the prompts that are the hosts of edits which are scored on these cells.
    """

    def __init__(self, chunk: Chunk, limits: Limits, scored: Sequence[str]) -> None:
        self.chunk = chunk
        self._limits = limits
        decoded = decode(chunk, limits)
        with wide_logits(chunk.lm):
            unedited = run_unedited(chunk, decoded, limits, scored=bool(scored))
        self.recorded = record(chunk, decoded, unedited.xy, unedited.others)
        self._clean: Clean | None = unedited.clean
        if self._clean is not None:
            check_clean(chunk, decoded, self._clean)

    def shape(self, row: Row, *, text: bool = False) -> Hashable:
        """See `Runs`: the length of the prompt, and of the continuation that is fed."""
        cell, edit = row
        host = self.chunk.cells[cell].prompts[self.chunk.plan.edits[edit].host]
        length = len(self.chunk.plan.prompts[host].ids)
        return length if text else (length, int(self.recorded.decoded.lengths[cell]))

    def rows_at_once(self, row: Row) -> int:
        """See `Runs`."""
        cell, edit = row[0], self.chunk.plan.edits[row[1]]
        prompt = self.chunk.plan.prompts[self.chunk.cells[cell].prompts[edit.host]]
        size = self._limits.rows_of(len(prompt.ids) + self.chunk.plan.reference_tokens)
        return max(1, size // 2) if has_own_reference(self.chunk, edit) else size

    def score(self, batch: Sequence[Row]) -> list[tuple[float, int]]:
        """See `Runs`."""
        assert self._clean is not None
        with wide_logits(self.chunk.lm):
            return score(self.chunk, self.recorded, self._clean, batch)

    def write(self, batch: Sequence[Row]) -> tuple[tuple[int, ...], ...]:
        """See `Runs`."""
        chunk, plan = self.chunk, self.chunk.plan
        n_tokens = plan.edits[batch[0][1]].generate
        prompts = [chunk.cells[cell].prompts[plan.edits[edit].host] for cell, edit in batch]
        rows = [plan.prompts[prompt].ids for prompt in prompts]
        ids = torch.tensor(rows, device=chunk.device)
        changes = changes_of(chunk, self.recorded, batch, from_tail=False)
        written = edited_texts(chunk, self._limits, ids, n_tokens, changes)
        return finished(chunk, batch, *written)

    def forget_scores(self) -> None:
        """See `Runs`."""
        self._clean = None
