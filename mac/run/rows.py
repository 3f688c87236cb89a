"""What an evaluation found, as rows of `eval.jsonl`, and what makes it doubtful."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mac.errors import UserError
from mac.run.measure import columns
from mac.types import EnvSpec, Episodes


def eval_rows(
    step: int,
    seeds: Sequence[int],
    tasks: Sequence[int],
    result: Episodes,
    engine: str,
    data: str = "",
    spec: EnvSpec | None = None,
) -> list[dict[str, Any]]:
    """Rows of `eval.jsonl`: `step`, `seed`, `task`, `success` in [0, 1], `return` (undiscounted, mean
    over episodes), `length` (control steps, mean), `episodes`, `engine`, `dropped` (contacts that the
    engine left out, sum over episodes), `data` (where the training data come from, if it is known); of an
    algorithm that predicts returns also `predicted_return`, what it expected at the start, and
    `realised_return`, what came (means over episodes, of discounted returns as
    `mac.run.returns.realised_return` defines them). Where `spec` says that data record rewards, also
    `measure`, the column to judge by in place of `success`, and maybe `score` (`mac.run.measure`).

    Raises:
        UserError: a return is not finite, because the policy's actions were not.
    """
    success, returns, length = (
        np.asarray(x, np.float64) for x in (result.success, result.episode_return, result.length)
    )
    dropped = np.asarray(result.dropped, np.int64)
    expected = (
        {}
        if result.predicted is None or result.realised is None
        else {
            "predicted_return": np.asarray(result.predicted, np.float64),
            "realised_return": np.asarray(result.realised, np.float64),
        }
    )
    for i, j, _ in np.argwhere(~np.isfinite(returns))[:1]:
        raise UserError(
            f"evaluation after update {step}: the policy of seed {seeds[i]} gave actions that are not finite "
            f"in task {tasks[j]}; look for the update where its losses grow in metrics.jsonl"
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
            **({"data": data} if data else {}),
            **(columns(spec, returns[i, j].mean()) if spec else {}),
            **{name: x[i, j].mean() for name, x in expected.items()},
        }
        for i, seed in enumerate(seeds)
        for j, task in enumerate(tasks)
    ]


def overflow_warning(rows: Iterable[Mapping[str, Any]], flag: str) -> str | None:
    """One line if an engine left out contacts in the evaluation that `rows` describe, else None.

    Args:
        rows: as `eval_rows` makes them.
        flag: of the command line, that chooses the engine.
    """
    by_task: dict[int, int] = {}
    engine = ""
    for row in rows:
        engine = row["engine"]
        by_task[row["task"]] = by_task.get(row["task"], 0) + int(row["dropped"])
    if not any(by_task.values()):
        return None
    each = ", ".join(f"task {task}: {count:,}" for task, count in by_task.items() if count)
    return (
        f"warning: engine {engine} had no room for {sum(by_task.values()):,} contacts ({each}), so success "
        f"there may be wrong; use {flag} c, which keeps every contact"
    )
