"""Engine `c`: MuJoCo's own C code stepping many scenes on host threads, called from inside jit.

The state is passed exactly, see `host_threads.py`. Servo targets are computed in float64, in JAX, and passed
as bits too. A target that is off by one rounding of float32 moves a button or a finger in contact by up to a
centimetre in one step.
"""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from envs_mjx.engines.base import (
    AbstractTabletopEngine,
    TabletopPhysics,
    overwrite_where_active,
    where_active,
)
from envs_mjx.engines.host_threads import STATE, HostThreadPool, Worker
from envs_mjx.manipulation import arm_controller as arms
from envs_mjx.manipulation.scenes import FREE_DAMPING, LOCKED_DAMPING, Scene


class CEngine(AbstractTabletopEngine):
    """MuJoCo C on host threads.

    Any number of `vmap`s around `step` becomes one callback per control step for the whole batch;
    environments that are not `active` are skipped and cost nothing. On an accelerator the state
    crosses the bus at every control step.

    `TabletopPhysics.raw` is uint32[2 * n]: the bits of the doubles of the integration state, and of position
    and rotation matrix of the pinch point as observed.
    """

    name: str = eqx.field(static=True)
    host: "_TabletopThreadPool" = eqx.field(static=True)

    def __init__(self, scene: Scene, threads: int | None = None):
        """Creates an engine for `scene` on `threads` host threads (default: every available core).

        Raises:
            UserError: if `threads` is less than 1.
        """
        self.name = "c"
        self.host = _TabletopThreadPool(scene, threads)

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> TabletopPhysics:
        free = jnp.zeros(self.host.scene.slides, bool)
        return self._unpack(*self.host.call(self.host.load, qpos, qvel, jnp.asarray(True)), free)

    def place(
        self,
        physics: TabletopPhysics,
        qpos: Float[Array, " nq"],
        qvel: Float[Array, " nv"],
        active: Bool[Array, ""],
    ) -> TabletopPhysics:
        results = self.host.call(self.host.load, qpos, qvel, active)
        return overwrite_where_active(self._unpack(*results, physics.locked), physics, active)

    def control(
        self, arm: arms.Arm, scene: Scene, physics: TabletopPhysics, action: Float[Array, " 5"]
    ) -> UInt32[Array, " words"]:
        """Returns `arm.control` in float64, as bits."""
        with jax.enable_x64(True):
            state = jax.lax.bitcast_convert_type(physics.raw.reshape(-1, 2), jnp.float64)
            qpos = jax.lax.slice_in_dim(state, self.host.qpos_at, self.host.qpos_at + self.host.nq)
            pinch = arms.Pinch(state[-12:-9], state[-9:].reshape(3, 3))
            ctrl = arms.control(arm, scene, pinch, qpos, action)
            return jax.lax.bitcast_convert_type(ctrl, jnp.uint32).reshape(-1)

    def step(self, physics: TabletopPhysics, ctrl: Array, active: Bool[Array, ""]) -> TabletopPhysics:
        """As in `AbstractTabletopEngine`; `ctrl` are the bits that `control` gives, or float32[nu]."""
        results = self.host.call(self.host.step, physics.raw, ctrl, active, physics.locked)
        new = self._unpack(*results, physics.locked)
        return where_active(active, new, physics)

    def read(self, data: mujoco.MjData) -> TabletopPhysics:
        """Returns the physics of an `MjData` of this engine's model as it is (host side, no forward)."""
        worker = _TabletopWorker(self.host.scene, data)
        raw, row = self.host.empty_rows(1)
        worker.save(raw[0], row[0])
        locked = data.model.dof_damping[self.host.scene.slide_dof] == LOCKED_DAMPING
        return self._unpack(jnp.asarray(raw[0].view(np.uint32)), jnp.asarray(row[0]), jnp.asarray(locked))

    def _unpack(
        self, raw: UInt32[Array, " words"], row: Float[Array, " readings"], locked: Bool[Array, " slides"]
    ) -> TabletopPhysics:
        nq, nv, sites = self.host.nq, self.host.nv, len(self.host.scene.sites)
        qpos, qvel, pos, mat, touch = jnp.split(row, np.cumsum([nq, nv, 3 * sites, 9 * sites]))
        return TabletopPhysics(
            qpos=qpos,
            qvel=qvel,
            site_pos=pos.reshape(sites, 3),
            site_mat=mat.reshape(sites, 3, 3),
            touch=touch,
            locked=locked,
            dropped=jnp.zeros((), jnp.int32),
            raw=raw,
        )


class _TabletopThreadPool(HostThreadPool["_TabletopWorker"]):
    """Workers of one scene."""

    def __init__(self, scene: Scene, threads: int | None):
        self.scene = scene
        self.nq, self.nv = int(scene.model.nq), int(scene.model.nv)
        self.qpos_at = mujoco.mj_stateSize(scene.model, mujoco.mjtState.mjSTATE_TIME)
        size = mujoco.mj_stateSize(scene.model, STATE) + 12  # the pinch point's pose
        super().__init__(threads, size, self.nq + self.nv + 12 * len(scene.sites) + 6)

    def step(self, raw, ctrl, active, locked):
        """Advances every active environment by one control step; rows of the others are zero."""
        old, ctrl = self.doubles(np.asarray(raw)), np.ascontiguousarray(ctrl)
        ctrl = ctrl.view(np.float64) if ctrl.dtype == np.uint32 else ctrl
        ctrl = ctrl.reshape(len(old), -1)
        locked = np.asarray(locked).reshape(len(old), self.scene.slides)

        def one(worker: _TabletopWorker, i: int, new: np.ndarray, row: np.ndarray) -> None:
            worker.step(old[i], ctrl[i], locked[i])
            worker.save(new, row)

        return self.fill(one, np.asarray(active))

    def load(self, qpos, qvel, active):
        """Puts every active environment into a given state at time 0 and computes derived quantities."""
        qpos, qvel = np.asarray(qpos).reshape(-1, self.nq), np.asarray(qvel).reshape(-1, self.nv)

        def one(worker: _TabletopWorker, i: int, new: np.ndarray, row: np.ndarray) -> None:
            worker.load(qpos[i], qvel[i])
            worker.save(new, row)

        return self.fill(one, np.asarray(active))

    def make_worker(self) -> "_TabletopWorker":
        # Damping is a field of the model, so where it differs between scenes each worker has its own.
        model = copy.copy(self.scene.model) if self.scene.slides else self.scene.model
        return _TabletopWorker(self.scene, mujoco.MjData(model))


class _TabletopWorker(Worker):
    """A worker of one scene, with views of the fields that are read after each step."""

    def __init__(self, scene: Scene, data: mujoco.MjData):
        super().__init__(data)
        self.substeps, self.fresh, self.slides = scene.substeps, scene.fresh, scene.slide_dof
        self.sites, self.pad = scene.sites, scene.pad_body
        sizes = [scene.model.nq, scene.model.nv, 3 * len(scene.sites), 9 * len(scene.sites), 6]
        ends = np.cumsum(sizes).tolist()
        self.slices = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def step(self, state: np.ndarray, ctrl: np.ndarray, locked: np.ndarray) -> None:
        if self.slides.size:
            self.model.dof_damping[self.slides] = np.where(locked, LOCKED_DAMPING, FREE_DAMPING)
        self.restore(state[:-12])
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, self.substeps)  # releases the GIL
        mujoco.mj_rnePostConstraint(self.model, self.data)
        if self.fresh:
            mujoco.mj_kinematics(self.model, self.data)

    def save(self, state: np.ndarray, row: np.ndarray) -> None:
        """Writes the integration state and the readings of the current `MjData`."""
        data = self.data
        mujoco.mj_getState(self.model, data, state[:-12], STATE)
        state[-12:-9] = data.site_xpos[self.sites[0]]
        state[-9:] = data.site_xmat[self.sites[0]]
        qpos, qvel, pos, mat, touch = self.slices
        row[qpos] = data.qpos
        row[qvel] = data.qvel
        row[pos] = data.site_xpos[self.sites].ravel()
        row[mat] = data.site_xmat[self.sites].ravel()
        row[touch] = data.cfrc_ext[self.pad]
