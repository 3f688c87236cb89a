"""Tests of gym walkers on engine `c`: initial states, rewards, termination."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.registry import make
from mac.errors import UserError
from tests.envs.test_maze_env import assert_normal, assert_uniform


def gym(name: str) -> GymEnv:
    env = make(name)
    assert isinstance(env, GymEnv)
    return env


@pytest.mark.parametrize("body", ["hopper", "walker2d", "halfcheetah"])
def test_starts_are_near_the_models_pose(body: str):
    env = gym(f"{body}-medium-v2")
    state = jax.jit(jax.vmap(env.reset, (0, None)))(jr.split(jr.key(0), 256), jnp.asarray(1))
    noise = 0.1 if body == "halfcheetah" else 0.005
    assert_uniform(np.asarray(state.motion.qpos) - env.walker.model.qpos0, noise)
    (assert_normal if body == "halfcheetah" else assert_uniform)(state.motion.qvel, noise)
    np.testing.assert_array_equal(
        state.obs, np.concatenate([state.motion.qpos[:, 1:], state.motion.qvel], axis=1)
    )


def test_termination_costs_the_healthy_reward_in_version_5_only():
    action = jnp.zeros(3)
    for name, reward in (("hopper-medium-v2", 1.0), ("mujoco/hopper/medium-v0", 0.0)):
        env = gym(name)
        state = env.reset(jr.key(0), jnp.asarray(1))
        tilted = env.engine.load(state.motion.qpos.at[2].set(0.5), jnp.zeros(6))
        after = jax.jit(env.step)(eqx.tree_at(lambda s: s.motion, state, tilted), action)
        assert bool(after.done) and not bool(after.success) and int(after.t) == 1
        # `seen` is the mean velocity along x over the step.
        assert float(after.reward) == pytest.approx(reward + float(after.motion.seen[0]), abs=1e-6)
        gone = float(after.motion.qpos[0] - tilted.qpos[0])
        assert float(after.motion.seen[0]) == pytest.approx(gone / 0.008, abs=1e-4)


def test_observed_velocities_are_clipped_except_the_halfcheetahs():
    for name, top in (
        ("hopper-medium-v2", 10.0),
        ("walker2d-medium-v2", 10.0),
        ("halfcheetah-medium-v2", 30.0),
    ):
        env = gym(name)
        state = env.reset(jr.key(0), jnp.asarray(1))
        fast = env.engine.load(state.motion.qpos, jnp.full(env.walker.model.nv, 30.0))
        assert float(env.observe(fast).max()) == top


@pytest.mark.parametrize(
    ("name", "index", "low", "high"),
    [
        ("hopper-medium-v2", 1, 0.7, None),
        ("hopper-medium-v2", 2, -0.2, 0.2),
        ("hopper-medium-v2", 4, -100.0, 100.0),
        ("walker2d-medium-v2", 1, 0.8, 2.0),
        ("walker2d-medium-v2", 2, -1.0, 1.0),
        ("halfcheetah-medium-v2", 1, None, None),
    ],
)
def test_who_is_healthy(name: str, index: int, low: float | None, high: float | None):
    env = gym(name)
    motion = env.reset(jr.key(0), jnp.asarray(1)).motion
    assert bool(env.healthy(motion))
    inside = [-1e3 if low is None else low + 1e-3, 1e3 if high is None else high - 1e-3]
    outside = [edge + way for edge, way in ((low, -1e-3), (high, 1e-3)) if edge is not None]
    for value in inside + outside:
        moved = eqx.tree_at(lambda m: m.qpos, motion, motion.qpos.at[index].set(value))
        assert bool(env.healthy(moved)) == (value in inside)


def test_rewards_are_recorded_and_not_computed():
    with pytest.raises(UserError, match="read those that the dataset records"):
        gym("walker2d-medium-v2").relabel(np.zeros((1, 17), np.float32), 1)


def test_an_episode_ends_after_1000_steps_and_is_frozen():
    env = gym("halfcheetah-medium-v2")
    step = jax.jit(env.step)
    state = eqx.tree_at(lambda s: s.t, env.reset(jr.key(0), jnp.asarray(1)), jnp.asarray(998))
    states = [state := step(state, jnp.full(6, 0.5)) for _ in range(3)]
    assert [bool(s.done) for s in states] == [False, True, True]
    np.testing.assert_array_equal(states[1].obs, states[2].obs)
    assert int(states[2].t) == 1000 and not any(bool(s.success) for s in states)


def test_a_nonfinite_action_makes_the_reward_nan():
    env = gym("halfcheetah-medium-v2")
    state = env.reset(jr.key(0), jnp.asarray(1))
    assert np.isnan(float(env.step(state, jnp.full(6, jnp.inf)).reward))
