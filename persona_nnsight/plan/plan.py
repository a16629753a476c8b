"""Everything a run will do, as plain data, before anything runs.

A plan holds token ids, numbers and names only: it can be printed, costed, hashed, or sent to a
server, and needs no model weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from persona_nnsight.method.conditions import TASK_KEY
from persona_nnsight.method.sites import generated_index
from persona_nnsight.models.paths import AUTO
from persona_nnsight.plan.interventions import Intervention
from persona_nnsight.prompts.prompt import Prompt, user_last
from persona_nnsight.prompts.rendering import UNDATED, Rendering

#: Residuals at every site as plain numbers: [positions][layers][d_model].
Given = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Edit:
    """One intervention and what is measured of it, in a run of its own for every cell.

    Attributes:
        intervention: what is done to the run.
        host: the prompt that is run: ``XY``, ``BY``, or ``Y`` (the task alone).
        scored: whether the KL from the clean run is taken.
        generate: tokens of greedy text to write, 0 for none.
        cells: indices into `Plan.cells` of the cells it runs on; None for all.
    """

    intervention: Intervention
    host: str = "XY"
    scored: bool = True
    generate: int = 0
    cells: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        return self.intervention.condition

    @property
    def is_unedited(self) -> bool:
        """Whether its run is the host's own."""
        return self.intervention.lowest_layer is None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that it needs: its host, and those that something is taken from."""
        return self.host, *self.intervention.reads

    @property
    def batch_key(self) -> Hashable:
        """What edits that are scored in one batch share."""
        return self.host, self.intervention.batch_key

    @property
    def columns(self) -> dict[str, Any]:
        """What tables say of it, by column."""
        return {"host": self.host, **self.intervention.columns}

    def runs_on(self, cell: int) -> bool:
        """Whether the plan's cell number `cell` is one of its cells."""
        return self._cells is None or cell in self._cells

    @cached_property
    def _cells(self) -> frozenset[int] | None:
        """Asked for every cell: a tuple would make plans of many cells slow."""
        return None if self.cells is None else frozenset(self.cells)


@dataclass(frozen=True)
class CellPlan:
    """One cell as indices into `Plan.prompts`, by residual key (BB, XB, BY, XY, maybe OB) and Y."""

    persona: str
    task: str
    prompts: dict[str, int]
    seed: int


@dataclass(frozen=True)
class Plan:
    """A run over cells.

    Attributes:
        command: the experiment, such as ``capture``.
        prompts: every unique prompt once.
        cells: the cells, in the grid's order.
        layers: layers whose residuals are recorded, ascending.
        positions: positions whose residuals are recorded, in sequence order.
        window: how many tokens a KL is summed over.
        edits: the interventions; none for a capture.
        keeps_residuals: whether the residuals are handed back.
        eos_ids: tokens that end a continuation.
        pad_id: a token for padding, which stands in the prompts; attention never sees it.
        seed: of the ``random`` condition.
        given_x: Δ_X to use in place of the run's own, by persona: [positions][layers][d_model].
        continuation: length of the clean continuation, at least `last_generated` + 1 and as much
            as the windows of the edits reach; None for the window of the last position.
        decoding: settings of the checkpoint that decoding keeps to, by their names in transformers
            (`persona_nnsight.models.decoding`); none where the largest logit wins.
        path: through the engine: ``fast``, ``whole``, or ``auto``, where the model decides
            (`persona_nnsight.models.paths`).
        rendering: how the prompts were rendered.
    """

    command: str
    prompts: tuple[Prompt, ...]
    cells: tuple[CellPlan, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    window: int
    edits: tuple[Edit, ...]
    keeps_residuals: bool
    eos_ids: tuple[int, ...]
    pad_id: int
    seed: int
    given_x: dict[str, Given] | None = None
    continuation: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    path: str = AUTO
    rendering: Rendering = UNDATED

    @property
    def last_generated(self) -> int:
        """K, the highest k of the positions gk (0 when only prompt positions are asked)."""
        return max(generated_index(position) for position in self.positions)

    @property
    def reference_tokens(self) -> int:
        """Length of the clean continuation: the window of the last position ends it."""
        if self.continuation is not None:
            return self.continuation
        return self.window + self.last_generated

    @property
    def is_scored(self) -> bool:
        """Whether any edit is."""
        return any(edit.scored for edit in self.edits)

    @property
    def continued(self) -> int:
        """How many tokens of its continuation XY is run over: for its sites, and for KLs."""
        return self.reference_tokens - 1 if self.is_scored else self.last_generated

    @property
    def tail(self) -> int:
        """How many tokens at the end of a prompt stay out of the shared prefix.

        From the first asked prompt position to ``p_last``; one number for all prompts, so that
        their tails line up in a batch.
        """
        if "p_user_last" not in self.positions:
            return 1
        return max(len(prompt.ids) - user_last(prompt) for prompt in self.prompts)

    @property
    def longest_text(self) -> int:
        """The most tokens of greedy text that an edit asks for."""
        return max((edit.generate for edit in self.edits), default=0)

    @property
    def roles(self) -> tuple[str, ...]:
        """The residual keys that every cell of this plan has."""
        return tuple(key for key in self.cells[0].prompts if key != TASK_KEY)

    @property
    def n_results(self) -> int:
        """How many results the plan leaves: cells recorded, KLs and texts are one each."""
        total = len(self.cells)
        for edit in self.edits:
            cells = len(self.cells) if edit.cells is None else len(edit.cells)
            total += cells * (edit.scored + (edit.generate > 0))
        return total


def unique_prompts(plan: Plan, cells: Iterable[CellPlan]) -> list[int]:
    """Indices of the prompts that `cells` use, each once, in first-use order."""
    return list(dict.fromkeys(index for cell in cells for index in cell.prompts.values()))
