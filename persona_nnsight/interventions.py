"""Which vector is written at a site.

Every condition is a formula over the four residuals of a cell at one site, in float32:
Δ_X = h_XB - h_BB, Δ_Y = h_BY - h_BB, Δ_XY = h_XY - h_BB (Xu 2026, arXiv 2605.23147, §3). Besides
the paper's additive vector there are controls, because a small KL can be nearly free: at an early
site the edit hardly matters, whatever is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

#: Conditions of `substitute`: written at one site of the XY run.
SUBSTITUTE_CONDITIONS = {
    "additive": "h_BB + Δ_X + Δ_Y, the paper's substitution",
    "remove_x": "h_XY - Δ_X, the persona's effect taken out",
    "remove_y": "h_XY - Δ_Y, the task's effect taken out",
    "bb": "h_BB, neither persona nor task (control)",
    "by": "h_BY, the task alone (control)",
    "xb": "h_XB, the persona alone (control)",
    "other_x": "h_BB + Δ_X' + Δ_Y with another persona X' (control)",
    "random": "h_BB + a random vector as long as Δ_XY (control)",
    "clean": "h_XY itself; its KL is the numerical floor (control)",
}

#: Conditions of `inject`: written into the BY host, the prompt without its persona.
INJECT_CONDITIONS = {
    "host": "no edit: the persona-free prompt as it is",
    "oracle": "h_XY, the residual of the prompt with its persona",
    "cached": "h_BB + Δ_X + Δ_Y, what a cache of persona and task effects would hold",
}

#: Prompts whose residuals a formula reads; OB is the prompt of the other persona X' (`other_x`).
RESIDUAL_KEYS = ("BB", "XB", "BY", "XY")
DONOR_KEY = "OB"


def edit_vector(condition: str, h: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
    """The vector that `condition` writes.

    Args:
        condition: a key of `SUBSTITUTE_CONDITIONS` or `INJECT_CONDITIONS` (except ``host``).
        h: residuals by prompt (`RESIDUAL_KEYS`, and OB for ``other_x``), float32 [..., d_model].
        noise: for ``random``, a vector of any length in the same shape.

    Returns:
        float32 [..., d_model].
    """
    delta_x: Tensor = h["XB"] - h["BB"]
    delta_y: Tensor = h["BY"] - h["BB"]
    delta_xy: Tensor = h["XY"] - h["BB"]
    match condition:
        case "additive" | "cached":
            return h["BB"] + delta_x + delta_y
        case "remove_x":
            return h["XY"] - delta_x
        case "remove_y":
            return h["XY"] - delta_y
        case "bb" | "by" | "xb":
            return h[condition.upper()]
        case "clean" | "oracle":
            return h["XY"]
        case "other_x":
            return h["BB"] + (h[DONOR_KEY] - h["BB"]) + delta_y
        case "random" if noise is not None:
            length: Tensor = delta_xy.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            return h["BB"] + noise * length
    raise ValueError(f"no vector is defined for condition {condition!r}")


def seeded_noise(seed: int, position: str, layer: int, d_model: int) -> Tensor:
    """A standard normal vector, float32 [d_model], that depends on its arguments alone.

    The neighbours of a cell in a batch, and the device, leave it unchanged.
    """
    digest = hashlib.sha256(f"{seed}:{position}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(d_model, generator=generator)
