"""Tests of the arm's controller against OGBench's, and of an environment's handling of invalid input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs_mjx.manipulation import arm_controller as arms
from envs_mjx.registry import make
from mac.errors import UserError
from tests.helpers.ogbench_runs import official


@pytest.fixture(scope="module")
def env():
    return make("cube-single-play-singletask-task2-v0")


def test_starting_poses_are_the_official_controllers(env):
    """Compares poses from home to random ones, over many more iterations than a control step takes."""
    theirs = official("cube-single-v0")
    theirs.reset()
    rng = np.random.default_rng(0)
    low, high = theirs._arm_sampling_bounds
    pos, yaw = rng.uniform(low, high, (48, 3)), rng.uniform(-np.pi, np.pi, 48)
    solve = jax.jit(
        jax.vmap(lambda p, y: arms.joints_for(env.arm, p, y, jnp.asarray(arms.HOME, jnp.float32)))
    )
    ours = np.asarray(solve(jnp.asarray(pos, jnp.float32), jnp.asarray(yaw, jnp.float32)))
    for i in range(48):
        np.testing.assert_allclose(ours[i], official_pose(theirs, pos[i], yaw[i]), atol=2e-5)


def official_pose(env, pos, yaw):
    from ogbench.manipspace import lie

    turn = lie.SO3.from_z_radians(yaw) @ env._effector_down_rotation
    flange = lie.SE3.from_rotation_and_translation(turn, pos) @ env._T_pa
    return env._ik.solve(flange.translation(), flange.rotation().wxyz, env._home_qpos)


def test_the_least_squares_step_is_numpys_in_float64(getkey):
    with jax.enable_x64(True):
        jacobian = jax.random.normal(getkey(), (6, 6), "float64")
        rhs = jax.random.normal(getkey(), (6,), "float64")
        ours = np.asarray(arms.damped_least_squares(jacobian, rhs))
    j = np.asarray(jacobian)
    expected = j.T @ np.linalg.solve(j @ j.T + arms.IK_DAMPING * np.eye(6), np.asarray(rhs))
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


@pytest.mark.slow
def test_servo_targets_in_float32_are_those_in_float64(env):
    """Compares the float32 version, which engines other than `c` use."""
    reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
    physics = reset(jax.random.split(jax.random.key(0), 32), 2).physics
    actions = jax.random.uniform(jax.random.key(1), (32, 5), minval=-1, maxval=1)
    exact = jax.jit(jax.vmap(lambda p, a: env.engine.control(env.arm, env.scene, p, a)))(physics, actions)
    single = super(type(env.engine), env.engine).control
    ours = np.asarray(jax.jit(jax.vmap(lambda p, a: single(env.arm, env.scene, p, a)))(physics, actions))
    theirs = np.asarray(exact).view(np.float64)
    np.testing.assert_allclose(ours[:, :6], theirs[:, :6], atol=5e-6)
    np.testing.assert_allclose(ours[:, 6], theirs[:, 6], atol=1e-3)


def test_actions_are_clipped(env):
    state = jax.jit(env.reset)(jax.random.key(0), 2)
    step = jax.jit(env.step)
    np.testing.assert_array_equal(step(state, jnp.full(5, 7.0)).obs, step(state, jnp.ones(5)).obs)


def test_an_action_of_another_shape_is_a_mistake(env):
    state = jax.eval_shape(env.reset, jax.random.key(0), 2)
    for shape in ((4,), (6,)):
        with pytest.raises(UserError, match=r"action of .* has shape .*expected \(5,\)"):
            jax.eval_shape(env.step, state, jax.ShapeDtypeStruct(shape, "float32"))


@pytest.mark.slow
def test_a_nonfinite_action_is_no_motion_and_a_nan_reward(env):
    state = jax.jit(env.reset)(jax.random.key(0), 2)
    step = jax.jit(env.step)
    for bad in (jnp.nan, jnp.inf):
        after = step(state, jnp.ones(5).at[2].set(bad))
        assert np.isnan(after.reward)
        np.testing.assert_array_equal(after.obs, step(state, jnp.zeros(5)).obs)


@pytest.mark.parametrize(
    "family", ["scene", *(pytest.param(f, marks=pytest.mark.slow) for f in ("cube-single", "puzzle-3x3"))]
)
def test_a_cube_thrown_out_of_the_scene_comes_back_to_the_table(family):
    """As in OGBench: only where there are a drawer and a window, and at rest."""
    env = make(f"{family}-play-oraclerep-v0")
    state = jax.jit(env.reset)(jax.random.key(0), 1)
    out = state.physics.qpos
    if env.scene.cubes:
        out = out.at[env.scene.cube_qpos[0]].set(1.5)
    physics = env.engine.load(out, state.physics.qvel + 0.0)
    physics = dataclasses.replace(physics, locked=state.physics.locked)
    state = dataclasses.replace(state, world=dataclasses.replace(state.world, physics=physics))
    after = jax.jit(env.step)(state, jnp.zeros(5))
    cube = np.asarray(env.readings(after.world).cube_pos)
    if env.scene.slides:
        low, high = env.scene.object_bounds
        assert (cube[0, :2] >= low).all() and (cube[0, :2] <= high).all() and cube[0, 2] == np.float32(0.02)
        assert not after.physics.qvel[env.scene.cube_dof[0] + np.arange(6)].any()
        np.testing.assert_array_equal(after.physics.locked, state.physics.locked)
    else:
        assert (cube[:, 0] > 1.0).all()


def test_wrong_observations_or_tasks_are_mistakes(env):
    with pytest.raises(UserError, match=r"\(N, 28\)"):
        env.relabel(np.zeros((3, 37), np.float32), 1)
    with pytest.raises(UserError, match="task 6"):
        env.relabel(np.zeros((3, 28), np.float32), 6)
