"""Tests of resets' distributions, and of the ends of episodes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs_mjx.manipulation.env import ManipState
from envs_mjx.manipulation.scene_simulation import SLIDE_RANGE
from envs_mjx.manipulation.tasks import task_table
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
def resets(reset) -> ManipState:
    return reset(jax.random.key(0))


def test_the_goal_of_plain_names_is_a_whole_observation(env, resets):
    plain = make("cube-single-play-v0")
    world = jax.tree.map(lambda x: x[0], resets.world)
    np.testing.assert_array_equal(plain.goal_of(world), env.observe(world))


def test_single_tasks_start_in_place_with_noise_and_any_yaw(env, resets):
    seen = jax.vmap(env.readings)(resets.world)
    offset = np.asarray(seen.cube_pos[:, 0]) - [0.35, 0.0, 0.02]
    assert np.abs(offset[:, :2]).max() <= 0.01 and np.abs(offset[:, :2]).max() > 0.008
    assert np.abs(offset[:, 2]).max() < 1e-6
    np.testing.assert_allclose(resets.target.cubes, np.tile([0.5, 0.0, 0.02], (64, 1, 1)), atol=1e-7)
    quarters = np.histogram(np.asarray(seen.cube_yaw[:, 0]), bins=4, range=(-np.pi, np.pi))[0]
    assert quarters.min() >= 6  # 64 draws, 16 expected in each
    assert not resets.physics.qvel.any()
    assert not resets.done.any() and not resets.success.any() and not resets.t.any()


def test_the_arm_starts_anywhere_in_its_box_pointing_down(env, resets):
    seen = jax.vmap(env.readings)(resets.world)
    low, high = np.asarray([[0.25, -0.35, 0.20], [0.6, 0.35, 0.35]])
    pos = np.asarray(seen.effector_pos)
    assert (pos > low - 2e-4).all() and (pos < high + 2e-4).all()
    assert (np.ptp(pos, axis=0) > 0.85 * (high - low)).all()
    quarters = np.histogram(np.asarray(seen.effector_yaw), bins=4, range=(-np.pi, np.pi))[0]
    assert quarters.min() >= 6
    np.testing.assert_allclose(resets.physics.site_mat[:, 0, 2, 2], -1.0, atol=1e-5)


def test_goal_conditioned_resets_shuffle_cubes_and_settle_goals():
    env = make("cube-double-play-oraclerep-v0")
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(1), 32), jnp.full(32, 2))
    start = np.asarray(jax.vmap(env.readings)(state.world).cube_pos)
    table = np.asarray([[0.35, -0.1, 0.02], [0.50, -0.1, 0.02]])
    swapped = np.abs(start[:, 0] - table[1]).max(axis=1) < 0.011
    straight = np.abs(start[:, 0] - table[0]).max(axis=1) < 0.011
    assert (swapped | straight).all() and 6 <= swapped.sum() <= 26
    # Each cube's target moves with it: here, 0.2 m along y.
    np.testing.assert_allclose(
        state.target.cubes - np.round(start, 2), np.tile([0.0, 0.2, 0.0], (32, 2, 1)), atol=0.011
    )
    # The goal shows the cubes at their targets, settled for two steps.
    goal = np.asarray(state.goal).reshape(32, 2, 3) / 10 + [0.425, 0.0, 0.0]
    np.testing.assert_allclose(goal, state.target.cubes, atol=2e-3)


def test_single_task_success_is_reported_one_step_late(env, resets):
    """Checks that success is judged before the action: an episode ends in the step after the cube arrives."""
    state = jax.tree.map(lambda x: x[0], resets)
    here = jax.vmap(env.readings)(resets.world).cube_pos[0]
    state = dataclasses.replace(state, target=state.target._replace(cubes=here))
    step = jax.jit(env.step)
    first = step(state, jnp.zeros(5))
    assert (float(first.reward), bool(first.success), bool(first.done)) == (0.0, False, False)
    second = step(first, jnp.zeros(5))
    assert (float(second.reward), bool(second.success), bool(second.done)) == (0.0, True, True)
    third = step(second, jnp.ones(5))
    assert_same_bits(second, third)  # an ended episode is frozen
    late = dataclasses.replace(
        state, target=state.target._replace(cubes=here + 1.0), t=jnp.asarray(env.spec.max_steps - 1)
    )
    last = step(late, jnp.zeros(5))
    assert (float(last.reward), bool(last.success), bool(last.done)) == (-1.0, False, True)


def test_the_same_key_gives_the_same_bits(reset, resets):
    assert_same_bits(resets, reset(jax.random.key(0)))


def assert_same_bits(a: ManipState, b: ManipState):
    chex.assert_trees_all_equal(*((jax.random.key_data(x.key), x.obs, x.world, x.t) for x in (a, b)))


def test_collection_starts_are_anywhere_on_the_table():
    env = make("cube-double-play-v0")
    world = jax.jit(jax.vmap(env.reset_collect))(jax.random.split(jax.random.key(2), 64))
    pos = np.asarray(jax.vmap(env.readings)(world).cube_pos).reshape(-1, 3)
    low, high = np.asarray([[0.3, -0.3], [0.55, 0.3]])
    assert (pos[:, :2] >= low - 1e-6).all() and (pos[:, :2] <= high + 1e-6).all()
    assert (np.ptp(pos[:, :2], axis=0) > 0.9 * (high - low)).all()
    np.testing.assert_allclose(pos[:, 2], 0.02, atol=1e-7)


def test_scene_resets_draw_drawer_and_window_and_lock_by_button():
    env = make("scene-play-oraclerep-v0")
    tasks = jnp.arange(64) % 5 + 1
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(3), 64), tasks)
    seen = jax.vmap(env.readings)(state.world)
    start, _ = task_table("scene")
    shift = np.asarray(seen.slide_pos) - start.slides[np.asarray(tasks) - 1]
    assert np.abs(shift).max() <= 0.01 + 1e-6 and np.abs(shift).max() > 0.008
    # A slide cannot pass its ends: half of the draws at an end stay at it.
    assert seen.slide_pos[:, 0].max() == 0.0 and seen.slide_pos[:, 1].min() == 0.0
    np.testing.assert_array_equal(state.buttons, start.buttons[np.asarray(tasks) - 1])
    np.testing.assert_array_equal(state.physics.locked, ~state.buttons)


@pytest.mark.slow
def test_collection_starts_of_scene_and_puzzle_are_anywhere():
    for name, buttons in (("scene", 2), ("puzzle-3x3", 9)):
        env = make(f"{name}-play-v0")
        world = jax.jit(jax.vmap(env.reset_collect))(jax.random.split(jax.random.key(4), 64))
        on = np.asarray(world.buttons).mean(axis=0)
        assert on.shape == (buttons,) and (on > 0.25).all() and (on < 0.75).all()
        slides = np.asarray(jax.vmap(env.readings)(world).slide_pos)
        for slide, (low, high) in zip(slides.T, SLIDE_RANGE[: env.scene.slides], strict=True):
            assert low <= slide.min() < low + 0.02 and high - 0.02 < slide.max() <= high


@pytest.mark.slow
def test_presses_toggle_neighbours_in_puzzles_only():
    for name, pressed, toggled in (
        ("puzzle-3x3", 4, {1, 3, 4, 5, 7}),
        ("puzzle-4x5", 0, {0, 1, 5}),
        ("puzzle-4x5", 9, {4, 8, 9, 14}),
        ("scene", 1, {1}),
    ):
        env = make(f"{name}-play-v0")
        before = env.reset_collect(jax.random.key(0))
        qpos = before.physics.qpos.at[env.scene.button_qpos[pressed]].set(-0.021)
        after = env.press(
            before, dataclasses.replace(before, physics=dataclasses.replace(before.physics, qpos=qpos))
        )
        assert set(np.flatnonzero(after.buttons != before.buttons)) == toggled
        held = env.press(after, after)
        np.testing.assert_array_equal(held.buttons, after.buttons)  # keeping it down is no second press
        np.testing.assert_array_equal(after.physics.locked, ~after.buttons[: env.scene.slides])
