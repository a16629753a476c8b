"""A plan carried out on a model: its steps, chunk by chunk of cells and batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from persona_nnsight.engine.chunk import Chunk, is_far
from persona_nnsight.engine.fast.attention import grouped_attention
from persona_nnsight.engine.fast.runs import FastRuns
from persona_nnsight.engine.memory import alike, in_batches
from persona_nnsight.engine.record import public_geometry, public_residuals
from persona_nnsight.engine.runs import Row, Runs
from persona_nnsight.engine.whole.runs import WholeRuns
from persona_nnsight.models.module_tree import ModuleTree
from persona_nnsight.plan.costs import Limits
from persona_nnsight.plan.events import Done, Event, Recorded, Scored, Written
from persona_nnsight.plan.plan import Edit, Plan


@torch.no_grad()
def run(
    lm: Any, tree: ModuleTree, plan: Plan, limits: Limits, done: Done | None = None, /
) -> Iterator[Event]:
    """Carry out `plan` on an nnsight model; results come as they are finished.

    Args:
        lm, tree: the model.
        plan: what to do.
        limits: batch sizes, and the path that rows take. The last bits of a number depend on
            them.
        done: what is finished and need not be done again. Some of it may be, with the same
            numbers: batches are passed over whole or not at all.

    Raises:
        PersonaError: a residual or logit that is not finite, or, on the fast path, a model whose
            KV cache cannot be shared between rows.
    """
    done = done or Done()
    whole = limits.path.is_whole
    make = WholeRuns if whole else FastRuns
    device = torch.device("cpu") if is_far(lm) else lm.device

    def prepare(numbers: Sequence[int]) -> Runs:
        chunk = Chunk(lm, tree, plan, [plan.cells[number] for number in numbers], device)
        hosts = [
            edit.host for edit in plan.edits if edit.scored and any(map(edit.runs_on, numbers))
        ]
        return make(chunk, limits, hosts)

    with nullcontext() if whole else grouped_attention(lm):
        chunks = in_batches(
            range(len(plan.cells)), limits.cells, prepare, lambda cells: done.has(plan, cells)
        )
        for numbers, runs in chunks:
            recorded = runs.recorded
            yield Recorded(
                cells=tuple(numbers),
                continuations=recorded.decoded.token_ids(),
                margins=recorded.decoded.token_margins(),
                geometry=public_geometry(runs.chunk, recorded),
                residuals=public_residuals(runs.chunk, recorded) if plan.keeps_residuals else None,
            )
            yield from _scores(runs, numbers, done)
            runs.forget_scores()
            yield from _texts(runs, numbers, limits, done)


def _scores(runs: Runs, numbers: Sequence[int], done: Done) -> Iterator[Scored]:
    plan = runs.chunk.plan

    def is_done(batch: Sequence[Row]) -> bool:
        return all((numbers[cell], edit) in done.scored for cell, edit in batch)

    scored = [index for index, edit in enumerate(plan.edits) if edit.scored]
    for edits in _groups(plan, scored, lambda edit: edit.batch_key):
        for rows in alike(_rows(plan, edits, numbers), runs.shape):
            size = runs.rows_at_once(rows[0])
            for batch, results in in_batches(rows, size, runs.score, is_done):
                for (cell, edit), (kl, n_tokens) in zip(batch, results, strict=True):
                    yield Scored(numbers[cell], edit, kl, n_tokens)


def _texts(runs: Runs, numbers: Sequence[int], limits: Limits, done: Done) -> Iterator[Written]:
    plan, cells = runs.chunk.plan, runs.chunk.cells

    def work(batch: Sequence[Sequence[Row]]) -> tuple[tuple[int, ...], ...]:
        return runs.write([rows[0] for rows in batch])

    def is_done(batch: Sequence[Sequence[Row]]) -> bool:
        return all((numbers[cell], edit) in done.written for rows in batch for cell, edit in rows)

    generating = [index for index, edit in enumerate(plan.edits) if edit.generate]
    for edits in _groups(plan, generating, lambda edit: edit.generate):
        # Cells that share an unedited prompt share its text.
        sharing: dict[Hashable, list[Row]] = {}
        for cell, edit in _rows(plan, edits, numbers):
            unedited = cells[cell].prompts[plan.edits[edit].host]
            text = unedited if plan.edits[edit].is_unedited else (cell, edit)
            sharing.setdefault(text, []).append((cell, edit))
        for texts in alike(sharing.values(), lambda rows: runs.shape(rows[0], text=True)):
            for batch, found in in_batches(texts, limits.rows, work, is_done):
                for rows, tokens in zip(batch, found, strict=True):
                    for cell, edit in rows:
                        yield Written(numbers[cell], edit, tokens)


def _groups(
    plan: Plan, edits: Sequence[int], what: Callable[[Edit], Hashable]
) -> Iterable[list[int]]:
    """Edits that can share a batch because `what` is the same of them."""
    return alike(edits, lambda index: what(plan.edits[index]))


def _rows(plan: Plan, edits: Sequence[int], numbers: Sequence[int]) -> list[Row]:
    """Rows (cell within the chunk, edit) of the edits, each on its cells."""
    return [
        (cell, edit)
        for edit in edits
        for cell, number in enumerate(numbers)
        if plan.edits[edit].runs_on(number)
    ]
