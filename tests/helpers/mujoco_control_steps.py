"""Control steps of MuJoCo C under OGBench's experts, reference of engine `mjx`."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs_mjx.engines.base import TabletopPhysics
from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.engines.tabletop_mjx.engine import MjxEngine
from envs_mjx.manipulation.scenes import LOCKED_DAMPING, Scene
from tests.helpers.ogbench_runs import play, single


class Moments(NamedTuple):
    """One control step a row: state, warm start, control and locks before; state and readings after.

    `links`: whether in C a mesh of the gripper touched something, which engine `mjx` has boxes for.
    """

    qpos: np.ndarray
    qvel: np.ndarray
    warm: np.ndarray
    ctrl: np.ndarray
    locked: np.ndarray
    next_qpos: np.ndarray
    next_qvel: np.ndarray
    next_site: np.ndarray
    next_touch: np.ndarray
    links: np.ndarray


def record(
    scene: Scene, *, task: int = 2, steps: int = 130, noise: float | None = 0.1, seed: int = 0
) -> Moments:
    """Plays ogbench's environment and repeats each control step in C."""
    engine = CEngine(scene, threads=1)
    run = play(single(scene.family, task), engine, seed=seed, steps=steps, noise=noise)
    return Moments(
        *map(
            np.array,
            zip(*(_repeat(scene, *row) for row in zip(run.before, run.ctrl, strict=True)), strict=True),
        )
    )


def _repeat(scene: Scene, before, ctrl: np.ndarray) -> tuple[np.ndarray, ...]:
    m, d = scene.model, mujoco.MjData(scene.model)
    bits = np.ascontiguousarray(before.physics.raw).view(np.float64)
    size = mujoco.mj_stateSize(m, mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_setState(m, d, bits[:size], mujoco.mjtState.mjSTATE_INTEGRATION)
    d.ctrl[:] = ctrl
    locked = np.asarray(before.physics.locked)
    free = m.dof_damping.copy()
    m.dof_damping[scene.slide_dof] = np.where(locked, LOCKED_DAMPING, free[scene.slide_dof])
    start = d.qpos.copy(), d.qvel.copy(), d.qacc_warmstart.copy(), ctrl, locked
    links = False
    for _ in range(scene.substeps):
        mujoco.mj_step(m, d)
        links |= bool(np.any(m.geom_type[d.contact.geom] == mujoco.mjtGeom.mjGEOM_MESH))
    mujoco.mj_rnePostConstraint(m, d)
    if scene.fresh:
        mujoco.mj_kinematics(m, d)
    m.dof_damping[:] = free
    after = d.qpos.copy(), d.qvel.copy(), d.site_xpos[scene.sites], d.cfrc_ext[scene.pad_body].copy()
    return *start, *after, np.asarray(links)


def chosen(moments: Moments, rows: np.ndarray) -> Moments:
    return Moments(*(column[rows] for column in moments))


def physics_of(engine: MjxEngine, moments: Moments, dtype=jnp.float32) -> TabletopPhysics:
    """The moments' starts, batch axis first."""
    load = eqx.filter_jit(lambda e, q, v: jax.vmap(e.load)(q, v))
    start = load(engine, jnp.asarray(moments.qpos, dtype), jnp.asarray(moments.qvel, dtype))
    return eqx.tree_at(
        lambda p: (p.raw, p.locked), start, (jnp.asarray(moments.warm, dtype), jnp.asarray(moments.locked))
    )


class Errors(NamedTuple):
    """Largest error of each row: rad, rad, m or quaternion, m, and of the observed contact in [0, 1]."""

    arm: np.ndarray
    gripper: np.ndarray
    objects: np.ndarray
    pinch: np.ndarray
    contact: np.ndarray


def errors_of(scene: Scene, after: TabletopPhysics, moments: Moments) -> Errors:
    """Errors of control steps; the two signs of a quaternion are one rotation."""
    qpos = np.array(after.qpos, float)
    for at in scene.cube_qpos:
        quat = qpos[:, at + 3 : at + 7]
        quat *= np.sign(np.sum(quat * moments.next_qpos[:, at + 3 : at + 7], axis=1, keepdims=True))
    off = np.abs(qpos - moments.next_qpos)
    felt = [
        np.clip(np.linalg.norm(np.asarray(t), axis=1) / 50, 0, 1) for t in (after.touch, moments.next_touch)
    ]
    pinch = np.abs(np.asarray(after.site_pos)[:, 0] - moments.next_site[:, 0]).max(1)
    return Errors(
        off[:, :6].max(1), off[:, 6:14].max(1), off[:, 14:].max(1), pinch, np.abs(felt[0] - felt[1])
    )
