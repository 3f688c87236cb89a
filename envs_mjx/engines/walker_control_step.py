"""Start and end of a walker's control step on engines that run inside JAX."""

import copy
from typing import NamedTuple

import jax.numpy as jnp
import mujoco
from jaxtyping import Array, Float
from mujoco import mjx

from envs_mjx.engines.matmul_precision import full_precision
from envs_mjx.locomotion.walkers import TORSO, Walker


class StartedControlStep(NamedTuple):
    """A control step that is about to run: state after a jump, controls, and the x that was set to 0."""

    qpos: Float[Array, " nq"]
    qvel: Float[Array, " nv"]
    ctrl: Float[Array, " nu"]
    origin: Float[Array, ""]


def start_control_step(
    walker: Walker, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"], ctrl: Float[Array, " nu"]
) -> StartedControlStep:
    """Returns state and controls of the first physics step.

    A plane is the same everywhere along x, so on it a step begins at x = 0. The speed is a difference of x,
    and small numbers keep its precision.
    """
    ctrl = ctrl.astype(qpos.dtype)
    if walker.jump:
        qpos, qvel = qpos.at[: ctrl.size].add(walker.jump * ctrl), jnp.zeros_like(qvel)
        ctrl = jnp.zeros_like(ctrl)
    origin = qpos[0] if walker.maze is None else jnp.zeros_like(qpos[0])
    return StartedControlStep(qpos.at[0].add(-origin), qvel, ctrl, origin)


def finish_control_step(
    started: StartedControlStep, qpos: Float[Array, " nq"]
) -> tuple[Float[Array, " nq"], Float[Array, ""]]:
    """Returns positions after the last physics step, and the increase of the first one."""
    return qpos.at[0].add(started.origin), qpos[0] - started.qpos[0]


def contact_free_model(walker: Walker) -> tuple[mjx.Model, mjx.Data]:
    """Returns the walker's model without contacts, and data of it, for MJX-JAX on the default device."""
    model = copy.copy(walker.model)
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    device = jnp.zeros(()).device
    blank = mjx.make_data(model, device=device, impl="jax")
    return mjx.put_model(model, device=device, impl="jax"), blank


@full_precision
def read_seen(
    walker: Walker,
    sight: tuple[mjx.Model, mjx.Data],
    qpos: Float[Array, " nq"],
    qvel: Float[Array, " nv"],
    moved: Float[Array, ""],
) -> Float[Array, " R"]:
    """Returns `WalkerPhysics.seen` of a state.

    Args:
        sight: result of `contact_free_model`.
        moved: by how much x grew in the control step, m.
    """
    pos = jnp.zeros((walker.model.nbody, 3), qpos.dtype)
    mat, velocity = jnp.zeros((walker.model.nbody, 3, 3), qpos.dtype), jnp.zeros(3, qpos.dtype)
    if walker.fresh:
        model, data = sight[0], sight[1].replace(qpos=qpos, qvel=qvel)
        data = mjx.com_vel(model, mjx.com_pos(model, mjx.kinematics(model, data)))
        turn, slide = jnp.split(data.cvel, 2, axis=1)  # of each body, taken at the centre of mass of all
        speed = slide - jnp.cross(data.xipos - data.subtree_com[TORSO], turn)
        pos, mat, velocity = data.xpos, data.xmat, model.body_mass @ speed / jnp.sum(model.body_mass)
    return walker.seen(moved, pos, mat, velocity).astype(qpos.dtype)
