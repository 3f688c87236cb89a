"""Small files in the layouts of D4RL and of Minari, whose rows are known one by one."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

FALL, LIMIT, CUT = "fall", "limit", "cut"
"""End of an episode: termination, time limit, or end of the file."""

EPISODES = ((5, FALL), (7, LIMIT), (1, FALL), (6, LIMIT), (4, CUT))
"""Transitions of each episode, and its end."""


def states(number: int, steps: int) -> np.ndarray:
    """The `steps` + 1 states of an episode: its number, and the step."""
    return np.stack([np.full(steps + 1, number), np.arange(steps + 1), np.zeros(steps + 1)], -1)


def d4rl_arrays(episodes: tuple[tuple[int, str], ...] = EPISODES, seed: int = 0) -> dict[str, Any]:
    """Arrays as D4RL has them, float32; rewards are 10 * episode + step + 1."""
    rng = np.random.default_rng(seed)
    rows = [states(i, steps) for i, (steps, _) in enumerate(episodes)]
    count = sum(steps for steps, _ in episodes)
    ends = np.cumsum([steps for steps, _ in episodes]) - 1
    terminals, timeouts = np.zeros(count, bool), np.zeros(count, bool)
    for end, (_, how) in zip(ends, episodes, strict=True):
        terminals[end], timeouts[end] = how == FALL, how == LIMIT
    return {
        "observations": np.concatenate([x[:-1] for x in rows]).astype(np.float32),
        "next_observations": np.concatenate([x[1:] for x in rows]).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        "rewards": np.concatenate([10 * i + 1 + np.arange(n) for i, (n, _) in enumerate(episodes)]).astype(
            np.float32
        ),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def write_d4rl(path: Path, arrays: dict[str, Any]) -> Path:
    """The file, with the additional keys of D4RL's files."""
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name] = value
        file["infos/qpos"] = np.zeros((len(arrays["actions"]), 3))
        file["metadata/algorithm"] = "SAC"
    return path


def write_minari(
    path: Path, arrays: dict[str, Any], episodes: tuple[tuple[int, str], ...] = EPISODES
) -> Path:
    """The same rows as Minari lays them out: one group per episode, float64."""
    at = 0
    with h5py.File(path, "w") as file:
        for i, (steps, how) in enumerate(episodes):
            part = slice(at, at + steps)
            group = file.create_group(f"episode_{i}")
            final = arrays["next_observations"][part][-1:]
            group["observations"] = np.concatenate([arrays["observations"][part], final]).astype(np.float64)
            group["actions"] = arrays["actions"][part]
            group["rewards"] = arrays["rewards"][part].astype(np.float64)
            group["terminations"] = arrays["terminals"][part]
            group["truncations"] = np.arange(steps) == (steps - 1 if how == LIMIT else -1)
            group["infos/x"] = np.zeros(steps + 1)
            at += steps
    return path
