"""From a grid and its edits to a plan: prompts encoded, cells laid out."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.method.conditions import DONOR_KEY, RESIDUAL_KEYS, TASK_KEY
from persona_nnsight.models.paths import AUTO
from persona_nnsight.plan.plan import CellPlan, Edit, Given, Plan
from persona_nnsight.prompts.encoding import encode_prompt
from persona_nnsight.prompts.prompt import Prompt
from persona_nnsight.prompts.rendering import UNDATED, Rendering
from persona_nnsight.prompts.role_prompt import RolePrompt, bare_task
from persona_nnsight.prompts.token_groups import encode_grouped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_nnsight.prompts.grids import Cell, Grid


def build_plan(
    command: str,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    *,
    layers: tuple[int, ...],
    positions: tuple[str, ...],
    window: int,
    edits: Sequence[Edit] = (),
    keeps_residuals: bool = False,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (),
    given_x: dict[str, Given] | None = None,
    decoding: dict[str, Any] | None = None,
    path: str = AUTO,
    rendering: Rendering = UNDATED,
) -> Plan:
    """Encode a grid's prompts and lay out its cells.

    Raises:
        PersonaError: a window or text length that is no positive number, a prompt that the chat
            template cannot take, a template in which an asked position does not exist, or edits
            of token groups with a tokenizer that does not tell them apart.
    """
    if window < 1:
        raise PersonaError(f"A window of {window} tokens holds nothing; use 1 or more (10).")
    for edit in edits:
        if edit.generate < 0:
            raise PersonaError(f"Cannot generate {edit.generate} tokens; use 0 for none, or more.")
    prompts: dict[Hashable, int] = {}
    encoded: list[Prompt] = []
    grouped = any(edit.intervention.needs_groups for edit in edits)

    def index(message: RolePrompt) -> int:
        # One text may come of other personas and tasks, which are then other groups.
        key = message if grouped else message.text
        if key not in prompts:
            prompts[key] = len(encoded)
            encoded.append(
                encode_grouped(tokenizer, message, rendering)
                if grouped
                else encode_prompt(tokenizer, message.text, rendering)
            )
        return prompts[key]

    wanted = {*RESIDUAL_KEYS, *(key for edit in edits for key in edit.prompts)}
    if given_x is None:
        # The geometry, which every such plan measures, has another persona's Δ_X as a control.
        wanted.add(DONOR_KEY)
    else:
        wanted.remove("XB")
    cells = tuple(
        CellPlan(
            persona=cell.persona.key,
            task=cell.task.key,
            prompts={
                key: index(message)
                for key, message in _messages(grid, cell).items()
                if key in wanted
            },
            seed=_cell_seed(seed, grid.prompt(cell.persona, cell.task)),
        )
        for cell in grid.cells
    )
    plan = Plan(
        command=command,
        prompts=tuple(encoded),
        cells=cells,
        layers=layers,
        positions=positions,
        window=window,
        edits=tuple(edits),
        keeps_residuals=keeps_residuals,
        eos_ids=eos_ids,
        # The tokenizer's own may have no row in the embedding, as where it was added afterwards.
        pad_id=next((token for prompt in encoded for token in prompt.ids), 0),
        seed=seed,
        given_x=given_x,
        decoding=decoding or {},
        path=path,
        rendering=rendering,
    )
    shortest = min(plan.prompts, key=lambda prompt: len(prompt.ids))
    if len(shortest.ids) <= plan.tail:
        raise PersonaError(
            f"The prompt {shortest.text!r} is only {len(shortest.ids)} tokens long after the chat "
            f"template, and the {plan.tail} tokens from the end of the user turn need at least one "
            "before them; use a longer template."
        )
    return plan


def _messages(grid: Grid, cell: Cell) -> dict[str, RolePrompt]:
    persona, task = cell.persona, cell.task
    messages = {
        "BB": grid.role_prompt(None, None),
        "XB": grid.role_prompt(persona, None),
        "BY": grid.role_prompt(None, task),
        "XY": grid.role_prompt(persona, task),
        TASK_KEY: bare_task(task.text),
    }
    if (donor := grid.donor(persona)) is not None:
        messages[DONOR_KEY] = grid.role_prompt(donor, None)
    return messages


def _cell_seed(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:6], "big")
