"""States of walkers in MuJoCo C under random torques: on the ground, in the air and at walls."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs_mjx.engines.base import AbstractWalkerEngine, WalkerPhysics
from envs_mjx.locomotion.mazes import UNIT
from envs_mjx.locomotion.walkers import Walker


class Moments(NamedTuple):
    """Control steps of C, one a row: state, warm start and control before; state after.

    `walls`: whether a wall was touched before; `touching`: how many contacts there were; `steep`: whether
    in the step a capsule touched the floor that stands within 30 degrees of upright.
    """

    qpos: np.ndarray
    qvel: np.ndarray
    warm: np.ndarray
    ctrl: np.ndarray
    next_qpos: np.ndarray
    next_qvel: np.ndarray
    walls: np.ndarray
    touching: np.ndarray
    steep: np.ndarray


def record(walker: Walker, *, starts: int = 12, steps: int = 20, keep: int = 5, seed: int = 0) -> Moments:
    """The last `keep` of `steps` control steps from each of many starts.

    In a maze every start is in a free cell at a wall or in a corner of two, and drifts towards it.
    """
    rng, model = np.random.default_rng(seed), walker.model
    data, rows = mujoco.MjData(model), []
    for _ in range(starts):
        mujoco.mj_resetData(model, data)
        toward = _put(walker, data, rng)
        for step in range(steps):
            ctrl = np.clip(rng.normal(size=model.nu), -1, 1)
            if walker.jump and rng.random() < 0.7:
                ctrl = np.clip(ctrl + 2 * toward, -1, 1)
            row = control_step(walker, data, ctrl)
            if step >= steps - keep:
                rows.append(row)
    return Moments(*(np.array(column) for column in zip(*rows, strict=True)))


def control_step(walker: Walker, data: mujoco.MjData, ctrl: np.ndarray) -> tuple[np.ndarray, ...]:
    """One control step of C: a row of `Moments`."""
    model = walker.model
    before = data.qpos.copy(), data.qvel.copy(), data.qacc_warmstart.copy(), ctrl
    mujoco.mj_forward(model, data)
    boxes = model.geom_type[data.contact.geom] == mujoco.mjtGeom.mjGEOM_BOX
    contacts = bool(boxes.any()), data.ncon
    data.ctrl[:] = 0 if walker.jump else ctrl
    if walker.jump:
        data.qpos[:] += walker.jump * ctrl
        data.qvel[:] = 0
    steep = False
    for _ in range(walker.substeps):
        mujoco.mj_step(model, data)
        steep |= _steep(model, data)
    return *before, data.qpos.copy(), data.qvel.copy(), *map(np.asarray, (*contacts, steep))


def _steep(model: mujoco.MjModel, data: mujoco.MjData) -> bool:
    kinds = model.geom_type[data.contact.geom]
    pairs = data.contact.geom[(kinds[:, 0] == 0) & (kinds[:, 1] == mujoco.mjtGeom.mjGEOM_CAPSULE)]
    return bool(np.any(np.abs(data.geom_xmat[pairs[:, 1], 8]) > np.cos(np.pi / 6)))


def _put(walker: Walker, data: mujoco.MjData, rng: np.random.Generator) -> np.ndarray:
    """Puts a walker somewhere; the direction of the walls that are near."""
    model, toward = walker.model, np.zeros(2)
    data.qpos[:] += rng.uniform(-0.1, 0.1, model.nq)
    data.qvel[:] = rng.normal(size=model.nv) * (0.2 if walker.maze is None else 0.5)
    if walker.maze is None:
        return toward
    free = np.argwhere(~walker.maze.walls)
    cell = free[rng.integers(len(free))]
    sides = [way for way in ((0, 1), (1, 0), (0, -1), (-1, 0)) if walker.maze.walls[tuple(cell + way)]]
    near = {"point": 0.75, "ant": 0.75, "humanoid": 0.8}[walker.body]
    xy = walker.maze.xy(cell)
    for row, column in sides if rng.random() < 0.6 else sides[:1]:
        way = np.array([column, row])
        xy = np.where(way != 0, walker.maze.xy(cell) + way * (UNIT / 2 - near), xy)
        data.qvel[:2] += way * 1.5
        toward += way
    data.qpos[:2] = xy + rng.uniform(-0.1, 0.1, 2)
    if walker.body != "point":
        data.qpos[3:7] = rng.normal(size=4) + np.array([1.5, 0, 0, 0])
        data.qpos[2] += {"ant": 0.2, "humanoid": 0.1}[walker.body]
    return toward


def chosen(moments: Moments, rows: np.ndarray) -> Moments:
    """Some of the moments."""
    return Moments(*(column[rows] for column in moments))


def accelerations(walker: Walker, moments: Moments) -> np.ndarray:
    """C's accelerations, its solver run until nothing changes."""
    model = copy.copy(walker.model)
    model.opt.tolerance = 1e-15
    data, found = mujoco.MjData(model), []
    for row in range(len(moments.qpos)):
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:], data.ctrl[:] = moments.qpos[row], moments.qvel[row], moments.ctrl[row]
        mujoco.mj_forward(model, data)
        found.append(data.qacc.copy())
    return np.array(found)


def loaded(engine: AbstractWalkerEngine, moments: Moments) -> WalkerPhysics:
    """The moments' starts in float32, with C's warm starts."""
    start = eqx.filter_jit(lambda e, q, v: jax.vmap(e.load)(q, v))(
        engine, jnp.asarray(moments.qpos, jnp.float32), jnp.asarray(moments.qvel, jnp.float32)
    )
    return eqx.tree_at(lambda m: m.raw, start, jnp.asarray(moments.warm, jnp.float32))


def errors_of(walker: Walker, qpos: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Largest error of positions in each row (m, rad, quaternion); a quaternion has two signs."""
    qpos = np.array(qpos, float)
    if walker.body in ("ant", "humanoid"):
        quat = qpos[..., 3:7]
        quat *= np.sign(np.sum(quat * expected[..., 3:7], axis=-1, keepdims=True))
    return np.abs(qpos - expected).max(-1)


def open_loop(engine: Any, step: Callable[..., WalkerPhysics], rows: int, steps: int = 10) -> np.ndarray:
    """Errors after `steps` control steps under the same controls as in C, of `rows` walkers that were just
    put down.

    Torques are 0.3 in standard deviation. Under uniform ones C itself diverges: a half-cheetah from 1e-7 (m,
    rad) off is 7e-3 off after ten steps.
    """
    walker, rng = engine.walker, np.random.default_rng(1)
    moments = record(walker, starts=rows, steps=1, keep=1)
    motion = loaded(engine, moments)
    worlds = _worlds(walker, *(np.asarray(x, float) for x in (motion.qpos, motion.qvel, motion.raw)))
    on = jnp.ones(rows, bool)
    for _ in range(steps):
        ctrl = (0.3 * rng.normal(size=moments.ctrl.shape)).clip(-1, 1).astype(np.float32)
        motion = step(engine, motion, jnp.asarray(ctrl), on)
        for row, data in enumerate(worlds):
            control_step(walker, data, ctrl[row].astype(float))
    return errors_of(walker, np.asarray(motion.qpos), np.array([data.qpos for data in worlds]))


def _worlds(walker: Walker, qpos: np.ndarray, qvel: np.ndarray, warm: np.ndarray) -> list[mujoco.MjData]:
    worlds = []
    for row in range(len(qpos)):
        data = mujoco.MjData(walker.model)
        data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = qpos[row], qvel[row], warm[row]
        worlds.append(data)
    return worlds
