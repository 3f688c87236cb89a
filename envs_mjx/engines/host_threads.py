"""MuJoCo's C code stepping many environments on host threads, called from inside jit.

The whole simulator state passes through JAX as an opaque array: the bits of doubles. So a step is a function
of its arguments alone, bitwise reproducible whatever the batch, the threads and the order. Rounding positions
to float32 between steps would diverge within a few contacts.
"""

import abc
import collections
import concurrent.futures
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array

from mac.cgroup_limits import cores
from mac.errors import UserError

STATE = mujoco.mjtState.mjSTATE_INTEGRATION
"""Components of MuJoCo's state that an exact continuation needs: positions, velocities, warm start, time
..."""


class Worker:
    """One `MjData` of a model."""

    def __init__(self, data: mujoco.MjData):
        self.data, self.model = data, data.model

    def load(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Puts the model into a state at time 0 and computes derived quantities."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        self.data.qvel[:] = qvel
        mujoco.mj_forward(self.model, self.data)

    def restore(self, state: np.ndarray) -> None:
        """Sets the integration state."""
        mujoco.mj_setState(self.model, self.data, state, STATE)


W = TypeVar("W", bound=Worker)


class HostThreadPool(abc.ABC, Generic[W]):
    """The host side of an engine: threads, each with a worker (an `MjData`) of its own.

    A worker fills one row of doubles, the state, and one of float32, the readings, per environment. Two
    callbacks may run at once (two devices, two jitted calls), so workers are borrowed from a stack that
    grows as needed. They are not thread-local: a thread of XLA's has a new Python identity at every
    callback. No result depends on which worker computed it.
    """

    def __init__(self, threads: int | None, state_size: int, row_size: int):
        """Creates a host of `threads` threads (default: every available core).

        Raises:
            UserError: if `threads` is less than 1.
        """
        if threads is not None and threads < 1:
            raise UserError(f"threads={threads} of engine 'c' must be at least 1")
        self.threads = threads or cores()
        self.state_size, self.row_size = state_size, row_size
        self._idle: collections.deque[W] = collections.deque()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._pool_lock = threading.Lock()

    @abc.abstractmethod
    def make_worker(self) -> W:
        """Creates a new worker."""

    def call(self, function: Callable, *args: Array) -> tuple[Array, Array]:
        """Returns state bits uint32[2 * state_size] and readings float32[row_size] of one environment. Any
        number of `vmap`s makes one callback for the whole batch."""
        shapes = (
            jax.ShapeDtypeStruct((2 * self.state_size,), jnp.uint32),
            jax.ShapeDtypeStruct((self.row_size,), jnp.float32),
        )
        return jax.pure_callback(function, shapes, *args, vmap_method="broadcast_all")

    def fill(
        self, one: Callable[[W, int, np.ndarray, np.ndarray], None], active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fills the rows of every `active` environment with `one(worker, i, state, row)`, in any order. Rows
        of the others are zero and cost nothing."""
        new, rows = self.empty_rows(active.size)
        self._each(lambda worker, i: one(worker, i, new[i], rows[i]), np.flatnonzero(active).tolist())
        return new.view(np.uint32).reshape(*active.shape, -1), rows.reshape(*active.shape, -1)

    def empty_rows(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((n, self.state_size)), np.zeros((n, self.row_size), np.float32)

    def doubles(self, bits: np.ndarray) -> np.ndarray:
        """Returns states float64[n, state_size] of bits uint32[..., 2 * state_size]."""
        return np.ascontiguousarray(bits).view(np.float64).reshape(-1, self.state_size)

    def _each(self, one: Callable[[W, int], None], indices: list[int]) -> None:
        """Calls `one(worker, i)` for every index; threads draw the next index as they become free."""
        queue: Iterable[int] = iter(indices)  # `next` on a list's iterator is atomic under the GIL

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

    def _borrow(self) -> W:
        try:
            return self._idle.pop()
        except IndexError:
            return self.make_worker()

    def _executor(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._pool_lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(self.threads, "mujoco")
            return self._pool
