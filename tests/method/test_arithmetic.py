"""The formulas alone: vectors, geometry and KL on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import tolerance
from torch import tensor

from persona_nnsight.method import kl as kl_module
from persona_nnsight.method.conditions import (
    HOST,
    INJECT_CONDITIONS,
    READS,
    STEER,
    SUBSTITUTE_CONDITIONS,
)
from persona_nnsight.method.edit_vectors import edit_vector, seeded_noise
from persona_nnsight.method.geometry import decompose
from persona_nnsight.method.kl import window_kl

H = {
    "BB": tensor([1.0, 0.0, 0.0]),
    "XB": tensor([1.0, 2.0, 0.0]),
    "BY": tensor([1.0, 0.0, 3.0]),
    "XY": tensor([2.0, 2.0, 2.0]),
    "OB": tensor([1.0, -1.0, 0.0]),
}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("additive", [1.0, 2.0, 3.0]),
        ("cached", [1.0, 2.0, 3.0]),
        ("remove_x", [2.0, 0.0, 2.0]),
        ("remove_y", [2.0, 2.0, -1.0]),
        ("bb", [1.0, 0.0, 0.0]),
        ("by", [1.0, 0.0, 3.0]),
        ("xb", [1.0, 2.0, 0.0]),
        ("other_x", [1.0, -1.0, 3.0]),
        ("clean", [2.0, 2.0, 2.0]),
        ("oracle", [2.0, 2.0, 2.0]),
    ],
)
def test_vectors(condition: str, expected: list[float]) -> None:
    assert edit_vector(condition, H).tolist() == expected


@pytest.mark.parametrize("condition", READS)
def test_a_formula_reads_these_residuals_and_no_others(condition: str) -> None:
    read, noise = {key: H[key] for key in READS[condition]}, torch.ones(3)
    edit_vector(condition, read, noise=noise)
    for key in read:
        with pytest.raises(KeyError, match=key):
            edit_vector(condition, {k: h for k, h in read.items() if k != key}, noise=noise)


def test_every_condition_has_a_vector() -> None:
    assert READS.keys() == {*SUBSTITUTE_CONDITIONS, *INJECT_CONDITIONS, STEER}
    noise = torch.ones(3)
    for condition in [*SUBSTITUTE_CONDITIONS, *INJECT_CONDITIONS]:
        assert edit_vector(condition, H, noise=noise).shape == (3,)
    with pytest.raises(ValueError, match="no vector is defined for condition 'host'"):
        edit_vector(HOST, H)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 1.0, [1.0, 2.0, 3.0]),  # additive
        (0.0, 0.0, [1.0, 0.0, 0.0]),  # bb
        (0.5, -2.0, [1.0, 1.0, -6.0]),
        (3.0, 0.0, [1.0, 6.0, 0.0]),
    ],
)
def test_steering_scales_each_effect(alpha: float, beta: float, expected: list[float]) -> None:
    assert edit_vector(STEER, H, alpha=alpha, beta=beta).tolist() == expected


def test_random_is_as_long_as_the_joint_effect() -> None:
    noise = seeded_noise(5, "p_last", 8, 3)
    step = edit_vector("random", H, noise=noise) - H["BB"]
    close = tolerance(terms=3, size=4)
    assert float(step.norm()) == pytest.approx(3.0, abs=close)  # Δ_XY = (1, 2, 2)
    assert float(step @ noise) == pytest.approx(3.0 * float(noise.norm()), rel=close)


def test_rounded_moves_every_number_by_a_rounding_error() -> None:
    unit = torch.finfo(torch.bfloat16).eps / 2
    noise = torch.tensor([0.3, -2.0, 1.0])
    moved = edit_vector("rounded", H, noise=noise, unit=unit)
    assert torch.equal(moved / H["XY"] - 1, torch.tensor([unit, -unit, unit]))
    assert torch.equal(edit_vector("rounded", H, noise=noise), H["XY"])


def test_noise_depends_on_seed_position_and_layer_alone() -> None:
    first = seeded_noise(1, "g1", 8, 64)
    torch.manual_seed(99)
    assert torch.equal(first, seeded_noise(1, "g1", 8, 64))
    for other in ((2, "g1", 8), (1, "g2", 8), (1, "g1", 9)):
        assert not torch.equal(first, seeded_noise(*other, 64))


def test_decompose() -> None:
    # Δ_X = (0, 2, 0), Δ_Y = (0, 0, 3), Δ_XY = (1, 2, 2), Inter = (1, 0, -1), Δ_X′ = (0, -1, 0)
    expected = {
        "cos_xy_sum": 10 / (3 * math.sqrt(13)),
        "cos_xy_y": 6 / (3 * 3),
        "cos_xy_x": 4 / (3 * 2),
        "cos_xy_other": 4 / (3 * math.sqrt(10)),
        "cos_x_y": 0.0,
        "inter_over_xy": math.sqrt(2) / 3,
        "rest_y": math.sqrt(6) / 3,  # (1, 2, -1)
        "rest_x": math.sqrt(5) / 3,  # (1, 0, 2)
        "rest_other": math.sqrt(11) / 3,  # (1, 3, -1)
        "norm_dx": 2.0,
        "norm_dy": 3.0,
        "norm_dxy": 3.0,
        "norm_inter": math.sqrt(2),
    }
    close = tolerance(terms=3, size=4)
    found = {name: float(value) for name, value in decompose(H).items()}
    assert found == pytest.approx(expected, abs=close)
    # Where there is no other persona, its measures are not there.
    lone = {key: h for key, h in H.items() if key != "OB"}
    found = {name: float(value) for name, value in decompose(lone).items()}
    for name in ("cos_xy_other", "rest_other"):
        del expected[name]
    assert found == pytest.approx(expected, abs=close)


def test_nothing_over_nothing_is_nothing() -> None:
    found = decompose({key: torch.ones(2, 3) for key in H})
    for value in found.values():
        assert value.tolist() == [0.0, 0.0]


def test_decompose_computes_in_float32() -> None:
    """Residuals of 2048 and more, whose differences float16 would round to even numbers."""
    half = {key: (2048 + 2 * value).to(torch.float16) for key, value in H.items()}
    found = decompose(half)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name, value in decompose(H).items():
        factor = 2 if name.startswith("norm") else 1
        assert float(found[name]) == pytest.approx(factor * float(value), rel=1e-6), name


def test_kl_is_a_sum_over_the_window() -> None:
    p, q = tensor([0.5, 0.25, 0.25]), tensor([0.25, 0.5, 0.25])
    one = 0.5 * math.log(2) - 0.25 * math.log(2)  # KL(p ‖ q), by hand
    clean = torch.stack([q, p]).log()[:, None].expand(2, 4, 3)
    logits = (q.log() + 7).expand(4, 4, 3)  # logits are defined up to a constant
    kl = window_kl(clean, clean.exp(), logits, [1, 1, 1, 0], tensor([4, 1, 0, 4])).tolist()
    close = tolerance(terms=4 * 3, size=2)
    assert kl[:2] == pytest.approx([4 * one, one], abs=close)
    assert math.isnan(kl[2])
    assert kl[3] == pytest.approx(0, abs=close)


@pytest.mark.parametrize("block", [1, 1 << 30])
def test_kl_does_not_depend_on_how_many_rows_are_worked_on(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 4, 50, generator=draw).log_softmax(-1)
    logits = torch.randn(5, 4, 50, generator=draw)
    cells, counts = [2, 0, 0, 1, 2], tensor([4, 3, 0, 1, 4])
    monkeypatch.setitem(kl_module._BLOCK, "cpu", block)
    kl = window_kl(clean, clean.exp(), logits, cells, counts).tolist()
    for row, (cell, count) in enumerate(zip(cells, counts.tolist(), strict=True)):
        p, q = clean[cell, :count].double(), logits[row, :count].double().log_softmax(-1)
        expected = float((p.exp() * (p - q)).sum()) if count else math.nan
        assert kl[row] == pytest.approx(expected, abs=tolerance(terms=4 * 50, size=8), nan_ok=True)


def test_kl_of_low_precision_logits_is_float32() -> None:
    clean = torch.zeros(1, 1, 50_000).log_softmax(-1)
    logits = torch.zeros(1, 1, 50_000, dtype=torch.bfloat16)
    logits[..., 0] = 4
    kl = window_kl(clean, clean.exp(), logits, [0], tensor([1]))
    total = 49_999 + math.exp(4)
    assert kl.dtype == torch.float32
    # In float32 log-probabilities of -10.8 are right to 5e-7; in bfloat16 they are off by 3e-2.
    close = tolerance(terms=50_000, size=10.8)
    assert close < 2e-3
    assert kl.item() == pytest.approx(math.log(total / 50_000) - 4 / 50_000, abs=close)
