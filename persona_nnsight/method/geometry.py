"""How the persona's and the task's effects add up in the residual stream (docs/method.md §3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from persona_nnsight.method.conditions import DONOR_KEY

#: Added to denominators, so that 0/0 is reported as 0.
EPSILON = 1e-9


def decompose(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cosines and norms of the effects at every site.

    With Δ_X = h_XB - h_BB, Δ_Y = h_BY - h_BB, Δ_XY = h_XY - h_BB, Inter = Δ_XY - Δ_X - Δ_Y, and
    Δ_X′ = h_OB - h_BB of another persona. A sum that comes close to Δ_XY says little by itself:
    one of its terms may come as close, and so may the sum with another persona's effect. These
    stand beside it as controls.

    Args:
        h: residuals ``BB``, ``XB``, ``BY``, ``XY`` and, where there is another persona, ``OB``,
            each [..., d_model] of any dtype; computed in float32.

    Returns:
        ``cos_xy_sum`` = cos(Δ_XY, Δ_X + Δ_Y), ``cos_xy_y`` = cos(Δ_XY, Δ_Y), ``cos_xy_x`` =
        cos(Δ_XY, Δ_X), ``cos_xy_other`` = cos(Δ_XY, Δ_X′ + Δ_Y), ``cos_x_y`` = cos(Δ_X, Δ_Y),
        ``inter_over_xy`` = ‖Inter‖/‖Δ_XY‖, ``rest_y`` = ‖Δ_XY - Δ_Y‖/‖Δ_XY‖, ``rest_x`` =
        ‖Δ_XY - Δ_X‖/‖Δ_XY‖, ``rest_other`` = ‖Δ_XY - Δ_X′ - Δ_Y‖/‖Δ_XY‖, and the norms
        ``norm_dx``, ``norm_dy``, ``norm_dxy``, ``norm_inter``; each float32 [...]. Those of Δ_X′
        are left out without ``OB``.
    """
    bb = h["BB"].float()
    delta_x, delta_y, delta_xy = (h[key].float() - bb for key in ("XB", "BY", "XY"))
    norm_xy, norm_inter = delta_xy.norm(dim=-1), (delta_xy - delta_x - delta_y).norm(dim=-1)
    controls = {"y": delta_y, "x": delta_x}
    if DONOR_KEY in h:
        controls["other"] = h[DONOR_KEY].float() - bb + delta_y
    return {
        "cos_xy_sum": _cosine(delta_xy, delta_x + delta_y),
        **{f"cos_xy_{name}": _cosine(delta_xy, vector) for name, vector in controls.items()},
        "cos_x_y": _cosine(delta_x, delta_y),
        "inter_over_xy": norm_inter / (norm_xy + EPSILON),
        **{
            f"rest_{name}": (delta_xy - vector).norm(dim=-1) / (norm_xy + EPSILON)
            for name, vector in controls.items()
        },
        "norm_dx": delta_x.norm(dim=-1),
        "norm_dy": delta_y.norm(dim=-1),
        "norm_dxy": norm_xy,
        "norm_inter": norm_inter,
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    cosine: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPSILON)
    return cosine
