"""Engine `c` for walkers: MuJoCo C on host threads; the state is passed exactly, see `host_threads.py`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from envs_mjx.engines.base import AbstractWalkerEngine, WalkerPhysics, where_active
from envs_mjx.engines.host_threads import STATE, HostThreadPool, Worker
from envs_mjx.locomotion.walkers import TORSO, Walker


class CWalkerEngine(AbstractWalkerEngine):
    """MuJoCo C on host threads.

    Any number of `vmap`s around a method becomes one callback for the whole batch; walkers that are not
    `active` are skipped and cost nothing. `WalkerPhysics.raw` are the bits of the doubles of the integration
    state, uint32[2 * n].
    """

    name: str = eqx.field(static=True)
    host: "_WalkerThreadPool" = eqx.field(static=True)

    def __init__(self, walker: Walker, threads: int | None = None):
        """Creates an engine for `walker` on `threads` host threads (default: every available core).

        Raises:
            UserError: if `threads` is less than 1.
        """
        self.name = "c"
        self.host = _WalkerThreadPool(walker, threads)

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> WalkerPhysics:
        return self._unpack(*self.host.call(self.host.load, qpos, qvel))

    def step(
        self, physics: WalkerPhysics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]
    ) -> WalkerPhysics:
        new = self._unpack(*self.host.call(self.host.step, physics.raw, ctrl, active))
        return where_active(active, new, physics)

    def touches(self, qpos: Float[Array, " nq"]) -> Bool[Array, ""]:
        shape = jax.ShapeDtypeStruct((), jnp.bool_)
        return jax.pure_callback(self.host.touches, shape, qpos, vmap_method="broadcast_all")

    def place(self, physics: WalkerPhysics, xy: Float[Array, " 2"], active: Bool[Array, ""]) -> WalkerPhysics:
        new = self._unpack(*self.host.call(self.host.place, physics.raw, xy, active))
        return where_active(active, new, physics)

    def read(self, data: mujoco.MjData) -> WalkerPhysics:
        """Returns `WalkerPhysics` of an `MjData` of this engine's model as it is (host side, no forward)."""
        raw, row = self.host.empty_rows(1)
        _WalkerWorker(self.host.walker, data).save(raw[0], row[0], data.qpos[0])
        return self._unpack(jnp.asarray(raw[0].view(np.uint32)), jnp.asarray(row[0]))

    def _unpack(self, raw: UInt32[Array, " words"], row: Float[Array, " readings"]) -> WalkerPhysics:
        model = self.host.walker.model
        qpos, qvel, seen = jnp.split(row, np.cumsum([model.nq, model.nv]))
        return WalkerPhysics(qpos=qpos, qvel=qvel, seen=seen, dropped=jnp.zeros((), jnp.int32), raw=raw)


class _WalkerThreadPool(HostThreadPool["_WalkerWorker"]):
    """Workers of one walker."""

    def __init__(self, walker: Walker, threads: int | None):
        self.walker = walker
        size = mujoco.mj_stateSize(walker.model, STATE)
        super().__init__(threads, size, walker.model.nq + walker.model.nv + walker.seen_size)

    def load(self, qpos, qvel):
        """Puts environments into given states at time 0 and computes derived quantities."""
        qpos, qvel = np.asarray(qpos), np.asarray(qvel)
        batch, model = qpos.shape[:-1], self.walker.model
        qpos, qvel = qpos.reshape(-1, model.nq), qvel.reshape(-1, model.nv)

        def one(worker: _WalkerWorker, i: int, new: np.ndarray, row: np.ndarray) -> None:
            worker.load(qpos[i], qvel[i])
            worker.save(new, row, worker.data.qpos[0])

        return self.fill(one, np.ones(batch, bool))

    def step(self, raw, ctrl, active):
        """Advances every active environment by one control step."""
        old, active = self.doubles(np.asarray(raw)), np.asarray(active)
        ctrl = np.asarray(ctrl).reshape(len(old), -1)

        def one(worker: _WalkerWorker, i: int, new: np.ndarray, row: np.ndarray) -> None:
            worker.restore(old[i])
            before = worker.data.qpos[0]
            worker.step(ctrl[i])
            worker.save(new, row, before)

        return self.fill(one, active)

    def place(self, raw, xy, active):
        """Moves every active environment to another place, and computes derived quantities."""
        old, active = self.doubles(np.asarray(raw)), np.asarray(active)
        xy = np.asarray(xy).reshape(len(old), 2)

        def one(worker: _WalkerWorker, i: int, new: np.ndarray, row: np.ndarray) -> None:
            worker.restore(old[i])
            worker.place(xy[i])
            worker.save(new, row, worker.data.qpos[0])

        return self.fill(one, active)

    def touches(self, qpos) -> np.ndarray:
        """Returns whether walkers touch anything at the positions."""
        qpos, data = np.asarray(qpos), mujoco.MjData(self.walker.model)
        found = np.zeros(qpos.shape[:-1], bool)
        for i in np.ndindex(found.shape):
            data.qpos[:] = qpos[i]
            mujoco.mj_fwdPosition(self.walker.model, data)
            found[i] = data.ncon > 0
        return found

    def make_worker(self) -> "_WalkerWorker":
        return _WalkerWorker(self.walker, mujoco.MjData(self.walker.model))


class _WalkerWorker(Worker):
    """A worker of one walker."""

    def __init__(self, walker: Walker, data: mujoco.MjData):
        super().__init__(data)
        self.walker = walker
        self.ends = np.cumsum([walker.model.nq, walker.model.nv]).tolist()

    def step(self, ctrl: np.ndarray) -> None:
        if self.walker.jump:
            self.data.qpos[:] += self.walker.jump * ctrl.astype(float)
            self.data.qvel[:] = 0.0
        else:
            self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, self.walker.substeps)  # releases the GIL
        if self.walker.fresh:
            mujoco.mj_step1(self.model, self.data)

    def place(self, xy: np.ndarray) -> None:
        self.data.qpos[:2] = xy
        mujoco.mj_forward(self.model, self.data)

    def save(self, state: np.ndarray, row: np.ndarray, before: float) -> None:
        """Writes the integration state and the readings of the current `MjData`.

        Args:
            before: `qpos[0]` (m) at the start of the control step.
        """
        data, (positions, end) = self.data, self.ends
        mujoco.mj_getState(self.model, data, state, STATE)
        row[:positions] = data.qpos
        row[positions:end] = data.qvel
        if len(row) > end:
            moved, mat = np.asarray(data.qpos[0] - before), data.xmat.reshape(-1, 3, 3)
            row[end:] = self.walker.seen(moved, data.xpos, mat, data.subtree_linvel[TORSO])
