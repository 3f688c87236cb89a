"""Environments by the names of their datasets: OGBench's, D4RL's, Minari's and one's own.

`register_env` adds one. A name is parsed once, at the command line, into a `TaskId`, which is passed on.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from envs_mjx.base import AbstractEnv
from envs_mjx.data_only import data_only_env, has_goals, is_data_only
from envs_mjx.engines.base import AbstractTabletopEngine, AbstractWalkerEngine
from envs_mjx.engines.warp_setup import available as warp_available
from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.walkers import MAZES, build_walker
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.scenes import FAMILIES, build_scene
from envs_mjx.manipulation.tasks import TASKS, default_task
from mac.errors import UserError
from mac.plugins import load_plugins

ENGINES = ("auto", "c", "mjx", "warp")
STYLES = ("play", "noisy")
"""Styles of the datasets of a tabletop scene."""
_GYM = ("hopper", "walker2d", "halfcheetah")
_D4RL_LEVELS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
_MINARI_LEVELS = ("simple", "medium", "expert")
_ALL_TASKS = tuple(range(1, TASKS + 1))

SAMPLES = (
    "cube-single-play-singletask-task2-v0",
    "pointmaze-medium-navigate-oraclerep-v0",
    "hopper-medium-v2",
)
"""A name of each kind, for messages."""

Goals = Literal["single", "goal", "oracle", "recorded"]
Collection = Literal["OGBench", "D4RL", "Minari", "registered", "file"]


class TaskId(NamedTuple):
    """An environment with its dataset and its task or goals, parsed from its name.

    Attributes:
        name: the name itself, such as `cube-single-play-singletask-task2-v0`.
        family: scene such as `cube-single`, or walker such as `antmaze-medium` or `hopper`.
        dataset: name of the dataset, such as `cube-single-play-v0`.
        style: how the dataset was collected, such as `play`, `navigate` or `medium-replay`.
        goals: `single` (one task, whose rewards label the data), `goal` (goals are whole observations),
            `oracle` (goals are positions of objects, or the position in a maze), or `recorded` (the dataset
            records rewards).
        task: 1-based task id where `goals` is `single`, else None.
        tasks: ids of all tasks of the scene or walker, also if the name is one of them.
        collection: publisher of the dataset; `registered` of an environment of one's own, `file` of data
            without an environment (`data_only.py`).
        hparams_of: name of the environment whose rows in `hparams.toml` apply too; often the name itself.
    """

    name: str
    family: str
    dataset: str
    style: str
    goals: Goals
    task: int | None
    tasks: tuple[int, ...]
    collection: Collection
    hparams_of: str


_registered: dict[str, tuple[TaskId, Callable[[str], AbstractEnv]]] = {}


def register_env(
    name: str,
    build: Callable[[str], AbstractEnv],
    *,
    goals: Goals = "recorded",
    task: int | None = None,
    tasks: tuple[int, ...] = (1,),
    hparams_of: str | None = None,
) -> None:
    """Adds an environment of one's own, which every program then knows by its name.

    A program finds the call in a package that declares the entry point `mac_jax.plugins` (`mac.plugins`). Its
    dataset is the file that `--data.path` names, or `NAME.npz` in `--data.dir`.

    Args:
        name: letters, digits, `-`, `_` and `.`; free so far.
        build: makes it on physics engine `c`, `mjx` or `warp`; its `spec.name` is `name`.
        goals: see `TaskId`; `single` labels the data with the rewards of `task`, by the environment's
            `relabel`.
        tasks: ids of its tasks.
        hparams_of: a known environment whose hyperparameters apply to this one too.
    Raises:
        ValueError: the name is taken or malformed, or `task` does not fit `goals`.
    """
    if name in _table() or name in _registered:
        raise ValueError(f"an environment {name!r} exists already; choose another name")
    if not name or set(name.lower()) - set("abcdefghijklmnopqrstuvwxyz0123456789-_."):
        raise ValueError(f"name {name!r} may have letters, digits, '-', '_' and '.' only")
    if (task is not None) != (goals == "single") or (task is not None and task not in tasks):
        raise ValueError(f"goals={goals!r} with task={task}: give a task of {tasks} with 'single' only")
    parsed = TaskId(name, name, name, "", goals, task, tasks, "registered", hparams_of or name)
    _registered[name] = parsed, build


def names() -> tuple[str, ...]:
    """Returns every name that `make` accepts."""
    load_plugins()
    return (*_table(), *_registered)


def registered_names() -> tuple[str, ...]:
    """Returns the names that `register_env` added."""
    load_plugins()
    return tuple(_registered)


def parse(name: str) -> TaskId:
    """Parses a name.

    Raises:
        UserError: for an unknown name, with the closest known ones; or if a plug-in cannot be loaded.
    """
    if (found := _table().get(name)) is not None:
        return found
    if is_data_only(name):
        # Sizes and times of D4RL's rows, or of those with goals, in `hparams.toml`.
        goals, rows = ("goal", "-oraclerep-v0") if has_goals(name) else ("recorded", "-v2")
        return TaskId(name, name, name, "", goals, None, (), "file", f"data-only{rows}")
    load_plugins()
    if name in _registered:
        return _registered[name][0]
    if missing := _missing(name):
        raise UserError(missing)
    known = names()
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"a name is such as {', '.join(SAMPLES)}"
    raise UserError(f"unknown environment {name!r}; {hint}")


def make(name: str | TaskId, engine: str = "c") -> AbstractEnv:
    """Makes the environment called `name` on physics engine `engine`: `c` (MuJoCo on host threads), `mjx`
    (JAX), `warp` (MuJoCo Warp, with the extra `warp`), or `auto` (`resolve_engine`).

    Raises:
        UserError: for an unknown name or engine, if ogbench's files are missing, or if the engine is
            not installed.
    """
    parsed, engine = parse(name) if isinstance(name, str) else name, resolve_engine(engine)
    if parsed.collection == "registered":
        return _registered[parsed.name][1](engine)
    if parsed.collection == "file":
        return data_only_env(parsed.name)
    physics, oracle = engine_for(parsed.family, engine), parsed.goals == "oracle"
    if parsed.family in FAMILIES:
        return ManipEnv(
            parsed.name, build_scene(parsed.family), physics, task=parsed.task, oracle_goal=oracle
        )
    walker = build_walker(parsed.family)
    if parsed.family in MAZES:
        return MazeEnv(parsed.name, walker, physics, task=parsed.task, oracle_goal=oracle)
    return GymEnv(parsed.name, walker, physics, version=4 if parsed.collection == "D4RL" else 5)


def _missing(name: str) -> str | None:
    """What to say of a published environment that this project does not have; None of any other name."""
    if name.startswith(("antsoccer-", "visual-", "powderworld-")):
        return (
            f"OGBench's {name.split('-')[0]} tasks are not in this project; unless they are images, "
            "--env data-only-goals --data.path FILE trains on their data, without evaluation"
        )
    if "/" in name:
        return (
            f"Minari's {name!r} has no environment here; --env data-only --data.path "
            f"~/.minari/datasets/{name}/data trains on it if its boxes are flat, without evaluation"
        )
    return None


def maze_styles(family: str) -> tuple[str, ...]:
    """Returns the styles of OGBench's datasets of a maze."""
    explored = family.startswith("ant") and not family.endswith("giant")
    return ("navigate", "stitch", "explore") if explored else ("navigate", "stitch")


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
def _table() -> dict[str, TaskId]:
    """Returns every published name."""
    found = []
    stems = [(family, style, default_task(family)) for family in FAMILIES for style in STYLES]
    stems += [(family, style, 1) for family in MAZES for style in maze_styles(family)]
    for family, style, default in stems:
        stem, dataset = f"{family}-{style}", f"{family}-{style}-v0"
        oracle = f"{stem}-oraclerep-v0"
        goal = TaskId(dataset, family, dataset, style, "goal", None, _ALL_TASKS, "OGBench", oracle)
        found += [goal, goal._replace(name=oracle, goals="oracle")]
        singles = {f"{stem}-singletask-v0": default}
        singles |= {f"{stem}-singletask-task{task}-v0": task for task in _ALL_TASKS}
        for name, task in singles.items():
            found.append(goal._replace(name=name, goals="single", task=task, hparams_of=name))
    for body in _GYM:
        for level in _D4RL_LEVELS:
            name = f"{body}-{level}-v2"
            found.append(TaskId(name, body, name, level, "recorded", None, (1,), "D4RL", name))
        version_5 = "walker2d-v5" if body == "walker2d" else body
        for level in _MINARI_LEVELS:
            name, rows = f"mujoco/{body}/{level}-v0", f"{body}-{level}-v2"
            found.append(TaskId(name, version_5, name, level, "recorded", None, (1,), "Minari", rows))
    return {each.name: each for each in found}
