"""Interface of physics engines: `AbstractTabletopEngine` for scenes, `AbstractWalkerEngine` for walkers.

Environments read `TabletopPhysics` or `WalkerPhysics` only, so engines are interchangeable. Engines are
`eqx.Module`s whose methods are written for one environment and may be vmapped and jitted.
"""

import abc
import dataclasses
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.manipulation import arm_controller as arms
from envs_mjx.manipulation.scenes import Scene

State = TypeVar("State", bound=eqx.Module)


class Physics(eqx.Module):
    """State of one simulation after a control step, as C MuJoCo would leave it.

    Attributes:
        qpos, qvel: joint positions (m, rad) and velocities, float32.
        dropped: contacts dropped since the load because the contact buffer was full, summed over substeps.
            Always 0 on engine `c`, which has no limit; results are doubtful if it is not 0.
        raw: other engine state that an exact continuation needs.
    """

    qpos: Float[Array, " nq"]
    qvel: Float[Array, " nv"]
    dropped: Int[Array, ""]
    raw: Any


class TabletopPhysics(Physics):
    """State of one simulated scene.

    Site poses are those of the *last substep's start* (2 ms older than `qpos`), because
    `mj_step` integrates after computing them and OGBench reads them so. Where `Scene.fresh` they are
    those of `qpos`, because there OGBench calls `mj_forward` after each control step.

    Attributes:
        site_pos: world positions (m) of the model's tracked sites, in the order of `Scene.sites`.
        site_mat: their rotation matrices.
        touch: `cfrc_ext` of the right finger pad (torque, force; N m and N), after
            `mj_rnePostConstraint`.
        locked: which slides of the scene are locked: their joint damping is 1e6 instead of 2 N s / m
            from the next step on. The task logic sets it.
    """

    site_pos: Float[Array, "sites 3"]
    site_mat: Float[Array, "sites 3 3"]
    touch: Float[Array, " 6"]
    locked: Bool[Array, " slides"]


class WalkerPhysics(Physics):
    """State of one walker; `seen` are other quantities that its environment reads (`Walker.seen`)."""

    seen: Float[Array, " R"]


PhysicsT = TypeVar("PhysicsT", bound=Physics)


class StepState(NamedTuple):
    """State that a physics step of engine `mjx` advances, of one simulation or of a batch (last axis).

    Attributes:
        warm: acceleration from which the solver starts.
        dropped: as in `Physics`.
    """

    qpos: Float[Array, " nq *B"]
    qvel: Float[Array, " nv *B"]
    warm: Float[Array, " nv *B"]
    dropped: Int[Array, "*B"]


class AbstractEngine(eqx.Module, Generic[PhysicsT]):
    """A physics engine bound to one compiled model."""

    name: eqx.AbstractVar[str]

    @abc.abstractmethod
    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> PhysicsT:
        """Loads the given state at time 0, without locks, and computes derived quantities (`mj_forward`)."""

    @abc.abstractmethod
    def step(self, physics: PhysicsT, ctrl: Array, active: Bool[Array, ""]) -> PhysicsT:
        """Takes one control step (all substeps under constant `ctrl`); unchanged where not `active`."""


class AbstractTabletopEngine(AbstractEngine[TabletopPhysics]):
    """A physics engine of one scene."""

    def control(
        self, arm: arms.Arm, scene: Scene, physics: TabletopPhysics, action: Float[Array, " 5"]
    ) -> Array:
        """Returns servo targets for an action in [-1, 1]^5, in the form that `step` takes (`arm.control`)."""
        pinch = arms.Pinch(physics.site_pos[0], physics.site_mat[0])
        return arms.control(arm, scene, pinch, physics.qpos, action)

    def place(
        self,
        physics: TabletopPhysics,
        qpos: Float[Array, " nq"],
        qvel: Float[Array, " nv"],
        active: Bool[Array, ""],
    ) -> TabletopPhysics:
        """Puts a running scene into another state where `active`; contact force and locks are kept."""
        return overwrite_where_active(self.load(qpos, qvel), physics, active)


def overwrite_where_active(
    loaded: TabletopPhysics, physics: TabletopPhysics, active: Bool[Array, ""]
) -> TabletopPhysics:
    """Returns `physics`, or where `active` the state just loaded, with contact force and locks of
    `physics`."""
    loaded = dataclasses.replace(loaded, touch=physics.touch, locked=physics.locked, dropped=physics.dropped)
    return where_active(active, loaded, physics)


class AbstractWalkerEngine(AbstractEngine[WalkerPhysics]):
    """A physics engine of one walker (`walkers.Walker`).

    Controls are in [-1, 1]. A control step is a jump by `Walker.jump`, then `Walker.substeps` of physics.
    """

    @abc.abstractmethod
    def touches(self, qpos: Float[Array, " nq"]) -> Bool[Array, ""]:
        """Returns whether a walker at `qpos` touches floor, walls or itself."""

    def place(self, physics: WalkerPhysics, xy: Float[Array, " 2"], active: Bool[Array, ""]) -> WalkerPhysics:
        """Moves a running walker to another place where `active`; pose, velocity and `dropped` are kept."""
        loaded = self.load(physics.qpos.at[:2].set(xy), physics.qvel)
        loaded = dataclasses.replace(loaded, dropped=physics.dropped)
        return where_active(active, loaded, physics)


def where_active(active: Bool[Array, ""], new: State, old: State) -> State:
    """Returns `new` where `active`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)
