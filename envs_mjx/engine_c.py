"""Engine `c`: MuJoCo's own C code stepping many environments on host threads, called from inside jit.

The whole simulator state travels through JAX as an opaque array: the bits of the doubles of
MuJoCo's `mjSTATE_INTEGRATION` vector (positions, velocities, warm start, mocap poses, time ...). A step is
therefore a function of its arguments alone, bitwise reproducible whatever the batch, the threads
and the order; rounding positions to float32 between steps would diverge within a few contacts. For the
same reason servo targets are computed in float64, in JAX, and travel as bits too: a target that is off
by one rounding of float32 moves a button or a finger in contact by up to a centimetre in one step.
"""

import collections
import concurrent.futures
import copy
import os
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from envs_mjx import arm as arms
from envs_mjx.engine import AbstractEngine, Physics, keep, only_where
from envs_mjx.scenes import FREE_DAMPING, LOCKED_DAMPING, Scene
from mac.errors import UserError

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CEngine(AbstractEngine):
    """MuJoCo C on host threads.

    Any number of `vmap`s around `step` becomes one callback per control step for the whole batch;
    environments that are not `active` are skipped and cost nothing. On an accelerator the state
    crosses the bus at every control step.

    `Physics.raw` is uint32[2 * n]: the bits of the doubles of the integration state, and of position
    and rotation matrix of the pinch point as observed.
    """

    name: str = eqx.field(static=True)
    host: "_Host" = eqx.field(static=True)

    def __init__(self, scene: Scene, threads: int | None = None):
        """An engine for `scene` on `threads` host threads (default: every available core).

        Raises:
            UserError: if `threads` is less than 1.
        """
        if threads is not None and threads < 1:
            raise UserError(f"threads={threads} of engine 'c' must be at least 1")
        self.name = "c"
        self.host = _Host(scene, threads or available_cores())

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> Physics:
        free = jnp.zeros(self.host.scene.slides, bool)
        return self._unpack(*self._call(self.host.load, qpos, qvel, jnp.asarray(True)), free)

    def place(
        self, physics: Physics, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"], active: Bool[Array, ""]
    ) -> Physics:
        results = self._call(self.host.load, qpos, qvel, active)
        return keep(self._unpack(*results, physics.locked), physics, active)

    def control(
        self, arm: arms.Arm, scene: Scene, physics: Physics, action: Float[Array, " 5"]
    ) -> UInt32[Array, " words"]:
        """`arm.control` in float64, as bits."""
        with jax.enable_x64(True):
            state = jax.lax.bitcast_convert_type(physics.raw.reshape(-1, 2), jnp.float64)
            qpos = jax.lax.slice_in_dim(state, self.host.qpos_at, self.host.qpos_at + self.host.nq)
            pinch = arms.Pinch(state[-12:-9], state[-9:].reshape(3, 3))
            ctrl = arms.control(arm, scene, pinch, qpos, action)
            return jax.lax.bitcast_convert_type(ctrl, jnp.uint32).reshape(-1)

    def step(self, physics: Physics, ctrl: Array, active: Bool[Array, ""]) -> Physics:
        """As in `AbstractEngine`; `ctrl` are the bits that `control` gives, or float32[nu]."""
        results = self._call(self.host.step, physics.raw, ctrl, active, physics.locked)
        new = self._unpack(*results, physics.locked)
        return only_where(active, new, physics)

    def read(self, data: mujoco.MjData) -> Physics:
        """`Physics` of an `MjData` of this engine's model, exactly as it stands (host side, no forward)."""
        worker = _Worker(self.host.scene, data)
        raw, row = self.host.empty_rows(1)
        worker.save(raw[0], row[0])
        locked = data.model.dof_damping[self.host.scene.slide_dof] == LOCKED_DAMPING
        return self._unpack(jnp.asarray(raw[0].view(np.uint32)), jnp.asarray(row[0]), jnp.asarray(locked))

    def _call(self, function, *args) -> tuple[Array, Array]:
        raw, row = self.host.empty_rows(1)
        shapes = (
            jax.ShapeDtypeStruct((2 * raw.shape[1],), jnp.uint32),
            jax.ShapeDtypeStruct((row.shape[1],), jnp.float32),
        )
        return jax.pure_callback(function, shapes, *args, vmap_method="broadcast_all")

    def _unpack(
        self, raw: UInt32[Array, " words"], row: Float[Array, " readings"], locked: Bool[Array, " slides"]
    ) -> Physics:
        nq, nv, sites = self.host.nq, self.host.nv, len(self.host.scene.sites)
        qpos, qvel, pos, mat, touch = jnp.split(row, np.cumsum([nq, nv, 3 * sites, 9 * sites]))
        return Physics(
            qpos,
            qvel,
            pos.reshape(sites, 3),
            mat.reshape(sites, 3, 3),
            touch,
            locked,
            jnp.zeros((), jnp.int32),
            raw,
        )


class _Host:
    """The side of the engine that JAX does not see: threads, each with an `MjData` of its own.

    Two callbacks may run at once (two devices, two jitted calls), so workers are borrowed from a
    stack that grows as needed. They are not thread-local: a thread of XLA's has a new Python identity
    at every callback. No result depends on which worker computed it.
    """

    def __init__(self, scene: Scene, threads: int):
        self.scene = scene
        self.threads = threads
        self.nq, self.nv = int(scene.model.nq), int(scene.model.nv)
        self.state_size = mujoco.mj_stateSize(scene.model, _STATE) + 12  # the pinch point's pose
        self.qpos_at = mujoco.mj_stateSize(scene.model, mujoco.mjtState.mjSTATE_TIME)
        self.row_size = self.nq + self.nv + 12 * len(scene.sites) + 6
        self._idle: collections.deque[_Worker] = collections.deque()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()

    def empty_rows(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((n, self.state_size)), np.zeros((n, self.row_size), np.float32)

    def step(self, raw, ctrl, active, locked):
        """Advances every active environment by one control step; rows of the others are zero."""
        raw, ctrl, active = np.asarray(raw), np.ascontiguousarray(ctrl), np.asarray(active)
        batch = active.shape
        old = np.ascontiguousarray(raw).view(np.float64).reshape(-1, self.state_size)
        ctrl = ctrl.view(np.float64) if ctrl.dtype == np.uint32 else ctrl
        ctrl = ctrl.reshape(len(old), -1)
        locked = np.asarray(locked).reshape(len(old), self.scene.slides)
        new, rows = self.empty_rows(len(old))

        def one(worker: _Worker, i: int) -> None:
            worker.step(old[i], ctrl[i], locked[i])
            worker.save(new[i], rows[i])

        self._each(one, np.flatnonzero(active).tolist())
        return self._results(new, rows, batch)

    def load(self, qpos, qvel, active):
        """Puts every active environment into a given state at time 0 and computes what follows from it."""
        qpos, qvel, active = np.asarray(qpos), np.asarray(qvel), np.asarray(active)
        batch = qpos.shape[:-1]
        qpos, qvel = qpos.reshape(-1, self.nq), qvel.reshape(-1, self.nv)
        new, rows = self.empty_rows(len(qpos))

        def one(worker: _Worker, i: int) -> None:
            worker.load(qpos[i], qvel[i])
            worker.save(new[i], rows[i])

        self._each(one, np.flatnonzero(active).tolist())
        return self._results(new, rows, batch)

    def _results(self, new, rows, batch):
        return new.view(np.uint32).reshape(*batch, -1), rows.reshape(*batch, -1)

    def _each(self, one, indices) -> None:
        """Calls `one(worker, i)` for every index; threads draw the next index as they become free."""
        queue = iter(indices)  # `next` on a list or range iterator is atomic under the GIL

        def drain() -> None:
            worker = self._borrow()
            for i in queue:
                one(worker, i)
            self._idle.append(worker)

        helpers = min(self.threads, len(indices)) - 1
        others = [self._executor().submit(drain) for _ in range(helpers)] if helpers > 0 else []
        drain()  # the calling thread works too
        for other in others:
            other.result()

    def _borrow(self) -> "_Worker":
        try:
            return self._idle.pop()
        except IndexError:
            # Damping is a field of the model, so where it differs between scenes each worker has its own.
            model = copy.copy(self.scene.model) if self.scene.slides else self.scene.model
            return _Worker(self.scene, mujoco.MjData(model))

    def _executor(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._pool_lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(self.threads, "mujoco")
            return self._pool


class _Worker:
    """One `MjData`, with views of the fields that are read after each step."""

    def __init__(self, scene: Scene, data: mujoco.MjData):
        self.data, self.substeps, self.fresh = data, scene.substeps, scene.fresh
        self.model, self.slides = data.model, scene.slide_dof
        self.sites, self.pad = scene.sites, scene.pad_body
        sizes = [scene.model.nq, scene.model.nv, 3 * len(scene.sites), 9 * len(scene.sites), 6]
        ends = np.cumsum(sizes).tolist()
        self.slices = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def step(self, state: np.ndarray, ctrl: np.ndarray, locked: np.ndarray) -> None:
        if self.slides.size:
            self.model.dof_damping[self.slides] = np.where(locked, LOCKED_DAMPING, FREE_DAMPING)
        mujoco.mj_setState(self.model, self.data, state[:-12], _STATE)
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, self.substeps)  # releases the GIL
        mujoco.mj_rnePostConstraint(self.model, self.data)
        if self.fresh:
            mujoco.mj_kinematics(self.model, self.data)

    def load(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        self.data.qvel[:] = qvel
        mujoco.mj_forward(self.model, self.data)

    def save(self, state: np.ndarray, row: np.ndarray) -> None:
        """Writes the integration state and the readings of the current `MjData`."""
        data = self.data
        mujoco.mj_getState(self.model, data, state[:-12], _STATE)
        state[-12:-9] = data.site_xpos[self.sites[0]]
        state[-9:] = data.site_xmat[self.sites[0]]
        qpos, qvel, pos, mat, touch = self.slices
        row[qpos] = data.qpos
        row[qvel] = data.qvel
        row[pos] = data.site_xpos[self.sites].ravel()
        row[mat] = data.site_xmat[self.sites].ravel()
        row[touch] = data.cfrc_ext[self.pad]
