"""Physics engines of tabletop scenes and of walkers, each behind one protocol.

Environments read `TabletopPhysics` or `WalkerPhysics` only, so engines are interchangeable. Engines are
`eqx.Module`s whose methods are written for one environment and may be vmapped and jitted.
"""

import abc
import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.manipulation import arm as arms
from envs_mjx.manipulation.scenes import Scene

State = TypeVar("State", bound=eqx.Module)


class TabletopPhysics(eqx.Module):
    """State of one simulated scene after a control step, as C MuJoCo would leave it.

    Site poses are those of the *last substep's start* (2 ms older than `qpos`), because
    `mj_step` integrates after computing them and OGBench reads them so. Where `Scene.fresh` they are
    those of `qpos`, because there OGBench calls `mj_forward` after each control step.

    Attributes:
        qpos, qvel: joint positions (m, rad) and velocities, float32.
        site_pos: world positions (m) of the model's tracked sites, in the order of `Scene.sites`.
        site_mat: their rotation matrices.
        touch: `cfrc_ext` of the right finger pad (torque, force; N m and N), after
            `mj_rnePostConstraint`.
        locked: which slides of the scene are locked: their joint damping is 1e6 instead of 2 N s / m
            from the next step on. The task logic sets it.
        dropped: contacts dropped since the load because the contact buffer was full, summed over substeps.
            Always 0 on engine `c`, which has no limit; results are doubtful if it is not 0.
        raw: other engine state that an exact continuation needs.
    """

    qpos: Float[Array, " nq"]
    qvel: Float[Array, " nv"]
    site_pos: Float[Array, "sites 3"]
    site_mat: Float[Array, "sites 3 3"]
    touch: Float[Array, " 6"]
    locked: Bool[Array, " slides"]
    dropped: Int[Array, ""]
    raw: Any


class AbstractTabletopEngine(eqx.Module):
    """A physics engine bound to one compiled model."""

    name: eqx.AbstractVar[str]

    @abc.abstractmethod
    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> TabletopPhysics:
        """Loads the given state at time 0: nothing locked, all derived quantities fresh (`mj_forward`)."""

    def control(
        self, arm: arms.Arm, scene: Scene, physics: TabletopPhysics, action: Float[Array, " 5"]
    ) -> Array:
        """Returns servo targets for an action in [-1, 1]^5, in the form that `step` takes (`arm.control`)."""
        pinch = arms.Pinch(physics.site_pos[0], physics.site_mat[0])
        return arms.control(arm, scene, pinch, physics.qpos, action)

    @abc.abstractmethod
    def step(self, physics: TabletopPhysics, ctrl: Array, active: Bool[Array, ""]) -> TabletopPhysics:
        """Takes one control step (all substeps under constant `ctrl`); unchanged where not `active`."""

    def place(
        self,
        physics: TabletopPhysics,
        qpos: Float[Array, " nq"],
        qvel: Float[Array, " nv"],
        active: Bool[Array, ""],
    ) -> TabletopPhysics:
        """Puts a running scene into another state where `active`; contact force and locks are kept."""
        return keep(self.load(qpos, qvel), physics, active)


def keep(loaded: TabletopPhysics, physics: TabletopPhysics, active: Bool[Array, ""]) -> TabletopPhysics:
    """Returns `physics`, or where `active` the state just loaded, with contact force and locks of
    `physics`."""
    loaded = dataclasses.replace(loaded, touch=physics.touch, locked=physics.locked, dropped=physics.dropped)
    return where_active(active, loaded, physics)


class WalkerPhysics(eqx.Module):
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
    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> WalkerPhysics:
        """Loads the given state at time 0, without having moved, all derived quantities fresh
        (`mj_forward`)."""

    @abc.abstractmethod
    def step(
        self, motion: WalkerPhysics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]
    ) -> WalkerPhysics:
        """Takes one control step under constant `ctrl` in [-1, 1]: a jump by `Walker.jump`, then
        `Walker.substeps` of physics. Unchanged where not `active`."""

    def place(self, motion: WalkerPhysics, xy: Float[Array, " 2"], active: Bool[Array, ""]) -> WalkerPhysics:
        """Moves a running walker to another place where `active`; pose, velocity and `dropped` are kept."""
        loaded = self.load(motion.qpos.at[:2].set(xy), motion.qvel)
        loaded = dataclasses.replace(loaded, dropped=motion.dropped)
        return where_active(active, loaded, motion)


def where_active(active: Bool[Array, ""], new: State, old: State) -> State:
    """Returns `new` where `active`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)
