"""Tests that engine `c` is a pure function, equal to MuJoCo called directly."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.manipulation.scenes import build_scene
from mac.errors import UserError

STEPS = 12
BATCH = 6


@pytest.fixture(scope="module")
def scene():
    return build_scene("cube-single")


@pytest.fixture(scope="module")
def engine(scene):
    return CEngine(scene, threads=3)


@pytest.fixture(scope="module")
def ctrl(scene):
    """Servo targets that swing the arm and close the fingers, float32[STEPS, BATCH, nu]."""
    rng = np.random.default_rng(0)
    arm = np.asarray([-1.57, -1.57, 1.57, -1.57, -1.57, 0.0]) + rng.normal(0, 0.3, (STEPS, BATCH, 6))
    return np.concatenate([arm, rng.uniform(0, 255, (STEPS, BATCH, 1))], axis=-1).astype(np.float32)


@pytest.fixture(scope="module")
def start(scene):
    """Positions with the cube a little above the table, so that it lands: float32[BATCH, nq]."""
    qpos = np.tile(scene.model.qpos0, (BATCH, 1)).astype(np.float32)
    qpos[:, :6] = [-1.57, -1.57, 1.57, -1.57, -1.57, 0.0]
    qpos[:, scene.cube_qpos[0] + 2] += np.linspace(0.0, 0.05, BATCH)
    return qpos


@pytest.fixture(scope="module")
def rollout(engine, scene):
    """Returns jit(scan(vmap(step))) of positions, servo targets and the flags of active environments."""

    def run(qpos, ctrl, active):
        physics = jax.vmap(engine.load)(qpos, jnp.zeros((len(qpos), scene.model.nv)))

        def body(p, c):
            p = jax.vmap(engine.step)(p, c, active)
            return p, p

        return physics, jax.lax.scan(body, physics, ctrl)[1]

    return jax.jit(run)


def direct(scene, qpos, ctrl):
    """The same, with one MjData and no state carried through JAX; qpos after each step, float64."""
    data = mujoco.MjData(scene.model)
    data.qpos[:] = qpos
    mujoco.mj_forward(scene.model, data)
    out = []
    for u in ctrl:
        data.ctrl[:] = u
        mujoco.mj_step(scene.model, data, scene.substeps)
        mujoco.mj_rnePostConstraint(scene.model, data)
        pad = data.cfrc_ext[scene.pad_body]
        out.append((data.qpos.copy(), data.qvel.copy(), data.site_xpos[scene.sites].copy(), pad.copy()))
    return [np.asarray(column, np.float32) for column in zip(*out, strict=True)]


def test_a_scanned_batch_equals_mujoco_called_in_a_loop(scene, rollout, start, ctrl):
    _, after = rollout(start, ctrl, jnp.ones(BATCH, bool))
    for i in range(BATCH):
        qpos, qvel, sites, touch = direct(scene, start[i], ctrl[:, i])
        np.testing.assert_array_equal(after.qpos[:, i], qpos)
        np.testing.assert_array_equal(after.qvel[:, i], qvel)
        np.testing.assert_array_equal(after.site_pos[:, i], sites)
        np.testing.assert_array_equal(after.touch[:, i], touch)


def test_a_step_is_a_function_of_its_arguments(rollout, start, ctrl):
    """Repeats a step with other environments in the batch and in another order: the same bits."""
    active = jnp.ones(BATCH, bool)
    _, first = rollout(start, ctrl, active)
    _, reverse = rollout(start[::-1], ctrl[:, ::-1], active)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(reverse), strict=True):
        np.testing.assert_array_equal(a, np.flip(np.asarray(b), 1))


def test_inactive_environments_stay_as_they_were(rollout, start, ctrl):
    active = np.arange(BATCH) % 2 == 0
    before, after = rollout(start, ctrl, jnp.asarray(active))
    _, all_active = rollout(start, ctrl, jnp.ones(BATCH, bool))
    for old, new, free in zip(*map(jax.tree.leaves, (before, after, all_active)), strict=True):
        np.testing.assert_array_equal(new[-1][~active], old[~active])
        np.testing.assert_array_equal(new[-1][active], free[-1][active])


def test_the_number_of_threads_does_not_matter(scene, engine, rollout, start, ctrl):
    physics, after = rollout(start, ctrl, jnp.ones(BATCH, bool))
    raw = np.asarray(physics.raw)
    for threads in (1, 2, 5):
        other = CEngine(scene, threads=threads)
        new, row = other.host.step(raw, ctrl[0], np.ones(BATCH, bool), np.zeros((BATCH, 0), bool))
        np.testing.assert_array_equal(new, after.raw[0])
        np.testing.assert_array_equal(row[:, : scene.model.nq], after.qpos[0])


def test_any_number_of_batch_axes(engine, rollout, start, ctrl):
    physics, after = rollout(start, ctrl, jnp.ones(BATCH, bool))
    physics = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), physics)
    nested = jax.jit(jax.vmap(jax.vmap(engine.step)))(
        physics, ctrl[0].reshape(2, 3, -1), jnp.ones((2, 3), bool)
    )
    np.testing.assert_array_equal(nested.raw.reshape(BATCH, -1), after.raw[0])
    one = engine.step(jax.tree.map(lambda x: x[1, 2], physics), jnp.asarray(ctrl[0, 5]), jnp.asarray(True))
    np.testing.assert_array_equal(one.raw, after.raw[0, 5])


def test_poses_are_those_of_the_last_substeps_start(scene, rollout, start, ctrl):
    """Forward kinematics of the positions gives another pose: they are 2 ms newer."""
    _, after = rollout(start, ctrl, jnp.ones(BATCH, bool))
    data = mujoco.MjData(scene.model)
    data.qpos[:] = after.qpos[2, 0]
    mujoco.mj_kinematics(scene.model, data)
    gap = np.linalg.norm(data.site_xpos[scene.sites[0]] - after.site_pos[2, 0, 0])
    speed = np.linalg.norm(after.site_pos[2, 0, 0] - after.site_pos[1, 0, 0]) / 0.05
    assert 1e-5 < gap < 3e-3 * max(speed, 1.0)


def test_a_large_batch_from_inside_jit_does_not_hang(engine, scene):
    """Passes megabytes, with which a callback that waits for JAX's own threads would deadlock."""
    many = 600
    qpos = jnp.tile(jnp.asarray(scene.model.qpos0, jnp.float32), (many, 1))
    load = jax.jit(jax.vmap(lambda q: engine.load(q, jnp.zeros(scene.model.nv)).raw.sum()))
    assert np.ptp(load(qpos)) == 0


def test_no_threads_is_a_mistake(scene):
    with pytest.raises(UserError, match="threads=0"):
        CEngine(scene, threads=0)
