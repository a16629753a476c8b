"""What a plan costs before it runs: tokens, passes, memory, and the batch sizes that fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from persona_nnsight.errors import PersonaError
from persona_nnsight.method.sites import generated_index
from persona_nnsight.plan.plan import Edit, Plan, unique_prompts
from persona_nnsight.plan.prefix_tree import prefix_tree
from persona_nnsight.plan.run_path import NOT_MEASURED, RunPath

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
    """Batch sizes, and the path that rows take.

    Attributes:
        cells: recorded together.
        rows: in one forward.
        tokens: in one forward, of rows that feed several.
        path: through the engine.
    """

    cells: int
    rows: int
    tokens: int = _BATCH_TOKENS["cpu"]
    path: RunPath = NOT_MEASURED

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Limits:
        """The limits that `asdict` was given, also after a passage through JSON.

        Raises:
            TypeError, ValueError: other data.
        """
        sizes = {name: int(data[name]) for name in ("cells", "rows", "tokens")}
        return cls(**sizes, path=RunPath(**data["path"]))

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


def fit_limits(
    plan: Plan, tree: ModuleTree, *, budget: int, gpu: bool, path: RunPath = NOT_MEASURED
) -> Limits:
    """Batch sizes with which this plan takes at most `budget` bytes beside the weights.

    At least one cell and one row, whatever they take.
    """
    kind = "gpu" if gpu else "cpu"
    row = _row_bytes(plan, tree, path)
    # What a forward's tokens take is taken whatever the rows and cells; most is left to those.
    tokens = _BATCH_TOKENS[kind]
    while (
        tokens > _BATCH_TOKENS["cpu"]
        and 4 * working_bytes(plan, tree, Limits(1, 1, tokens, path)) > budget
    ):
        tokens //= 2
    rows = max(1, min(int(_ROWS_SHARE * budget) // row, _BATCH_TOKENS[kind]))
    limits = Limits(min(len(plan.cells), _BATCH_CELLS[kind]), rows, tokens, path)
    while limits.cells > 1 and working_bytes(plan, tree, limits) > budget:
        limits = replace(limits, cells=limits.cells - 1)
    left = budget - _chunk_bytes(plan, tree, limits)
    return replace(limits, rows=max(1, min(limits.rows, left // row)))


def check_budget(plan: Plan, tree: ModuleTree, budget: int, path: RunPath) -> None:
    """Refuse a memory budget that not even one cell fits in.

    Raises:
        PersonaError: names what is needed.
    """
    needed = working_bytes(plan, tree, Limits(1, 1, path=path))
    if needed > budget:
        raise PersonaError(
            f"A memory budget of {budget / 1e6:.0f} MB is less than one cell of this run takes, "
            f"about {needed / 1e6:.0f} MB; use --memory-budget {math.ceil(needed / 1e8) / 10}GB or "
            "more."
        )


def working_bytes(plan: Plan, tree: ModuleTree, limits: Limits) -> int:
    """An estimate of the peak memory of a run beside the weights."""
    scored = [
        limits.rows_of(_fed(plan, edit, tree, limits.path)) for edit in plan.edits if edit.scored
    ]
    texts = [limits.rows for edit in plan.edits if edit.generate]
    most = len(plan.cells) * max(1, len(plan.edits))
    rows = min(max([*scored, *texts], default=0), most)
    return _chunk_bytes(plan, tree, limits) + rows * _row_bytes(plan, tree, limits.path)


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
    n_cells = len(plan.cells)
    count = _whole_steps if limits.path.is_whole else _fast_steps
    steps = [count(plan, tree, limits, chunk) for chunk in spans(n_cells, limits.cells)]
    tokens, passes = (sum(each) for each in zip(*steps, strict=True))
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


def _fast_steps(
    plan: Plan, tree: ModuleTree, limits: Limits, chunk: Sequence[int]
) -> tuple[int, int]:
    """Tokens and forwards of a chunk of cells on the fast path."""
    forced, decoded = plan.last_generated, plan.tail + plan.reference_tokens - 1
    hosts = {"XY", *(edit.host for edit in plan.edits if edit.scored)}
    cells = [plan.cells[cell] for cell in chunk]
    openings = prefix_tree(plan, cells, window=tree.window, most_tokens=limits.tokens)
    baselines = {cell.prompts[key] for cell in cells for key in plan.roles if key != "XY"}
    tokens = openings.n_tokens + len(baselines) * plan.tail
    tokens += len(cells) * (decoded + (len(plan.roles) - 1) * forced)
    passes = len(openings.batches) + plan.reference_tokens + 1 + bool(forced)
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
    return tokens, passes


def _whole_steps(
    plan: Plan, tree: ModuleTree, limits: Limits, chunk: Sequence[int]
) -> tuple[int, int]:
    """The same on the whole-row path, with continuations that do not end early."""
    tokens = passes = 0
    n_followed, path = plan.reference_tokens, limits.path

    def forwards(prompts: Iterable[int], followed: int) -> None:
        nonlocal tokens, passes
        lengths = Counter(len(plan.prompts[prompt].ids) + followed for prompt in prompts)
        for length, rows in lengths.items():
            tokens += rows * length
            passes += math.ceil(rows / limits.rows_of(length))

    def decoding(prompts: Iterable[int], n_tokens: int) -> None:
        nonlocal tokens, passes
        for length, rows in Counter(len(plan.prompts[prompt].ids) for prompt in prompts).items():
            fed = [length, *([1] * (n_tokens - 1))]
            if not path.keeps_cache:
                fed = [length + step for step in range(n_tokens)]
            tokens += rows * sum(fed)
            passes += math.ceil(rows / limits.rows_of(length)) * n_tokens

    cells = [plan.cells[cell] for cell in chunk]
    xy = [cell.prompts["XY"] for cell in cells]
    decoding(xy, n_followed)
    forwards(xy, n_followed)
    others = [cell.prompts[key] for cell in cells for key in plan.roles if key != "XY"]
    if plan.last_generated or not path.causal:
        forwards(others, n_followed)
    else:
        forwards(set(others), 0)
    for edit in plan.edits:
        own = [plan.cells[cell].prompts[edit.host] for cell in chunk if edit.runs_on(cell)]
        if edit.scored:
            forwards(own, n_followed)
        if edit.generate:
            decoding(set(own) if edit.is_unedited else own, edit.generate)
    return tokens, passes


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


def _fed(plan: Plan, edit: Edit, tree: ModuleTree, path: RunPath) -> int:
    """Tokens that are fed to score an edit, at most."""
    return _longest(plan) if path.is_whole else fed_tokens(plan, edit, tree)


def _row_bytes(plan: Plan, tree: ModuleTree, path: RunPath) -> int:
    """One edited row: its copy of the KV cache, its activations, its logits."""
    fed = _longest(plan) if path.is_whole else plan.tail - 1 + plan.window
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
