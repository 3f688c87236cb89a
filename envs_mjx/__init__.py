"""Environments in JAX over batched MuJoCo physics.

`make` makes one by its dataset's name; `register_env` adds your own.
"""

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.registry import TaskId, make, names, parse, register_env

__all__ = ["AbstractEnv", "EnvState", "TaskId", "make", "names", "parse", "register_env"]
