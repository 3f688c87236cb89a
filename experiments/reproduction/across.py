"""Algorithms compared across the tasks of a suite, on the runs that all of them have finished."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from experiments.reproduction.cells import Cell
from experiments.reproduction.comparison import Finished
from experiments.reproduction.suites import Suite
from mac.formatting import plural
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

    `names` are the tasks, and `runs` the runs that they are from, of `all_runs` that the table has.
    `improvement` is the probability that a seed of the reference scores higher than one of this algorithm on
    the same task. `profile` is the fraction of scores above 0, 0.1 ... 0.9.
    """

    suite: str
    algo: str
    preset: str
    data: str
    tasks: int
    runs: int
    all_runs: int
    names: str
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


def across(suite: Suite, finished: Mapping[Cell, Finished], all_runs: int) -> list[AcrossRow]:
    """One row for each algorithm with a finished cell, in the order of the suite.

    None where there is one algorithm, or fewer than two tasks that are common to all.

    Args:
        all_runs: runs of each algorithm that the table has.
    """
    by_algo: dict[str, dict[str, Finished]] = {}
    for cell, each in finished.items():
        if each.curve.measure in (SUCCESS, SCORE):
            by_algo.setdefault(cell.algo, {})[cell.env] = each
    common = set.intersection(*(set(runs) for runs in by_algo.values())) if by_algo else set[str]()
    names = list(dict.fromkeys(run for runs in by_algo.values() for run in runs if run in common))
    tables = {algo: _scores([runs[run] for run in names]) for algo, runs in by_algo.items() if names}
    tables = {algo: tables[algo] for algo in suite.methods if algo in tables}
    if len(tables) < 2 or next(iter(tables.values())).shape[1] < 2:
        return []
    reference = REFERENCE if REFERENCE in tables else next(iter(tables))
    rows = []
    for algo, scores in tables.items():
        kinds = dict.fromkeys(kind for run in names for kind in by_algo[algo][run].kinds)
        labels = (suite.name, algo, by_algo[algo][names[0]].cell.preset, " + ".join(kinds))
        which = (len(names), all_runs, task_names(names))
        rows.append(_row(labels, which, scores, reference, tables[reference]))
    return rows


def task_names(runs: Sequence[str]) -> str:
    """Names of the tasks of runs, those of one environment together: `cube-single-play tasks 1, 3`."""
    by_env: dict[str, list[str]] = {}
    for run in runs:
        found = re.fullmatch(r"(.+)-singletask-task(\d+)-v0", run)
        by_env.setdefault(found[1] if found else run, []).extend([found[2]] if found else [])
    said = []
    for env, tasks in by_env.items():
        said.append(f"{env} {plural('task', len(tasks))} {', '.join(tasks)}" if tasks else env)
    return "; ".join(said)


def _scores(parts: Sequence[Finished]) -> Float[np.ndarray, "S tasks"]:
    scaled = [part.curve.last() / (1.0 if part.curve.measure is SUCCESS else 100.0) for part in parts]
    return np.concatenate(scaled, axis=1)


def _row(
    labels: tuple[str, str, str, str],
    which: tuple[int, int, str],
    scores: Float[np.ndarray, "S tasks"],
    reference: str,
    others: Float[np.ndarray, "R tasks"],
) -> AcrossRow:
    """The row of `labels` (suite, algorithm, preset, data), compared with the scores of the reference.

    Args:
        which: numbers of runs that count, and of all, and the names of the tasks.
    """
    mean = bootstrap_interval(_mean, scores)
    middle, gap = bootstrap_interval(_iqm, scores), bootstrap_interval(optimality_gap, scores)
    better = bootstrap_interval(probability_of_improvement, others, scores)
    if labels[1] == reference:
        better = Interval(0.5, 0.5, 0.5)
    profile = performance_profile(scores, THRESHOLDS)
    said = " ".join(f"{at:.1f}:{part:.3f}" for at, part in zip(THRESHOLDS, profile, strict=True))
    seeds, tasks = scores.shape
    return AcrossRow(*labels, tasks, *which, seeds, *mean, *middle, *gap, reference, *better, said)


def _mean(scores: Any) -> Any:
    return scores.mean(axis=(-2, -1))


def _iqm(scores: Any) -> Any:
    return iqm(scores.reshape(*scores.shape[:-2], -1))


def across_title(suite: Suite, rows: Sequence[AcrossRow]) -> str:
    """Title of a table across tasks."""
    first = rows[0]
    if first.runs == first.all_runs:
        tasks = f"all {first.tasks} tasks"
    elif first.runs == first.tasks:
        tasks = f"{first.tasks} of {first.all_runs} tasks"
    else:
        tasks = f"{first.tasks} tasks of {first.runs} of {first.all_runs} runs"
    return f"{suite.name}, across {tasks} ({first.preset})"


def across_notes(rows: Sequence[AcrossRow]) -> list[str]:
    """Lines on a table across tasks: which tasks, and the estimators."""
    first = rows[0]
    which = ", those that all of these algorithms have finished" * (first.runs < first.all_runs)
    return [
        f"tasks{which}: {first.names}",
        "95% bootstrap intervals over seeds, stratified by task (Agarwal et al. 2021)",
    ]


def across_columns(suite: Suite, rows: Sequence[AcrossRow]) -> dict[str, list[str]]:
    """The cells of each column of a table across tasks."""
    better = f"P({suite.methods[rows[0].reference]} is better)"
    columns = dict[str, list[str]]()
    for row in rows:
        known = row.algo != row.reference
        cells = {
            "algorithm": suite.methods[row.algo],
            "mean": _shown(row.mean, row.mean_low, row.mean_high),
            "IQM": _shown(row.iqm, row.iqm_low, row.iqm_high),
            "optimality gap": _shown(row.gap, row.gap_low, row.gap_high),
            better: _shown(row.improvement, row.improvement_low, row.improvement_high) if known else "-",
            "data": row.data,
            "seeds": str(row.seeds),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    return columns


def _shown(value: float, low: float, high: float) -> str:
    return f"{value:.2f}" + ("" if math.isnan(low) else f" ({low:.2f} to {high:.2f})")


def across_table(suite: Suite, rows: Sequence[AcrossRow]) -> Table:
    """A table for `print_tables`."""
    title = across_title(suite, rows)
    caption = "\n".join(across_notes(rows))
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = across_columns(suite, rows)
    for name in columns:
        table.add_column(name, justify="left" if name in ("algorithm", "data") else "right")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table
