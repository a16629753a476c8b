"""Which vector is written at a site.

Every condition is a formula over the four residuals of a cell at one site, in float32:
Δ_X = h_XB - h_BB, Δ_Y = h_BY - h_BB, Δ_XY = h_XY - h_BB (docs/method.md §3, §5). Besides
the paper's additive vector there are controls, because a small KL can be nearly free: at an early
site the edit hardly matters, whatever is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from persona_nnsight.method.conditions import DONOR_KEY


def edit_vector(
    condition: str,
    h: Mapping[str, Tensor],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    noise: Tensor | None = None,
    unit: float = 0.0,
) -> Tensor:
    """The vector that `condition` writes.

    Args:
        condition: a key of `SUBSTITUTE_CONDITIONS` or `INJECT_CONDITIONS`, or ``steer``.
        h: residuals by prompt, at least of those in `READS`, float32 [..., d_model].
        alpha, beta: for ``steer``, the factors of Δ_X and Δ_Y.
        noise: for ``random`` and ``rounded``, a vector of any length in the same shape.
        unit: for ``rounded``, the largest relative error of rounding to the model's dtype.

    Returns:
        float32 [..., d_model].
    """

    def delta(prompt: str) -> Tensor:
        difference: Tensor = h[prompt] - h["BB"]
        return difference

    match condition:
        case "additive" | "cached":
            return h["BB"] + delta("XB") + delta("BY")
        case "steer":
            return h["BB"] + alpha * delta("XB") + beta * delta("BY")
        case "remove_x":
            return h["XY"] - delta("XB")
        case "remove_y":
            return h["XY"] - delta("BY")
        case "bb" | "by" | "xb":
            return h[condition.upper()]
        case "clean" | "oracle":
            return h["XY"]
        case "other_x":
            return h["BB"] + delta(DONOR_KEY) + delta("BY")
        case "random" if noise is not None:
            length = delta("XY").norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            drawn: Tensor = h["BB"] + noise * length
            return drawn
        case "rounded" if noise is not None:
            return h["XY"] * (1 + unit * noise.sign())
    raise ValueError(f"no vector is defined for condition {condition!r}")


def seeded_noise(seed: int, position: str, layer: int, d_model: int) -> Tensor:
    """A standard normal vector, float32 [d_model], that depends on its arguments alone.

    The neighbours of a cell in a batch, and the device, leave it unchanged.
    """
    digest = hashlib.sha256(f"{seed}:{position}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(d_model, generator=generator, dtype=torch.float32)
