"""What the engine hands over, and what of a plan has been handed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from persona_nnsight.plan.plan import Plan


@dataclass(frozen=True)
class Recorded:
    """Clean continuations of a chunk of cells, and their residuals if the plan has no edits.

    Attributes:
        cells: indices into `Plan.cells`.
        continuations: token ids per cell, ended by the first end-of-sequence token.
        margins: by how much the logit of each of them is above the next one's; 0 is a tie.
        geometry: how the effects add up (`persona_nnsight.method.geometry.decompose`, and
            ``inter_over_xy_normed``), by measure, float32 [cells, positions, layers].
        residuals: float32 [cells, positions, layers, d_model] by residual key, on the CPU.

    What a continuation ended before is NaN.
    """

    cells: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    geometry: dict[str, Tensor]
    residuals: dict[str, Tensor] | None


@dataclass(frozen=True, slots=True)
class Scored:
    """One KL: `cell` and `edit` index the plan; NaN where `n_tokens` is 0."""

    cell: int
    edit: int
    kl: float
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Written:
    """Greedy text of one cell under one edit."""

    cell: int
    edit: int
    tokens: tuple[int, ...]


Event = Recorded | Scored | Written


@dataclass
class Done:
    """What of a plan is finished already, by the plan's numbers of cells and edits."""

    recorded: set[int] = field(default_factory=set)
    scored: set[tuple[int, int]] = field(default_factory=set)
    written: set[tuple[int, int]] = field(default_factory=set)

    def add(self, event: Event) -> bool:
        """Count an event as finished; False where it was."""
        before = self._size()
        match event:
            case Recorded():
                self.recorded.update(event.cells)
            case Scored():
                self.scored.add((event.cell, event.edit))
            case Written():
                self.written.add((event.cell, event.edit))
        return self._size() > before

    def _size(self) -> int:
        return len(self.recorded) + len(self.scored) + len(self.written)

    def has(self, plan: Plan, cells: Sequence[int]) -> bool:
        """Whether nothing of these cells is left to do."""
        return self.recorded.issuperset(cells) and all(
            (not edit.scored or (cell, index) in self.scored)
            and (not edit.generate or (cell, index) in self.written)
            for index, edit in enumerate(plan.edits)
            for cell in cells
            if edit.runs_on(cell)
        )
