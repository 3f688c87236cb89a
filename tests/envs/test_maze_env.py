"""Tests of mazes on engine `c`: starts, goals, rewards and the ends of episodes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from ogbench.relabel_utils import relabel_dataset

from envs_mjx.locomotion.maze_env import SUCCESS_RADIUS, MazeEnv, MazeState
from envs_mjx.locomotion.mazes import SIZES
from envs_mjx.registry import make
from mac.errors import UserError
from tests.helpers.real_walkers import real

MANY = 256
SIGMAS = 5


def maze(name: str) -> MazeEnv:
    env = make(name)
    assert isinstance(env, MazeEnv)
    return env


def resets(env: MazeEnv, task: int, many: int = MANY) -> MazeState:
    return jax.jit(jax.vmap(env.reset, (0, None)))(jr.split(jr.key(task), many), jnp.asarray(task))


def assert_uniform(values: np.ndarray, half: float) -> None:
    """Asserts columns uniform in [-half, half]: never beyond, and mean and variance within standard
    errors."""
    values = np.asarray(values, float) / half
    assert np.abs(values).max() <= 1 + 1e-5 and np.abs(values).max() > 0.9
    error = SIGMAS / np.sqrt(len(values))
    np.testing.assert_array_less(np.abs(values.mean(axis=0)), error * np.sqrt(1 / 3))
    np.testing.assert_array_less(np.abs((values**2).mean(axis=0) - 1 / 3), error * np.sqrt(4 / 45))


def assert_normal(values: np.ndarray, scale: float) -> None:
    """Asserts columns normal with mean 0 and standard deviation `scale`, within standard errors."""
    values = np.asarray(values, float) / scale
    error = SIGMAS / np.sqrt(len(values))
    np.testing.assert_array_less(np.abs(values.mean(axis=0)), error)
    np.testing.assert_array_less(np.abs((values**2).mean(axis=0) - 1), error * np.sqrt(2))


@pytest.mark.parametrize("task", [1, 4])
def test_starts_and_goals_are_within_a_metre_of_their_cells(task: int):
    env = maze("pointmaze-large-navigate-oraclerep-v0")
    state = resets(env, task)
    xy = env.maze.xy
    assert_uniform(np.asarray(state.obs) - xy(env.maze.starts[task - 1]), 1.0)
    assert_uniform(np.asarray(state.target) - xy(env.maze.goals[task - 1]), 1.0)
    np.testing.assert_array_equal(state.goal, state.target)
    correlation = np.corrcoef(np.concatenate([state.obs, state.target], axis=1), rowvar=False)
    assert np.abs(correlation - np.eye(4)).max() < SIGMAS / np.sqrt(MANY)


def test_goals_of_single_tasks_are_centres_of_cells():
    env = maze("antmaze-medium-navigate-singletask-task3-v0")
    state = resets(env, 3, 3)
    np.testing.assert_array_equal(state.target, np.tile(env.maze.xy(env.maze.goals[2]), (3, 1)))
    assert state.goal is None and env.spec.goal_dim is None and env.spec.tasks == (3,)


def test_an_ant_starts_near_the_models_pose():
    env = maze("antmaze-giant-navigate-oraclerep-v0")
    state = resets(env, 2)
    assert_uniform(np.asarray(state.motion.qpos[:, 2:]) - env.walker.model.qpos0[2:], 0.1)
    assert_normal(state.motion.qvel, 0.1)


def test_a_humanoid_starts_in_any_pose_that_touches_nothing():
    """Compares joint by joint with ogbench's own reset."""
    env = maze("humanoidmaze-medium-navigate-oraclerep-v0")
    theirs, rows = real(env), []
    theirs.reset(seed=0)
    for _ in range(MANY):
        theirs.data.qpos[:] = theirs.model.qpos0
        theirs.reset_model()
        rows.append(np.concatenate([theirs.data.qpos, theirs.data.qvel]))
    state = resets(env, 1)
    ours = np.concatenate([state.motion.qpos, state.motion.qvel], axis=1)[:, 2:]
    rows = np.stack(rows)[:, 2:]
    spread = rows.std(axis=0)
    error = SIGMAS * np.sqrt(2 / MANY) * spread
    np.testing.assert_array_less(np.abs(ours.mean(axis=0) - rows.mean(axis=0)), error + 1e-6)
    np.testing.assert_array_less(np.abs(ours.std(axis=0) - spread), 0.25 * spread + 1e-6)
    low, high = env.walker.model.jnt_range[1:].T
    joints = np.asarray(state.motion.qpos[:, 7:])
    assert (joints >= low - 1e-5).all() and (joints <= high + 1e-5).all()


def test_observation_goals_show_the_walker_at_the_target():
    """Checks a pose settled by random actions, at the same mean height as in ogbench."""
    env = maze("antmaze-medium-navigate-v0")
    state = resets(env, 1, 40)
    assert state.goal is not None
    np.testing.assert_array_equal(state.goal[:, :2], state.target)
    theirs = real(env)
    heights = [theirs.reset(seed=i, options={"task_id": 1})[1]["goal"][2] for i in range(40)]
    ours = np.asarray(state.goal[:, 2])
    assert abs(ours.mean() - np.mean(heights)) < SIGMAS * np.std(heights) * np.sqrt(2 / 40)
    assert np.std(heights) / 2 < ours.std() < np.std(heights) * 2
    assert np.abs(ours - np.asarray(state.obs[:, 2])).min() > 0  # not the pose at the start


@pytest.mark.parametrize("family", [f"pointmaze-{size}" for size in SIZES] + ["antmaze-large"])
def test_labels_of_all_five_tasks_equal_ogbenchs(family: str):
    rng = np.random.default_rng(0)
    for task in range(1, 6):
        env = maze(f"{family}-navigate-singletask-task{task}-v0")
        theirs, radius = real(env), SUCCESS_RADIUS[env.walker.body]
        goal = env.maze.xy(env.maze.goals[task - 1])
        obs = np.zeros((400, env.spec.obs_dim), np.float32)
        obs[:, :2] = goal + rng.uniform(-1.5, 1.5, (400, 2)) * radius
        obs[:2, :2] = goal + np.asarray([[radius, 0], [0, radius * 1.0001]])
        data = {"qpos": obs.copy()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(theirs, "step", lambda *_: None)
            relabel_dataset(env.spec.name, theirs, data)
        reward, mask = env.relabel(obs, task)
        np.testing.assert_array_equal(reward, data["rewards"])
        np.testing.assert_array_equal(mask, data["masks"])
        assert reward.dtype == mask.dtype == np.float32 and 0.2 < mask.mean() < 0.9
        assert (reward[0], reward[1]) == (0, -1)


def test_labels_do_not_depend_on_the_environments_own_task():
    env = maze("pointmaze-medium-navigate-v0")
    obs = np.float32(env.maze.xy(env.maze.goals))
    labels = np.stack([env.relabel(obs, task)[1] for task in range(1, 6)])
    np.testing.assert_array_equal(labels, 1 - np.eye(5))


def test_rows_and_tasks_that_do_not_exist_are_mistakes():
    env = maze("antmaze-medium-navigate-v0")
    with pytest.raises(UserError, match=r"expected \(N, 29\)"):
        env.relabel(np.zeros((3, 2), np.float32), 1)
    with pytest.raises(UserError, match="task 6 of antmaze-medium-navigate-v0 does not exist; choose 1 to 5"):
        env.relabel(np.zeros((3, 29), np.float32), 6)


def test_success_is_judged_before_a_single_tasks_step_else_after():
    """Moves a point, 1.15 m from the goal, 0.2 m towards it."""
    for mode, after in (("singletask-task1", False), ("oraclerep", True)):
        env = maze(f"pointmaze-medium-navigate-{mode}-v0")
        state = env.reset(jr.key(0), jnp.asarray(1))
        target = state.obs + jnp.asarray([1.15, 0.0])
        state = eqx.tree_at(lambda s: s.target, state, target)
        action = jnp.asarray([1.0, 0.0])
        first = env.step(state, action)
        second = env.step(first, action)
        assert (bool(first.success), bool(first.done)) == (after, after)
        assert float(first.reward) == (1.0 if after else -1.0)
        assert bool(second.success) and bool(second.done) and int(second.t) == (1 if after else 2)
        assert float(second.reward) == (1.0 if after else 0.0)


@pytest.fixture(scope="module")
def ant() -> tuple[MazeEnv, MazeState]:
    env = maze("antmaze-medium-navigate-oraclerep-v0")
    return env, resets(env, 1, 3)


def test_an_ended_episode_is_frozen(ant: tuple[MazeEnv, MazeState]):
    env, state = ant
    state = eqx.tree_at(lambda s: (s.done, s.success), state, (jnp.asarray([True, False, True]),) * 2)
    after = jax.jit(jax.vmap(env.step))(state, jnp.full((3, 8), 0.3))
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = jr.key_data(old), jr.key_data(new)
        np.testing.assert_array_equal(old[::2], new[::2])
    assert int(after.t[1]) == 1 and np.abs(after.obs[1] - state.obs[1]).max() > 1e-3


def test_a_step_is_bitwise_the_same_in_any_batch(ant: tuple[MazeEnv, MazeState]):
    env, state = ant
    actions = jr.uniform(jr.key(1), (3, 8), minval=-1, maxval=1)
    together = jax.jit(jax.vmap(env.step))(state, actions)
    alone = [jax.jit(env.step)(jax.tree.map(lambda x, i=i: x[i], state), actions[i]) for i in range(3)]
    for i, one in enumerate(alone):
        np.testing.assert_array_equal(together.motion.raw[i], one.motion.raw)
        np.testing.assert_array_equal(together.obs[i], one.obs)


def test_the_time_limit_ends_an_episode(ant: tuple[MazeEnv, MazeState]):
    env, state = ant
    state = eqx.tree_at(lambda s: s.t, state, jnp.asarray([998, 999, 0]))
    after = jax.jit(jax.vmap(env.step))(state, jnp.zeros((3, 8)))
    np.testing.assert_array_equal(after.done, [False, True, False])
    assert not after.success.any()


def test_actions_are_clipped_and_zero_if_not_finite(ant: tuple[MazeEnv, MazeState]):
    env, state = ant
    actions = jnp.asarray([[3.0] * 8, [1.0] * 8, [jnp.nan] + [1.0] * 7])
    same = jax.tree.map(lambda x: jnp.stack([x[0], x[0], x[0]]), state)
    after = jax.jit(jax.vmap(env.step))(same, actions)
    still = jax.jit(env.step)(jax.tree.map(lambda x: x[0], state), jnp.zeros(8))
    np.testing.assert_array_equal(after.obs[0], after.obs[1])
    np.testing.assert_array_equal(after.obs[2], still.obs)
    assert np.isnan(after.reward[2]) and np.isfinite(after.reward[:2]).all()
    with pytest.raises(UserError, match=r"expected \(8,\); vmap"):
        env.step(jax.tree.map(lambda x: x[0], state), jnp.zeros(7))


def test_teleporters_lead_to_each_exit_equally_often():
    env = maze("pointmaze-teleport-navigate-oraclerep-v0")
    state = resets(env, 2)
    here = jnp.asarray(env.maze.entrances[1], jnp.float32) + jnp.asarray([1.2, 0.0])
    motion = env.engine.place(jax.tree.map(lambda x: x[0], state.motion), here, jnp.asarray(True))
    state = eqx.tree_at(lambda s: s.motion, state, jax.tree.map(lambda x: jnp.stack([x] * MANY), motion))
    after = jax.jit(jax.vmap(env.step))(state, jnp.zeros((MANY, 2)))
    assert np.abs(np.asarray(after.obs) - np.asarray(here)).max() < 0.1  # the policy sees the entrance
    away = np.linalg.norm(np.asarray(after.motion.qpos)[:, None] - env.maze.exits, axis=-1)
    np.testing.assert_allclose(away.min(axis=1), 0.0, atol=1e-5)
    counts = np.bincount(away.argmin(axis=1), minlength=3)
    assert np.abs(counts - MANY / 3).max() < SIGMAS * np.sqrt(MANY * 2 / 9)
    later = jax.jit(jax.vmap(env.step))(after, jnp.zeros((MANY, 2)))
    np.testing.assert_allclose(later.obs, after.motion.qpos, atol=0.05)
