"""The published procedure: one sequence and one full forward per number, with plain hooks.

Where the paper leaves room this takes the cheaper way, so that the comparison is conservative:
greedy tokens come from `generate` with its KV cache, one forward reads a residual at all layers,
and only the forwards are timed, not what is done with their outputs. For each cell:

=================  ==========================================================================
continuation       one generation from XY: a full forward, and a step for each further token
capture            BB, XB, BY and XY over prompt and continuation, for each position
a scored edit      XY clean and the host patched: two full forwards
a text             one generation with the hooks active: a full forward, and steps
=================  ==========================================================================

What a whole grid would take is the mean time of each kind of forward, as timed on a subset, times
how many of them the grid needs, which `planned` counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from edits import written_sites
from reference import Edits, Reference, generated_index, kl, vector
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.floor import window_tokens
from benchmarks.lengths import Lengths
from benchmarks.measure import synchronize
from benchmarks.work import Work
from persona_nnsight.plan.plan import Edit, Plan

#: The prompts whose residuals are captured.
ROLES = ("BB", "XB", "BY", "XY")

#: Kinds of forward: of these all but `STEP` run a whole sequence.
PREFILL, STEP, CAPTURE, SCORE = "prefill", "step", "capture", "score"
KINDS = (PREFILL, STEP, CAPTURE, SCORE)

#: What the hook reference calls the vectors that are written into a host.
_VECTORS = {"oracle": "clean", "cached": "additive"}


@dataclass(frozen=True)
class Count:
    """Forwards of one kind, their tokens, the rows of logits among them, and their time."""

    forwards: int = 0
    tokens: int = 0
    head_rows: int = 0
    seconds: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.forwards + other.forwards,
            self.tokens + other.tokens,
            self.head_rows + other.head_rows,
            self.seconds + other.seconds,
        )


Counts = dict[str, Count]


def full_forwards(counts: Counts) -> int:
    """Forwards over a whole sequence."""
    return sum(counts[kind].forwards for kind in KINDS if kind != STEP)


def work_of(counts: Counts, n_layers: int) -> Work:
    total = sum(counts.values(), Count())
    return Work(total.tokens * n_layers, total.head_rows)


def needs_continuation(plan: Plan) -> bool:
    """Whether XY's continuation is part of the protocol; for texts alone it is not."""
    return not plan.edits or any(edit.scored for edit in plan.edits)


def planned(plan: Plan, lengths: Lengths, cells: Iterable[int], edits: Iterable[int]) -> Counts:
    """Count the forwards of the procedure, without running any.

    Args:
        plan: what is asked for.
        lengths: of its continuations and texts.
        cells: numbers of cells in the plan.
        edits: numbers of edits; captures and continuations are counted whatever these are.
    """
    counts = dict.fromkeys(KINDS, Count())
    edits = tuple(edits)

    def add(kind: str, forwards: int, tokens: int, *, all_rows: bool = True) -> None:
        counts[kind] += Count(forwards, tokens, tokens if all_rows else forwards)

    def add_generation(prompt: int, length: int) -> None:
        add(PREFILL, 1, prompt, all_rows=False)
        add(STEP, length - 1, length - 1)

    for cell in cells:
        sizes = {key: len(plan.prompts[i].ids) for key, i in plan.cells[cell].prompts.items()}
        length = 0
        if needs_continuation(plan):
            length = lengths.continuations[cell]
            add_generation(sizes["XY"], length)
        positions = sum(generated_index(position) <= length for position in plan.positions)
        add(CAPTURE, 4 * positions, positions * sum(sizes[key] + length for key in ROLES))
        for number in edits:
            edit = plan.edits[number]
            if not edit.runs_on(cell):
                continue
            if window_tokens(plan, edit, length):
                add(SCORE, 2, sizes["XY"] + sizes[edit.host] + 2 * length)
            if edit.generate:
                add_generation(sizes[edit.host], lengths.texts[cell, number])
    return counts


def scaled_seconds(timed: Counts, whole: Counts) -> float:
    """Time of the `whole`: the mean time of each kind in `timed`, times the number of them.

    Raises:
        ValueError: a kind that was never timed.
    """
    seconds = 0.0
    for kind, count in whole.items():
        if count.forwards:
            if not timed[kind].forwards:
                raise ValueError(f"no {kind} forward was timed, and {count.forwards} are needed")
            seconds += timed[kind].seconds / timed[kind].forwards * count.forwards
    return seconds


@dataclass(frozen=True)
class CellNumbers:
    """What the procedure finds in one cell.

    Attributes:
        continuation: XY's greedy tokens; none where the protocol has no use for them.
        residuals: by prompt, float32 [positions, layers, d_model]; a position that the
            continuation does not reach is left out.
        kls: by edit; NaN where there is no window.
        texts: tokens by edit.
    """

    continuation: tuple[int, ...]
    residuals: dict[str, Tensor]
    kls: dict[int, float]
    texts: dict[int, tuple[int, ...]]


class Procedure(Reference):
    """The hook reference, with its forwards counted and timed in `counts`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: Collection[int]
    ) -> None:
        super().__init__(model, tokenizer, eos)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.counts: Counts = dict.fromkeys(KINDS, Count())

    @contextmanager
    def _timed(self, kind: str, tokens: int) -> Iterator[None]:
        synchronize(self.model.device)
        start = time.perf_counter()
        yield
        synchronize(self.model.device)
        self.counts[kind] += Count(1, tokens, tokens, time.perf_counter() - start)

    def generate(self, ids: Sequence[int], n: int, edits: Edits | None = None) -> list[int]:
        """As `greedy`, with a KV cache; edits are written in the prompt's forward."""
        prompt = torch.tensor([list(ids)], device=self.model.device)
        ends: list[float] = []

        def ended(*_: object) -> None:
            if not ends:
                synchronize(self.model.device)
            ends.append(time.perf_counter())

        handle = cast(nn.Module, self.model).register_forward_hook(ended)
        start = time.perf_counter()
        with torch.no_grad(), self._editing(edits):
            output = cast(Any, self.model).generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=sorted(self.eos) or None,
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )
        new = [int(token) for token in output[0, len(ids) :]]
        end = time.perf_counter()
        handle.remove()
        steps = len(ends) - 1
        self.counts[PREFILL] += Count(1, len(ids), 1, ends[0] - start)
        self.counts[STEP] += Count(steps, steps, steps, end - ends[0])
        return new

    def residuals(self, ids: Sequence[int], layers: Sequence[int], position: int) -> Tensor:
        """The inputs of several decoder layers at one position, float32 [layers, d_model]."""
        seen: dict[int, Tensor] = {}

        def keeper(layer: int) -> Any:
            def keep(hidden: Tensor) -> None:
                seen[layer] = hidden[0, position].detach().float().clone()

            return keep

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(self._pre_hook(layer, keeper(layer)))
            with self._timed(CAPTURE, len(ids)):
                self._logits(ids)
        return torch.stack([seen[layer] for layer in layers])

    def logprobs(
        self, ids: Sequence[int], start: int, n: int, edits: Edits | None = None
    ) -> Tensor:
        """See `Reference.logprobs`."""
        with self._timed(SCORE, len(ids)):
            logits = self._logits(ids, edits)
        return logits[start - 1 : start - 1 + n].log_softmax(-1)

    def run_cell(
        self, plan: Plan, cell: int, edits: Iterable[int], continuation: Sequence[int]
    ) -> CellNumbers:
        """Everything that the protocol asks of one cell.

        Args:
            plan: what is asked for.
            cell: its number in the plan.
            edits: numbers of the edits to do.
            continuation: what everything is teacher-forced on. The procedure's own greedy tokens
                are found too, and handed back; in low precision a tie may make them others, and
                the numbers would not be comparable.
        """
        prompts = {key: plan.prompts[i].text for key, i in plan.cells[cell].prompts.items()}
        own: list[int] = []
        forced: Sequence[int] = ()
        if needs_continuation(plan):
            own = self.generate(self.ids(prompts["XY"]), plan.reference_tokens)
            forced = continuation
        reached = [name for name in plan.positions if generated_index(name) <= len(forced)]
        h = {
            key: torch.stack(
                [
                    self.residuals(
                        [*self.ids(prompts[key]), *forced],
                        plan.layers,
                        self.positions(prompts[key], position, forced),
                    )
                    for position in reached
                ]
            )
            for key in ROLES
        }
        at = {
            (position, layer): {key: value[p, j] for key, value in h.items()}
            for p, position in enumerate(reached)
            for j, layer in enumerate(plan.layers)
        }
        kls: dict[int, float] = {}
        texts: dict[int, tuple[int, ...]] = {}
        for number in edits:
            edit = plan.edits[number]
            if edit.scored:
                kls[number] = self._kl(plan, edit, prompts, at, forced)
            if edit.generate:
                writes = self._writes(edit, prompts, at, forced)
                host = self.ids(prompts[edit.host])
                texts[number] = tuple(self.generate(host, edit.generate, writes))
        return CellNumbers(tuple(own), h, kls, texts)

    def _writes(
        self,
        edit: Edit,
        prompts: Mapping[str, str],
        at: Mapping[tuple[str, int], Mapping[str, Tensor]],
        forced: Sequence[int],
    ) -> Edits:
        name = _VECTORS.get(edit.name, edit.name)
        writes: dict[int, dict[int, Tensor]] = {}
        for _, position, layer in written_sites(edit):
            token = self.positions(prompts[edit.host], position, forced)
            writes.setdefault(layer, {})[token] = vector(name, at[position, layer])
        return writes

    def _kl(
        self,
        plan: Plan,
        edit: Edit,
        prompts: Mapping[str, str],
        at: Mapping[tuple[str, int], Mapping[str, Tensor]],
        forced: Sequence[int],
    ) -> float:
        n = window_tokens(plan, edit, len(forced))
        if not n:
            return math.nan
        k = generated_index(edit.intervention.anchor)
        target, host = self.ids(prompts["XY"]), self.ids(prompts[edit.host])
        clean = self.logprobs([*target, *forced], len(target) + k, n)
        writes = self._writes(edit, prompts, at, forced)
        return kl(clean, self.logprobs([*host, *forced], len(host) + k, n, writes))
