"""A plan carried out on a model: its steps, chunk by chunk of cells and batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from persona_nnsight.engine.attention import grouped_attention
from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.decode import decode
from persona_nnsight.engine.extend import HostRun, check_clean, extend
from persona_nnsight.engine.memory import in_batches
from persona_nnsight.engine.prefill import prefill
from persona_nnsight.engine.record import Record, public_geometry, public_residuals, record
from persona_nnsight.engine.score import has_own_reference, score
from persona_nnsight.engine.wide_logits import wide_logits
from persona_nnsight.engine.write import write
from persona_nnsight.models.module_tree import ModuleTree
from persona_nnsight.plan.costs import Limits, fed_tokens
from persona_nnsight.plan.events import Done, Event, Recorded, Scored, Written
from persona_nnsight.plan.plan import Edit, Plan
from persona_nnsight.plan.prefix_tree import prefix_tree

#: A cell within the chunk and an edit of the plan.
Row = tuple[int, int]


@torch.no_grad()
def run(
    lm: Any, tree: ModuleTree, plan: Plan, limits: Limits, done: Done | None = None, /
) -> Iterator[Event]:
    """Carry out `plan` on an nnsight model; results come as they are finished.

    Args:
        lm, tree: the model.
        plan: what to do.
        limits: batch sizes. The last bits of a number depend on them.
        done: what is finished and need not be done again. Some of it may be, with the same
            numbers: batches are passed over whole or not at all.

    Raises:
        PersonaError: a residual or logit that is not finite, or a model whose KV cache cannot be
            shared between rows.
    """
    done = done or Done()

    def prepare(numbers: Sequence[int]) -> _Prepared:
        cells = [plan.cells[number] for number in numbers]
        openings = prefix_tree(plan, cells, window=tree.window, most_tokens=limits.tokens)
        chunk = Chunk(lm, tree, plan, cells, prefill(lm, plan, openings))
        decoded = decode(chunk)
        scored = [edit for edit in plan.edits if edit.scored and any(map(edit.runs_on, numbers))]
        # Every KL is taken from what XY predicts.
        keys = dict.fromkeys(["XY", *(edit.host for edit in scored)])
        with wide_logits(lm):
            hosts = {key: extend(chunk, decoded, key) for key in keys}
        recorded = record(chunk, decoded, hosts["XY"].sites)
        if (clean := hosts["XY"].clean) is not None:
            check_clean(chunk, decoded, clean)
        return _Prepared(chunk, recorded, hosts if scored else {})

    with grouped_attention(lm):
        chunks = in_batches(
            range(len(plan.cells)), limits.cells, prepare, lambda cells: done.has(plan, cells)
        )
        for numbers, ready in chunks:
            yield Recorded(
                cells=tuple(numbers),
                continuations=ready.recorded.decoded.token_ids(),
                margins=ready.recorded.decoded.token_margins(),
                geometry=public_geometry(ready.chunk, ready.recorded),
                residuals=public_residuals(ready.chunk, ready.recorded)
                if plan.keeps_residuals
                else None,
            )
            yield from _scores(ready, numbers, limits, done)
            ready.hosts.clear()
            yield from _texts(ready, numbers, limits, done)


@dataclass(frozen=True)
class _Prepared:
    """A chunk of cells whose clean runs are done."""

    chunk: Chunk
    recorded: Record
    hosts: dict[str, HostRun]


def _scores(
    ready: _Prepared, numbers: Sequence[int], limits: Limits, done: Done
) -> Iterator[Scored]:
    plan = ready.chunk.plan
    scored = [index for index, edit in enumerate(plan.edits) if edit.scored]
    for edits in _groups(plan, scored, lambda edit: edit.batch_key):
        first = plan.edits[edits[0]]

        def work(batch: Sequence[Row], host: str = first.host) -> list[tuple[float, int]]:
            clean = ready.hosts["XY"].clean
            assert clean is not None
            with wide_logits(ready.chunk.lm):
                return score(ready.chunk, ready.recorded, clean, ready.hosts[host], batch)

        def is_done(batch: Sequence[Row]) -> bool:
            return all((numbers[cell], edit) in done.scored for cell, edit in batch)

        size = limits.rows_of(fed_tokens(plan, first, ready.chunk.tree))
        if has_own_reference(ready.chunk, first):
            size = max(1, size // 2)
        for batch, results in in_batches(_rows(plan, edits, numbers), size, work, is_done):
            for (cell, edit), (kl, n_tokens) in zip(batch, results, strict=True):
                yield Scored(numbers[cell], edit, kl, n_tokens)


def _texts(
    ready: _Prepared, numbers: Sequence[int], limits: Limits, done: Done
) -> Iterator[Written]:
    plan = ready.chunk.plan

    def work(batch: Sequence[Sequence[Row]]) -> tuple[tuple[int, ...], ...]:
        return write(ready.chunk, ready.recorded, [rows[0] for rows in batch])

    def is_done(batch: Sequence[Sequence[Row]]) -> bool:
        return all((numbers[cell], edit) in done.written for rows in batch for cell, edit in rows)

    generating = [index for index, edit in enumerate(plan.edits) if edit.generate]
    for edits in _groups(plan, generating, lambda edit: edit.generate):
        # Cells that share an unedited prompt share its text.
        sharing: dict[Hashable, list[Row]] = {}
        for cell, edit in _rows(plan, edits, numbers):
            unedited = ready.chunk.cells[cell].prompts[plan.edits[edit].host]
            text = unedited if plan.edits[edit].is_unedited else (cell, edit)
            sharing.setdefault(text, []).append((cell, edit))
        for batch, texts in in_batches(list(sharing.values()), limits.rows, work, is_done):
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


def _rows(plan: Plan, edits: Sequence[int], numbers: Sequence[int]) -> list[Row]:
    """Rows (cell within the chunk, edit) of the edits, each on its cells."""
    return [
        (cell, edit)
        for edit in edits
        for cell, number in enumerate(numbers)
        if plan.edits[edit].runs_on(number)
    ]
