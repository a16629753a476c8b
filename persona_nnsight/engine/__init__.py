"""Every nnsight trace of the project: prefill, record, extend, score, write.

A plan runs in chunks of cells, each in steps, one file a step:

1. `prefill`: the opening of every unique prompt runs once and leaves its KV cache. The last few
   tokens, the *tail* (from the first asked prompt position to ``p_last``), stay out of it.
2. `record`: one traced ``generate`` from the tails records the residuals of BB, XB, BY and XY at
   every asked site while XY decodes its clean continuation; the baselines are teacher-forced onto
   it by giving them XY's logits. XY alone then decodes the rest of the continuation.
3. `extend`: tails and continuation of the host prompt run once unedited. This keeps the clean
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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from persona_nnsight.costs import Limits
from persona_nnsight.engine.extend import extend
from persona_nnsight.engine.prefill import Chunk, prefill
from persona_nnsight.engine.record import public_residuals, record
from persona_nnsight.engine.score import score
from persona_nnsight.engine.write import write
from persona_nnsight.module_tree import ModuleTree
from persona_nnsight.plan import Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Recorded:
    """Clean continuations of a chunk of cells, and their residuals if the plan has no edits.

    Attributes:
        cells: indices into `Plan.cells`.
        continuations: token ids per cell, ended by the first end-of-sequence token.
        residuals: float32 [cells, positions, layers, d_model] by residual key, on the CPU; NaN
            where a continuation ended before the position.
    """

    cells: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
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
    """Greedy text of one cell under one edit; `edit` None is the unedited XY prompt."""

    cell: int
    edit: int | None
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
    plan, in_chunk = chunk.plan, range(len(chunk.cells))
    recorded = record(chunk)
    yield Recorded(
        cells=tuple(numbers),
        continuations=recorded.token_ids(),
        residuals=None if plan.edits else public_residuals(chunk, recorded),
    )
    if not plan.edits:
        return
    clean = extend(chunk, recorded, "XY")
    host = clean if plan.host == "XY" else extend(chunk, recorded, plan.host)
    for edits in _edit_groups(plan):
        rows = [(cell, edit) for edit in edits for cell in in_chunk]
        for batch in _batches(rows, batch_rows):
            results = score(chunk, recorded, clean.logprobs, host, batch)
            for (cell, edit), (kl, n_tokens) in zip(batch, results, strict=True):
                yield Scored(numbers[cell], edit, kl, n_tokens)
    texts = [(cell, edit) for edit in plan.text_edits for cell in in_chunk]
    for writing in _batches(texts, batch_rows):
        written = write(chunk, recorded, writing)
        for (cell, text_edit), tokens in zip(writing, written, strict=True):
            yield Written(numbers[cell], text_edit, tokens)


def _edit_groups(plan: Plan) -> list[list[int]]:
    """Edits that can share a batch: the same layers and position."""
    groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for index, edit in enumerate(plan.edits):
        groups.setdefault((edit.layers, edit.position), []).append(index)
    return list(groups.values())


def _batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
