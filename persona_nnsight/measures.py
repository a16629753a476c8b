"""The causal metric: KL divergence summed over a window of tokens (Xu 2026, §4)."""

from __future__ import annotations

import torch
from torch import Tensor


def window_kl(clean: Tensor, patched_logits: Tensor, n_tokens: Tensor) -> Tensor:
    """Σ over a window of KL(clean ‖ patched), in nats, over the full vocabulary.

    A sum over the tokens, not a mean; log-softmax in float32 whatever the model's dtype.

    Args:
        clean: float32 [rows, window, vocab], log-probabilities of the unedited run.
        patched_logits: [rows, window, vocab], logits of the edited run, any float dtype.
        n_tokens: int [rows], how many tokens of the window exist (fewer where the continuation
            ended early). Row by row, so that no second [rows, window, vocab] tensor is held.

    Returns:
        float32 [rows]; NaN for a row whose window is empty.
    """
    kl = torch.full((len(clean),), torch.nan, device=clean.device)
    for row, count in enumerate(n_tokens.tolist()):
        if count:
            expected = clean[row, :count]
            patched = torch.log_softmax(patched_logits[row, :count].float(), dim=-1)
            kl[row] = (expected.exp() * (expected - patched.to(expected.device))).sum()
    return kl
