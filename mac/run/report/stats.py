"""Aggregate scores and their uncertainty over seeds, in NumPy.

The definitions are those of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice": a score is one seed's result on one task, and intervals come from a bootstrap
that draws seeds, separately for each task (strata), because a seed is what an experiment repeats.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mac.atomic_files import misfit
from mac.errors import UserError
from mac.run.report.score import MEASURES, SUCCESS, ScoreKind


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval; the ends are NaN with fewer than two seeds."""

    value: float
    low: float
    high: float


class ScoreSummary(NamedTuple):
    """Aggregates of a table of scores of `seeds` seeds on `tasks` tasks."""

    mean: Interval
    iqm: Interval
    seeds: int
    tasks: int


def iqm(scores: Float[np.ndarray, "*batch N"]) -> Float[np.ndarray, "*batch"]:
    """Interquartile mean over the last axis: the mean without the lowest and the highest quarter.

    Where a quarter is not whole it is rounded down, floor(N / 4) scores leave at each end, as in
    `scipy.stats.trim_mean(scores, 0.25)`; so with fewer than four scores it is the mean.
    """
    n = scores.shape[-1]
    cut = n // 4
    return np.asarray(np.sort(scores, axis=-1)[..., cut : n - cut].mean(axis=-1))


def bootstrap(
    scores: Float[np.ndarray, "S tasks"], reps: int, rng: np.random.Generator
) -> Float[np.ndarray, "reps S tasks"]:
    """Draws `reps` tables as large as `scores`, each column from its own column with replacement."""
    seeds, tasks = scores.shape
    rows = rng.integers(seeds, size=(reps, seeds, tasks))
    return scores[rows, np.arange(tasks)]


def summarise(
    success: Float[np.ndarray, "S tasks"], *, confidence: float = 0.95, reps: int = 10_000, seed: int = 0
) -> ScoreSummary:
    """Mean and IQM of all scores with percentile intervals of a bootstrap stratified by task.

    Args:
        success: score of each seed on each task, for instance a success rate in [0, 1].
        confidence: coverage of the intervals, in (0, 1).
        reps: bootstrap tables; the interval's ends vary with `seed` by about 1/sqrt(reps) of its width.
        seed: of the bootstrap's draws; equal arguments give equal intervals.
    Raises:
        ValueError: `success` is empty, not a matrix, or not finite.
    """
    scores = np.asarray(success, np.float64)
    if scores.ndim != 2 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"success must be a finite matrix of seeds by tasks, not of shape {scores.shape}")
    tables = bootstrap(scores, reps, np.random.default_rng(seed)).reshape(reps, -1)
    flat = scores.reshape(-1)

    def interval(value: float, draws: np.ndarray) -> Interval:
        if len(scores) < 2:
            return Interval(value, math.nan, math.nan)
        tail = (1 - confidence) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    return ScoreSummary(
        mean=interval(float(flat.mean()), tables.mean(axis=1)),
        iqm=interval(float(iqm(flat)), iqm(tables)),
        seeds=scores.shape[0],
        tasks=scores.shape[1],
    )


RETURNS = ("predicted_return", "realised_return")
"""Columns of `eval.jsonl` that rows of some algorithms, and of older runs, lack."""


class Curve(NamedTuple):
    """Scores of a run: `scores[i, s, t]` at `steps[i]`, of `seeds[s]` on `tasks[t]`, of the kind `measure`.

    `data` says where the training data come from, if the rows do.
    `predicted` and `realised`, of the same shape, are the means of the returns that the algorithm expected
    and of the realized ones; NaN where the rows do not tell.
    """

    steps: list[int]
    seeds: list[int]
    tasks: list[int]
    scores: np.ndarray
    episodes: int
    predicted: np.ndarray
    realised: np.ndarray
    data: str = ""
    measure: ScoreKind = SUCCESS

    def last(self, count: int = 1) -> np.ndarray:
        """Mean over the last `count` evaluations (or all, if fewer), shape [S, tasks]."""
        return self.scores[-count:].mean(axis=0)


def learning_curve(rows: Iterable[Mapping[str, Any]], where: str = "eval.jsonl") -> Curve:
    """Arranges rows of `eval.jsonl`. Steps at which a seed or a task is missing are left out.

    `episodes` is the smallest number of episodes behind one score.

    Args:
        where: the file, for messages; its lines are counted from 1.
    Raises:
        UserError: there is no complete evaluation, a row lacks a field, or has one of a wrong type.
    """
    rows = list(rows)
    check_rows(rows, where)
    data = "; ".join(dict.fromkeys(row["data"] for row in rows if row.get("data")))
    measure = MEASURES[next((row["measure"] for row in rows if row.get("measure") in MEASURES), SUCCESS.name)]
    check_rows(rows, where, measure)
    table = {
        (r["step"], r["seed"], r["task"]): (
            r[measure.name],
            r["episodes"],
            *(r.get(k, math.nan) for k in RETURNS),
        )
        for r in rows
    }
    steps, seeds, tasks = (sorted({key[axis] for key in table}) for axis in range(3))
    complete = [i for i in steps if all((i, s, t) in table for s in seeds for t in tasks)]
    if not complete:
        raise UserError(f"{where} holds no complete evaluation: train until the first one")
    cells = [[[table[i, s, t] for t in tasks] for s in seeds] for i in complete]
    values = np.asarray(cells, np.float64)
    scores, episodes, predicted, realised = np.moveaxis(values, -1, 0)
    return Curve(complete, seeds, tasks, scores, int(episodes.min()), predicted, realised, data, measure)


def check_rows(rows: Iterable[Mapping[str, Any]], where: str, measure: ScoreKind | None = None) -> None:
    """Checks that rows are those of `eval.jsonl`, and have a score of the kind `measure`, if it is given.

    Raises:
        UserError: one is not; its line in the file `where` is counted from 1.
    """
    for line, row in enumerate(rows, start=1):
        if fault := _misread(row) or (measure and _no_score(row, measure)):
            raise UserError(f"{where}, line {line}: {fault}; restore the file")


def _misread(row: Any) -> str | None:
    """Returns the first reason why a row is none of `eval.jsonl`, whatever it is measured by."""
    if fault := misfit(row, step=int, seed=int, task=int, episodes=int):
        return fault
    number, text = (int, float), str
    known = {"data": text, "measure": text, "engine": text, **dict.fromkeys(RETURNS, number)}
    return misfit(row, **{name: kind for name, kind in known.items() if name in row})


def _no_score(row: Mapping[str, Any], measure: ScoreKind) -> str | None:
    """Returns why a row has no score of a kind."""
    score = row.get(measure.name)
    if isinstance(score, int | float) and math.isfinite(score):
        return None
    return f"{measure.name} is no number" if measure.name in row else f"{measure.name} is missing"
