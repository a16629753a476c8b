"""What a plan costs before it runs: tokens, passes, memory, and the batch sizes that fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from persona_nnsight.plan import Plan, unique_prompts
from persona_nnsight.sites import generated_index

if TYPE_CHECKING:
    from persona_nnsight.models import Model
    from persona_nnsight.module_tree import ModuleTree

#: Share of the free memory that a run may fill besides the weights.
_BUDGET_SHARE = 0.25
#: Beyond this many tokens in one forward the matrix products run no faster, so batches stop here.
_BATCH_TOKENS = {"cpu": 1024, "gpu": 16384}


@dataclass(frozen=True)
class Limits:
    """Batch sizes: cells that are recorded together, and edited rows in one forward."""

    cells: int
    rows: int


@dataclass(frozen=True)
class Cost:
    """The size of a plan.

    Attributes:
        cells, unique_prompts, edits: how many of each.
        prompt_tokens: tokens of the unique prompts, each prompt once.
        token_forwards: tokens pushed through the model, prompts and continuations, padding left
            out and a token counted once however many layers are skipped.
        forward_passes: batched forwards, decoding steps included.
        weight_bytes, working_bytes: memory of the weights and an estimate of the peak beside them.
    """

    cells: int
    unique_prompts: int
    edits: int
    prompt_tokens: int
    token_forwards: int
    forward_passes: int
    weight_bytes: int
    working_bytes: int

    def to_dict(self) -> dict[str, int]:
        """The fields by name."""
        return asdict(self)


def fed_tokens(plan: Plan, positions: Sequence[str]) -> int:
    """Tokens that an edit is scored on: the tail, and the continuation to the window's end."""
    return plan.tail + generated_index(positions[0]) + plan.window - 1


def fit_limits(plan: Plan, tree: ModuleTree, *, free_bytes: int, gpu: bool) -> Limits:
    """Batch sizes for this plan in a share of the memory that is free."""
    budget = int(_BUDGET_SHARE * free_bytes)
    row_bytes, cell_bytes = _row_bytes(plan, tree), _cell_bytes(plan, tree)
    tokens = _BATCH_TOKENS["gpu" if gpu else "cpu"]
    longest_fed = plan.tail + plan.reference_tokens
    rows = min(budget // 2 // row_bytes, tokens // longest_fed)
    return Limits(cells=max(1, budget // 2 // cell_bytes), rows=max(1, rows))


def estimate(plan: Plan, model: Model, limits: Limits) -> Cost:
    """Count what `plan` computes when it is cut into batches of `limits`."""
    n_cells, n_roles = len(plan.cells), len(plan.roles)
    chunks = [
        range(start, min(start + limits.cells, n_cells))
        for start in range(0, n_cells, limits.cells)
    ]
    openings = sum(
        len(plan.prompts[index].ids) - plan.tail
        for chunk in chunks
        for index in unique_prompts(plan, [plan.cells[cell] for cell in chunk])
    )
    steps = plan.last_generated + 1
    recorded = n_cells * (n_roles * (plan.tail + steps - 1) + plan.window - 1)
    passes = len(chunks) * (1 + steps + plan.window - 1)
    hosts = {"XY", *(edit.host for edit in plan.edits if edit.scored)}
    edited = widest = 0
    for chunk in chunks:
        scored, texts = _rows(plan, chunk)
        if scored:
            edited += len(hosts) * len(chunk) * (plan.tail + plan.reference_tokens - 1)
            passes += len(hosts)
        for (positions, _, _), rows in scored.items():
            edited += rows * fed_tokens(plan, positions)
            passes += math.ceil(rows / limits.rows)
        for length, rows in texts.items():
            edited += rows * (plan.tail + length - 1)
            passes += math.ceil(rows / limits.rows) * length
        widest = max([widest, *scored.values(), *texts.values()])
    item = model.dtype.itemsize
    working = min(limits.cells, n_cells) * _cell_bytes(plan, model.tree)
    working += min(limits.rows, widest) * _row_bytes(plan, model.tree)
    return Cost(
        cells=n_cells,
        unique_prompts=len(plan.prompts),
        edits=len(plan.edits),
        prompt_tokens=sum(len(prompt.ids) for prompt in plan.prompts),
        token_forwards=openings + recorded + edited,
        forward_passes=passes,
        weight_bytes=model.n_parameters * item,
        working_bytes=working,
    )


def _rows(
    plan: Plan, chunk: range
) -> tuple[Counter[tuple[tuple[str, ...], tuple[int, ...], str]], Counter[int]]:
    """Rows of a chunk of cells: by (positions, layers, host) to be scored, by length of text."""
    scored: Counter[tuple[tuple[str, ...], tuple[int, ...], str]] = Counter()
    texts: Counter[int] = Counter()
    for edit in plan.edits:
        cells = [plan.cells[cell] for cell in chunk if edit.runs_on(cell)]
        if edit.scored and cells:
            scored[edit.positions, edit.layers, edit.host] += len(cells)
        if edit.generate and cells:
            # Cells share the text of an unedited prompt that they share.
            unedited = {cell.prompts[edit.host] for cell in cells}
            texts[edit.generate] += len(cells if edit.layers else unedited)
    return scored, texts


def _longest(plan: Plan) -> int:
    return max(len(prompt.ids) for prompt in plan.prompts)


def _row_bytes(plan: Plan, tree: ModuleTree) -> int:
    """One edited row: its copy of the KV cache (old and grown), and logits with their softmax."""
    length = _longest(plan) + max(plan.reference_tokens, plan.longest_text)
    return 2 * length * tree.kv_bytes + 2 * plan.window * tree.vocab_size * 4


def _cell_bytes(plan: Plan, tree: ModuleTree) -> int:
    """One recorded cell: KV rows of all its prompts, clean log-probabilities, residuals."""
    length = _longest(plan) + plan.reference_tokens
    caches = 3 * len(plan.roles) * length * tree.kv_bytes
    reference = 2 * plan.reference_tokens * tree.vocab_size * 4 if plan.edits else 0
    residuals = len(plan.layers) * (plan.tail + plan.reference_tokens) * tree.d_model * 4
    return caches + reference + residuals


def free_memory(device: str) -> int:
    """Bytes that are free now where a model on `device` works."""
    if device == "balanced":
        return min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
