"""Statistics over many tasks, in NumPy: probability of improvement, performance profile, optimality gap.

The definitions are those of Agarwal et al. 2021, as in `mac.run.report.stats`. Scores are [..., S, tasks],
one seed's result on one task; leading axes are those of bootstrap tables.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from mac.run.report.stats import Interval, bootstrap


def probability_of_improvement(
    ours: Float[np.ndarray, "*batch S tasks"], theirs: Float[np.ndarray, "*batch R tasks"]
) -> Float[np.ndarray, "*batch"]:
    """Probability that a seed of ours scores higher than one of theirs on the same task, mean over tasks.

    Equal scores count half, as in the statistic U of Mann and Whitney divided by S R.
    """
    x, y = ours[..., :, None, :], theirs[..., None, :, :]
    return np.asarray(((x > y) + 0.5 * (x == y)).mean(axis=(-3, -2, -1)))


def performance_profile(
    scores: Float[np.ndarray, "*batch S tasks"], thresholds: Float[np.ndarray, " K"]
) -> Float[np.ndarray, "*batch K"]:
    """Fraction of all scores above each threshold; it falls from 1 to 0."""
    return np.asarray((scores[..., None] > thresholds).mean(axis=(-3, -2)))


def optimality_gap(
    scores: Float[np.ndarray, "*batch S tasks"], target: float = 1.0
) -> Float[np.ndarray, "*batch"]:
    """Mean of what each score lacks to the target; scores above it count as the target."""
    return np.asarray(target - np.minimum(scores, target).mean(axis=(-2, -1)))


def bootstrap_interval(
    statistic: Callable[..., Any],
    *scores: Float[np.ndarray, "_ _"],
    confidence: float = 0.95,
    reps: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic with the percentile interval of a bootstrap over seeds, stratified by task.

    Args:
        statistic: of one table of scores [..., S, tasks] or of several, one number for each leading index.
        scores: the tables; each is drawn anew, independently of the others.
        confidence: coverage of the interval, in (0, 1).
        reps: bootstrap tables.
        seed: of the draws; equal arguments give equal intervals.
    Returns:
        The statistic; the ends are NaN where a table has fewer than two seeds.
    Raises:
        ValueError: a table is empty or not finite.
    """
    if not all(table.size and np.isfinite(table).all() for table in scores):
        raise ValueError("scores must be finite and not empty")
    value = float(statistic(*scores))
    if min(len(table) for table in scores) < 2:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = statistic(*(bootstrap(table, reps, rng) for table in scores))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
