"""Every nnsight trace of the project: prefill, record, extend, score, write.

A plan runs in chunks of cells, each in steps, one file a step:

1. `prefill`: the opening of every unique prompt runs once and leaves its KV cache. The last few
   tokens, the *tail* (from the first asked prompt position to ``p_last``), stay out of it.
2. `record`: one traced ``generate`` from the tails records the residuals of BB, XB, BY and XY at
   every asked site while XY decodes its clean continuation; the baselines are teacher-forced onto
   it by giving them XY's logits. XY alone then decodes the rest of the continuation.
3. `extend`: tails and continuation of each host prompt run once unedited. This keeps the clean
   log-probabilities and, at the layers to be edited, the residuals of every token.
4. `score`: rows of (cell, edit) run over the same tokens with residuals overwritten. What lies
   below the lowest edited layer is unchanged by the edit, so those layers are skipped and the
   stored residuals enter at the edited layer. KL is taken inside the trace; only numbers leave.
5. `write`: greedy text under the edits, if the plan asks for it.

Rows of different cells and conditions share batches: padding stands on the left, positions are
explicit, and no cache is ever cropped, so sliding-window caches need no special case.

The engine is meant to run as it is on a remote server: it imports torch, nnsight, transformers and
the plain-data modules of this package, and returns small things.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from persona_nnsight.costs import Limits
from persona_nnsight.engine.extend import extend
from persona_nnsight.engine.prefill import Chunk, prefill
from persona_nnsight.engine.record import Record, public_geometry, public_residuals, record
from persona_nnsight.engine.score import score
from persona_nnsight.engine.write import write
from persona_nnsight.module_tree import ModuleTree
from persona_nnsight.plan import Edit, Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """Clean continuations of a chunk of cells, and their residuals if the plan has no edits.

    Attributes:
        cells: indices into `Plan.cells`.
        continuations: token ids per cell, ended by the first end-of-sequence token.
        geometry: how the effects add up (`persona_nnsight.geometry.decompose`, and
            ``inter_over_xy_normed``), by measure, float32 [cells, positions, layers].
        residuals: float32 [cells, positions, layers, d_model] by residual key, on the CPU.

    What a continuation ended before is NaN.
    """

    cells: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    geometry: dict[str, Tensor]
    residuals: dict[str, Tensor] | None


@dataclass(frozen=True)
class Scored:
    """One KL: `cell` and `edit` index the plan; NaN where `n_tokens` is 0."""

    cell: int
    edit: int
    kl: float
    n_tokens: int


@dataclass(frozen=True)
class Written:
    """Greedy text of one cell under one edit."""

    cell: int
    edit: int
    tokens: tuple[int, ...]


Event = Recorded | Scored | Written


@torch.no_grad()
def run(lm: Any, tree: ModuleTree, plan: Plan, limits: Limits) -> Iterator[Event]:
    """Carry out `plan` on an nnsight model; results come as they are finished.

    Raises:
        PersonaError: a residual or logit that is not finite, or a model whose KV cache cannot be
            shared between rows.
    """
    for start in range(0, len(plan.cells), limits.cells):
        numbers = range(start, min(start + limits.cells, len(plan.cells)))
        cells = [plan.cells[number] for number in numbers]
        chunk = Chunk(lm, tree, plan, cells, prefill(lm, plan, cells))
        yield from _run_chunk(chunk, numbers, limits.rows)


def _run_chunk(chunk: Chunk, numbers: range, batch_rows: int) -> Iterator[Event]:
    """The events of a chunk, whose cells have these numbers in the plan."""
    plan = chunk.plan
    recorded = record(chunk)
    yield Recorded(
        cells=tuple(numbers),
        continuations=recorded.token_ids(),
        geometry=public_geometry(chunk, recorded),
        residuals=public_residuals(chunk, recorded) if plan.keeps_residuals else None,
    )
    yield from _scores(chunk, recorded, numbers, batch_rows)
    yield from _texts(chunk, recorded, numbers, batch_rows)


def _scores(chunk: Chunk, recorded: Record, numbers: range, batch_rows: int) -> Iterator[Scored]:
    plan = chunk.plan
    scored = [
        index
        for index, edit in enumerate(plan.edits)
        if edit.scored and any(map(edit.runs_on, numbers))
    ]
    if not scored:
        return
    keys = dict.fromkeys(["XY", *(plan.edits[index].host for index in scored)])
    hosts = {key: extend(chunk, recorded, key) for key in keys}
    for edits in _groups(plan, scored, lambda edit: (edit.positions, edit.layers, edit.host)):
        host = hosts[plan.edits[edits[0]].host]
        for batch in _batches(_rows(plan, edits, numbers), batch_rows):
            results = score(chunk, recorded, hosts["XY"].logprobs, host, batch)
            for (cell, edit), (kl, n_tokens) in zip(batch, results, strict=True):
                yield Scored(numbers[cell], edit, kl, n_tokens)


def _texts(chunk: Chunk, recorded: Record, numbers: range, batch_rows: int) -> Iterator[Written]:
    plan = chunk.plan
    generating = [index for index, edit in enumerate(plan.edits) if edit.generate]
    for edits in _groups(plan, generating, lambda edit: edit.generate):
        # Cells that share an unedited prompt share its text.
        sharing: dict[Hashable, list[tuple[int, int]]] = {}
        for cell, edit in _rows(plan, edits, numbers):
            unedited = chunk.cells[cell].prompts[plan.edits[edit].host]
            text = (cell, edit) if plan.edits[edit].layers else unedited
            sharing.setdefault(text, []).append((cell, edit))
        for batch in _batches(list(sharing.values()), batch_rows):
            texts = write(chunk, recorded, [rows[0] for rows in batch])
            for rows, tokens in zip(batch, texts, strict=True):
                for cell, edit in rows:
                    yield Written(numbers[cell], edit, tokens)


def _groups(
    plan: Plan, edits: Sequence[int], what: Callable[[Edit], Hashable]
) -> Iterable[list[int]]:
    """Edits that can share a batch because `what` is the same of them."""
    groups: dict[Hashable, list[int]] = {}
    for index in edits:
        groups.setdefault(what(plan.edits[index]), []).append(index)
    return groups.values()


def _rows(plan: Plan, edits: Sequence[int], numbers: range) -> list[tuple[int, int]]:
    """Rows (cell within the chunk, edit) of the edits, each on its cells."""
    return [
        (cell, edit)
        for edit in edits
        for cell, number in enumerate(numbers)
        if plan.edits[edit].runs_on(number)
    ]


def _batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
