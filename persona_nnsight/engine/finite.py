"""What to say when a value overflows or is not a number."""

from __future__ import annotations

import torch

from persona_nnsight.errors import PersonaError
from persona_nnsight.plan import CellPlan


def residual_of(key: str, cell: CellPlan) -> str:
    """How an error names the residuals of one prompt."""
    return f"The residual of the {key} prompt of cell {cell.persona}/{cell.task}"


def not_finite(what: str, layer: int, position: str, dtype: torch.dtype) -> PersonaError:
    """The error, with the dtype to use instead: bfloat16 has the range of float32."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        way_out = "check the weights, which overflow in every dtype"
    else:
        way_out = f"use --dtype {'float32' if dtype == torch.bfloat16 else 'bfloat16'}"
    return PersonaError(
        f"{what} is not finite at layer {layer}, position {position} in {name}; {way_out}."
    )
