"""What a reset of the cube environments draws, and when an episode ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs_mjx.base import EnvState
from envs_mjx.registry import make


@pytest.fixture(scope="module")
def env():
    return make("cube-single-play-singletask-task2-v0")


@pytest.fixture(scope="module")
def reset(env):
    """64 resets of task 2 from one key."""
    many = jax.jit(jax.vmap(env.reset))
    return lambda key: many(jax.random.split(key, 64), jnp.full(64, 2))


@pytest.fixture(scope="module")
def resets(reset) -> EnvState:
    return reset(jax.random.key(0))


def test_the_goal_of_plain_names_is_a_whole_observation(env, resets):
    plain = make("cube-single-play-v0")
    physics = jax.tree.map(lambda x: x[0], resets.physics)
    np.testing.assert_array_equal(plain.goal_of(physics), env.observe(physics))


def test_a_single_task_starts_at_its_place_with_noise_and_any_yaw(env, resets):
    seen = jax.vmap(env.readings)(resets.physics)
    offset = np.asarray(seen.cube_pos[:, 0]) - [0.35, 0.0, 0.02]
    assert np.abs(offset[:, :2]).max() <= 0.01 and np.abs(offset[:, :2]).max() > 0.008
    assert np.abs(offset[:, 2]).max() < 1e-6
    np.testing.assert_allclose(resets.target, np.tile([0.5, 0.0, 0.02], (64, 1, 1)), atol=1e-7)
    quarters = np.histogram(np.asarray(seen.cube_yaw[:, 0]), bins=4, range=(-np.pi, np.pi))[0]
    assert quarters.min() >= 6  # 64 draws, 16 expected in each
    assert not resets.physics.qvel.any() and not resets.physics.touch.any()
    assert not resets.done.any() and not resets.success.any() and not resets.t.any()


def test_the_arm_starts_anywhere_in_its_box_pointing_down(env, resets):
    seen = jax.vmap(env.readings)(resets.physics)
    low, high = np.asarray([[0.25, -0.35, 0.20], [0.6, 0.35, 0.35]])
    pos = np.asarray(seen.effector_pos)
    assert (pos > low - 2e-4).all() and (pos < high + 2e-4).all()
    assert (np.ptp(pos, axis=0) > 0.85 * (high - low)).all()
    quarters = np.histogram(np.asarray(seen.effector_yaw), bins=4, range=(-np.pi, np.pi))[0]
    assert quarters.min() >= 6
    np.testing.assert_allclose(resets.physics.site_mat[:, 0, 2, 2], -1.0, atol=1e-5)


def test_goal_conditioned_resets_shuffle_cubes_and_show_a_settled_goal():
    env = make("cube-double-play-oraclerep-v0")
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), 32), jnp.full(32, 2))
    start = np.asarray(jax.vmap(env.readings)(state.physics).cube_pos)
    table = np.asarray([[0.35, -0.1, 0.02], [0.50, -0.1, 0.02]])
    swapped = np.abs(start[:, 0] - table[1]).max(axis=1) < 0.011
    straight = np.abs(start[:, 0] - table[0]).max(axis=1) < 0.011
    assert (swapped | straight).all() and 6 <= swapped.sum() <= 26
    # Each cube's target moves with it: here, 0.2 m along y.
    np.testing.assert_allclose(
        state.target - np.round(start, 2), np.tile([0.0, 0.2, 0.0], (32, 2, 1)), atol=0.011
    )
    # The goal shows the cubes at their targets, settled for two steps.
    goal = np.asarray(state.goal).reshape(32, 2, 3) / 10 + [0.425, 0.0, 0.0]
    np.testing.assert_allclose(goal, state.target, atol=2e-3)


def test_single_task_success_is_reported_one_step_late_and_not_at_the_start(env, resets):
    """Judged before the action: the step that ends an episode is the one after the cube got there."""
    state = jax.tree.map(lambda x: x[0], resets)
    here = jax.vmap(env.readings)(resets.physics).cube_pos[0]
    state = dataclasses.replace(state, target=here)
    step = jax.jit(env.step)
    first = step(state, jnp.zeros(5))
    assert (float(first.reward), bool(first.success), bool(first.done)) == (0.0, False, False)
    second = step(first, jnp.zeros(5))
    assert (float(second.reward), bool(second.success), bool(second.done)) == (0.0, True, True)
    third = step(second, jnp.ones(5))
    for a, b in zip(jax.tree.leaves(second), jax.tree.leaves(third), strict=True):
        np.testing.assert_array_equal(a, b)  # an ended episode stands still
    late = dataclasses.replace(state, target=here + 1.0, t=jnp.asarray(env.spec.max_steps - 1))
    last = step(late, jnp.zeros(5))
    assert (float(last.reward), bool(last.success), bool(last.done)) == (-1.0, False, True)


def test_the_same_key_gives_the_same_bits(reset, resets):
    for a, b in zip(jax.tree.leaves(resets), jax.tree.leaves(reset(jax.random.key(0))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_collection_starts_are_anywhere_on_the_table():
    env = make("cube-double-play-v0")
    physics = jax.jit(jax.vmap(env.reset_collect))(jax.random.split(jax.random.key(2), 64))
    pos = np.asarray(jax.vmap(env.readings)(physics).cube_pos).reshape(-1, 3)
    low, high = np.asarray([[0.3, -0.3], [0.55, 0.3]])
    assert (pos[:, :2] >= low - 1e-6).all() and (pos[:, :2] <= high + 1e-6).all()
    assert (np.ptp(pos[:, :2], axis=0) > 0.9 * (high - low)).all()
    np.testing.assert_allclose(pos[:, 2], 0.02, atol=1e-7)
