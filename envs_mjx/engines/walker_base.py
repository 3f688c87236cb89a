"""Physics engines of walkers behind one protocol.

Environments read `Motion` only, so an engine is interchangeable. Engines are `eqx.Module`s whose
methods are written for one environment and may be vmapped and jitted.
"""

import abc
import dataclasses
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.engines.base import only_where


class Motion(eqx.Module):
    """State of one walker after a control step, as C MuJoCo would leave it.

    Attributes:
        qpos, qvel: joint positions (m, rad) and velocities, float32.
        seen: what the walker's environment reads besides them (`Walker.seen`), of this very state.
        dropped: contacts left out for want of a slot since the walker was loaded, summed over substeps;
            always 0 on engine `c`, which has no limit. Not 0 means that results are doubtful.
        raw: whatever else the engine must carry for an exact continuation.
    """

    qpos: Float[Array, " nq"]
    qvel: Float[Array, " nv"]
    seen: Float[Array, " R"]
    dropped: Int[Array, ""]
    raw: Any


class AbstractWalkerEngine(eqx.Module):
    """A physics engine bound to one walker (`walkers.Walker`)."""

    name: eqx.AbstractVar[str]

    @abc.abstractmethod
    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> Motion:
        """The walker put into the given state at time 0, without having moved, and all derived
        quantities fresh (`mj_forward`)."""

    @abc.abstractmethod
    def step(self, motion: Motion, ctrl: Float[Array, " nu"], active: Bool[Array, ""]) -> Motion:
        """One control step under constant `ctrl` in [-1, 1] (`Walker.substeps` of physics, after a jump by
        `Walker.jump`); unchanged where not `active`."""

    def place(self, motion: Motion, xy: Float[Array, " 2"], active: Bool[Array, ""]) -> Motion:
        """A running walker put at another place, in the same pose and at the same velocity, where
        `active`; `dropped` goes on."""
        loaded = self.load(motion.qpos.at[:2].set(xy), motion.qvel)
        loaded = dataclasses.replace(loaded, dropped=motion.dropped)
        return only_where(active, loaded, motion)
