"""Tests of goals: columns of the observation, as in ogbench, and the success that they define."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.observation import Objects
from envs_mjx.manipulation.scene_simulation import SceneState
from envs_mjx.manipulation.scenes import FAMILIES, Scene
from envs_mjx.manipulation.tasks import task_table
from envs_mjx.registry import make
from experiments.ogbench_eval.worker import Start, WorkerEnvs
from tests.helpers.ogbench_runs import Run, official, play
from tests.helpers.pytest_params import slow_except

CENTER, SLIDE_SCALE, RADIUS = np.asarray([0.425, 0.0, 0.0]), np.asarray([18.0, 15.0]), 0.04
COUNT = 300  # random scenes


def goal_env(family: str, kind: str = "play-oraclerep") -> ManipEnv:
    env = make(f"{family}-{kind}-v0")
    assert isinstance(env, ManipEnv)
    return env


# Random scenes of ours.


class Scattered(NamedTuple):
    """Random scenes near the targets of random tasks; axis 0 = scenes."""

    task: np.ndarray
    obs: np.ndarray
    goal: np.ndarray
    whole: np.ndarray
    reached: np.ndarray


def disturbed(scene: Scene, target: Objects, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Joint positions and button states of scenes that differ from `target` by about the tolerance."""
    qpos = np.tile(scene.model.qpos0, (COUNT, 1)) + rng.normal(scale=0.05, size=(COUNT, scene.model.nq))
    reach = rng.choice([0.01, 0.03, 0.06], (COUNT, 1))
    cubes = target.cubes + reach[:, None] * rng.uniform(-1, 1, target.cubes.shape)
    for i, at in enumerate(scene.cube_qpos):
        qpos[:, at : at + 3] = cubes[:, i]
        qpos[:, at + 3 : at + 7] /= np.linalg.norm(qpos[:, at + 3 : at + 7], axis=1, keepdims=True)
    qpos[:, scene.slide_qpos] = target.slides + reach * rng.uniform(-1, 1, target.slides.shape)
    flips = (rng.random((COUNT, 1)) < 0.5) & (
        np.arange(scene.buttons) == rng.integers(99, size=(COUNT, 1)) % 9
    )
    return qpos.astype(np.float32), target.buttons ^ flips


@functools.cache
def scattered(family: str) -> Scattered:
    env, plain, rng = goal_env(family), goal_env(family, "play"), np.random.default_rng(0)
    task = rng.integers(1, 6, COUNT)
    target = Objects(*(np.asarray(x)[task - 1] for x in task_table(family)[1]))
    qpos, buttons = disturbed(env.scene, target, rng)

    @jax.jit
    @jax.vmap
    def look(qpos: jax.Array, buttons: jax.Array, target: Objects) -> tuple[jax.Array, ...]:
        world = SceneState(env.engine.load(qpos, 0.1 * jnp.ones(env.scene.model.nv)), buttons)
        return env.observe(world), env.goal_of(world), plain.goal_of(world), env.reached(world, target)

    wanted = Objects(*(jnp.asarray(x, x.dtype if x.dtype == bool else jnp.float32) for x in target))
    seen = look(jnp.asarray(qpos), jnp.asarray(buttons), wanted)
    return Scattered(task, *(np.asarray(x) for x in seen))


@pytest.mark.parametrize("family", slow_except(["cube-double", "scene", "puzzle-4x5"], FAMILIES))
def test_goal_columns_equal_the_scenes_oracle_goal_bit_for_bit(family: str):
    env, plain, scenes = goal_env(family), goal_env(family, "play"), scattered(family)
    columns = np.asarray(env.spec.goal_columns)
    assert (
        columns.shape == (env.spec.goal_dim,) == scenes.goal.shape[1:] and np.ptp(scenes.goal, axis=0).all()
    )
    np.testing.assert_array_equal(scenes.obs[:, columns], scenes.goal)
    assert plain.spec.goal_columns == tuple(range(plain.spec.obs_dim))
    np.testing.assert_array_equal(scenes.obs, scenes.whole)
    assert goal_env(family, "play-singletask").spec.goal_columns == ()


def same(scene: Scene, goal: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether pairs of oracle goals agree in all objects, as the tasks count it; and near ties."""
    cubes, end = slice(0, 3 * scene.cubes), 3 * scene.cubes + scene.buttons
    apart = [
        np.linalg.norm((goal - other)[:, cubes].reshape(len(goal), -1, 3) / 10, axis=-1),
        np.abs(goal - other)[:, end:] / SLIDE_SCALE[: scene.slides],
    ]
    far = np.concatenate(apart, axis=1)
    equal = np.all(goal[:, 3 * scene.cubes : end] == other[:, 3 * scene.cubes : end], axis=1)
    return equal & np.all(far <= RADIUS, axis=1), np.any(np.abs(far - RADIUS) < 1e-5, axis=1)


def representation(target: Objects) -> np.ndarray:
    """Oracle goals of scenes whose objects are at `target`, axis 0 = scenes."""
    cubes = ((target.cubes - CENTER) * 10).reshape(len(target.cubes), -1)
    slides = target.slides * SLIDE_SCALE[: target.slides.shape[-1]]
    return np.concatenate([cubes, target.buttons.astype(float), slides], axis=1)


@pytest.mark.parametrize("family", slow_except(["cube-double", "scene", "puzzle-4x5"], FAMILIES))
def test_state_and_goal_agree_exactly_at_success(family: str):
    """Judges on goal columns only, within 4 cm; single-task labels of the same states agree."""
    env, scenes = goal_env(family), scattered(family)
    target = Objects(*(np.asarray(x)[scenes.task - 1] for x in task_table(family)[1]))
    agree, close = same(env.scene, scenes.goal.astype(float), representation(target))
    success = scenes.reached.all(axis=1)
    np.testing.assert_array_equal(agree[~close], success[~close])
    assert 10 < success.sum() < COUNT - 10 and close.sum() < COUNT // 20
    for task in range(1, 6):
        mine = scenes.task == task
        reward, mask = env.relabel(scenes.obs[mine], task)
        np.testing.assert_array_equal((mask == 0)[~close[mine]], success[mine & ~close])
        lacking = scenes.reached[mine].sum(axis=1) - float(scenes.reached.shape[1])
        np.testing.assert_array_equal(reward[~close[mine]], lacking[~close[mine]])


# The real environments.


@pytest.fixture(scope="module", params=slow_except(["scene"], FAMILIES))
def recorded(request: pytest.FixtureRequest) -> tuple[ManipEnv, list[Run]]:
    """The expert in two tasks of ogbench's goal-conditioned environment."""
    env = goal_env(request.param)
    theirs = official(f"{request.param}-v0", use_oracle_rep=True)
    runs = [
        play(theirs, env.engine, seed=task, steps=150, noise=0.05, options={"task_id": task})
        for task in (1, 2)
    ]
    return env, runs


def test_columns_of_ogbenchs_observations_are_its_oracle_goals(
    recorded: tuple[ManipEnv, list[Run]],
):
    env, runs = recorded
    for run in runs:
        np.testing.assert_array_equal(run.obs[:, np.asarray(env.spec.goal_columns)], run.oracle)
        assert (np.ptp(run.oracle, axis=0) > 1e-6).any()


def test_ogbench_reports_success_where_state_and_goal_agree(recorded: tuple[ManipEnv, list[Run]]):
    """Checks every action until the episode's end and beyond it."""
    env, runs = recorded
    columns, solved = np.asarray(env.spec.goal_columns), []
    for run in runs:
        target = Objects(*(np.repeat(x[None], len(run.obs), axis=0) for x in run.target))
        agree, close = same(env.scene, run.obs[:, columns], representation(target))
        np.testing.assert_array_equal(agree[~close], run.success[~close])
        np.testing.assert_array_equal(run.success, run.terminated)
        solved.append(run.success.any())
    assert any(solved) or env.scene.family != "cube-single"


def test_goal_of_the_played_environment_shows_the_solved_scene():
    """Checks the goal that ogbench gives to a policy: as wide as ours, in the same units and order."""
    name = "cube-double-play-oraclerep-v0"
    slots = WorkerEnvs(name, 1, film=True)
    goals = []
    for task in (1, 5):
        played = slots.execute(0, Start(3, task))
        assert played.goal is not None and played.goal.dtype == np.float32
        assert played.goal.shape == (make(name).spec.goal_dim,)
        shown = played.goal.reshape(2, 3) / 10 + CENTER
        np.testing.assert_allclose(shown, played.film[0].target[0], atol=2e-3)
        goals.append(played.goal)
    assert np.abs(goals[0] - goals[1]).max() > 0.5
    assert slots.execute(0, np.zeros((1, 5), np.float32)).goal is None
    assert played.obs.shape == (37,)
