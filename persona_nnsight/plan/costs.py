"""What a plan costs before it runs: tokens, passes, memory, and the batch sizes that fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from persona_nnsight.errors import PersonaError
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.plan import Edit, Plan, unique_prompts
from persona_nnsight.plan.prefix_tree import prefix_tree

if TYPE_CHECKING:
    from persona_nnsight.models.loading import Model
    from persona_nnsight.models.module_tree import ModuleTree

#: Of that, the share that the rows of one forward may take; cells that wait share the rest.
_ROWS_SHARE = 0.4
#: Beyond this many tokens in one forward the matrix products run no faster, so batches stop here.
_BATCH_TOKENS = {"cpu": 1024, "gpu": 16384}
#: Cells for whose decoding steps, one token each, the same holds.
_BATCH_CELLS = {"cpu": 128, "gpu": 1024}


@dataclass(frozen=True)
class Limits:
    """Batch sizes.

    Attributes:
        cells: recorded together.
        rows: in one forward.
        tokens: in one forward, of rows that feed several.
    """

    cells: int
    rows: int
    tokens: int = _BATCH_TOKENS["cpu"]

    def rows_of(self, tokens: int) -> int:
        """Rows in one forward that feeds so many tokens of each."""
        return max(1, min(self.rows, self.tokens // tokens))


@dataclass(frozen=True)
class Cost:
    """The size of a plan.

    Attributes:
        cells, unique_prompts, edits: how many of each.
        prompt_tokens: tokens of the unique prompts, each prompt once.
        token_forwards: tokens pushed through the model, prompts and continuations, shared text once
            and padding left out, and a token counted once however many layers are skipped.
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


def spans(total: int, most: int) -> Iterator[range]:
    """Cut `total` things into as few spans of at most `most` as there can be, about equal."""
    count = math.ceil(total / most)
    for number in range(count):
        yield range(number * total // count, (number + 1) * total // count)


def fit_limits(plan: Plan, tree: ModuleTree, *, budget: int, gpu: bool) -> Limits:
    """Batch sizes with which this plan takes at most `budget` bytes beside the weights.

    At least one cell and one row, whatever they take.
    """
    kind = "gpu" if gpu else "cpu"
    row = _row_bytes(plan, tree)
    # What a forward's tokens take is taken whatever the rows and cells; most is left to those.
    tokens = _BATCH_TOKENS[kind]
    while (
        tokens > _BATCH_TOKENS["cpu"]
        and 4 * working_bytes(plan, tree, Limits(1, 1, tokens)) > budget
    ):
        tokens //= 2
    rows = max(1, min(int(_ROWS_SHARE * budget) // row, _BATCH_TOKENS[kind]))
    limits = Limits(min(len(plan.cells), _BATCH_CELLS[kind]), rows, tokens)
    while limits.cells > 1 and working_bytes(plan, tree, limits) > budget:
        limits = replace(limits, cells=limits.cells - 1)
    left = budget - _chunk_bytes(plan, tree, limits)
    return replace(limits, rows=max(1, min(limits.rows, left // row)))


def check_budget(plan: Plan, tree: ModuleTree, budget: int) -> None:
    """Refuse a memory budget that not even one cell fits in.

    Raises:
        PersonaError: names what is needed.
    """
    needed = working_bytes(plan, tree, Limits(1, 1))
    if needed > budget:
        raise PersonaError(
            f"A memory budget of {budget / 1e6:.0f} MB is less than one cell of this run takes, "
            f"about {needed / 1e6:.0f} MB; use --memory-budget {math.ceil(needed / 1e8) / 10}GB or "
            "more."
        )


def working_bytes(plan: Plan, tree: ModuleTree, limits: Limits) -> int:
    """An estimate of the peak memory of a run beside the weights."""
    scored = [limits.rows_of(fed_tokens(plan, edit, tree)) for edit in plan.edits if edit.scored]
    texts = [limits.rows for edit in plan.edits if edit.generate]
    most = len(plan.cells) * max(1, len(plan.edits))
    rows = min(max([*scored, *texts], default=0), most)
    return _chunk_bytes(plan, tree, limits) + rows * _row_bytes(plan, tree)


def fed_tokens(plan: Plan, edit: Edit, tree: ModuleTree) -> int:
    """Tokens that are fed to score an edit: from the first that it touches to the window's end."""
    end = plan.tail - 1 + generated_index(edit.intervention.anchor) + plan.window
    first = edit.intervention.first
    if first == "p_user_last" or _longest(plan) >= tree.window:
        return end
    return end - (plan.tail - 1 + generated_index(first))


def estimate(plan: Plan, model: Model, limits: Limits) -> Cost:
    """Count what `plan` computes when it is cut into batches of `limits`."""
    tree = model.tree
    n_cells, n_roles = len(plan.cells), len(plan.roles)
    forced, decoded = plan.last_generated, plan.tail + plan.reference_tokens - 1
    hosts = {"XY", *(edit.host for edit in plan.edits if edit.scored)}
    tokens = passes = 0
    for chunk in spans(n_cells, limits.cells):
        cells = [plan.cells[cell] for cell in chunk]
        openings = prefix_tree(plan, cells, window=tree.window, most_tokens=limits.tokens)
        baselines = {cell.prompts[key] for cell in cells for key in plan.roles if key != "XY"}
        tokens += openings.n_tokens + len(baselines) * plan.tail
        tokens += len(cells) * (decoded + (n_roles - 1) * forced)
        passes += len(openings.batches) + plan.reference_tokens + 1 + bool(forced)
        scored, texts = _rows(plan, chunk)
        run_on = len(hosts) if scored else 1
        tokens += run_on * len(cells) * (plan.tail + plan.continued)
        passes += run_on
        for edit, rows in scored.items():
            fed = fed_tokens(plan, plan.edits[edit], tree)
            tokens += rows * fed
            passes += math.ceil(rows / limits.rows_of(fed))
        for length, rows in texts.items():
            tokens += rows * (plan.tail + length - 1)
            passes += math.ceil(rows / limits.rows) * length
    return Cost(
        cells=n_cells,
        unique_prompts=len(plan.prompts),
        edits=len(plan.edits),
        prompt_tokens=sum(len(prompt.ids) for prompt in plan.prompts),
        token_forwards=tokens,
        forward_passes=passes,
        weight_bytes=model.n_parameters * model.dtype.itemsize,
        working_bytes=working_bytes(plan, tree, limits),
    )


def _rows(plan: Plan, chunk: Sequence[int]) -> tuple[Counter[int], Counter[int]]:
    """Rows of a chunk of cells: scored ones by the first edit they share batches with, and texts
    by their length.
    """
    scored: Counter[int] = Counter()
    texts: Counter[int] = Counter()
    first: dict[Hashable, int] = {}
    for index, edit in enumerate(plan.edits):
        cells = [plan.cells[cell] for cell in chunk if edit.runs_on(cell)]
        if edit.scored and cells:
            scored[first.setdefault(edit.batch_key, index)] += len(cells)
        if edit.generate and cells:
            # Cells share the text of an unedited prompt that they share.
            unedited = {cell.prompts[edit.host] for cell in cells}
            texts[edit.generate] += len(unedited if edit.is_unedited else cells)
    return scored, texts


def _longest(plan: Plan) -> int:
    """Tokens of the longest row, prompt and what follows it."""
    prompt = max(len(prompt.ids) for prompt in plan.prompts)
    return prompt + max(plan.reference_tokens, plan.longest_text)


def _row_bytes(plan: Plan, tree: ModuleTree) -> int:
    """One edited row: its copy of the KV cache, its activations, its logits."""
    fed = plan.tail - 1 + plan.window
    activations = fed * (8 * tree.d_model + 3 * tree.d_mlp) * 4
    # Of a text, one token's logits, which `generate` copies.
    logits = 4 * tree.vocab_size * max(plan.window, 3)
    return int(_longest(plan) * tree.kv_bytes * 1.1) + activations + logits


def _chunk_bytes(plan: Plan, tree: ModuleTree, limits: Limits) -> int:
    """The cells that are recorded together: KV caches, residuals, what the clean runs predict."""
    chunks = [plan.cells[span.start : span.stop] for span in spans(len(plan.cells), limits.cells)]
    cells = max(map(len, chunks))
    prompts = max(len(unique_prompts(plan, chunk)) for chunk in chunks)
    hosts = {"XY", *(edit.host for edit in plan.edits if edit.scored)}
    # Every opening twice while they are brought together; later once, beside those of the
    # baselines that are followed further, or of the hosts.
    rows = prompts + max(prompts, cells * max(len(plan.roles) - 1, len(hosts)))
    fed = plan.tail + plan.reference_tokens
    # Read as they are and after the norm, and put in order.
    sites = 4 * len(plan.roles) * len(plan.positions) * len(plan.layers)
    residuals = cells * (sites + len(plan.layers) * fed) * tree.d_model * 4
    # Log-probabilities and their exponentials, and the logits they are made of.
    logits = 3 * cells * (plan.reference_tokens if plan.is_scored else 1) * tree.vocab_size * 4
    tokens = max(limits.tokens, cells * fed)
    activations = tokens * (8 * tree.d_model + 3 * tree.d_mlp) * 4
    return rows * _longest(plan) * tree.kv_bytes + residuals + logits + activations
