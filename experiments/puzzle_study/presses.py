"""Presses of trained policies, compared with the exact solution of their puzzle."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs_mjx.gymnasium_env import GymnasiumVectorEnv
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.observation import goal_columns
from envs_mjx.manipulation.tasks import task_table
from envs_mjx.registry import make
from experiments.launch.saved_run import open_run
from experiments.puzzle_study.boards import Puzzle, as_bits, is_solvable
from mac.errors import UserError
from mac.run.policy import Policy


@dataclass(frozen=True)
class PressRow:
    """Presses of one seed of a run in one task.

    Attributes:
        discount: that of the run.
        success: share of the episodes that were solved.
        presses: per episode.
        nearer: share of the presses after which fewer are needed than before; nan without presses.
        best: share of the presses that are the best by the exact Q of this discount, where every decision is
            a press.
        left: wrong buttons when an episode ends, mean over episodes.
    """

    run: str
    seed: int
    task: int
    discount: float
    episodes: int
    success: float
    presses: float
    nearer: float
    best: float
    left: float


def follow(folder: Path, episodes: int, press_steps: int) -> Iterator[PressRow]:
    """Plays a saved run, each seed and task, and yields how its presses compare with the exact solution.

    Args:
        press_steps: control steps of a decision of the exact solution.
    Raises:
        UserError: no run, or a run on another scene.
    """
    run = open_run(folder)
    env = make(run.settings.task_id, "c")
    if not isinstance(env, ManipEnv) or not is_solvable(env.scene.grid):
        raise UserError(
            f"--run {folder}: a run on {run.settings.env}, which is no puzzle with an exact solution"
        )
    puzzle, discount = Puzzle.of(env.scene.grid).without_waiting(), run.settings.hp.discount
    _, q = puzzle.values(discount, press_steps, None)
    goal = task_table(env.scene.family)[1]
    columns = list(goal_columns(env.scene))
    for seed in run.numbers:
        policy = run.policy(seed)
        for task in env.spec.tasks:
            success, seen = play(env, policy, task, episodes, columns)
            bits = as_bits(seen ^ goal.buttons[task - 1])
            presses = presses_of(puzzle, bits)
            nearer, best = compare(puzzle, q, presses)
            yield PressRow(
                folder.name, seed, task, discount, episodes, float(success.mean()),
                len(presses) / episodes, nearer, best, float(puzzle.wrong[bits[-1]].mean()),
            )  # fmt: skip


def play(
    env: ManipEnv, policy: Policy, task: int, episodes: int, columns: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Plays episodes of a task side by side.

    Args:
        columns: entries of the observation that are the buttons.
    Returns:
        bool[E], whether each episode was solved, and bool[T + 1, E, buttons], the buttons after each control
        step; after an episode's end they stay as they were.
    """
    lanes = GymnasiumVectorEnv(env, episodes)
    obs, info = lanes.reset(seed=task, options={"task_id": task})
    policy.reset(task=task)
    over, solved = np.zeros(episodes, bool), np.zeros(episodes, bool)
    seen = [obs[:, columns] > 0.5]
    while not over.all():
        obs, _, terminated, truncated, info = lanes.step(policy(obs, info.get("goal")))
        seen.append(np.where(over[:, None], seen[-1], obs[:, columns] > 0.5))
        solved |= ~over & info["success"]
        over |= terminated | truncated
    return solved, np.stack(seen)


def presses_of(puzzle: Puzzle, boards: np.ndarray) -> list[tuple[int, int]]:
    """Returns the board before each press of one button, and the button.

    Args:
        boards: int[T, E].
    """
    found = []
    for before, after in itertools.pairwise(boards):
        for lane in np.flatnonzero(before != after):
            (button,) = np.nonzero(puzzle.after[before[lane]] == after[lane])
            found += [(int(before[lane]), int(b)) for b in button]
    return found


def compare(puzzle: Puzzle, q: np.ndarray, presses: list[tuple[int, int]]) -> tuple[float, float]:
    """Returns the share of presses after which fewer are needed, and that of the best by `q`."""
    if not presses:
        return float("nan"), float("nan")
    board, button = np.array(presses).T
    needed = puzzle.presses()
    nearer = needed[puzzle.after[board, button]] < needed[board]
    best = q[board, button] >= q[board].max(axis=1) - 1e-6
    return float(nearer.mean()), float(best.mean())
