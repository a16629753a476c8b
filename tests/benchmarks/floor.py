"""The fewest tokens × layers and LM-head rows that a plan needs, from the plan alone.

Each distinct prompt token once through every layer, where two prompts share the tokens with which
both begin; each token of a continuation or a text once; each patched token once per layer from its
edit up, since the layers below are those of the unedited run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile

from benchmarks.lengths import Lengths
from benchmarks.work import Work
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.prompts.prompt import user_last


def floor(plan: Plan, n_layers: int, lengths: Lengths | None = None) -> Work:
    """The sum of `floor_parts`."""
    return sum(floor_parts(plan, n_layers, lengths).values(), Work())


def floor_parts(plan: Plan, n_layers: int, lengths: Lengths | None = None) -> dict[str, Work]:
    """What a plan needs, by what for.

    Args:
        plan: every cell of it.
        n_layers: of the model.
        lengths: of the continuations and texts; None takes them as long as was asked.

    Returns:
        ``prompts``; ``unedited``, the clean continuations and the texts that nothing was written
        for; ``forced``, the other prompts teacher-forced on XY's continuation; ``edited``.
    """
    known = Lengths.asked(plan) if lengths is None else lengths
    return {
        "prompts": Work(distinct_tokens(prompt.ids for prompt in plan.prompts) * n_layers),
        "unedited": _unedited(plan, n_layers, known),
        "forced": _forced(plan, n_layers, known),
        "edited": sum(
            (
                _edited(plan, number, edit, cell, n_layers, known)
                for number, edit in enumerate(plan.edits)
                for cell in range(len(plan.cells))
                if not edit.is_unedited and edit.runs_on(cell)
            ),
            Work(),
        ),
    }


def distinct_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """Nodes of the prefix tree of the sequences, its empty root left out."""
    ordered = sorted({tuple(sequence) for sequence in sequences})
    shared = sum(_shared(*pair) for pair in pairwise(ordered))
    return sum(map(len, ordered)) - shared


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they part."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    )


def window_tokens(plan: Plan, edit: Edit, length: int) -> int:
    """Tokens that an edit is scored on in a cell whose continuation has `length` tokens."""
    if not edit.scored:
        return 0
    return max(0, min(plan.window, length - generated_index(edit.intervention.anchor)))


def _unedited(plan: Plan, n_layers: int, lengths: Lengths) -> Work:
    """Greedy tokens after each prompt: the last one is chosen and not fed."""
    written = {
        cell.prompts["XY"]: length
        for cell, length in zip(plan.cells, lengths.continuations, strict=True)
    }
    for (cell, number), length in lengths.texts.items():
        edit = plan.edits[number]
        if edit.is_unedited:
            prompt = plan.cells[cell].prompts[edit.host]
            written[prompt] = max(length, written.get(prompt, 0))
    return Work(sum(n - 1 for n in written.values()) * n_layers, sum(written.values()))


def _forced(plan: Plan, n_layers: int, lengths: Lengths) -> Work:
    tokens = head_rows = 0
    for number, (cell, length) in enumerate(zip(plan.cells, lengths.continuations, strict=True)):
        fed = {key: min(plan.last_generated, length) for key in plan.roles if key != "XY"}
        for edit in plan.edits:
            window = window_tokens(plan, edit, length)
            if not edit.is_unedited or not window or not edit.runs_on(number):
                continue
            assert edit.host in cell.prompts
            start = generated_index(edit.intervention.anchor)
            fed[edit.host] = max(fed.get(edit.host, 0), start + window - 1)
            head_rows += window
        tokens += sum(fed.values())
    return Work(tokens * n_layers, head_rows)


def _edited(
    plan: Plan, number: int, edit: Edit, cell: int, n_layers: int, lengths: Lengths
) -> Work:
    """One edit in one cell: from its first position on, from its lowest layer up.

    A text differs from the unedited one token by token, so what is fed of it goes through every
    layer.
    """
    first, lowest = edit.intervention.first, edit.intervention.lowest_layer or 0
    prompt = plan.prompts[plan.cells[cell].prompts[edit.host]]
    site = len(prompt.ids) - user_last(prompt) if first == "p_user_last" else 1
    window = window_tokens(plan, edit, lengths.continuations[cell])
    text = max(0, lengths.texts.get((cell, number), 0) - generated_index(first))
    # The site's own tokens serve both.
    patched = (site if window or text else 0) + max(0, window - 1)
    return Work(
        patched * (n_layers - lowest) + max(0, text - 1) * n_layers,
        window + (max(0, text - 1) if window else text),
    )
