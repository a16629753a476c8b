"""Experiments in several threads: each has its own numbers, and none fails."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pandas as pd
from cells import MARKED
from tiny import Tiny

from persona_nnsight import Model, markers, substitute

ONE = MARKED.select(["yoda"], ["haiku"])
TOGETHER = 4


def numbers(model: Model, seed: int, **options: Any) -> pd.DataFrame:
    conditions = ["additive", "random"]
    asked: dict[str, Any] = {"layers": (2,), "positions": "p_last,g1", "conditions": conditions}
    return substitute(model, MARKED, **asked, window=3, seed=seed, **options).frame()


def test_each_thread_has_its_own_numbers(tiny: Tiny) -> None:
    models = [tiny("llama"), tiny("qwen2")]
    ready = Barrier(TOGETHER)

    def one(seed: int) -> pd.DataFrame:
        ready.wait()
        return numbers(models[seed % 2], seed)

    with ThreadPoolExecutor(TOGETHER) as pool:
        found = list(pool.map(one, range(TOGETHER)))
    for seed, table in enumerate(found):
        assert table.equals(numbers(models[seed % 2], seed))


def test_a_callback_may_run_another(tiny: Tiny) -> None:
    model = tiny("llama")
    within: list[pd.DataFrame] = []

    def progress(done: int, _: int) -> None:
        if not within:
            within.append(markers(model, ONE, layers=(2,), tokens=2).frame())

    table = numbers(model, 0, progress=progress)
    assert table.equals(numbers(model, 0))
    assert within[0].equals(markers(model, ONE, layers=(2,), tokens=2).frame())
