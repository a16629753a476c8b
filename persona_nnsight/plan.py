"""Everything a run will do, as plain data, before anything runs.

A plan holds token ids, numbers and names only: it can be printed, costed, hashed, or sent to a
server, and needs no model weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_nnsight.conditions import DONOR_KEY, RESIDUAL_KEYS
from persona_nnsight.errors import PersonaError
from persona_nnsight.prompts import Prompt, encode_prompt
from persona_nnsight.sites import generated_index

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from persona_nnsight.grids import Cell, Grid


@dataclass(frozen=True)
class Edit:
    """One intervention, applied to every cell in a run of its own.

    Attributes:
        condition: which vector is written (`persona_nnsight.interventions`).
        position: the site's position name.
        layers: the layers written in the same run, each with its own vector.
    """

    condition: str
    position: str
    layers: tuple[int, ...]


@dataclass(frozen=True)
class CellPlan:
    """One cell as indices into `Plan.prompts`, by residual key (BB, XB, BY, XY, maybe OB)."""

    persona: str
    task: str
    prompts: dict[str, int]
    seed: int


@dataclass(frozen=True)
class Plan:
    """A run over cells.

    Attributes:
        command: the experiment: ``capture``, ``substitute`` or ``inject``.
        prompts: every unique prompt once.
        cells: the cells, in the grid's order.
        layers: layers whose residuals are recorded, ascending.
        positions: positions whose residuals are recorded, in sequence order.
        window: how many tokens a KL is summed over.
        host: the prompt that edits are written into, ``XY`` or ``BY``.
        edits: the interventions; none for a capture.
        generate: tokens of greedy text to write for each edit, 0 for none.
        eos_ids: tokens that end a continuation.
        pad_id: a token for padding; attention never sees it.
        seed: of the ``random`` condition.
    """

    command: str
    prompts: tuple[Prompt, ...]
    cells: tuple[CellPlan, ...]
    layers: tuple[int, ...]
    positions: tuple[str, ...]
    window: int
    host: str
    edits: tuple[Edit, ...]
    generate: int
    eos_ids: tuple[int, ...]
    pad_id: int
    seed: int

    @property
    def last_generated(self) -> int:
        """K, the highest k of the positions gk (0 when only prompt positions are asked)."""
        return max(generated_index(position) for position in self.positions)

    @property
    def reference_tokens(self) -> int:
        """Length of the clean continuation: the window of the last position ends it."""
        return self.window + self.last_generated

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
    def text_edits(self) -> tuple[int | None, ...]:
        """The edits that greedy text is written under; None is the unedited XY prompt.

        Writing h_XY back (``clean``) changes no text, so it is not among them.
        """
        if not self.generate:
            return ()
        changing = (i for i, edit in enumerate(self.edits) if edit.condition != "clean")
        return (None, *changing)

    @property
    def roles(self) -> tuple[str, ...]:
        """The residual keys that every cell of this plan has."""
        return tuple(self.cells[0].prompts)


def build_plan(
    command: str,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    *,
    layers: tuple[int, ...],
    positions: tuple[str, ...],
    window: int,
    edits: Sequence[Edit] = (),
    host: str = "XY",
    generate: int = 0,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (),
) -> Plan:
    """Encode a grid's prompts and lay out its cells.

    Raises:
        PersonaError: a window or text length that is no positive number, a prompt that the chat
            template cannot take, or a template in which an asked position does not exist.
    """
    if window < 1:
        raise PersonaError(f"A window of {window} tokens holds nothing; use 1 or more (10).")
    if generate < 0:
        raise PersonaError(f"Cannot generate {generate} tokens; use 0 for none, or more.")
    prompts: dict[str, int] = {}
    encoded: list[Prompt] = []

    def index(text: str) -> int:
        if text not in prompts:
            prompts[text] = len(encoded)
            encoded.append(encode_prompt(tokenizer, text))
        return prompts[text]

    with_donor = any(edit.condition == "other_x" for edit in edits)
    cells = tuple(
        CellPlan(
            persona=cell.persona.key,
            task=cell.task.key,
            prompts={key: index(text) for key, text in _texts(grid, cell, with_donor).items()},
            seed=_cell_seed(seed, grid.prompt(cell.persona, cell.task)),
        )
        for cell in grid.cells
    )
    pad_id = tokenizer.pad_token_id
    plan = Plan(
        command=command,
        prompts=tuple(encoded),
        cells=cells,
        layers=layers,
        positions=positions,
        window=window,
        host=host,
        edits=tuple(edits),
        generate=generate,
        eos_ids=eos_ids,
        pad_id=pad_id if isinstance(pad_id, int) else 0,
        seed=seed,
    )
    shortest = min(plan.prompts, key=lambda prompt: len(prompt.ids))
    if len(shortest.ids) <= plan.tail:
        raise PersonaError(
            f"The prompt {shortest.text!r} is only {len(shortest.ids)} tokens long after the chat "
            f"template, and the {plan.tail} tokens from the end of the user turn need at least one "
            "before them; use a longer template."
        )
    return plan


def user_last(prompt: Prompt) -> int:
    """Index of the last token of the user turn.

    Raises:
        PersonaError: the chat template gives it no position.
    """
    if prompt.user_last is None:
        raise PersonaError(
            "Position 'p_user_last' does not exist with this model: its chat template ends the "
            "user turn with other tokens when an answer follows; use p_last, g1 to g9."
        )
    return prompt.user_last


def _texts(grid: Grid, cell: Cell, with_donor: bool) -> dict[str, str]:
    persona, task = cell.persona, cell.task
    texts = dict(
        zip(
            RESIDUAL_KEYS,
            (
                grid.prompt(None, None),
                grid.prompt(persona, None),
                grid.prompt(None, task),
                grid.prompt(persona, task),
            ),
            strict=True,
        )
    )
    if with_donor and (donor := grid.donor(persona)) is not None:
        texts[DONOR_KEY] = grid.prompt(donor, None)
    return texts


def _cell_seed(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:6], "big")


def unique_prompts(plan: Plan, cells: Iterable[CellPlan]) -> list[int]:
    """Indices of the prompts that `cells` use, each once, in first-use order."""
    return list(dict.fromkeys(index for cell in cells for index in cell.prompts.values()))
