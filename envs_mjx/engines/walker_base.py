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
        seen: other quantities that the walker's environment reads (`Walker.seen`), of this very state.
        dropped: contacts dropped since the load because the contact buffer was full, summed over substeps.
            Always 0 on engine `c`, which has no limit; results are doubtful if it is not 0.
        raw: other engine state that an exact continuation needs.
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
        """Loads the given state at time 0, without having moved, all derived quantities fresh
        (`mj_forward`)."""

    @abc.abstractmethod
    def step(self, motion: Motion, ctrl: Float[Array, " nu"], active: Bool[Array, ""]) -> Motion:
        """Takes one control step under constant `ctrl` in [-1, 1]: a jump by `Walker.jump`, then
        `Walker.substeps` of physics. Unchanged where not `active`."""

    def place(self, motion: Motion, xy: Float[Array, " 2"], active: Bool[Array, ""]) -> Motion:
        """Moves a running walker to another place where `active`; pose, velocity and `dropped` are kept."""
        loaded = self.load(motion.qpos.at[:2].set(xy), motion.qvel)
        loaded = dataclasses.replace(loaded, dropped=motion.dropped)
        return only_where(active, loaded, motion)
