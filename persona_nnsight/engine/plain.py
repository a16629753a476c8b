"""Plain forwards: whole rows of one length, nothing cached, nothing padded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def plain_inputs(lm: Any, ids: Tensor, kept: int) -> dict[str, Any]:
    """Arguments of a forward over whole rows.

    Args:
        lm: the model.
        ids: token ids, int [rows, tokens].
        kept: of how many tokens at the end logits are needed.
    """
    known = inspect.signature(type(lm._module).forward).parameters
    options = {"use_cache": False, "logits_to_keep": last_tokens(ids.shape[1], kept)}
    return {"input_ids": ids, **{name: options[name] for name in options if name in known}}


def last_tokens(fed: int, kept: int) -> Tensor:
    """For ``logits_to_keep``: the last `kept` of `fed` tokens.

    Given as numbers, not as a count: transformers then copies these tokens together before the
    output embedding, and that product runs six times as fast as on a slice of every row.
    """
    return torch.arange(fed - kept, fed)


def last_logits(lm: Any, kept: int) -> Tensor:
    """Within a traced forward: logits of the last `kept` tokens, [rows, kept, vocab].

    Models that know no ``logits_to_keep`` give those of all tokens.
    """
    logits: Tensor = lm.output.logits
    return logits[:, logits.shape[1] - kept :]


def forget(lm: Any) -> None:
    """Let a model forget what it keeps from one call to the next, besides its cache.

    Models that also see keep how far pictures have moved the positions (``rope_deltas``), of as
    many rows as the last call had.
    """
    for module in lm._module.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
