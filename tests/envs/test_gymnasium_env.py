"""The environments in gymnasium's interface: its checker passes, steps are ours, others' loops run."""

import warnings
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from envs_mjx import make as make_env
from envs_mjx.gymnasium_env import make, make_vec
from mac.errors import UserError

MAZE = "pointmaze-medium-navigate-v0"
CUBE = "cube-single-play-singletask-task2-v0"
pytestmark = pytest.mark.promotion


@pytest.mark.parametrize("name", [MAZE, CUBE])
def test_gymnasiums_checker_passes(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unbounded spaces
        check_env(make(name), skip_render_check=True)


def chosen(at: np.ndarray, new: Any, old: Any) -> Any:
    """States `new` where `at`, else `old`."""

    def pick(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.stack([a if o else b for a, b, o in zip(x, y, at, strict=True)])

    return jax.tree.map(pick, new, old)


def test_thousand_steps_equal_ours():
    """In a batch of three mazes, across the ends of episodes."""
    own, envs, count, steps = make_env(MAZE), make_vec(MAZE, 3), 3, 1000
    obs, info = envs.reset(seed=5, options={"task_id": [1, 2, 3]})
    rng = np.random.default_rng(5)  # gymnasium's own generator is of the same kind
    twin = np.random.Generator(np.random.PCG64(np.random.SeedSequence(5)))
    reset, step = jax.jit(jax.vmap(own.reset)), jax.jit(jax.vmap(own.step))
    tasks = jnp.asarray([1, 2, 3])

    def fresh() -> Any:
        return reset(jr.split(jr.key(int(twin.integers(2**32))), count), tasks)

    state, over = fresh(), np.zeros(count, bool)
    np.testing.assert_array_equal(obs, state.obs)
    np.testing.assert_array_equal(info["goal"], state.goal)
    ends = 0
    for _ in range(steps):
        action = rng.uniform(-1, 1, (count, own.spec.action_dim)).astype(np.float32)
        obs, reward, terminated, truncated, info = envs.step(action)
        state = step(state, jnp.asarray(action))
        if over.any():
            state = chosen(over, fresh(), state)
        over = np.asarray(state.done)
        ends += over.sum()
        np.testing.assert_array_equal(obs, state.obs)
        np.testing.assert_array_equal(reward, state.reward)
        np.testing.assert_array_equal(terminated | truncated, over)
        np.testing.assert_array_equal(info["success"], state.success)
        np.testing.assert_array_equal(terminated, np.asarray(state.success))
    assert ends > 0


def test_vector_environment_declares_what_it_does():
    envs = make_vec(MAZE, 2)
    assert isinstance(envs, gymnasium.vector.VectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    obs, info = envs.reset(seed=0)
    assert envs.observation_space.contains(obs) and envs.action_space.shape == (2, 2)
    assert info["_goal"].all() and info["goal"].shape == (2, 2) and not info["success"].any()
    wrapped = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    wrapped.reset(seed=0, options={"task_id": 1})
    for _ in range(envs._lanes.env.spec.max_steps):
        *_, info = wrapped.step(np.zeros((2, 2), np.float32))
    np.testing.assert_array_equal(info["episode"]["l"], envs._lanes.env.spec.max_steps)


def test_tasks_are_chosen_by_the_option():
    env = make(MAZE)
    goals = {}
    for task in (1, 2):
        _, info = env.reset(seed=0, options={"task_id": task})
        goals[task] = tuple(info["goal"])
    assert goals[1] != goals[2] and info["success"] is False
    with pytest.raises(UserError, match=r"task_id=9: .* has tasks 1, 2, 3, 4, 5"):
        env.reset(options={"task_id": 9})
    with pytest.raises(UserError, match="option 'task' does not exist"):
        env.reset(options={"task": 1})
    env.reset(options={"task_id": 1, "render_goal": False})  # as OGBench's own evaluation does
    with pytest.raises(UserError, match="render_goal=True"):
        env.reset(options={"render_goal": True})
    assert len({env.reset(seed=seed)[1]["goal"].tobytes() for seed in range(9)}) > 1


def test_evaluation_of_stable_baselines_runs():
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation", reason="needs stable-baselines3")
    env = make(MAZE)

    class Still:
        """A model, as that loop calls it."""

        def predict(
            self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True
        ):
            return np.zeros((len(observation), 2), np.float32), state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no monitor wrapper
        returns, lengths = evaluation.evaluate_policy(
            Still(), env, n_eval_episodes=2, return_episode_rewards=True
        )
    assert lengths == [env._lanes.env.spec.max_steps] * 2 and returns == [0.0, 0.0]
