"""States of walkers in MuJoCo C under random torques: on the ground, in the air and at walls."""

from typing import NamedTuple

import mujoco
import numpy as np

from envs_mjx.locomotion.mazes import UNIT
from envs_mjx.locomotion.walkers import Walker


class Moments(NamedTuple):
    """Control steps of C, one a row: state, warm start and control before; state after. `walls`: whether a
    wall was touched before, `touching`: how many contacts there were.
    """

    qpos: np.ndarray
    qvel: np.ndarray
    warm: np.ndarray
    ctrl: np.ndarray
    next_qpos: np.ndarray
    next_qvel: np.ndarray
    walls: np.ndarray
    touching: np.ndarray


def record(walker: Walker, *, starts: int = 12, steps: int = 20, keep: int = 5, seed: int = 0) -> Moments:
    """The last `keep` of `steps` control steps from each of many starts.

    In a maze every start is in a free cell at a wall or in a corner of two, and drifts towards it.
    """
    rng, model = np.random.default_rng(seed), walker.model
    data, rows = mujoco.MjData(model), []
    for _ in range(starts):
        mujoco.mj_resetData(model, data)
        _put(walker, data, rng)
        for step in range(steps):
            ctrl = np.clip(rng.normal(size=model.nu), -1, 1)
            if walker.jump and step % 2:
                ctrl = np.sign(data.qpos[:2] % 1 - 0.5)  # into a wall, more or less
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
    mujoco.mj_step(model, data, walker.substeps)
    return *before, data.qpos.copy(), data.qvel.copy(), *map(np.asarray, contacts)


def _put(walker: Walker, data: mujoco.MjData, rng: np.random.Generator) -> None:
    model = walker.model
    data.qpos[:] += rng.uniform(-0.1, 0.1, model.nq)
    data.qvel[:] = rng.normal(size=model.nv) * (0.2 if walker.maze is None else 0.5)
    if walker.maze is None:
        return
    free = np.argwhere(~walker.maze.walls)
    cell = free[rng.integers(len(free))]
    sides = [way for way in ((0, 1), (1, 0), (0, -1), (-1, 0)) if walker.maze.walls[tuple(cell + way)]]
    near = {"point": 0.75, "ant": 0.75, "humanoid": 0.35}[walker.body]
    xy = walker.maze.xy(cell)
    for row, column in sides if rng.random() < 0.6 else sides[:1]:
        way = np.array([column, row])
        xy = np.where(way != 0, walker.maze.xy(cell) + way * (UNIT / 2 - near), xy)
        data.qvel[:2] += way * 1.5
    data.qpos[:2] = xy + rng.uniform(-0.1, 0.1, 2)
    if walker.body != "point":
        data.qpos[3:7] = rng.normal(size=4) + np.array([1.5, 0, 0, 0])
        data.qpos[2] += {"ant": 0.2, "humanoid": -0.1}[walker.body]
