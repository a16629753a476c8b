"""Tiny models in float64 throughout, where rounding is far below what any error would do.

In float32 the order in which a processor's kernels add up products shows in the fifth digit of a
KL, and two logits that are nearly equal may change places. In float64 neither happens, so that
numbers can be compared to ten digits, and greedy tokens one by one, on any processor. It is no
`--dtype`: transformers computes norms, softmax and rotary embeddings of every model in float32,
and so does the engine with residuals and KLs; here whatever asks for float32 gets float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from persona_nnsight import Model

_to: Callable[..., Tensor] = Tensor.to
_softmax: Callable[..., Tensor] = nn.functional.softmax
_randn: Callable[..., Tensor] = torch.randn
_tensor: Callable[..., Tensor] = torch.tensor


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _to_wide(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    return _to(tensor, *map(_wide, args), **{k: _wide(v) for k, v in options.items()})


def _softmax_wide(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
    return _softmax(*args, dtype=_wide(dtype), **options)


def _randn_wide(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
    return _randn(*args, dtype=_wide(dtype), **options)


def _tensor_wide(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
    return _tensor(*args, dtype=_wide(dtype), **options)


@contextmanager
def in_float64() -> Iterator[None]:
    """What asks for float32, or for no dtype, gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            patch.object(Tensor, "float", Tensor.double),
            patch.object(Tensor, "to", _to_wide),
            patch.object(nn.functional, "softmax", _softmax_wide),
            patch.object(torch, "randn", _randn_wide),
            patch.object(torch, "tensor", _tensor_wide),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def doubled(model: Model) -> Model:
    """A model that was loaded outside of `in_float64`, to be run inside."""
    assert torch.get_default_dtype() == torch.float32
    model.lm._module.double()
    return replace(model, dtype=torch.float64)
