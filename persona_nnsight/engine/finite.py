"""Values that overflow or are not numbers: where they come from, and what to say."""

from __future__ import annotations

import nnsight
import torch
from torch import Tensor

from persona_nnsight.engine.chunk import Chunk
from persona_nnsight.engine.plain import plain_inputs
from persona_nnsight.errors import PersonaError


def not_finite(what: str, where: str, dtype: torch.dtype) -> PersonaError:
    """The error, with the dtype to use instead: bfloat16 has the range of float32."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        way_out = "check the weights, which overflow in every dtype"
    else:
        way_out = f"use --dtype {'float32' if dtype == torch.bfloat16 else 'bfloat16'}"
    return PersonaError(f"{what} is not finite {where} in {name}; {way_out}.")


def residual_not_finite(
    chunk: Chunk, key: str, cell: int, layer: int, position: str
) -> PersonaError:
    """The error for a residual of one prompt of the chunk's `cell`."""
    what = f"The residual of the {key} prompt of cell {_name(chunk, cell)}"
    return not_finite(what, f"at layer {layer}, position {position}", chunk.dtype)


def overflowed(logits: Tensor) -> Tensor:
    """Whether a row holds NaN or +inf (-inf is how models forbid a token), bool [rows]."""
    return (~(logits < torch.inf)).any(-1)


def output_not_finite(chunk: Chunk, key: str, cell: int, continuation: Tensor) -> PersonaError:
    """The error for logits of an unedited run: finds the residual they overflowed in.

    Args:
        chunk: the chunk.
        key: the prompt.
        cell: the cell within the chunk.
        continuation: the tokens that follow the prompt, int [n].
    """
    lm, layers = chunk.lm, chunk.layers
    prompt = chunk.plan.prompts[chunk.cells[cell].prompts[key]].ids
    ids = torch.tensor([[*prompt, *continuation[:-1].tolist()]], device=chunk.device)
    with lm.trace(**plain_inputs(lm, ids, kept=0)):
        finite = nnsight.save([])
        for envoy in layers:
            finite.append(envoy.input[0].isfinite().all(-1))
    for layer, row in enumerate(finite):
        if not row.all():
            k = int((~row).int().argmax()) - len(prompt) + 1
            position = f"g{k}" if k > 0 else "p_last" if k == 0 else "before p_last"
            return residual_not_finite(chunk, key, cell, layer, position)
    what = f"The output of the {key} prompt of cell {_name(chunk, cell)}"
    return not_finite(what, f"after layer {len(finite) - 1}", chunk.dtype)


def geometry_not_finite(
    chunk: Chunk, name: str, cell: int, layer: int, position: str
) -> PersonaError:
    """The error for a measure that overflowed although the residuals did not."""
    what = f"The geometry {name!r} of cell {_name(chunk, cell)}"
    return not_finite(what, f"at layer {layer}, position {position}", chunk.dtype)


def edited_not_finite(chunk: Chunk, cell: int, edit: int, continuation: Tensor) -> PersonaError:
    """The error for logits of the run of an edit on the chunk's `cell`.

    Where nothing is edited it is an unedited run of the host, on `continuation`, int [n].
    """
    chosen = chunk.plan.edits[edit]
    if chosen.is_unedited:
        return output_not_finite(chunk, chosen.host, cell, continuation)
    what = f"The output of cell {_name(chunk, cell)} under {chosen.name!r}"
    where = "after the edit at layer {layers}, position {position}".format_map(chosen.columns)
    return not_finite(what, where, chunk.dtype)


def _name(chunk: Chunk, cell: int) -> str:
    return f"{chunk.cells[cell].persona}/{chunk.cells[cell].task}"
