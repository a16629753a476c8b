"""Bootstrap intervals against what is known of them without drawing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from persona_nnsight.analysis.bootstrap import Floats, drawn_means, drawn_medians, interval


def interval_of_medians(values: Floats) -> list[tuple[float, float]]:
    return list(zip(*(end.tolist() for end in interval(drawn_medians(values))), strict=True))


def chance_of_at_most(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k)."""
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def lower_rank(n: int) -> int:
    """Which of n values, n odd, is the lower end for the median.

    A drawn median is at most the k-th lowest value if more than half of the draws, each of which
    is among the k lowest with chance k/n, are.
    """
    return next(k for k in range(1, n) if 1 - chance_of_at_most(n // 2, n, k / n) > 0.025)


@pytest.mark.parametrize(("n", "rank"), [(5, 1), (7, 2), (9, 2), (15, 4), (25, 8)])
def test_the_ends_for_a_median_are_the_order_statistics_of_theory(n: int, rank: int) -> None:
    assert lower_rank(n) == rank
    values = np.random.default_rng(7).permutation(np.arange(1.0, n + 1)) ** 3
    assert interval_of_medians(values[:, None]) == [(rank**3, (n + 1 - rank) ** 3)]


@pytest.mark.parametrize(("ones", "ends"), [(5, (2, 8)), (2, (0, 5)), (10, (10, 10))])
def test_the_ends_for_a_share_are_the_binomial_ones(ones: int, ends: tuple[int, int]) -> None:
    theory = [
        next(k for k in range(11) if chance_of_at_most(k, 10, ones / 10) > level)
        for level in (0.025, 0.975)
    ]
    assert tuple(theory) == ends
    values = np.array([1.0] * ones + [0.0] * (10 - ones))[:, None]
    low, high = interval(drawn_means(values))
    assert (10 * low.item(), 10 * high.item()) == pytest.approx(ends)


def test_the_interval_of_a_mean_is_that_of_a_slow_loop() -> None:
    values = np.random.default_rng(1).exponential(size=30)
    draw = np.random.default_rng(2).integers
    means = sorted(
        sum(values[draw(30)] for _ in range(30)) / 30
        for _ in range(4000)  # other draws than those of the package
    )
    low, high = interval(drawn_means(values[:, None]))
    error = 0.15 * (means[3900] - means[100])
    assert low.item() == pytest.approx(means[100], abs=error)
    assert high.item() == pytest.approx(means[3900], abs=error)


def test_intervals_hold_the_true_median_about_as_often_as_they_say() -> None:
    samples = np.random.default_rng(3).normal(size=(25, 400))
    held = [low <= 0 <= high for low, high in interval_of_medians(samples)]
    assert 0.90 <= sum(held) / len(held) <= 0.99


def test_the_draws_are_the_same_on_every_call_and_for_every_column() -> None:
    values = np.random.default_rng(4).normal(size=(12, 1))
    once = drawn_medians(np.hstack([values, 0.5 * values, values]))
    assert np.array_equal(once[:, 0], once[:, 2])
    assert np.array_equal(0.5 * once[:, 0], once[:, 1])
    assert np.array_equal(drawn_medians(values)[:, 0], once[:, 0])
    means = drawn_means(np.hstack([values, values]))
    assert np.array_equal(means[:, 0], means[:, 1])
    assert drawn_means(values)[:, 0] == pytest.approx(means[:, 0])
    # There is something to draw: a constant would pass all of the above.
    assert len(np.unique(once[:, 0])) > 5


def test_fewer_than_five_cells_have_no_interval() -> None:
    for draws in (drawn_medians, drawn_means):
        low, high = interval(draws(np.ones((4, 2))))
        assert np.isnan([low, high]).all()
        low, high = interval(draws(np.ones((5, 2))))
        assert (low == 1).all()
        assert (high == 1).all()


def test_cells_without_a_value_are_left_out_of_their_column_alone() -> None:
    full = np.arange(1.0, 10.0)
    holes = np.where(full > 7, np.nan, full)  # seven values left
    few = np.where(full > 4, np.nan, full)  # four
    none = np.full(9, np.nan)
    found = interval_of_medians(np.stack([full, holes, few, none], axis=1))
    assert list(found[0]) == [2, 8]
    assert 1 <= found[1][0] < 4 < found[1][1] <= 7
    assert np.isnan(found[2:]).all()
    assert interval_of_medians(np.where(full > 7, np.nan, 3.0)[:, None]) == [(3, 3)]


def test_five_values_among_many_empty_cells_draw_no_warning() -> None:
    """Some draws of 48 cells hold none of the five; they have no median and are passed over."""
    values = np.full((48, 1), np.nan)
    values[:5, 0] = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert interval_of_medians(values) == [(2, 2)]


def test_no_columns_have_no_intervals() -> None:
    low, high = interval(drawn_medians(np.empty((6, 0))))
    assert low.shape == high.shape == (0,)
