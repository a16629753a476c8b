"""Plans of bare token ids."""

from __future__ import annotations

from collections.abc import Sequence

from persona_nnsight.plan.plan import CellPlan, Edit, Plan
from persona_nnsight.prompts.prompt import Prompt


def plan_of(
    openings: Sequence[Sequence[int]],
    *,
    positions: tuple[str, ...] = ("p_last",),
    tail: int = 1,
    window: int = 3,
    edits: tuple[Edit, ...] = (),
) -> Plan:
    """A plan of one cell per opening, whose prompts end with `tail` tokens more."""
    prompts = [Prompt(str(o), (*o, *range(900, 900 + tail)), len(o)) for o in openings]
    cells = [CellPlan("x", "y", {"XY": number}, 0) for number in range(len(openings))]
    return Plan(
        command="capture",
        prompts=tuple(prompts),
        cells=tuple(cells),
        layers=(0,),
        positions=positions,
        window=window,
        edits=edits,
        keeps_residuals=False,
        eos_ids=(),
        pad_id=0,
        seed=0,
    )
