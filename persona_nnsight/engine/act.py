"""What an intervention does to the runs of its host: the questions that every kind answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.record import Record

#: Changes residuals in place, [rows, tokens, d_model].
Change = Callable[[Tensor], None]


class Act:
    """How a kind of intervention acts; this one does nothing."""

    def forced(
        self,
        chunk: Chunk,
        recorded: Record,
        rows: Sequence[tuple[int, Any]],
        prompts: Sequence[int],
        fed: range,
    ) -> dict[int, Change]:
        """What it does in a teacher-forced run, by layer whose input changes.

        Args:
            chunk, recorded: the chunk and its clean runs.
            rows: cell within the chunk and intervention of each row; they share a batch key.
            prompts: of the plan, each row's host.
            fed: the tokens of tail and continuation that are fed; those below 0 are before the
                tail.
        """
        return {}

    def decoded(
        self, chunk: Chunk, recorded: Record, row: tuple[int, Any], prompt: int, start: int
    ) -> dict[tuple[int, int], Change]:
        """What it does in a row whose text is decoded, by step and layer whose input changes.

        Step 0 feeds the end of the prompt, step k the k-th token of the text.

        Args:
            chunk, recorded: the chunk and its clean runs.
            row: cell within the chunk and intervention.
            prompt: of the plan, the row's host.
            start: where in the tail what step 0 feeds begins; below 0 before the tail.
        """
        return {}
