"""Environments by the names of their datasets: OGBench's, D4RL's and Minari's."""

import difflib
import functools
from typing import Any, NamedTuple

import jax

from envs_mjx.base import AbstractEnv
from envs_mjx.engines.base import AbstractTabletopEngine, AbstractWalkerEngine
from envs_mjx.engines.warp_setup import available as warp_available
from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.walkers import MAZES, build_walker
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.scenes import FAMILIES, build_scene
from envs_mjx.manipulation.tasks import TASKS, default_task
from mac.errors import UserError

ENGINES = ("auto", "c", "mjx", "warp")
STYLES = ("play", "noisy")
"""Styles of the datasets of a tabletop scene."""
_GYM = ("hopper", "walker2d", "halfcheetah")
_D4RL_LEVELS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
_MINARI_LEVELS = ("simple", "medium", "expert")


class EnvName(NamedTuple):
    """A parsed environment name.

    Attributes:
        family: scene such as `cube-single`, or walker such as `antmaze-medium` or `hopper`.
        dataset: name of the dataset, such as `cube-single-play-v0`.
        mode: `single` (one task, with rewards), `goal` (goals are whole observations), `oracle` (goals are
            positions of objects, or the position in a maze), or `d4rl` or `minari` (rewards are recorded in
            the dataset; rules of gymnasium's version 4 or 5).
        task: 1-based task id in mode `single`, else None.
    """

    family: str
    dataset: str
    mode: str
    task: int | None


def maze_styles(family: str) -> tuple[str, ...]:
    """Returns the styles of OGBench's datasets of a maze."""
    explored = family.startswith("ant") and not family.endswith("giant")
    return ("navigate", "stitch", "explore") if explored else ("navigate", "stitch")


def names() -> tuple[str, ...]:
    """Returns every name that `make` accepts."""
    return tuple(_table())


def parse(name: str) -> EnvName:
    """Parses a name.

    Raises:
        UserError: for an unknown name, with the closest known ones.
    """
    table = _table()
    if name not in table:
        close = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or list(table)[:1]
        raise UserError(f"unknown environment {name!r}; did you mean {' or '.join(close)}?")
    return table[name]


def task_ids(name: str) -> tuple[int, ...]:
    """Returns the ids of all tasks of the scene or walker of `name`, also if `name` is one of them.

    Raises:
        UserError: for an unknown name.
    """
    return (1,) if parse(name).mode in ("d4rl", "minari") else tuple(range(1, TASKS + 1))


def make(name: str, engine: str = "c") -> AbstractEnv:
    """Makes the environment called `name` on physics engine `engine`: `c` (MuJoCo on host threads), `mjx`
    (JAX), `warp` (MuJoCo Warp, with the extra `warp`), or `auto` (`resolve_engine`).

    Raises:
        UserError: for an unknown name or engine, if ogbench's files are missing, or if the engine is
            not installed.
    """
    parsed = parse(name)
    physics = engine_for(parsed.family, resolve_engine(engine))
    if parsed.family in FAMILIES:
        scene, oracle = build_scene(parsed.family), parsed.mode == "oracle"
        return ManipEnv(name, scene, physics, task=parsed.task, oracle_goal=oracle)
    walker = build_walker(parsed.family)
    if parsed.family in MAZES:
        return MazeEnv(name, walker, physics, task=parsed.task, oracle_goal=parsed.mode == "oracle")
    return GymEnv(name, walker, physics, version=4 if parsed.mode == "d4rl" else 5)


def resolve_engine(engine: str) -> str:
    """Returns `c`, `mjx` or `warp`. For `auto` the default device decides: on CPU `c`, which is many times
    faster there; on an NVIDIA GPU `warp` if it is installed; on any other accelerator `mjx`.

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


def engine_for(family: str, engine: str) -> Any:
    """Returns the engine called `engine` (not `auto`) of a family. All its environments share one, with its
    threads and compiled programs. An `AbstractTabletopEngine` of scenes, an `AbstractWalkerEngine` of
    walkers.
    """
    return _scene_engine(family, engine) if family in FAMILIES else _walker_engine(family, engine)


@functools.cache
def _scene_engine(family: str, engine: str) -> AbstractTabletopEngine:
    scene = build_scene(family)
    if engine == "mjx":
        from envs_mjx.engines.tabletop_mjx.engine import MjxEngine

        return MjxEngine(scene)
    if engine == "warp":
        from envs_mjx.engines.tabletop_warp import WarpEngine

        return WarpEngine(scene)
    from envs_mjx.engines.tabletop_c import CEngine

    return CEngine(scene)


@functools.cache
def _walker_engine(family: str, engine: str) -> AbstractWalkerEngine:
    walker = build_walker(family)
    if engine == "mjx":
        from envs_mjx.engines.walker_mjx.engine import MjxWalkerEngine

        return MjxWalkerEngine(walker)
    if engine == "warp":
        from envs_mjx.engines.walker_warp import WarpWalkerEngine

        return WarpWalkerEngine(walker)
    from envs_mjx.engines.walker_c import CWalkerEngine

    return CWalkerEngine(walker)


@functools.cache
def _table() -> dict[str, EnvName]:
    table = {}
    stems = [(family, f"{family}-{style}", default_task(family)) for family in FAMILIES for style in STYLES]
    stems += [(family, f"{family}-{style}", 1) for family in MAZES for style in maze_styles(family)]
    for family, stem, default in stems:
        dataset = f"{stem}-v0"
        table[dataset] = EnvName(family, dataset, "goal", None)
        table[f"{stem}-oraclerep-v0"] = EnvName(family, dataset, "oracle", None)
        table[f"{stem}-singletask-v0"] = EnvName(family, dataset, "single", default)
        for task in range(1, TASKS + 1):
            table[f"{stem}-singletask-task{task}-v0"] = EnvName(family, dataset, "single", task)
    for body in _GYM:
        d4rl = [f"{body}-{level}-v2" for level in _D4RL_LEVELS]
        minari = [f"mujoco/{body}/{level}-v0" for level in _MINARI_LEVELS]
        table |= {name: EnvName(body, name, "d4rl", None) for name in d4rl}
        late = "walker2d-v5" if body == "walker2d" else body
        table |= {name: EnvName(late, name, "minari", None) for name in minari}
    return table
