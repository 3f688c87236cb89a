"""Reasons why a report has no number: no folder, no finished cells, or cells of other sizes."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from experiments.reproduction.cells import Cell, Plan, Progress, cells_of, progress
from experiments.reproduction.comparison import faults_of
from experiments.reproduction.model_errors import FOLDER as STUDIES
from experiments.reproduction.model_errors import study_cell
from experiments.reproduction.suites import Entry, Suite
from experiments.reproduction.times import FOLDER as TIMES
from experiments.reproduction.times import time_cells
from mac.atomic_files import visible
from mac.formatting import counted

Chosen = Sequence[tuple[Suite, list[Entry]]]


def why_nothing(chosen: Chosen, plan: Plan) -> str:
    """The line of a report without a number: what was looked for, what is there instead, and the remedy."""
    if not plan.out.is_dir():
        return f"--out={plan.out} does not exist; name the folder of the runs, or run without --report"
    names = dict.fromkeys(f"{suite.name} ({_sizes(suite, plan)})" for suite, _ in chosen)
    states = {
        suite.name: {cell: progress(cell, plan) for cell in cells_of(entries, plan)}
        for suite, entries in chosen
        if suite.of_runs
    }
    every = [state.status for each in states.values() for state in each.values()]
    may_run = not every or any(status not in ("unusable", "not available") for status in every)
    found = [*_unfinished(chosen, states, plan), *_others(chosen, plan)]
    said = f"{plan.out} has not all cells of any number of {', '.join(names)}"
    return "; ".join([said, *found, *(["run the rest first, without --report"] if may_run else [])])


def _sizes(suite: Suite, plan: Plan) -> str:
    if suite.kind == "time":
        return f"preset {plan.time_preset}, 1 seed"
    return f"preset {plan.preset}, {counted(plan.seeds, 'seed')}"


def _unfinished(chosen: Chosen, states: Mapping[str, Mapping[Cell, Progress]], plan: Plan) -> list[str]:
    """How many cells are finished, and what is wrong with others."""
    found = []
    for suite, entries in chosen:
        if own := states.get(suite.name):
            done = sum(state.status == "done" for state in own.values())
            found += [f"{done} of its {counted(len(own), 'cell')} finished"] if done else []
            found += faults_of(entries, own, plan)
    return list(dict.fromkeys(found))


def _others(chosen: Chosen, plan: Plan) -> list[str]:
    """Cells of the same algorithms and environments that have other sizes or flags, with those."""
    counts = Counter[str]()
    for suite, entries in chosen:
        wanted = _cells(suite, entries, plan)
        kinds = {cell._replace(preset="", seeds=0, flags=()).name for cell in wanted}
        for name in _names(suite, plan):
            match = re.fullmatch(r"(.+)_([a-z]+)_s(\d+)(_[0-9a-f]{8})?", name)
            if not match or name in {cell.name for cell in wanted} or f"{match[1]}__s0" not in kinds:
                continue
            size = f"--preset {match[2]}" + ("" if suite.kind == "time" else f" --seeds {match[3]}")
            flags = (
                " and other flags after `--`" if match[4] else " without these flags" if plan.flags else ""
            )
            counts[size + flags] += 1
    return [f"it has {counted(count, 'cell')} of {size}" for size, count in counts.most_common(3)]


def _cells(suite: Suite, entries: Sequence[Entry], plan: Plan) -> list[Cell]:
    if suite.kind == "time":
        return time_cells(entries, plan)
    if suite.kind == "model error":
        return [study_cell(suite, entry, plan) for entry in entries]
    return cells_of(entries, plan)


def _names(suite: Suite, plan: Plan) -> Iterable[str]:
    """Names of cells that are in the folder of all runs, as `Cell.name` makes them."""
    if suite.kind == "time":
        return [path.stem for path in visible(plan.out / TIMES, "*/*.json")]
    folder = plan.out / STUDIES if suite.kind == "model error" else plan.out
    return [path.name for path in visible(folder, "*") if path.is_dir()]
