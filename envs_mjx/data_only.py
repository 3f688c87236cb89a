"""Data without an environment: names, and what takes an environment's place, which cannot be played.

| `--env` | rewards | files |
|---|---|---|
| `data-only` | those of the file, with its terminations | `.npz` or hdf5 with D4RL's keys, or Minari's hdf5 |
| `data-only-goals` | none: goals are whole observations of the data | OGBench's `.npz` |

The widths of observations and actions are those of the file. They become part of the name, such as
`data-only-28x5`, so that a saved run tells them without its data.
"""

import re
from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import numpy as np

from envs_mjx.base import AbstractEnv
from mac.errors import UserError
from mac.types import EnvSpec, EnvState

NAMES = ("data-only", "data-only-goals")


def is_data_only(name: str) -> bool:
    """True of names of data without an environment, with widths or without."""
    return _parts(name) is not None


def has_goals(name: str) -> bool:
    """True if goals are states of the data, and rewards are not read."""
    parts = _parts(name)
    return parts is not None and parts["goals"] is not None


def with_widths(name: str, read: Callable[[], tuple[int, int]]) -> str:
    """Returns the name with the widths of observations and actions in it.

    Args:
        read: called if the name does not have them yet.
    """
    parts = _parts(name)
    if parts is None or parts["obs"]:
        return name
    return "{}-{}x{}".format(name, *read())


def _parts(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"data-only(?P<goals>-goals)?(-(?P<obs>[1-9]\d*)x(?P<action>[1-9]\d*))?", name)


def data_only_env(name: str) -> "DataOnlyEnv":
    """Returns what takes the place of an environment.

    Raises:
        UserError: the name has no widths.
    """
    parts = _parts(name)
    if parts is None or not parts["obs"]:
        raise UserError(f"--env {name} needs --data.path FILE, whose columns tell the widths")
    obs, goals = int(parts["obs"]), has_goals(name)
    spec = EnvSpec(
        name,
        obs_dim=obs,
        action_dim=int(parts["action"]),
        goal_dim=obs if goals else None,
        tasks=(),
        max_steps=0,  # not known
        control_dt=0.0,
        goal_columns=tuple(range(obs)) if goals else (),
        recorded=not goals,
    )
    return DataOnlyEnv(spec)


class DataOnlyEnv(AbstractEnv[EnvState]):
    """The facts of data without an environment; it has no tasks and cannot be played."""

    spec: EnvSpec = eqx.field(static=True)

    def reset(self, key: Any, task: Any) -> NoReturn:
        """Refuses."""
        raise _nothing_to_play(self.spec)

    def step(self, state: EnvState, action: Any) -> NoReturn:
        """Refuses."""
        raise _nothing_to_play(self.spec)

    def relabel(self, obs: np.ndarray, task: int) -> NoReturn:
        """Refuses: rewards are recorded in the dataset, or follow from goals."""
        raise _nothing_to_play(self.spec)


def _nothing_to_play(spec: EnvSpec) -> UserError:
    return UserError(f"{spec.name} is data without an environment, so no episode can be played")
