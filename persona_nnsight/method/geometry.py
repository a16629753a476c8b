"""How the persona's and the task's effects add up in the residual stream (docs/method.md §3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

#: Added to denominators, so that 0/0 is reported as 0.
EPSILON = 1e-9


def decompose(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cosines and norms of the effects at every site.

    With Δ_X = h_XB - h_BB, Δ_Y = h_BY - h_BB, Δ_XY = h_XY - h_BB and
    Inter = Δ_XY - Δ_X - Δ_Y:

    Args:
        h: residuals ``BB``, ``XB``, ``BY``, ``XY``, each [..., d_model]; computed in float32.

    Returns:
        ``cos_xy_sum`` = cos(Δ_XY, Δ_X + Δ_Y), ``cos_x_y`` = cos(Δ_X, Δ_Y),
        ``inter_over_xy`` = ‖Inter‖/‖Δ_XY‖, and the norms ``norm_dx``, ``norm_dy``, ``norm_dxy``,
        ``norm_inter``; each float32 [...].
    """
    bb, xb, by, xy = (h[key].float() for key in ("BB", "XB", "BY", "XY"))
    delta_x, delta_y, delta_xy = xb - bb, by - bb, xy - bb
    inter = delta_xy - delta_x - delta_y
    norm_xy, norm_inter = delta_xy.norm(dim=-1), inter.norm(dim=-1)
    return {
        "cos_xy_sum": _cosine(delta_xy, delta_x + delta_y),
        "cos_x_y": _cosine(delta_x, delta_y),
        "inter_over_xy": norm_inter / (norm_xy + EPSILON),
        "norm_dx": delta_x.norm(dim=-1),
        "norm_dy": delta_y.norm(dim=-1),
        "norm_dxy": norm_xy,
        "norm_inter": norm_inter,
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPSILON)
    return cosine
