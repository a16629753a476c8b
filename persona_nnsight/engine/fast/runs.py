"""The runs of a chunk on the fast path."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.clean import check_clean, has_own_reference
from persona_nnsight.engine.fast.baselines import baselines
from persona_nnsight.engine.fast.decode import decode, prompt_inputs
from persona_nnsight.engine.fast.extend import extend
from persona_nnsight.engine.fast.prefill import prefill
from persona_nnsight.engine.fast.score import score
from persona_nnsight.engine.record import record
from persona_nnsight.engine.runs import Row, Runs
from persona_nnsight.engine.texts import changes_of, finished, generate_edited
from persona_nnsight.engine.wide_logits import wide_logits
from persona_nnsight.plan.costs import Limits, fed_tokens
from persona_nnsight.plan.prefix_tree import prefix_tree


class FastRuns(Runs):
    """What `Runs` asks for, from shared openings.

    Args:
        chunk: the cells.
        limits: batch sizes.
        scored: the prompts that are the hosts of edits which are scored on these cells.
    """

    def __init__(self, chunk: Chunk, limits: Limits, scored: Sequence[str]) -> None:
        plan, window = chunk.plan, chunk.tree.window
        tree = prefix_tree(plan, chunk.cells, window=window, most_tokens=limits.tokens)
        self._prefix = prefix = prefill(chunk.lm, plan, tree)
        self.chunk = chunk = replace(chunk, device=prefix.opening.device)
        self._limits = limits
        decoded = decode(chunk, prefix)
        # Every KL is taken from what XY predicts.
        keys = dict.fromkeys(["XY", *scored])
        with wide_logits(chunk.lm):
            self._hosts = {
                key: extend(chunk, prefix, decoded, key, limits.path.deepest) for key in keys
            }
        xy = self._hosts["XY"]
        others = baselines(chunk, prefix, decoded.continuations)
        self.recorded = record(chunk, decoded, xy.sites, others)
        if xy.clean is not None:
            check_clean(chunk, decoded, xy.clean)
        if not scored:
            self._hosts.clear()

    def shape(self, row: Row, *, text: bool = False) -> Hashable:
        """See `Runs`: padding makes any rows alike."""
        return None

    def rows_at_once(self, row: Row) -> int:
        """See `Runs`."""
        edit = self.chunk.plan.edits[row[1]]
        size = self._limits.rows_of(fed_tokens(self.chunk.plan, edit, self.chunk.tree))
        return max(1, size // 2) if has_own_reference(self.chunk, edit) else size

    def score(self, batch: Sequence[Row]) -> list[tuple[float, int]]:
        """See `Runs`."""
        clean = self._hosts["XY"].clean
        assert clean is not None
        host = self._hosts[self.chunk.plan.edits[batch[0][1]].host]
        with wide_logits(self.chunk.lm):
            return score(self.chunk, self.recorded, clean, host, batch, self._limits.path.deepest)

    def write(self, batch: Sequence[Row]) -> tuple[tuple[int, ...], ...]:
        """See `Runs`."""
        chunk = self.chunk
        edits = [chunk.plan.edits[index] for _, index in batch]
        n_tokens = edits[0].generate
        prompts = [
            chunk.cells[cell].prompts[edit.host]
            for (cell, _), edit in zip(batch, edits, strict=True)
        ]
        inputs = prompt_inputs(chunk, self._prefix, self._prefix.rows(prompts), n_tokens)
        changes = changes_of(chunk, self.recorded, batch, from_tail=True)
        return finished(chunk, batch, *generate_edited(chunk, inputs, n_tokens, changes))

    def forget_scores(self) -> None:
        """See `Runs`."""
        self._hosts.clear()
