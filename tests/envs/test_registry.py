"""Tests that names are OGBench's, and make the right kind of environment."""

from typing import Any

import chex
import jax
import pytest

from envs_mjx.registry import make, names, parse, register_env, resolve_engine
from mac.errors import UserError
from mac.types import EnvSpec


@pytest.mark.parametrize(
    ("name", "family", "dataset", "goals", "task"),
    [
        ("cube-single-play-v0", "cube-single", "cube-single-play-v0", "goal", None),
        ("cube-octuple-play-oraclerep-v0", "cube-octuple", "cube-octuple-play-v0", "oracle", None),
        ("cube-double-play-singletask-v0", "cube-double", "cube-double-play-v0", "single", 2),
        ("cube-triple-play-singletask-task5-v0", "cube-triple", "cube-triple-play-v0", "single", 5),
        ("cube-quadruple-noisy-v0", "cube-quadruple", "cube-quadruple-noisy-v0", "goal", None),
        ("scene-play-singletask-v0", "scene", "scene-play-v0", "single", 2),
        ("puzzle-4x4-play-singletask-v0", "puzzle-4x4", "puzzle-4x4-play-v0", "single", 4),
        ("puzzle-4x6-noisy-oraclerep-v0", "puzzle-4x6", "puzzle-4x6-noisy-v0", "oracle", None),
        ("antmaze-giant-stitch-v0", "antmaze-giant", "antmaze-giant-stitch-v0", "goal", None),
        ("hopper-medium-replay-v2", "hopper", "hopper-medium-replay-v2", "recorded", None),
        ("mujoco/walker2d/medium-v0", "walker2d-v5", "mujoco/walker2d/medium-v0", "recorded", None),
    ],
)
def test_names_are_taken_apart(name: str, family: str, dataset: str, goals: str, task: int | None):
    parsed = parse(name)
    assert (parsed.name, parsed.family, parsed.dataset) == (name, family, dataset)
    assert (parsed.goals, parsed.task) == (goals, task)
    assert parsed.tasks == ((1,) if goals == "recorded" else (1, 2, 3, 4, 5))
    assert name in names()


@pytest.mark.parametrize(
    ("name", "style", "collection"),
    [
        ("cube-double-noisy-singletask-task3-v0", "noisy", "OGBench"),
        ("antmaze-medium-explore-oraclerep-v0", "explore", "OGBench"),
        ("hopper-medium-replay-v2", "medium-replay", "D4RL"),
        ("mujoco/hopper/expert-v0", "expert", "Minari"),
    ],
)
def test_names_tell_how_and_by_whom_the_data_were_collected(name: str, style: str, collection: str):
    assert (parse(name).style, parse(name).collection) == (style, collection)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("cube-single-play-v0", {}, "exists already"),
        ("two words", {}, "letters, digits"),
        ("mine-v0", {"task": 1}, "give a task"),
        ("mine-v0", {"goals": "single"}, "give a task"),
        ("mine-v0", {"goals": "single", "task": 3}, "give a task"),
    ],
)
def test_malformed_registrations_are_refused(name: str, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        register_env(name, lambda engine: make("cube-single-play-v0", engine), **changes)
    assert "mine-v0" not in names()


@pytest.mark.parametrize(
    ("name", "obs", "goal", "tasks", "limit"),
    [
        ("cube-single-play-singletask-task4-v0", 28, None, (4,), 200),
        ("cube-double-play-oraclerep-v0", 37, 6, (1, 2, 3, 4, 5), 500),
        ("cube-triple-play-v0", 46, 46, (1, 2, 3, 4, 5), 1000),
        ("cube-quadruple-play-singletask-v0", 55, None, (2,), 1000),
        ("cube-octuple-play-oraclerep-v0", 91, 24, (1, 2, 3, 4, 5), 1500),
        ("scene-play-oraclerep-v0", 40, 7, (1, 2, 3, 4, 5), 750),
        ("puzzle-3x3-play-singletask-v0", 55, None, (4,), 500),
        ("puzzle-4x4-noisy-oraclerep-v0", 83, 16, (1, 2, 3, 4, 5), 500),
        ("puzzle-4x5-play-oraclerep-v0", 99, 20, (1, 2, 3, 4, 5), 1000),
        ("puzzle-4x6-play-v0", 115, 115, (1, 2, 3, 4, 5), 1000),
    ],
)
def test_spec_and_shapes_of_every_family(name, obs, goal, tasks, limit):
    env = make(name)
    assert env.spec == EnvSpec(name, obs, 5, goal, tasks, limit, 0.05, env.spec.goal_columns)
    assert len(env.spec.goal_columns) == (goal or 0)
    state = jax.eval_shape(env.reset, jax.random.key(0), 1)
    assert state.obs.shape == (obs,)
    assert (state.goal.shape if goal else state.goal) == ((goal,) if goal else None)
    after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((5,), "float32"))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_environments_of_one_name_share_compiled_programs():
    """Checks that they are equal and leafless, so either may be a static argument or a closure."""
    a, b = (make("cube-single-play-singletask-task2-v0") for _ in range(2))
    assert a == b and hash(a) == hash(b) and not jax.tree.leaves(a)


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(UserError, match="did you mean cube-single-play-singletask-task2-v0"):
        make("cube-single-play-singletask-task22-v0")
    with pytest.raises(
        UserError, match=r"unknown environment.*a name is such as cube-single.*hopper-medium-v2"
    ):
        make("zzz")


def test_an_unknown_engine_is_a_mistake():
    with pytest.raises(UserError, match=r"'bullet'.*choose auto, c, mjx, warp"):
        make("cube-single-play-v0", "bullet")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the default device is an accelerator")
def test_auto_is_c_on_cpu():
    assert resolve_engine("auto") == "c"
