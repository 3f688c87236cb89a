"""Statistics over tasks equal closed forms, slow loops, and the numbers of rliable 1.2.0."""

import math

import numpy as np
import pytest
import scipy.stats

from mac.run.report.across_tasks import (
    bootstrap_interval,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)
from mac.run.report.stats import iqm, summarise

OURS = np.array(
    [
        [0.637, 0.27, 0.041, 0.017],
        [0.813, 0.913, 0.607, 0.729],
        [0.544, 0.935, 0.816, 0.003],
        [0.857, 0.034, 0.73, 0.176],
        [0.863, 0.541, 0.3, 0.423],
    ]
)
THEIRS = np.array([[0.813, 0.112, 0.604, 0.582], [0.554, 0.345, 0.3, 0.883], [0.617, 0.585, 0.62, 0.35]])
"""With two scores that are also in `OURS`."""


def flat_iqm(scores: np.ndarray) -> np.ndarray:
    return iqm(scores.reshape(*scores.shape[:-2], -1))


# Made with rliable 1.2.0 (pandas 2.3.3) on these tables.


def test_estimators_equal_rliables():
    assert probability_of_improvement(OURS, THEIRS) == pytest.approx(0.5166666666666666, abs=1e-12)
    assert probability_of_improvement(THEIRS, OURS) == pytest.approx(0.48333333333333334, abs=1e-12)
    assert optimality_gap(OURS) == pytest.approx(0.48754999999999993, abs=1e-12)
    assert optimality_gap(2 * THEIRS) == pytest.approx(0.14883333333333348, abs=1e-12)
    assert optimality_gap(OURS, 0.5) == pytest.approx(0.13679999999999998, abs=1e-12)
    summary = summarise(OURS)
    assert summary.iqm.value == pytest.approx(0.5594, abs=1e-12)
    assert summary.mean.value == pytest.approx(0.51245, abs=1e-12)


def test_profile_equals_rliables():
    expected = [1.0, 0.75, 0.65, 0.5, 0.3, 0.0]
    found = performance_profile(OURS, np.linspace(0, 1, 6))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "statistic, low, high",
    [(flat_iqm, 0.3627, 0.7154025), (optimality_gap, 0.36885, 0.60815)],
)
def test_intervals_agree_with_rliables(statistic, low: float, high: float):
    """Its 50,000 draws against 20,000 of ours: ends differ by their Monte Carlo error."""
    found = bootstrap_interval(statistic, OURS, reps=20_000)
    assert found.low == pytest.approx(low, abs=0.006)
    assert found.high == pytest.approx(high, abs=0.006)


def test_interval_of_improvement_agrees_with_rliables():
    found = bootstrap_interval(probability_of_improvement, OURS, THEIRS, reps=20_000)
    assert found.low == pytest.approx(1 / 3, abs=0.01)
    assert found.high == pytest.approx(0.7, abs=0.01)


# Closed forms and slow loops.


def test_improvement_is_certain_even_or_impossible():
    low, high = np.zeros((3, 2)), np.ones((4, 2))
    assert probability_of_improvement(high, low) == 1
    assert probability_of_improvement(low, high) == 0
    assert probability_of_improvement(low, low) == 0.5


def test_improvement_of_shifted_normals_is_their_closed_form():
    """P(X > Y) of normals of variance 1 whose means are d apart is Phi(d / sqrt(2))."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.8, 1, (1500, 1)), rng.normal(0, 1, (1500, 1))
    expected = 0.5 * (1 + math.erf(0.8 / 2))
    assert probability_of_improvement(ours, theirs) == pytest.approx(expected, abs=0.02)


def slow_improvement(ours: np.ndarray, theirs: np.ndarray) -> float:
    tasks = []
    for task in range(ours.shape[1]):
        wins = 0.0
        for x in ours[:, task]:
            for y in theirs[:, task]:
                wins += 1.0 if x > y else 0.5 if x == y else 0.0
        tasks.append(wins / (len(ours) * len(theirs)))
    return sum(tasks) / len(tasks)


@pytest.mark.parametrize("seed", range(5))
def test_estimators_equal_slow_loops(seed: int):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(0, 6, (4, 3)) / 4, rng.integers(0, 6, (5, 3)) / 4
    assert probability_of_improvement(ours, theirs) == pytest.approx(
        slow_improvement(ours, theirs), abs=1e-12
    )
    gap = sum(1.0 - min(score, 1.0) for score in ours.ravel()) / ours.size
    assert optimality_gap(ours) == pytest.approx(gap, abs=1e-12)
    thresholds = np.array([0.0, 0.5, 1.25])
    expected = [sum(score > at for score in ours.ravel()) / ours.size for at in thresholds]
    np.testing.assert_allclose(performance_profile(ours, thresholds), expected, atol=1e-12)


def test_estimators_take_bootstrap_tables():
    tables = np.stack([OURS, OURS[::-1] ** 2])
    for i, table in enumerate(tables):
        assert optimality_gap(tables)[i] == optimality_gap(table)
        others = np.stack([THEIRS, THEIRS])
        assert probability_of_improvement(tables, others)[i] == probability_of_improvement(table, THEIRS)
        at = np.array([0.2, 0.7])
        np.testing.assert_array_equal(performance_profile(tables, at)[i], performance_profile(table, at))


def test_profile_falls_from_one_to_zero():
    profile = performance_profile(OURS, np.linspace(-0.1, 1.0, 50))
    assert profile[0] == 1 and profile[-1] == 0 and (np.diff(profile) <= 0).all()


def test_area_below_the_profile_is_the_mean():
    """Of scores in [0, 1]: the integral of P(score > t) over t."""
    at = np.linspace(0, 1, 20_001)
    assert np.trapezoid(performance_profile(OURS, at), at) == pytest.approx(OURS.mean(), abs=1e-4)


def test_one_seed_has_no_interval():
    found = bootstrap_interval(optimality_gap, OURS[:1])
    assert found.value == pytest.approx(1 - OURS[:1].mean()) and math.isnan(found.low)
    assert math.isnan(bootstrap_interval(probability_of_improvement, OURS, THEIRS[:1]).high)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(optimality_gap, np.array([[1.0], [math.nan]]))


def coverage(seeds: int, simulations: int = 400) -> float:
    """Fraction of 95% intervals that contain the true mean, of normal scores on four tasks."""
    rng, truth, hits = np.random.default_rng(seeds), np.array([0.2, 0.4, 0.6, 0.8]), 0
    for i in range(simulations):
        scores = truth + 0.1 * rng.normal(size=(seeds, 4))
        found = bootstrap_interval(lambda x: x.mean(axis=(-2, -1)), scores, reps=1000, seed=i)
        hits += found.low <= truth.mean() <= found.high
    return hits / simulations


@pytest.mark.parametrize("seeds, expected", [(4, 0.884), (10, 0.929)])
def test_coverage_with_few_seeds_is_below_its_name(seeds: int, expected: float):
    """The bootstrap's variance is (n - 1) / n of the true one: docs/reproduce.md says so."""
    half = 1.96 * math.sqrt((seeds - 1) / seeds)
    assert 1 - 2 * scipy.stats.t.sf(half, 4 * (seeds - 1)) == pytest.approx(expected, abs=2e-3)
    assert coverage(seeds) == pytest.approx(expected, abs=0.045)  # three standard errors
