"""Intervals and verdicts: how often they are false where the truth is known, and what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from persona_nnsight.analysis import verdicts as module
from persona_nnsight.analysis.resampling import Crossed, Draws, Floats, combined
from persona_nnsight.analysis.verdicts import best_of, interval, simultaneous, verdicts

SHAPES = [(4, 3), (8, 6)]
#: Of the variance between cells, as measured: task 60 %, persona 8 %.
SHARES = (0.08, 0.60)


def grid(personas: int, tasks: int) -> list[tuple[str, str]]:
    return [(f"p{i:02}", f"t{j:02}") for i in range(personas) for j in range(tasks)]


def chain(generator: np.random.Generator, rows: int, columns: int, along: float) -> Floats:
    """Normal numbers of variance 1, [rows, columns], neighbours correlated as layers are."""
    found = generator.standard_normal((rows, columns))
    for column in range(1, columns):
        found[:, column] *= math.sqrt(1 - along**2)
        found[:, column] += along * found[:, column - 1]
    return found


def simulated(
    generator: np.random.Generator,
    shape: tuple[int, int],
    columns: int,
    along: float = 0.9,
    shares: tuple[float, float] = SHARES,
) -> Floats:
    """A table whose true medians and means are 0, and the variance of a cell 1."""
    personas, tasks = shape
    parts = [
        math.sqrt(share) * chain(generator, rows, columns, along).reshape(*form, columns)
        for share, rows, form in (
            (shares[0], personas, (personas, 1)),
            (shares[1], tasks, (1, tasks)),
            (1 - sum(shares), personas * tasks, shape),
        )
    ]
    return np.asarray(sum(parts)).reshape(personas * tasks, columns)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIMULATIONS", 300)


# --- how often they are false


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("statistic", ["medians", "means"])
def test_false_verdicts_per_table_and_coverage(shape: tuple[int, int], statistic: str) -> None:
    """Ten sites without any difference: at most 7 % of tables tell one."""
    generator = np.random.default_rng(0)
    crossed = Crossed(grid(*shape), draws=200)
    false, held = [], []
    for _ in range(250):
        draws = getattr(crossed, statistic)(simulated(generator, shape, 10))
        words = verdicts(*simultaneous(draws))
        false.append((words != "undecided").any())
        low, high = interval(draws)
        held.append(((low <= 0) & (high >= 0)).mean())
    assert np.mean(false) <= 0.07
    assert np.mean(held) >= 0.92


@pytest.mark.usefixtures("fast")
def test_false_verdicts_where_three_tasks_decide_nearly_everything() -> None:
    """Three tasks show two dimensions of the many that twenty sites have."""
    generator = np.random.default_rng(12)
    crossed = Crossed(grid(8, 3), draws=200)
    false = []
    for _ in range(150):
        table = simulated(generator, (8, 3), 20, shares=(0.02, 0.96))
        false.append((verdicts(*simultaneous(crossed.means(table))) != "undecided").any())
    assert np.mean(false) <= 0.07


@pytest.mark.usefixtures("fast")
def test_differences_are_found_where_tasks_are_enough() -> None:
    """Two standard deviations of a cell, over eight personas and six tasks."""
    generator = np.random.default_rng(1)
    crossed = Crossed(grid(8, 6), draws=200)
    found = [
        (verdicts(*simultaneous(crossed.medians(simulated(generator, (8, 6), 12) - 2))) == "lower")
        for _ in range(60)
    ]
    assert np.mean(found) > 0.7


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("shape", "shares"), [((8, 1), (0.5, 0.0)), ((1, 8), (0.0, 0.5))])
def test_false_verdicts_where_one_factor_is_drawn(
    shape: tuple[int, int], shares: tuple[float, float]
) -> None:
    """Of the one level of the other factor, which the truth is about."""
    generator = np.random.default_rng(2)
    crossed = Crossed(grid(*shape), draws=200)
    false = []
    for _ in range(200):
        table = simulated(generator, shape, 12, shares=shares)
        false.append((verdicts(*simultaneous(crossed.medians(table))) != "undecided").any())
    assert np.mean(false) <= 0.07


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("along", [0.0, 0.9])
def test_the_interval_of_the_best_column_holds_its_true_value(along: float) -> None:
    """Eight columns of one true value: the largest estimate is too large."""
    generator = np.random.default_rng(3)
    crossed = Crossed(grid(8, 6), draws=200)
    held, naive, corrected, estimates = [], [], [], []
    for _ in range(150):
        draws = crossed.medians(simulated(generator, (8, 6), 8, along))
        best = best_of(draws)
        assert best is not None
        held.append(best.low <= 0 <= best.high)
        corrected.append(best.corrected)
        estimates.append(best.estimate)
        low, high = interval(draws)
        naive.append(low[best.column] <= 0 <= high[best.column])
    assert np.mean(held) >= 0.92
    assert abs(np.mean(corrected)) < 0.6 * np.mean(estimates)
    if not along:
        assert np.mean(naive) < np.mean(held)


# --- what they are


def test_one_column_and_one_factor_are_students_t() -> None:
    values = np.random.default_rng(4).normal(size=(8, 1))
    low, high = interval(Crossed(grid(8, 1), draws=8000).means(values))
    half = 2.365 * values.std(ddof=1) / math.sqrt(8)
    assert low[0] == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert high[0] == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_few_tasks_widen_what_hangs_on_tasks_alone() -> None:
    """With three tasks that decide everything the multiple is that of two degrees, 4.30."""
    generator = np.random.default_rng(5)
    by_task = np.tile(generator.normal(size=3), 8) + 1e-3 * generator.normal(size=24)
    by_persona = np.repeat(generator.normal(size=8), 3) + 1e-3 * generator.normal(size=24)
    draws = Crossed(grid(8, 3)).means(np.stack([by_task, by_persona], axis=1))
    low, high = interval(draws)
    error = np.sqrt(((draws.joint - draws.estimate) ** 2).mean(axis=0))
    assert (high - low) / 2 / error == pytest.approx([4.30, 2.36], rel=0.1)


def test_what_is_of_no_level_has_the_degrees_of_both_factors_multiplied() -> None:
    values = np.random.default_rng(13).normal(size=(4, 3))
    values += values.mean() - values.mean(axis=0) - values.mean(axis=1)[:, None]
    draws = Crossed(grid(4, 3)).means(values.reshape(12, 1))
    low, high = interval(draws)
    error = np.sqrt(((draws.joint - draws.estimate) ** 2).mean(axis=0))
    assert (high - low) / 2 / error == pytest.approx([2.447], rel=0.06)  # t with 3 x 2 degrees


def test_intervals_of_a_table_are_wider_the_more_its_columns_differ() -> None:
    generator = np.random.default_rng(6)
    one = generator.normal(size=(48, 1))
    crossed = Crossed(grid(8, 6))
    widths = []
    for values in (one, one.repeat(20, axis=1), generator.normal(size=(48, 20))):
        draws = crossed.means(values)
        alone, together = (np.subtract(*ends(draws)[::-1]) for ends in (interval, simultaneous))
        widths.append((together / alone).mean())
    assert widths[0] == pytest.approx(1)
    # What cells have beyond their levels is simulated column by column: a little too wide.
    assert 1 <= widths[1] < 1.15
    assert 1.3 < widths[2] < 2


def test_intervals_do_not_hang_on_the_scale_of_a_column() -> None:
    values = np.random.default_rng(7).normal(size=(12, 3))
    crossed = Crossed(grid(4, 3))
    low, high = simultaneous(crossed.medians(values))
    scaled = simultaneous(crossed.medians(values * [1, 1e-6, 1e6]))
    assert scaled[0] == pytest.approx(low * [1, 1e-6, 1e6], rel=1e-6)
    assert scaled[1] == pytest.approx(high * [1, 1e-6, 1e6], rel=1e-6)


def test_lengths_have_intervals_above_zero() -> None:
    values = np.exp(2 * np.random.default_rng(8).normal(size=(12, 2)))
    values[:, 1] = 0
    draws = Crossed(grid(4, 3)).medians(values)
    low, high = interval(draws, positive=True)
    assert 0 < low[0] < draws.estimate[0] < high[0]
    assert interval(draws)[0][0] < 0
    logarithm = interval(combined(np.log, draws.take([0])))
    assert [low[0], high[0]] == pytest.approx(np.exp(np.ravel(logarithm)))
    assert (low[1], high[1]) == (0, 0)


def test_lengths_that_are_zero_in_a_draw_are_cut_at_zero() -> None:
    values = np.array([0.0] * 6 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    low, high = interval(Crossed(grid(4, 3)).medians(values), positive=True)
    assert low[0] == 0
    assert math.isfinite(high[0])


def test_a_constant_column_is_its_own_interval_and_widens_no_other() -> None:
    values = np.random.default_rng(9).normal(size=(12, 2))
    values[:, 1] = 3
    crossed = Crossed(grid(4, 3))
    low, high = simultaneous(crossed.medians(values))
    assert (low[1], high[1]) == (3, 3)
    alone = simultaneous(crossed.medians(values[:, :1]))
    assert (low[0], high[0]) == pytest.approx((alone[0][0], alone[1][0]))


def test_columns_without_draws_have_no_interval_and_no_verdict() -> None:
    values = np.random.default_rng(10).normal(size=(12, 2)) - 50
    values[4:, 1] = np.nan
    ends = simultaneous(Crossed(grid(4, 3)).medians(values))
    assert np.isnan(ends)[:, 1].all()
    assert verdicts(*ends, margin=100).tolist() == ["equivalent", ""]
    assert verdicts(*ends).tolist() == ["lower", ""]
    none = simultaneous(Crossed(grid(4, 3)).medians(np.empty((12, 0))))
    assert verdicts(*none).tolist() == []


def test_five_values_among_many_cells_have_a_finite_interval() -> None:
    values = np.full((48, 1), np.nan)
    values[[0, 7, 14, 21, 28], 0] = [1.0, 2.0, 3.0, 4.0, 5.0]
    low, high = interval(Crossed(grid(8, 6)).medians(values))
    assert low[0] < 3 < high[0]
    assert math.isfinite(low[0] + high[0])


def test_verdicts_in_words() -> None:
    low = np.array([-3.0, 1, -1, -0.1, 0.02, -0.1, np.nan])
    high = np.array([-2.0, 2, 1, 0.1, 0.05, 0.3, np.nan])
    assert verdicts(low, high).tolist() == [
        *("lower", "higher", "undecided", "undecided", "higher", "undecided", "")
    ]
    assert verdicts(low, high, margin=0.2).tolist() == [
        *("lower", "higher", "undecided", "equivalent", "equivalent", "undecided", "")
    ]
    assert verdicts(low, high, floor=0.03)[4] == "undecided"
    margins = np.array([5, np.nan, 1, 0.05, 0.05, -1, 1])
    assert verdicts(low, high, margin=margins).tolist() == [
        *("equivalent", "higher", "equivalent", "undecided", "equivalent", "undecided", "")
    ]


def test_the_best_column_is_chosen_anew_in_every_draw() -> None:
    def draws(*columns: list[float]) -> Draws:
        joint = np.array(columns).T
        return Draws(joint[0], joint, (), np.full((1, joint.shape[1]), 3, dtype=np.int32))

    value = draws([5.0, 5.0, 8.0, 4.0], [4.0, 7.0, 3.0, 4.0])
    best = best_of(value)
    assert best is not None
    assert (best.column, best.estimate, best.chosen) == (0, 5, 0.75)
    # 0, 7 - 4, 8 - 5 and 4 - 5.
    assert best.corrected == pytest.approx(5 - 5 / 4)
    # Chosen by something else, and never the first column.
    other = best_of(value, by=draws([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]))
    assert other is not None
    assert (other.column, other.estimate, other.chosen) == (1, 4, 1)
    assert other.corrected == pytest.approx(4 - 2 / 4)


def test_the_best_column_has_draws() -> None:
    values = np.random.default_rng(11).normal(size=(12, 3))
    values[4:, 0] = np.nan
    values[:4, 0] = 99
    crossed = Crossed(grid(4, 3))
    best = best_of(crossed.medians(values))
    assert best is not None
    assert best.column in (1, 2)
    assert best.low < best.corrected < best.high
    assert best.low <= best.estimate <= best.high
    assert best_of(crossed.medians(values[:, :1])) is None
    one = best_of(crossed.medians(values[:, 1:2]))
    assert one is not None
    assert one.chosen == 1
