"""How far apart two ways of computing the same number may be: the rule, said once.

The kernels of two processors, or one kernel with batches of two shapes, add up the same products
in other orders. A sum of n terms then differs by about √n roundings of the largest of them; with
the factor λ below, more than λ·√n of them come with a probability of 2·exp(-λ²/2) (Higham and
Mary, SIAM J. Sci. Comput. 41, 2019, A2815). So two numbers are the same where

    |found - expected| <= λ · eps(dtype) · √terms · size

`size` is the largest number on the way, not the one that comes out: a KL of 1e-6 is a sum of
products with log-probabilities of the order of 10.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from tiny import N_LAYERS
from torch import Tensor

_LAMBDA = 4

#: Products that follow each other on the longest way through a tiny model: queries and keys (32),
#: scores (8), a prompt's values (100), output (32), MLP in (32) and out (64); at last, logits.
TINY_TERMS = N_LAYERS * (32 + 8 + 100 + 32 + 32 + 64) + 32

#: Tokens of a window: a KL adds up so many.
_WINDOW = 10

#: Logits and residuals of tiny models are of this order.
TINY_SIZE = 10.0

#: nats; what the project promises of a real model in float32, beside one plain forward per number.
PROMISED_KL = 1e-4


def tolerance(
    dtype: torch.dtype = torch.float32, *, terms: int = TINY_TERMS, size: float = TINY_SIZE
) -> float:
    """The largest difference that is rounding."""
    return _LAMBDA * torch.finfo(dtype).eps * math.sqrt(terms) * size


#: Of a KL of a tiny model, in nats: 6e-4 in float32, 1e-12 in float64.
KL32, KL64 = (
    tolerance(dtype, terms=_WINDOW * TINY_TERMS) for dtype in (torch.float32, torch.float64)
)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Activations of a tiny model, by the dtype of what is found."""
    size = float(expected.abs().nan_to_num().max())
    torch.testing.assert_close(
        *(found, expected.to(found.dtype)),
        rtol=0,
        atol=tolerance(found.dtype, size=size),
        equal_nan=True,
    )


def assert_same_table(
    found: pd.DataFrame, expected: pd.DataFrame, close: float, **options: Any
) -> None:
    """Floating-point numbers within a tolerance, as `KL32`; the rest equal."""
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=close, **options)
