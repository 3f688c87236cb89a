"""Comparison of finished cells with published numbers, as rows that carry the provenance of each number."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.launch.settings import read_settings
from experiments.reproduction.cells import (
    Cell,
    Plan,
    Progress,
    cell_settings,
    cells_of,
    progress,
)
from experiments.reproduction.cost import seconds_spent
from experiments.reproduction.suites import JUDGED, Entry, Over, Published, Suite
from mac.data.provenance import provenance_from_dict
from mac.errors import UserError
from mac.formatting import counted
from mac.run.io.logger import EVAL, read_rows
from mac.run.io.run_metadata import launches
from mac.run.report.score import SUCCESS
from mac.run.report.stats import Curve, Interval, learning_curve, summarise
from mac.run.report.table import LATE

WIDENED = "widened by half a unit of the last digit for rounding"
WITHIN_DEVIATION = f"our mean lies within the published mean ± deviation, {WIDENED}"
WITHIN_INTERVAL = f"our 95% interval, {WIDENED}, contains the published mean, which has no deviation"
NO_TEST = "none: one seed, and no published deviation"
UNPUBLISHED = "none: the published number is not known to this project"
MIXED = "none: runs on generated and on other data in one number"
KINDS = {"generated": "generated", "downloaded": "official", "local": "local files"}
SETTINGS = ("steps", "hp", "data.rows", "data.normalize", "data.source", "data.shards", "eval.episodes")
SETTINGS += ("eval.noise",)
"""Settings whose difference from the preset a row tells."""


@dataclass(frozen=True)
class Row:
    """One number of a table: ours, the paper's, and where ours comes from.

    Success is in percent. `value` is the mean of the last evaluation and `low` to `high` its 95% interval;
    `setting` is the place in a figure; `paper` is NaN where the published number is not known, and
    `paper_text` the number as its table prints it. `iqm` is NaN for sums.
    `late` is the mean of the last three evaluations, `best` that of the best one, which is biased upwards.
    `judged` says which of our evaluations the verdict is about.
    """

    suite: str
    env: str
    task: str
    setting: str
    algo: str
    method: str
    preset: str
    data: str
    measure: str
    paper: float
    paper_deviation: float
    paper_text: str
    value: float
    deviation: float
    deviation_over: str
    low: float
    high: float
    iqm: float
    iqm_low: float
    iqm_high: float
    late: float
    best: float
    seeds: int
    episodes: int
    updates: str
    verdict: str
    judged: str
    test: str
    engine: str
    commit: str
    hardware: str
    seconds: float
    changes: str


class Finished(NamedTuple):
    """A finished cell, read.

    Attributes:
        curve: its learning curve.
        engines, commits, hardware, kinds: of all its launches and evaluations, without repeats.
        changes: settings that are not those of the preset.
    """

    cell: Cell
    folder: Path
    curve: Curve
    engines: tuple[str, ...]
    commits: tuple[str, ...]
    hardware: tuple[str, ...]
    kinds: tuple[str, ...]
    seconds: float
    changes: str


def read_finished(cell: Cell, plan: Plan, state: Progress | None = None) -> Finished | None:
    """Reads a cell; None if it is not finished, or its files are damaged.

    Args:
        state: its progress, where that is known.
    Raises:
        UserError: a file of it cannot be read.
    """
    state = state or progress(cell, plan)
    if state.status != "done":
        return None
    folder = plan.folder(cell)
    rows = list(read_rows(folder / EVAL))
    launched = launches(folder)
    return Finished(
        cell=cell,
        folder=folder,
        curve=learning_curve(rows, str(folder / EVAL)),
        engines=_distinct(row.get("engine") for row in rows),
        commits=_distinct(map(_commit, launched)),
        hardware=_distinct(_hardware(each.get("hardware", {})) for each in launched),
        kinds=_distinct(_kind(each.get("data")) for each in launched) or ("unknown",),
        seconds=seconds_spent(folder),
        changes=changes(cell, plan),
    )


def changes(cell: Cell, plan: Plan) -> str:
    """Settings in which a run differs from its preset, as text."""
    preset = cell_settings(cell._replace(flags=()), plan.data_dir).to_dict()
    run = read_settings(plan.folder(cell)).to_dict()
    found = []
    for name in SETTINGS:
        group, _, key = name.partition(".")
        here, there = run[group], preset[group]
        if name == "hp":
            found += [f"hp.{each}={value}" for each, value in here.items() if value != there[each]]
        elif (value := here[key] if key else here) != (there[key] if key else there):
            found.append(f"{name}={value}")
    return " ".join(found)


def _kind(data: Any) -> str:
    provenance = provenance_from_dict(data)
    return KINDS.get(provenance.kind, provenance.kind)


def _commit(launch: dict[str, Any]) -> str:
    git = launch.get("git") or {}
    return f"{str(git.get('commit', 'unknown'))[:9]}{' with changes' if git.get('changed') else ''}"


def _hardware(found: dict[str, Any]) -> str:
    device = found.get("device", "")
    return f"{found.get('cpu', 'unknown')}, {found.get('cores', '?')} cores" + (
        "" if device in ("", "cpu") else f"; {device}"
    )


def _distinct(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value) for value in values if value))


class Comparison(NamedTuple):
    """A suite compared with finished cells.

    Attributes:
        rows: of the entries that are complete.
        missing: the other entries.
        finished: the finished cells among those that the entries need.
        left_out: lines on what is missing, and why.
    """

    rows: list[Row]
    missing: list[Entry]
    finished: dict[Cell, Finished]
    left_out: list[str]


def compare(suite: Suite, entries: Sequence[Entry], plan: Plan) -> Comparison:
    """Compares entries of a suite with what is finished.

    Raises:
        UserError: runs record another measure than the suite's.
    """
    states = {cell: progress(cell, plan) for cell in cells_of(entries, plan)}
    found = {cell: read_finished(cell, plan, state) for cell, state in states.items()}
    finished = {cell: each for cell, each in found.items() if each is not None}
    for cell, each in finished.items():
        if (name := each.curve.measure.name) != suite.measure:
            raise UserError(
                f"{suite.name}: measure is {suite.measure!r}, but {cell.title} is measured by {name}; "
                f'write measure = "{name}", and published numbers of that kind'
            )
    rows, missing = [], []
    for entry in entries:
        cells = plan.cells(entry)
        if all(cell in finished for cell in cells):
            rows.append(row_of(suite, entry, [finished[cell] for cell in cells]))
        else:
            missing.append(entry)
    return Comparison(rows, missing, finished, left_out(missing, states, plan))


MOST_CELLS = 8
"""Unusable cells that a report names; `--list` names all."""


def faults_of(missing: Sequence[Entry], states: Mapping[Cell, Progress], plan: Plan) -> list[str]:
    """Lines on the cells of missing numbers that are to be mended, or are not available."""
    unusable = [f"left out, {cell.title}: {said}" for cell, said in _reasons(states, "unusable").items()]
    lines = unusable[:MOST_CELLS]
    if (more := len(unusable) - MOST_CELLS) > 0:
        lines.append(f"left out: {counted(more, 'more cell')} with damaged files; --list names them")
    by_reason: dict[str, list[str]] = {}
    unavailable = _reasons(states, "not available")
    for entry in missing:
        for cell in plan.cells(entry):
            if cell in unavailable:
                by_reason.setdefault(unavailable[cell], []).append(entry.method)
    for reason, methods in by_reason.items():
        lines.append(f"not available, {', '.join(dict.fromkeys(methods))}: {reason}")
    return lines


def left_out(missing: Sequence[Entry], states: Mapping[Cell, Progress], plan: Plan) -> list[str]:
    """Lines on the numbers that are missing: cells with a fault, and how many numbers wait for others."""
    lines = faults_of(missing, states, plan)
    known = {cell for cell, state in states.items() if state.status in ("unusable", "not available")}
    rest = sum(not known.intersection(plan.cells(entry)) for entry in missing)
    return [*lines, f"not in this table, because runs are not finished: {rest}"] if rest else lines


def _reasons(states: Mapping[Cell, Progress], status: str) -> dict[Cell, str]:
    return {cell: state.reason for cell, state in states.items() if state.status == status}


def setting_of(suite: Suite, entry: Entry) -> str:
    """The place of a number in a figure, as text; empty in a table."""
    if entry.setting is None:
        return ""
    line = f"{entry.setting.line}, " if entry.setting.line else ""
    return f"{line}{suite.axis}: {entry.setting.value:g}"


def scores_of(entry: Entry, curve: Curve, count: int = 1) -> Float[np.ndarray, "S tasks"]:
    """Scores of an entry in a run, mean of the last `count` evaluations; success in percent."""
    return _scale(curve) * curve.last(count)[:, _columns(entry, curve)]


def best_of(entry: Entry, curve: Curve) -> Float[np.ndarray, " tasks"]:
    """Scores of each task, mean over seeds, at the evaluation with the best mean."""
    means = _scale(curve) * curve.scores[:, :, _columns(entry, curve)].mean(axis=1)
    return means[int(np.argmax(means.mean(axis=1)))]


def _scale(curve: Curve) -> float:
    return 100.0 if curve.measure is SUCCESS else 1.0


def _columns(entry: Entry, curve: Curve) -> list[int]:
    """The tasks of a run that count.

    Raises:
        UserError: the run has no evaluations of the only one.
    """
    if entry.task not in (None, *curve.tasks):
        have = ", ".join(map(str, curve.tasks))
        raise UserError(
            f"task = {entry.task} of {entry.env}: its run has evaluations of task {have}; name that"
        )
    return [i for i, task in enumerate(curve.tasks) if entry.task in (None, task)]


def row_of(suite: Suite, entry: Entry, parts: Sequence[Finished]) -> Row:
    """The row of an entry, given all its runs."""
    scores = np.concatenate([scores_of(entry, part.curve) for part in parts], axis=1)
    late = np.concatenate([scores_of(entry, part.curve, LATE) for part in parts], axis=1)
    best = np.concatenate([best_of(entry, part.curve) for part in parts])
    factor = float(scores.shape[1]) if entry.aggregate == "sum" else 1.0
    summary = summarise(scores)
    mean = Interval(*(factor * end for end in summary.mean))
    iqm = Interval(math.nan, math.nan, math.nan) if entry.aggregate == "sum" else summary.iqm
    judged = mean
    if JUDGED[entry.published.judged] > 1:
        judged = Interval(*(factor * end for end in summarise(late).mean))
    kinds = _distinct(kind for part in parts for kind in part.kinds)
    verdict, test = judge(judged, entry.published) if len(kinds) == 1 else ("-", MIXED)
    steps = sorted({part.curve.steps[-1] for part in parts})
    return Row(
        suite=suite.name,
        env=entry.env,
        task="all" if entry.task is None else str(entry.task),
        setting=setting_of(suite, entry),
        algo=entry.algo,
        method=entry.method,
        preset=parts[0].cell.preset,
        data=" + ".join(kinds),
        measure=suite.measure,
        paper=entry.published.mean,
        paper_deviation=math.nan if entry.published.deviation is None else entry.published.deviation,
        paper_text=entry.published.text,
        value=mean.value,
        deviation=factor * deviation(scores, entry.published.over),
        deviation_over=entry.published.over,
        low=mean.low,
        high=mean.high,
        iqm=iqm.value,
        iqm_low=iqm.low,
        iqm_high=iqm.high,
        late=factor * float(late.mean()),
        best=factor * float(best.mean()),
        seeds=summary.seeds,
        episodes=min(part.curve.episodes for part in parts),
        updates=" to ".join(str(step) for step in dict.fromkeys((steps[0], steps[-1]))),
        verdict=verdict,
        judged=entry.published.judged,
        test=test,
        engine=" + ".join(_distinct(each for part in parts for each in part.engines)),
        commit=" + ".join(_distinct(each for part in parts for each in part.commits)),
        hardware=" + ".join(_distinct(each for part in parts for each in part.hardware)),
        seconds=sum(part.seconds for part in parts),
        changes="; ".join(_distinct(part.changes for part in parts)),
    )


def deviation(scores: Float[np.ndarray, "S tasks"], over: Over) -> float:
    """Sample standard deviation (n - 1) as a table states it; NaN with one seed.

    Those of the paper's own runs are of this kind: at 3 and 97 percent (2 of 60 episodes) the tables
    print 4 and 7, which n - 1 gives, and never 3 and 6, which n would give.

    Args:
        over: each seed's mean over tasks, or all tasks and seeds pooled.
    """
    if len(scores) < 2:
        return math.nan
    values = scores.mean(axis=1) if over == "seeds" else scores.reshape(-1)
    return float(values.std(ddof=1))


def judge(ours: Interval, paper: Published) -> tuple[str, str]:
    """Whether our mean is `inside`, `below` or `above` a published number, and by which test."""
    if math.isnan(paper.mean):
        return "-", UNPUBLISHED
    side = "below" if ours.value < paper.mean else "above"
    if paper.deviation is not None:
        inside = abs(ours.value - paper.mean) <= paper.deviation + paper.rounding
        return "inside" if inside else side, WITHIN_DEVIATION
    if math.isnan(ours.low):
        return "-", NO_TEST
    covers = ours.low - paper.rounding <= paper.mean <= ours.high + paper.rounding
    return "inside" if covers else side, WITHIN_INTERVAL
