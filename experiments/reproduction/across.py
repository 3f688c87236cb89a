"""Algorithms compared across the tasks of a suite, on the runs that all of them have finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from experiments.reproduction.cells import Plan
from experiments.reproduction.comparison import Finished, read_finished
from experiments.reproduction.suites import Entry, Suite
from mac.run.report.across_tasks import (
    bootstrap_interval,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)
from mac.run.report.score import SCORE, SUCCESS
from mac.run.report.stats import Interval, iqm

REFERENCE = "mac"
THRESHOLDS = np.linspace(0, 0.9, 10)


@dataclass(frozen=True)
class AcrossRow:
    """Statistics of one algorithm; scores are success, or the normalised score / 100.

    `improvement` is the probability that a seed of the reference scores higher than one of this algorithm on
    the same task. `profile` is the fraction of scores above 0, 0.1 ... 0.9.
    """

    suite: str
    algo: str
    preset: str
    data: str
    tasks: int
    seeds: int
    mean: float
    mean_low: float
    mean_high: float
    iqm: float
    iqm_low: float
    iqm_high: float
    gap: float
    gap_low: float
    gap_high: float
    reference: str
    improvement: float
    improvement_low: float
    improvement_high: float
    profile: str


def across(suite: Suite, entries: Sequence[Entry], plan: Plan) -> list[AcrossRow]:
    """One row for each algorithm with a finished run; none where fewer than two tasks are common to all."""
    finished: dict[str, dict[str, Finished]] = {}
    for entry in entries:
        for run in entry.runs:
            if run in finished.get(entry.algo, {}):
                continue
            found = read_finished(plan.cell(run, entry.algo), plan)
            if found is not None and found.curve.measure in (SUCCESS, SCORE):
                finished.setdefault(entry.algo, {})[run] = found
    common = set.intersection(*(set(runs) for runs in finished.values())) if finished else set[str]()
    order = [run for runs in finished.values() for run in runs if run in common]
    names = list(dict.fromkeys(order))
    tables = {algo: _scores([runs[run] for run in names]) for algo, runs in finished.items() if names}
    if not tables or next(iter(tables.values())).shape[1] < 2:
        return []
    reference = REFERENCE if REFERENCE in tables else next(iter(tables))
    rows = []
    for algo, scores in tables.items():
        kinds = dict.fromkeys(kind for run in names for kind in finished[algo][run].kinds)
        labels = (suite.name, algo, plan.preset, " + ".join(kinds))
        rows.append(_row(labels, scores, reference, tables[reference]))
    return rows


def _scores(parts: Sequence[Finished]) -> Float[np.ndarray, "S tasks"]:
    scaled = [part.curve.last() / (1.0 if part.curve.measure is SUCCESS else 100.0) for part in parts]
    return np.concatenate(scaled, axis=1)


def _row(
    labels: tuple[str, str, str, str],
    scores: Float[np.ndarray, "S tasks"],
    reference: str,
    others: Float[np.ndarray, "R tasks"],
) -> AcrossRow:
    """The row of `labels` (suite, algorithm, preset, data), compared with the scores of the reference."""
    mean = bootstrap_interval(_mean, scores)
    middle, gap = bootstrap_interval(_iqm, scores), bootstrap_interval(optimality_gap, scores)
    better = bootstrap_interval(probability_of_improvement, others, scores)
    if labels[1] == reference:
        better = Interval(0.5, 0.5, 0.5)
    profile = performance_profile(scores, THRESHOLDS)
    said = " ".join(f"{at:.1f}:{part:.3f}" for at, part in zip(THRESHOLDS, profile, strict=True))
    seeds, tasks = scores.shape
    return AcrossRow(*labels, tasks, seeds, *mean, *middle, *gap, reference, *better, said)


def _mean(scores: Any) -> Any:
    return scores.mean(axis=(-2, -1))


def _iqm(scores: Any) -> Any:
    return iqm(scores.reshape(*scores.shape[:-2], -1))


def across_table(suite: Suite, rows: Sequence[AcrossRow]) -> Table:
    """A table for `print_tables`."""
    first = rows[0]
    caption = (
        f"{first.tasks} tasks that all of these algorithms have finished; 95% bootstrap intervals over "
        "seeds, stratified by task (Agarwal et al. 2021)"
    )
    title = f"{suite.name}, across tasks ({first.preset})"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = ("mean", "IQM", "optimality gap", f"P({first.reference} is better)", "data", "seeds")
    table.add_column("algorithm")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        intervals = [
            Interval(row.mean, row.mean_low, row.mean_high),
            Interval(row.iqm, row.iqm_low, row.iqm_high),
            Interval(row.gap, row.gap_low, row.gap_high),
            Interval(row.improvement, row.improvement_low, row.improvement_high),
        ]
        shown = [f"{x.value:.2f} ({x.low:.2f} to {x.high:.2f})" for x in intervals]
        shown = [text.replace(" (nan to nan)", "") for text in shown]
        if row.algo == row.reference:
            shown[-1] = "-"
        table.add_row(suite.methods[row.algo], *shown, row.data, str(row.seeds))
    return table
