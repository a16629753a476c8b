"""torch's default dtype, which another library may have set, changes no number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
from cells import MARKED
from tiny import TinyDir

from persona_nnsight import Model, Vectors, capture, inject, load_model, markers, steer, substitute
from persona_nnsight.method.edit_vectors import seeded_noise

SITES: dict[str, Any] = {"layers": (2,), "positions": "p_last,g1"}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measured(model: Model, vectors: Vectors) -> list[pd.DataFrame]:
    """Every kind of number."""
    return [
        capture(model, MARKED, **SITES).frame(),
        substitute(model, MARKED, **SITES, window=3, generate=2).frame(),
        inject(model, MARKED, layers=(2,), window=3).frame(),
        markers(model, MARKED, layers=(2,), tokens=2).frame(),
        steer(model, MARKED, layers=(2,), window=3, vectors=vectors, alpha="0,1.1").frame(),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_numbers_are_the_same(tiny_dir: TinyDir, dtype: torch.dtype, weights: str) -> None:
    def loaded() -> Model:
        return load_model(str(tiny_dir("qwen2")), dtype=weights)

    def run(model: Model) -> list[pd.DataFrame]:
        return measured(model, capture(model, MARKED, layers=(2,), positions="p_last").vectors())

    model = loaded()
    expected = run(model)
    with default_dtype(dtype):
        both = run(model), run(loaded())
    for found in both:
        for one, other in zip(found, expected, strict=True):
            pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_noise_is_drawn_in_float32() -> None:
    expected = seeded_noise(3, "p_last", 2, 32)
    for dtype in (torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            drawn = seeded_noise(3, "p_last", 2, 32)
        assert drawn.dtype == torch.float32
        assert drawn.equal(expected)
