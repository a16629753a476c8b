"""Logits in float32 from a model in fewer bits.

A logit of 20 is rounded to a sixteenth in bfloat16, in the edited run and in the clean one. This
alone costs a thousandth of a nat at every token, as much as many edits do. So the last product, of
the normed residual with the output embedding, is made in float32 wherever a KL is taken: both
factors are as the model has them, and only their product is no longer rounded. Tokens are decoded
from the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from persona_nnsight.models.module_tree import has_few_bits

#: Rows of the output embedding that are in float32 at a time.
_BLOCK = 1 << 14
#: From this version on CUDA's products can be of more bits than their factors.
_WIDE_PRODUCTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


@contextmanager
def wide_logits(lm: Any) -> Iterator[None]:
    """Have a model in fewer bits than float32 compute its logits in float32 meanwhile.

    A model in float32 is left as it is, and so is one whose weights are elsewhere.
    """
    head = lm._module.get_output_embeddings()
    if (
        not isinstance(head, nn.Linear)
        or head.weight.is_meta
        or not has_few_bits(head.weight.dtype)
    ):
        yield
        return
    own: Any = head
    before = vars(head).get("forward")  # nnsight puts one there
    own.forward = lambda hidden: _product(head, hidden)
    try:
        yield
    finally:
        del own.forward
        if before is not None:
            own.forward = before


def _product(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The product of [..., d_model] with the output embedding: float32 [..., vocab]."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    if rows.is_cuda and _WIDE_PRODUCTS:
        wide = torch.mm(rows, head.weight.T, out_dtype=torch.float32)
    else:
        blocks = torch.split(head.weight, _BLOCK)
        wide = torch.cat([rows.float() @ block.float().T for block in blocks], dim=1)
    if head.bias is not None:
        wide = wide + head.bias.float()
    return wide.reshape(*hidden.shape[:-1], wide.shape[-1])
