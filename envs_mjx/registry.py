"""Environments by OGBench name."""

import difflib
import functools
from typing import NamedTuple

import jax

from envs_mjx.base import AbstractEnv
from envs_mjx.engine import AbstractEngine
from envs_mjx.engine_warp_setup import available as warp_available
from envs_mjx.manip import ManipEnv
from envs_mjx.scenes import FAMILIES, build_scene
from envs_mjx.tasks import TASKS, default_task
from mac.errors import UserError

ENGINES = ("auto", "c", "mjx", "warp")
_MODES = ("goal", "oracle", "single")


class EnvName(NamedTuple):
    """An environment name taken apart.

    Attributes:
        family: scene, such as `cube-single`.
        dataset: name of the dataset, such as `cube-single-play-v0`.
        mode: `single` (one task, with rewards), `goal` (goals are whole observations) or `oracle`
            (goals are object positions).
        task: 1-based task id in mode `single`, else None.
    """

    family: str
    dataset: str
    mode: str
    task: int | None


def names() -> tuple[str, ...]:
    """Every name that `make` accepts."""
    return tuple(_table())


def parse(name: str) -> EnvName:
    """Takes an OGBench name apart.

    Raises:
        UserError: for an unknown name, with the closest known ones.
    """
    table = _table()
    if name not in table:
        close = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or list(table)[:1]
        raise UserError(f"unknown environment {name!r}; did you mean {' or '.join(close)}?")
    return table[name]


def make(name: str, engine: str = "c") -> AbstractEnv:
    """The environment called `name` on physics engine `engine`: `c` (MuJoCo on host threads), `mjx`
    (JAX), `warp` (MuJoCo Warp, with the extra `warp`), or `auto` (`resolve_engine`).

    Raises:
        UserError: for an unknown name or engine, if ogbench's files are missing, or if the engine is
            not installed.
    """
    parsed = parse(name)
    return ManipEnv(
        name,
        build_scene(parsed.family),
        engine_for(parsed.family, resolve_engine(engine)),
        task=parsed.task,
        oracle_goal=parsed.mode == "oracle",
    )


def resolve_engine(engine: str) -> str:
    """`c`, `mjx` or `warp`. For `auto` the default device decides: on CPU `c`, many times faster there
    than the others; on an NVIDIA GPU `warp` if it is installed; on any other accelerator `mjx`.

    Raises:
        UserError: for an unknown engine.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown physics engine {engine!r}; choose {', '.join(ENGINES)}")
    if engine != "auto":
        return engine
    if jax.default_backend() == "cpu":
        return "c"
    return "warp" if jax.default_backend() == "gpu" and warp_available() else "mjx"


@functools.cache
def engine_for(family: str, engine: str) -> AbstractEngine:
    """One engine per scene, so that environments of a family share threads and compiled programs."""
    scene = build_scene(family)
    if engine == "mjx":
        from envs_mjx.engine_mjx import MjxEngine

        return MjxEngine(scene)
    if engine == "warp":
        from envs_mjx.engine_warp import WarpEngine

        return WarpEngine(scene)
    from envs_mjx.engine_c import CEngine

    return CEngine(scene)


@functools.cache
def _table() -> dict[str, EnvName]:
    table = {}
    for family in FAMILIES:
        for style in ("play", "noisy"):
            stem = f"{family}-{style}"
            dataset = f"{stem}-v0"
            table[dataset] = EnvName(family, dataset, "goal", None)
            table[f"{stem}-oraclerep-v0"] = EnvName(family, dataset, "oracle", None)
            table[f"{stem}-singletask-v0"] = EnvName(family, dataset, "single", default_task(family))
            for task in range(1, TASKS + 1):
                table[f"{stem}-singletask-task{task}-v0"] = EnvName(family, dataset, "single", task)
    return table
