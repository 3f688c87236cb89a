"""Aggregates equal their definitions; intervals are those of a bootstrap stratified by task."""

import math

import numpy as np
import pytest
import scipy.stats

from mac.errors import UserError
from mac.run.report.stats import bootstrap, iqm, learning_curve, summarise


@pytest.mark.parametrize("count", range(1, 21))
def test_iqm_is_scipys_trimmed_mean(count: int):
    scores = np.random.default_rng(count).random((5, count))
    np.testing.assert_allclose(iqm(scores), scipy.stats.trim_mean(scores, 0.25, axis=1), rtol=1e-14)


def test_iqm_ignores_the_outer_quarters():
    # 8 scores: the two lowest and the two highest leave, (2 + 3 + 4 + 5) / 4 stays.
    assert iqm(np.array([5.0, -100.0, 2.0, 3.0, 900.0, 4.0, -7.0, 80.0])) == 3.5


def test_bootstrap_draws_each_task_from_its_own_scores():
    scores = np.arange(12.0).reshape(4, 3)
    tables = bootstrap(scores, 500, np.random.default_rng(0))
    assert tables.shape == (500, 4, 3)
    for task in range(3):
        assert set(np.unique(tables[:, :, task])) == set(scores[:, task])


def test_bootstrap_draws_tasks_independently():
    scores = np.tile(np.arange(4.0)[:, None], 2)
    tables = bootstrap(scores, 4000, np.random.default_rng(0))
    assert abs(np.corrcoef(tables[:, :, 0].ravel(), tables[:, :, 1].ravel())[0, 1]) < 0.03


def slow_interval(scores: np.ndarray, statistic, reps: int, seed: int) -> tuple[float, float]:
    """The bootstrap written out: one draw of one seed of one task at a time."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(reps):
        draws = [[rng.choice(scores[:, task]) for task in range(scores.shape[1])] for _ in scores]
        values.append(statistic(np.ravel(draws)))
    values.sort()
    return values[int(0.025 * reps)], values[int(0.975 * reps)]


@pytest.mark.parametrize("which", ["mean", "iqm"])
def test_interval_agrees_with_the_slow_bootstrap(which: str):
    scores = np.random.default_rng(1).random((5, 3))
    statistic = np.mean if which == "mean" else lambda x: scipy.stats.trim_mean(x, 0.25)
    low, high = slow_interval(scores, statistic, reps=1500, seed=5)
    interval = getattr(summarise(scores), which)
    assert interval.value == pytest.approx(statistic(scores.ravel()))
    # Monte-Carlo error of an end is about 1/sqrt(1500) * width here, 4 times that is allowed.
    width = interval.high - interval.low
    assert abs(interval.low - low) < 0.1 * width and abs(interval.high - high) < 0.1 * width


def test_interval_of_many_seeds_is_the_normal_one():
    scores = np.random.default_rng(2).normal(0.5, 0.1, (400, 1))
    mean = summarise(scores).mean
    half = 1.96 * scores.std() / math.sqrt(400)
    assert mean.low == pytest.approx(scores.mean() - half, abs=0.06 * half)
    assert mean.high == pytest.approx(scores.mean() + half, abs=0.06 * half)


def test_interval_covers_the_truth():
    # 16 seeds of 20 episodes each at p = 0.6; a percentile interval covers a little under 95%.
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        mean = summarise(rng.binomial(20, 0.6, (16, 1)) / 20, reps=1000).mean
        hits += mean.low <= 0.6 <= mean.high
    assert 0.88 <= hits / 300 <= 0.98


def test_confidence_widens_the_interval():
    scores = np.random.default_rng(4).random((8, 2))
    narrow, wide = summarise(scores, confidence=0.5).mean, summarise(scores, confidence=0.99).mean
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_equal_arguments_give_equal_intervals():
    scores = np.random.default_rng(5).random((4, 2))
    assert summarise(scores) == summarise(scores)
    assert summarise(scores) != summarise(scores, seed=1)


def test_equal_seeds_have_no_width():
    summary = summarise(np.full((4, 1), 0.3))
    assert summary.mean == pytest.approx((0.3, 0.3, 0.3)) and summary.iqm == pytest.approx((0.3, 0.3, 0.3))


def test_one_seed_has_no_interval():
    summary = summarise(np.array([[0.25, 0.75]]))
    assert summary.mean.value == 0.5 and math.isnan(summary.mean.low) and math.isnan(summary.iqm.high)


@pytest.mark.parametrize("scores", [np.ones((0, 2)), np.array([[np.nan]])])
def test_bad_scores_are_refused(scores: np.ndarray):
    with pytest.raises(ValueError, match="matrix of seeds by tasks"):
        summarise(scores)


def row(step: int, seed: int, task: int, success: float) -> dict:
    return {"step": step, "seed": seed, "task": task, "success": success, "episodes": 20 + task}


def test_learning_curve_sorts_rows_and_drops_incomplete_steps():
    rows = [row(i, s, t, i + 10 * s + 100 * t) for i in (5, 10) for s in (1, 0) for t in (2, 1)]
    curve = learning_curve([*rows[::-1], row(15, 0, 1, 9.0)])
    assert (curve.steps, curve.seeds, curve.tasks, curve.episodes) == ([5, 10], [0, 1], [1, 2], 21)
    assert curve.scores[1, 0, 1] == 10 + 0 + 200 and curve.scores[0, 1, 0] == 5 + 10 + 100
    np.testing.assert_array_equal(curve.last(), curve.scores[1])
    np.testing.assert_array_equal(curve.last(2), curve.scores.mean(axis=0))


def test_learning_curve_needs_a_complete_evaluation():
    with pytest.raises(UserError, match="no complete evaluation"):
        learning_curve([])
    with pytest.raises(UserError, match=r"eval\.jsonl, line 1: task is missing"):
        learning_curve([{"step": 1, "seed": 0}])
