"""The table that ends a run: success, or a score, with its uncertainty over seeds."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mac.formatting import counted
from mac.run.report.score import SUCCESS
from mac.run.report.stats import Curve, Interval, summarise

LATE = 3  # evaluations that the second row averages: one evaluation alone is noisy
DIAGNOSTICS = "diagnostics/"
NOT_EVALUATED = "no environment, so no evaluation"
"""Caption of the diagnostics of runs on data alone."""
WIDEST = 10_000  # columns of a table


def print_tables(*tables: Table) -> None:
    """Prints tables on standard output, as wide as they are: a narrow terminal cuts no number."""
    console = Console()
    Console(width=max(console.width, *(_width(console, table) for table in tables))).print(*tables)


def _width(console: Console, table: Table) -> int:
    """Columns of text that a table needs where nothing is cut."""
    return Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum


def results_table(curve: Curve, *, title: str) -> Table:
    """Mean and IQM over seeds and tasks, each with its 95% bootstrap interval, written as its measure is.

    Rows: the last evaluation, the mean of the last `LATE` ones (if there are as many), and where a
    run has several tasks the last evaluation of each. Below, the returns that the algorithm expected at
    the last evaluation and the realized ones, if the rows have them, and where the data come from. Print
    it with `print_tables`.
    """
    seeds, tasks = len(curve.seeds), len(curve.tasks)
    caption = f"{counted(seeds, 'seed')}, {counted(curve.episodes, 'episode')} per seed"
    caption += " and task" * (tasks > 1)
    if seeds == 1:
        caption += "; intervals need two seeds"
    caption += _returns(curve)
    caption += f"\ndata: {curve.data}" if curve.data else ""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column(curve.measure.axis if curve.measure is not SUCCESS else "success")
    for name in ("mean", "95% interval", "IQM", "95% interval"):
        table.add_column(name, justify="right")
    form = curve.measure.form
    _add(table, f"at {counted(curve.steps[-1], 'update')}", curve.last(), form)
    if len(curve.steps) >= LATE:
        _add(table, f"last {LATE} evaluations", curve.last(LATE), form)
    if tasks > 1:
        for column, task in enumerate(curve.tasks):
            _add(table, f"  task {task}", curve.last()[:, column : column + 1], form)
    return table


def comparison_table(curves: Mapping[str, Curve], *, title: str) -> Table:
    """Runs one below the other, by name: means of the last evaluation and of the last `LATE`, over seeds and
    tasks, each with its 95% bootstrap interval over seeds; below, where the data come from.
    """
    measures = list(dict.fromkeys(curve.measure for curve in curves.values()))
    caption = "\n".join(dict.fromkeys(f"data: {curve.data}" for curve in curves.values() if curve.data))
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column(" / ".join(measure.name for measure in measures))
    for name in ("seeds", "updates", "at the end", f"last {LATE}"):
        table.add_column(name, justify="right")
    for name, curve in curves.items():
        ends = (summarise(curve.last(count)).mean for count in (1, min(LATE, len(curve.steps))))
        cells = ["{} ({})".format(*_cells(end, curve.measure.form)) for end in ends]
        table.add_row(name, str(len(curve.seeds)), f"{curve.steps[-1]:,}", *cells)
    return table


def last_diagnostics(
    rows: Iterable[Mapping[str, Any]], step: int | None = None
) -> dict[str, Float[np.ndarray, " S"]]:
    """The last value of each diagnostic, by name, for each seed in order.

    Args:
        rows: of `metrics.jsonl`.
        step: update whose diagnostics are meant; None is each seed's last.
    """
    last: dict[str, dict[int, float]] = {}
    for row in rows:
        if step is not None and row["step"] != step:
            continue
        for name, value in row.items():
            if name.startswith(DIAGNOSTICS):
                last.setdefault(name.removeprefix(DIAGNOSTICS), {})[row["seed"]] = value
    return {name: np.asarray([value for _, value in sorted(its.items())]) for name, its in last.items()}


Diagnosed = Mapping[str, Mapping[str, Float[np.ndarray, " S"]]]
"""Diagnostics of each seed (`last_diagnostics`) of runs, by the run's name."""


def diagnostics_tables(
    runs: Diagnosed, *, title: str, caption: str = "", width: int | None = None
) -> list[Table]:
    """Diagnostics, a column for each run: mean and range over seeds. Tables one below the other, each with as
    many runs as `width` columns of text hold, but with one at least.

    Args:
        width: None is the terminal's.
    """
    console = Console(width=width)
    groups: list[Diagnosed] = []
    for name, found in runs.items():
        wider = {**groups[-1], name: found} if groups else {name: found}
        table = _diagnostics_table(wider, title, caption)
        if groups and _width(console, table) > console.width:
            groups.append({name: found})
        else:
            groups[-1:] = [wider]
    return [_diagnostics_table(group, title, caption) for group in groups]


def _diagnostics_table(runs: Diagnosed, title: str, caption: str) -> Table:
    table = Table(title=title, title_justify="left", caption=caption)
    table.add_column("diagnostics")
    for name in runs:
        table.add_column(name, justify="right")
    for name in dict.fromkeys(name for found in runs.values() for name in found):
        table.add_row(name, *(_mean_and_range(found.get(name)) for found in runs.values()))
    return table


def _mean_and_range(values: Float[np.ndarray, " S"] | None) -> str:
    if values is None:
        return "-"
    spread = f" ({values.min():.3g} to {values.max():.3g})" if len(values) > 1 else ""
    return f"{values.mean():.3g}{spread}"


def _add(table: Table, name: str, scores: np.ndarray, form: str) -> None:
    summary = summarise(scores)
    table.add_row(name, *_cells(summary.mean, form), *_cells(summary.iqm, form))


def _returns(curve: Curve) -> str:
    """A line about the last evaluation's returns; empty if its rows have none."""
    expected, realised = (float(np.mean(x[-1])) for x in (curve.predicted, curve.realised))
    if math.isnan(expected) or math.isnan(realised):
        return ""
    how = "too high" if expected > realised else "too low"
    gap = f"{abs(expected - realised):.1f} {how}"
    return f"\ndiscounted return: {expected:.1f} expected, {realised:.1f} realised: {gap}"


def _cells(interval: Interval, form: str) -> tuple[str, str]:
    # In words: a dash would look like the sign of a negative number, and not every terminal has a long one.
    ends = "-" if math.isnan(interval.low) else f"{interval.low:{form}} to {interval.high:{form}}"
    return f"{interval.value:{form}}", ends
