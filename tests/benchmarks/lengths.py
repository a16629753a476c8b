"""How long the continuations and texts of a run are: as asked, or shorter where they ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from persona_nnsight.experiments.results import Result
from persona_nnsight.plan.plan import Plan


@dataclass(frozen=True)
class Lengths:
    """Tokens of each cell's clean continuation, and of each text by (cell, edit)."""

    continuations: tuple[int, ...]
    texts: Mapping[tuple[int, int], int]

    @classmethod
    def asked(cls, plan: Plan) -> Lengths:
        """Where nothing ends early."""
        return cls(
            continuations=(plan.reference_tokens,) * len(plan.cells),
            texts={
                (cell, number): edit.generate
                for cell in range(len(plan.cells))
                for number, edit in enumerate(plan.edits)
                if edit.generate and edit.runs_on(cell)
            },
        )

    @classmethod
    def of(cls, result: Result) -> Lengths:
        """Those of a finished run."""
        cells = {(cell.persona, cell.task): n for n, cell in enumerate(result.plan.cells)}
        edits = {
            (
                edit.name,
                None if edit.is_unedited else edit.columns["position"],
                None if edit.is_unedited else edit.columns["layers"],
            ): number
            for number, edit in enumerate(result.plan.edits)
            if edit.generate
        }
        return cls(
            continuations=tuple(len(tokens) for _, tokens in sorted(result.continuations.items())),
            texts={
                (
                    cells[text.persona, text.task],
                    edits[text.condition, text.position, text.layers],
                ): text.n_tokens
                for text in result.texts
            },
        )
