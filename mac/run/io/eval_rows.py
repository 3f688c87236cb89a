"""Rows of `eval.jsonl`: the results of an evaluation, and warnings about it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mac.errors import UserError
from mac.run.report.score import score_columns
from mac.types import EnvSpec, Episodes


class Evaluation(NamedTuple):
    """Results of one evaluation call, and the facts about it that its rows report.

    Attributes:
        step: updates before it.
        tasks: ids of the tasks on the second axis of `result`.
        engine: physics engine, or `ogbench`.
        data: origin of the training data, if known.
        spec: of the environment; needed for scores of tasks whose rewards are recorded in the data.
    """

    step: int
    tasks: Sequence[int]
    result: Episodes
    engine: str
    data: str = ""
    spec: EnvSpec | None = None


def eval_rows(evaluation: Evaluation, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the rows of `eval.jsonl`, one per seed and task.

    Columns: `step`, `seed`, `task`, `success` in [0, 1], `return` (undiscounted, mean over episodes),
    `length` (control steps, mean), `episodes`, `engine`, `dropped` (contacts that the engine left out, sum
    over episodes), `unstable` (episodes that ended because the simulation became unstable; they count as
    failures, with the return up to then), and `data` if it is known. Algorithms that predict returns add
    `predicted_return` and `realised_return`: means over episodes of discounted returns, as
    `mac.run.report.realized_return.realised_return` defines them. Tasks whose rewards are recorded in
    the data add `measure`, the column to judge by in place of `success`, and maybe `score`
    (`mac.run.report.score`).

    Raises:
        UserError: a policy gave actions that are not finite (`bad_actions`).
    """
    step, tasks, result, engine, data, spec = evaluation
    if fault := bad_actions(tasks, result):
        lane, what = fault
        raise UserError(
            f"evaluation after update {step}: the policy of seed {seeds[lane]} {what}; "
            "look for the update where its losses grow in metrics.jsonl"
        )
    success, returns, length = (
        np.asarray(x, np.float64) for x in (result.success, result.episode_return, result.length)
    )
    dropped = np.asarray(result.dropped, np.int64)
    unstable = np.zeros(success.shape, bool) if result.unstable is None else np.asarray(result.unstable)
    expected = (
        {}
        if result.predicted is None or result.realised is None
        else {
            "predicted_return": np.asarray(result.predicted, np.float64),
            "realised_return": np.asarray(result.realised, np.float64),
        }
    )
    return [
        {
            "step": step,
            "seed": seed,
            "task": task,
            "success": success[i, j].mean(),
            "return": returns[i, j].mean(),
            "length": length[i, j].mean(),
            "episodes": success.shape[2],
            "engine": engine,
            "dropped": dropped[i, j].sum(),
            "unstable": unstable[i, j].sum(),
            **({"data": data} if data else {}),
            **(score_columns(spec, returns[i, j].mean()) if spec else {}),
            **{name: x[i, j].mean() for name, x in expected.items()},
        }
        for i, seed in enumerate(seeds)
        for j, task in enumerate(tasks)
    ]


def bad_actions(tasks: Sequence[int], result: Episodes) -> tuple[int, str] | None:
    """The first lane whose policy gave an action that is not finite, and what it did, as an error says it."""
    if result.bad_action is None:
        return None
    found = np.argwhere(np.asarray(result.bad_action))
    if not len(found):
        return None
    lane, task, _ = found[0]
    return int(lane), f"gave actions that are not finite in task {tasks[task]}, where the states were finite"


def warnings_of(rows: Iterable[Mapping[str, Any]], flag: str) -> list[str]:
    """A line for each thing that makes the evaluation doubtful that `rows` describe.

    Args:
        rows: as `eval_rows` makes them.
        flag: of the command line, that chooses the engine.
    """
    rows = list(rows)
    return [said for warn in (overflow_warning, instability_warning) if (said := warn(rows, flag))]


def overflow_warning(rows: Sequence[Mapping[str, Any]], flag: str) -> str | None:
    """One line if an engine left out contacts in the evaluation that `rows` describe, else None.

    The arguments are those of `warnings_of`.
    """
    total, each = _by_task(rows, "dropped")
    return total and (
        f"warning: engine {rows[0]['engine']} had no room for {total} contacts ({each}), so success "
        f"there may be wrong; use {flag} c, which keeps every contact"
    )


def instability_warning(rows: Sequence[Mapping[str, Any]], flag: str) -> str | None:
    """One line if simulations became unstable in the evaluation that `rows` describe, else None.

    The arguments are those of `warnings_of`.
    """
    total, each = _by_task(rows, "unstable")
    return total and (
        f"warning: the simulation on engine {rows[0]['engine']} became unstable in {total} episodes "
        f"({each}); they count as failures, with the return up to then; compare with another {flag}"
    )


def _by_task(rows: Iterable[Mapping[str, Any]], column: str) -> tuple[str | None, str]:
    """Sum of a column, None if that is 0, and the sum of each task where it is not, as text."""
    by_task: dict[int, int] = {}
    for row in rows:
        by_task[row["task"]] = by_task.get(row["task"], 0) + int(row[column])
    total = sum(by_task.values())
    each = ", ".join(f"task {task}: {count:,}" for task, count in by_task.items() if count)
    return (f"{total:,}" if total else None), each
