"""Memory: batches that fit a budget, and runs that go on when it does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from benchmarks.measure import measure
from benchmarks.random_models import SPECIAL, random_model, texts_of
from cells import TINY_GRID
from commands import Persona
from rounding import KL64
from studies import study_of
from tiny import Tiny
from transformers import LlamaConfig

from persona_nnsight import Grid, PersonaError
from persona_nnsight.backends.local import LocalBackend
from persona_nnsight.engine.fast.runs import FastRuns
from persona_nnsight.engine.memory import in_batches
from persona_nnsight.engine.whole.runs import WholeRuns
from persona_nnsight.experiments.execution import execute
from persona_nnsight.experiments.substitute import Substitute, substitute
from persona_nnsight.plan.costs import Limits, fit_limits, working_bytes

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("MPS backend out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_is_halved(error: Exception) -> None:
    seen: list[int] = []

    def work(batch: Sequence[int]) -> int:
        seen.append(len(batch))
        if len(batch) > 3:
            raise error
        return sum(batch)

    done = list(in_batches(range(20), 16, work))
    assert [item for batch, _ in done for item in batch] == list(range(20))
    assert sum(result for _, result in done) == sum(range(20))
    assert seen[:2] == [10, 5]
    assert max(seen[2:]) <= 3


def test_batches_are_about_equal() -> None:
    assert [len(batch) for batch, _ in in_batches(range(100), 48, len)] == [33, 33, 34]


def test_a_single_row_that_does_not_fit() -> None:
    def work(batch: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(PersonaError, match=r"with a single row \(CUDA out of memory\.\)"):
        list(in_batches(range(4), 4, work))


def test_other_errors_are_not_taken_for_it() -> None:
    def work(batch: Sequence[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_batches(range(4), 4, work))


@pytest.mark.parametrize("path", ["fast", "whole"])
@pytest.mark.parametrize("step", ["make", "score", "write"])
def test_a_run_goes_on_in_halves(
    tiny64: Tiny, step: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Prompts of one length, so that rows share batches on both paths.
    grid = Grid.from_dict(
        {
            "name": "even",
            "baseline": {"persona": "someone", "task": "do it well."},
            "personas": {"a": "Old Poe", "b": "Old Kim", "c": "Old Lee"},
            "tasks": {"x": "sing a song", "y": "cook a soup"},
        }
    )
    model = replace(tiny64("llama"), path=path)
    options: dict[str, Any] = {"layers": (2,), "positions": "p_last,g1", "generate": 4}
    whole = substitute(model, grid, **options)
    kind: Any = {"fast": FastRuns, "whole": WholeRuns}[path]
    name = "__init__" if step == "make" else step
    real, failed = getattr(kind, name), []

    def scarce(runs: Any, batch: Any, *rest: Any) -> Any:
        rows = len(batch.cells) if step == "make" else len(batch)
        if rows > 2:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(runs, batch, *rest)

    monkeypatch.setattr(kind, name, scarce)
    halved = substitute(model, grid, **options)
    assert failed
    assert halved.texts == whole.texts
    assert halved.continuations == whole.continuations
    assert halved.frame()["kl"].tolist() == pytest.approx(whole.frame()["kl"].tolist(), abs=KL64)


@pytest.mark.parametrize("gpu", [False, True])
def test_limits_shrink_with_the_budget(tiny: Tiny, gpu: bool) -> None:
    model = tiny("llama")
    plan = Substitute(layers="all").plan(model, TINY_GRID)
    least = working_bytes(plan, model.tree, Limits(1, 1, 1024))
    before: Limits | None = None
    for share in (64, 8, 2, 1):
        limits = fit_limits(plan, model.tree, budget=least * share, gpu=gpu)
        assert working_bytes(plan, model.tree, limits) <= least * share
        if before is not None:
            assert limits.cells <= before.cells
            assert limits.rows <= before.rows
            assert limits.tokens <= before.tokens
        before = limits
    assert before is not None
    assert (before.cells, before.rows) == (1, 1)


def test_a_small_budget_on_a_gpu_leaves_room_for_rows(tiny: Tiny) -> None:
    """A GPU's large forwards are made smaller first."""
    model = tiny("llama")
    plan = Substitute(layers="all").plan(model, TINY_GRID)
    budget = 4 * working_bytes(plan, model.tree, Limits(1, 1, 1024))
    assert working_bytes(plan, model.tree, Limits(1, 1, 16384)) > budget
    limits = fit_limits(plan, model.tree, budget=budget, gpu=True)
    assert limits.tokens < 16384
    assert limits.rows > 1
    assert limits.cells > 1


BUDGETS = (120_000_000, 400_000_000)


def cells_and_peaks() -> list[tuple[int, int]]:
    """By budget: how many cells are recorded together, and bytes at the peak of the run."""
    # As with real models, most of it goes to logits and KV caches.
    config = LlamaConfig(
        vocab_size=60_000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        **SPECIAL,
    )
    grid = Grid.load("long").select(["engineer", "chef"])
    model = random_model("wide", config, texts_of([grid]), device="cpu")
    plan = Substitute(layers="all", positions="p_last", conditions="additive").plan(model, grid)
    execute(model, study_of(grid, plan))  # what is only allocated once
    found = []
    for budget in BUDGETS:
        backend = LocalBackend(model, memory_budget=budget)
        run = partial(execute, model, study_of(grid, plan), backend=backend)
        _, measured = measure(model, run)
        found.append((backend.limits(plan).cells, measured.peak_bytes))
    return found


def test_a_budget_is_kept() -> None:
    """In a process of its own: what a long one has let go of in pieces is no room for a run."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as there:
        found = there.submit(cells_and_peaks).result()
    for budget, (_, peak) in zip(BUDGETS, found, strict=True):
        assert peak < 1.1 * budget
    assert found[0][0] < found[1][0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory-budget", "much"], "'much' is not a size; use a number with MB or GB"),
        (["--memory-budget", "0GB"], "'0GB' is not a size"),
        (["--memory-budget", "1MB"], "less than one cell of this run takes"),
        (["--memory-budget", "1GB", "--backend", "simulate"], "is for --backend local"),
    ],
)
def test_bad_budgets(
    persona: Persona, tiny_dir: Callable[..., Any], arguments: list[str], said: str
) -> None:
    found = persona(
        "substitute", "-m", tiny_dir("llama"), "-g", "grid.yaml", "--layers", "2", *arguments
    )
    assert (found.code, found.out) == (2, "")
    assert said in " ".join(found.err.split())
