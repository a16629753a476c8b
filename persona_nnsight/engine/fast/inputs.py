"""Arguments of the model's forward, for rows that start from a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persona_nnsight.engine.fast.kv_cache import KVCache


def forward_inputs(kv: KVCache | None, ids: Tensor, seen: Tensor | None = None) -> dict[str, Any]:
    """Arguments of a forward over tokens that follow those in a KV cache.

    Args:
        kv: what stands before; its rows are those of `ids`. The forward appends to it.
        ids: token ids, int [rows, tokens].
        seen: 0 at padding, int [rows, tokens]; None where there is none.
    """
    mask = torch.ones_like(ids) if seen is None else seen
    if kv is not None:
        mask = torch.cat([kv.mask, mask], dim=1)
    # Padding is left out of the count.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions[:, -ids.shape[1] :],
        "past_key_values": None if kv is None else kv.cache,
        "use_cache": True,
    }
