"""The runs of some cells: what each of the two paths through the engine answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.record import Record

#: A cell within the chunk and an edit of the plan.
Row = tuple[int, int]


class Runs(ABC):
    """The clean runs of a chunk, which are done when it is made, and edited runs of its cells.

    Attributes:
        chunk: the cells.
        recorded: what the clean runs left.
    """

    chunk: Chunk
    recorded: Record

    @abstractmethod
    def shape(self, row: Row, *, text: bool = False) -> Hashable:
        """What rows that are scored in one batch share beside the batch key of their edits.

        Args:
            row: the row.
            text: of rows whose text is written in one batch, beside its length.
        """

    @abstractmethod
    def rows_at_once(self, row: Row) -> int:
        """How many rows like this one are scored in one batch."""

    @abstractmethod
    def score(self, batch: Sequence[Row]) -> list[tuple[float, int]]:
        """KL (nats) and number of tokens of each row, whose edits share a batch key.

        In a dtype of fewer bits than float32 the same row comes out otherwise in a batch of another
        shape. An edited run of XY is then set against an unedited row of its own batch. An unedited
        run that is scored, and a BY host, are set against the clean run: what that leaves is its
        KL's floor.

        Raises:
            PersonaError: an output that is not finite.
        """

    @abstractmethod
    def write(self, batch: Sequence[Row]) -> tuple[tuple[int, ...], ...]:
        """Greedy token ids of each row, up to and including the end of the text.

        Args:
            batch: rows whose edits share the length of their text and need not share anything else.

        Raises:
            PersonaError: logits that are not finite.
        """

    @abstractmethod
    def forget_scores(self) -> None:
        """Let go of what only `score` needs."""
