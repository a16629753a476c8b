"""The causal metric: KL divergence summed over a window of tokens (docs/method.md §4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Numbers that are worked on at a time: few on a CPU, where they stay in its cache.
_BLOCK = {"cpu": 1 << 19, "other": 1 << 26}


def window_kl(
    clean: Tensor,
    clean_probs: Tensor,
    patched_logits: Tensor,
    cells: Sequence[int],
    n_tokens: Tensor,
) -> Tensor:
    """Σ over a window of KL(clean ‖ patched), in nats, over the full vocabulary.

    A sum over the tokens, not a mean; log-softmax in float32 whatever the model's dtype.

    Args:
        clean: float32 [cells, window, vocab], log-probabilities of the unedited runs.
        clean_probs: their exponentials.
        patched_logits: [rows, window, vocab], logits of the edited runs, any float dtype.
        cells: for every row, the unedited run that it is compared with.
        n_tokens: int [rows], how many tokens of the window exist (fewer where the continuation
            ended early).

    Returns:
        float32 [rows]; NaN for a row whose window is empty.
    """
    rows, window, vocab = patched_logits.shape
    kind = "cpu" if patched_logits.device.type == "cpu" else "other"
    size = max(1, _BLOCK[kind] // (window * vocab))
    by_token = []
    for start in range(0, rows, size):
        own = list(cells[start : start + size])
        # One row is looked at where it is, more are copied together.
        index = slice(own[0], own[0] + 1) if len(own) == 1 else own
        logprobs, probs = (t[index].to(patched_logits.device) for t in (clean, clean_probs))
        patched = patched_logits[start : start + size].float().log_softmax(-1)
        by_token.append(-torch.linalg.vecdot(probs, patched.sub_(logprobs)))
    kl = torch.cat(by_token)
    counts = n_tokens.to(kl.device)[:, None]
    exists = torch.arange(window, device=kl.device) < counts
    return torch.where(exists, kl, 0).sum(-1).masked_fill(counts[:, 0] == 0, torch.nan)
