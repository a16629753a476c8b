"""Draws of personas and tasks, against plain computations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from persona_nnsight.analysis.resampling import Crossed, Draws, combined


def grid(personas: int, tasks: int) -> list[tuple[str, str]]:
    return [(f"p{i:02}", f"t{j:02}") for i in range(personas) for j in range(tasks)]


def test_medians_and_means_are_those_of_the_cells_as_often_as_they_were_drawn() -> None:
    cells = grid(4, 3)
    crossed = Crossed(cells, draws=200)
    rows = np.arange(12)
    # A column of the numbers 0 and 1 for every cell tells how often each was drawn.
    share = crossed.means(np.eye(12)).joint
    values = np.random.default_rng(0).normal(size=(12, 1))
    values[[2, 7]] = np.nan
    medians, means = crossed.medians(values).joint, crossed.means(values).joint
    for draw in range(200):
        times = np.rint(share[draw] * 6).astype(int)  # three personas and two tasks are drawn
        assert times.sum() == 6
        drawn = values[np.repeat(rows, times), 0]
        if np.isfinite(drawn).any():
            assert medians[draw, 0] == pytest.approx(np.nanmedian(drawn))
            assert means[draw, 0] == pytest.approx(np.nanmean(drawn))
        else:
            assert np.isnan([medians[draw, 0], means[draw, 0]]).all()
        by_level = times.reshape(4, 3)
        assert np.array_equal(by_level * 6, np.outer(by_level.sum(axis=1), by_level.sum(axis=0)))


def test_the_variance_of_a_mean_is_that_of_personas_tasks_and_what_is_left() -> None:
    values = np.random.default_rng(1).normal(size=(5, 4)) + np.arange(4)
    draws = Crossed(grid(5, 4)).means(values.reshape(20, 1))
    mean = values.mean()
    personas, tasks = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    left = values - mean - personas[:, None] - tasks
    of_personas, of_tasks = personas.var(ddof=1) / 5, tasks.var(ddof=1) / 4
    of_left = (left**2).sum() / (4 * 3) / 20
    persona_alone, task_alone = draws.alone
    assert persona_alone.var() == pytest.approx(of_personas, rel=0.15)
    assert task_alone.var() == pytest.approx(of_tasks, rel=0.15)
    assert draws.joint.var() == pytest.approx(of_personas + of_tasks + of_left, rel=0.08)
    assert draws.degrees.tolist() == [[4], [3], [12]]


def test_the_draws_are_the_same_on_every_call_for_every_column_and_order_of_rows() -> None:
    cells = grid(4, 3)
    value = np.random.default_rng(2).normal(size=(12, 1))
    once = Crossed(cells).medians(np.hstack([value, 2 * value, value]))
    assert np.array_equal(once.joint[:, 0], once.joint[:, 2])
    assert np.array_equal(2 * once.joint[:, 0], once.joint[:, 1])
    assert len(np.unique(once.joint[:, 0])) > 5
    order = np.random.default_rng(3).permutation(12)
    again = Crossed([cells[i] for i in order]).medians(value[order])
    assert np.array_equal(again.joint[:, 0], once.joint[:, 0])
    assert np.array_equal(again.alone[1][:, 0], once.alone[1][:, 0])


def test_the_estimate_is_the_statistic_of_all_cells() -> None:
    values = np.random.default_rng(4).normal(size=(12, 3))
    values[:4, 1] = np.nan
    values[:, 2] = np.nan
    crossed = Crossed(grid(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        medians, means = crossed.medians(values), crossed.means(values)
    assert medians.estimate[:2] == pytest.approx(np.nanmedian(values[:, :2], axis=0))
    assert means.estimate[:2] == pytest.approx(np.nanmean(values[:, :2], axis=0))
    assert np.isnan([medians.estimate[2], means.estimate[2]]).all()


def test_fewer_than_five_cells_have_an_estimate_and_no_draws() -> None:
    values = np.arange(12.0)[:, None].repeat(2, axis=1)
    values[4:, 0] = np.nan
    values[5:, 1] = np.nan
    draws = Crossed(grid(4, 3)).medians(values)
    assert draws.estimate.tolist() == [1.5, 2]
    assert np.isnan(draws.joint[:, 0]).all()
    assert np.isfinite(draws.joint[:, 1]).any()


def test_degrees_of_freedom_count_the_levels_that_a_column_has() -> None:
    values = np.ones((12, 3)).reshape(4, 3, 3)
    values[3, :, 1] = np.nan  # three personas left
    values[:, 1:, 2] = np.nan  # one task left
    draws = Crossed(grid(4, 3)).medians(values.reshape(12, 3))
    assert draws.degrees.tolist() == [[3, 2, 3], [2, 2, 0], [6, 4, 1]]


def test_one_persona_leaves_the_tasks_to_draw() -> None:
    crossed = Crossed(grid(1, 8))
    draws = crossed.medians(np.arange(8.0)[:, None])
    assert crossed.resampling.drawn == ("task",)
    assert crossed.resampling.method == "1 persona and 8 tasks, tasks drawn"
    assert crossed.resampling.few == ("persona",)
    assert crossed.resampling.scope == "this 1 persona"
    assert draws.alone == ()
    assert draws.degrees.tolist() == [[7]]
    assert len(np.unique(draws.joint)) > 5


def test_a_factor_with_few_levels_is_drawn_and_told() -> None:
    resampling = Crossed(grid(8, 3)).resampling
    assert resampling.drawn == ("persona", "task")
    assert resampling.method == "8 personas and 3 tasks, both drawn"
    assert resampling.scope == "these 3 tasks"
    assert Crossed(grid(4, 3)).resampling.scope == "these 4 personas and these 3 tasks"
    assert Crossed(grid(5, 5)).resampling.scope == ""


def test_held_factors_are_not_drawn() -> None:
    values = np.repeat(np.arange(6.0), 3)[:, None]
    assert Crossed(grid(6, 3)).medians(values).joint.std() > 0
    crossed = Crossed(grid(6, 3), held=("persona",))
    assert (crossed.medians(values).joint == 2.5).all()
    assert crossed.resampling.drawn == ("task",)
    nothing = Crossed(grid(6, 3), held=("persona", "task"))
    assert nothing.resampling.method == "6 personas and 3 tasks, none drawn"
    assert np.isnan(nothing.medians(values).joint).all()
    assert nothing.medians(values).estimate.tolist() == [2.5]


def test_tasks_of_one_persona_each_are_drawn_with_it() -> None:
    cells = [(f"p{i}", f"t{i}-{j}") for i in range(4) for j in range(2)]
    assert Crossed(cells).resampling.drawn == ("persona",)
    assert Crossed([(t, p) for p, t in cells]).resampling.drawn == ("task",)
    assert Crossed([(f"p{i}", f"t{i}") for i in range(6)]).resampling.drawn == ("persona",)
    # One shared task, and they are crossed.
    assert Crossed([*cells, ("p0", "t1-0")]).resampling.drawn == ("persona", "task")


def test_draws_are_taken_and_combined_column_by_column() -> None:
    values = np.random.default_rng(5).uniform(1, 2, size=(12, 3))
    values[::3, 2] = np.nan  # a task less
    draws = Crossed(grid(4, 3)).medians(values)
    ratio = combined(lambda a, b: 1 - a / b, draws.take([0, 1]), draws.take([2, 2]))
    assert isinstance(ratio, Draws)
    assert ratio.estimate == pytest.approx(1 - draws.estimate[:2] / draws.estimate[2])
    assert ratio.joint[:, 1] == pytest.approx(
        1 - draws.joint[:, 1] / draws.joint[:, 2], nan_ok=True
    )
    assert ratio.alone[1][:, 0] == pytest.approx(
        1 - draws.alone[1][:, 0] / draws.alone[1][:, 2], nan_ok=True
    )
    assert ratio.degrees[1].tolist() == [1, 1]


def test_no_cells_and_no_columns() -> None:
    assert Crossed([]).medians(np.empty((0, 2))).joint.shape[1] == 2
    assert Crossed(grid(4, 3)).means(np.empty((12, 0))).joint.shape[1] == 0


def test_many_cells_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).normal(size=(12, 2))
    whole = Crossed(grid(4, 3)).medians(values)
    monkeypatch.setattr("persona_nnsight.analysis.resampling._BLOCK", 12 * 7)
    assert np.array_equal(Crossed(grid(4, 3)).medians(values).joint, whole.joint)
