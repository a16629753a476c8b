"""Several plans on one model as one, so that what they share is computed once.

Plans share prompts, and the cells that they share have one clean continuation, one set of clean
log-probabilities and one reading of the residuals. Every event of the joint run is handed back to
the plans it belongs to, in their own numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from persona_nnsight.method.conditions import TASK_KEY
from persona_nnsight.method.sites import POSITIONS
from persona_nnsight.plan.events import Event, Recorded, Scored, Written
from persona_nnsight.plan.plan import CellPlan, Edit, Plan, unique_prompts
from persona_nnsight.prompts.prompt import Prompt


@dataclass(frozen=True)
class JointPlan:
    """A plan that does the work of several.

    Attributes:
        plan: the joint plan.
        parts: the plans it was made of.
        cells: for each part, from a cell of the joint plan to the part's own number.
        edits: for every edit of the joint plan, the part and the edit's number there.
    """

    plan: Plan
    parts: tuple[Plan, ...]
    cells: tuple[dict[int, int], ...]
    edits: tuple[tuple[int, int], ...]

    def split(self, event: Event) -> Iterator[tuple[int, Event]]:
        """The event as each part sees it: (part, event)."""
        if len(self.parts) == 1:
            yield 0, event
            return
        match event:
            case Recorded():
                for part in range(len(self.parts)):
                    if (own := self._recorded(event, part)) is not None:
                        yield part, own
            case Scored() | Written():
                part, edit = self.edits[event.edit]
                yield part, replace(event, cell=self.cells[part][event.cell], edit=edit)

    def _recorded(self, event: Recorded, part: int) -> Recorded | None:
        plan, mine = self.parts[part], self.cells[part]
        rows = [row for row, cell in enumerate(event.cells) if cell in mine]
        if not rows:
            return None
        positions = [self.plan.positions.index(name) for name in plan.positions]
        layers = [self.plan.layers.index(layer) for layer in plan.layers]

        def own(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {key: value[rows][:, positions][:, :, layers] for key, value in values.items()}

        return Recorded(
            cells=tuple(mine[event.cells[row]] for row in rows),
            continuations=tuple(event.continuations[row][: plan.reference_tokens] for row in rows),
            margins=tuple(event.margins[row][: plan.reference_tokens] for row in rows),
            geometry=own(event.geometry),
            residuals=own(event.residuals) if plan.keeps_residuals and event.residuals else None,
        )


def join(plans: Sequence[Plan]) -> JointPlan:
    """Make one plan of several, in which each finds what it would find alone.

    Each keeps its own continuation, positions, layers and texts. What a run has once only has to
    be the same in all of them.

    Raises:
        ValueError: plans that cannot share a run: other windows of KLs, seeds, days, ends of text
            or Δ_X to use, another model's tokens, one name for two cells or for a cell with two
            baselines or donors, or residuals of other prompts.
    """
    first = plans[0]
    windows = _check_common(plans)
    grouped = _grouped(plans)
    prompts = _all_prompts(plans, grouped)
    place = {prompt: index for index, prompt in enumerate(prompts)}
    cells: dict[tuple[str, str], CellPlan] = {}
    for plan in plans:
        for cell in plan.cells:
            own = {key: place[_told(plan.prompts[i], grouped)] for key, i in cell.prompts.items()}
            known = cells.get((cell.persona, cell.task))
            before = {} if known is None else known.prompts
            for key in own:
                if before.get(key, own[key]) != own[key]:
                    raise ValueError(
                        f"{cell.persona}/{cell.task} has another prompt {key} in each plan"
                    )
            cells[cell.persona, cell.task] = replace(cell, prompts={**before, **own})
    number = {key: index for index, key in enumerate(cells)}
    numbers = [[number[cell.persona, cell.task] for cell in plan.cells] for plan in plans]
    asked = {name for plan in plans for name in plan.positions}
    joint = replace(
        first,
        prompts=tuple(prompts),
        cells=tuple(cells.values()),
        layers=tuple(sorted({layer for plan in plans for layer in plan.layers})),
        positions=tuple(name for name in POSITIONS if name in asked),
        window=max(windows, default=first.window),
        # What the longest of them asks for; `JointPlan.split` cuts it for the others.
        continuation=max(plan.reference_tokens for plan in plans),
        keeps_residuals=any(plan.keeps_residuals for plan in plans),
        edits=tuple(
            _on_cells(edit, own, len(cells))
            for plan, own in zip(plans, numbers, strict=True)
            for edit in plan.edits
        ),
    )
    return JointPlan(
        plan=joint,
        parts=tuple(plans),
        cells=tuple({joined: own for own, joined in enumerate(part)} for part in numbers),
        edits=tuple(
            (part, edit) for part, plan in enumerate(plans) for edit in range(len(plan.edits))
        ),
    )


def _check_common(plans: Sequence[Plan]) -> set[int]:
    """Refuse plans that differ in what a run has once only; give the windows of their KLs."""
    first = plans[0]
    windows = {plan.window for plan in plans if any(edit.scored for edit in plan.edits)}
    if len(windows) > 1 or any(
        (plan.given_x, plan.seed) != (first.given_x, first.seed) for plan in plans
    ):
        raise ValueError("plans with different windows, seeds or given effects cannot be joined")
    if any((plan.decoding, plan.path) != (first.decoding, first.path) for plan in plans):
        raise ValueError("plans that decode or run their rows in other ways cannot be joined")
    if any(plan.rendering != first.rendering for plan in plans):
        raise ValueError("plans whose prompts are rendered on different days cannot be joined")
    if any(set(plan.eos_ids) != set(first.eos_ids) for plan in plans):
        raise ValueError("plans whose texts end at different tokens cannot be joined")
    # Given effects are numbered by the plan's own positions and layers.
    if first.given_x is not None and any(
        (plan.positions, plan.layers) != (first.positions, first.layers) for plan in plans
    ):
        raise ValueError("plans with given effects at different sites cannot be joined")
    # Also where the cells are the same: what is measured depends on it.
    if len({frozenset(cell.prompts) - {TASK_KEY} for p in plans for cell in p.cells}) > 1:
        raise ValueError("plans whose cells need different residuals cannot be joined")
    return windows


def _grouped(plans: Sequence[Plan]) -> dict[str, Prompt]:
    """Prompts with token groups, by their text; of one text with other groups, the first."""
    found: dict[str, Prompt] = {}
    for prompt in (prompt for plan in plans for prompt in plan.prompts):
        if prompt.groups is not None:
            found.setdefault(prompt.text, prompt)
    return found


def _told(prompt: Prompt, grouped: dict[str, Prompt]) -> Prompt:
    """A prompt whose groups nobody asked for is that of another plan that has them."""
    return prompt if prompt.groups is not None else grouped.get(prompt.text, prompt)


def _all_prompts(plans: Sequence[Plan], grouped: dict[str, Prompt]) -> list[Prompt]:
    """The prompts of all plans, each once, in first-use order."""
    tokens: dict[str, tuple[tuple[int, ...], int | None]] = {}
    prompts: dict[Prompt, None] = {}
    for prompt in (prompt for plan in plans for prompt in plan.prompts):
        own = prompt.ids, prompt.user_last
        if tokens.setdefault(prompt.text, own) != own:
            raise ValueError(f"the prompt {prompt.text!r} has other tokens in each plan")
        prompts[_told(prompt, grouped)] = None
    return list(prompts)


def _on_cells(edit: Edit, numbers: Sequence[int], n_cells: int) -> Edit:
    """The edit on the joint plan's numbers of its cells, which may be all of them."""
    own = range(len(numbers)) if edit.cells is None else edit.cells
    cells = tuple(numbers[cell] for cell in own)
    return replace(edit, cells=None if len(cells) == n_cells else cells)


def part_of(plan: Plan, cells: range) -> Plan:
    """The plan on some of its cells, with the prompts that they need.

    Edits keep their numbers; a cell of the part is its number in `plan` less ``cells.start``.
    """
    chosen = plan.cells[cells.start : cells.stop]
    kept = unique_prompts(plan, chosen)
    place = {index: number for number, index in enumerate(kept)}
    personas = {cell.persona for cell in chosen}
    given = plan.given_x
    return replace(
        plan,
        prompts=tuple(plan.prompts[index] for index in kept),
        cells=tuple(
            replace(cell, prompts={key: place[index] for key, index in cell.prompts.items()})
            for cell in chosen
        ),
        edits=tuple(
            edit
            if edit.cells is None
            else replace(edit, cells=tuple(n - cells.start for n in edit.cells if n in cells))
            for edit in plan.edits
        ),
        given_x=None if given is None else {k: x for k, x in given.items() if k in personas},
    )
