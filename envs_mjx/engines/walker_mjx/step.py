"""One physics step of one walker: MJX's smooth dynamics, with contacts, solver and integration of our own.

MJX-JAX's stages for kinematics, inertia, passive and actuator forces agree with C. Its contacts do not
(`sphere_capsule`), and it would collide with every wall of a maze. So they are switched off in the model, and
the constraint rows come from `contacts.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from mujoco import mjx
from mujoco.mjx._src import math as mjx_math

from envs_mjx.engines.base import StepState
from envs_mjx.engines.matmul_precision import full_precision
from envs_mjx.engines.newton_line_search import StoppingCriteria
from envs_mjx.engines.walker_mjx import contacts
from envs_mjx.engines.walker_mjx.contacts import WalkerContactCapacity
from envs_mjx.engines.walker_mjx.near_walls import near_walls
from envs_mjx.engines.walker_mjx.pairs import WalkerPairs
from envs_mjx.engines.walker_mjx.solver import WalkerProblem, solve
from envs_mjx.locomotion.mazes import Maze
from envs_mjx.locomotion.walkers import TORSO

_STAGES = mjx.kinematics, mjx.com_pos, mjx.crb, mjx.factor_m, mjx.transmission
_STAGES = *_STAGES, mjx.fwd_velocity, mjx.fwd_actuation, mjx.fwd_acceleration
_RK4_PATHS, _RK4_WEIGHTS = (0.5, 0.5, 1.0, 0.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class WalkerSim(NamedTuple):
    """Settings of a walker's simulation. Hashable: its parts are compared by identity."""

    pairs: WalkerPairs
    limits: contacts.WalkerJointLimits
    slots: WalkerContactCapacity
    maze: Maze | None
    solver: StoppingCriteria


def step(sim: WalkerSim, model: mjx.Model, blank: mjx.Data, state: StepState) -> StepState:
    """Takes one physics step of `model.opt.timestep` seconds, as `mj_step`; `blank` holds the controls."""
    if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        return _runge_kutta(sim, model, blank, state)
    data, lost = forward(sim, model, blank, state)
    data = mjx.euler(model, data)
    return StepState(data.qpos, data.qvel, data.qacc_warmstart, state.dropped + lost)


def forward(
    sim: WalkerSim, model: mjx.Model, blank: mjx.Data, state: StepState
) -> tuple[mjx.Data, Int[Array, ""]]:
    """Computes everything up to `qacc`, as `mj_forward` without sensors, and the number of contacts
    dropped."""
    data = blank.replace(qpos=state.qpos, qvel=state.qvel)
    for stage in _STAGES:
        data = stage(model, data)
    rows, lost = constraint_rows(sim, data)
    problem = WalkerProblem(mjx.full_m(model, data), data.qfrc_smooth, data.qacc_smooth, *rows)
    acc, push = solve(problem, state.warm, sim.solver)
    return data.replace(qacc=acc, qfrc_constraint=push), lost


def constraint_rows(sim: WalkerSim, data: mjx.Data) -> tuple[contacts.ConstraintRows, Int[Array, ""]]:
    """Rows of contacts and limits after `com_pos`."""
    rows, lost = contacts.contact_rows(sim.pairs, sim.slots, data, _walls(sim.maze, data))
    if not len(sim.limits.dof):
        return rows, lost
    return contacts.joined(rows, contacts.joint_limit_rows(sim.limits, data.qpos, data.qvel)), lost


@full_precision
def touches(
    pairs: WalkerPairs, maze: Maze | None, model: mjx.Model, blank: mjx.Data, qpos: Float[Array, " nq"]
) -> Bool[Array, ""]:
    """Returns whether a walker touches floor, walls or itself, which in C is `ncon > 0` after
    `mj_fwdPosition`."""
    data = mjx.kinematics(model, blank.replace(qpos=qpos))
    return contacts.any_contact(pairs, data, _walls(maze, data))


def _walls(maze: Maze | None, data: mjx.Data) -> contacts.Walls:
    return None if maze is None else near_walls(maze, data.xpos[TORSO, :2])


def _runge_kutta(sim: WalkerSim, model: mjx.Model, blank: mjx.Data, start: StepState) -> StepState:
    """The classic method of order 4: four forwards, the last of which gives the next warm start."""
    h = model.opt.timestep
    table = jnp.asarray(np.stack([_RK4_PATHS, _RK4_WEIGHTS], axis=1), start.qpos.dtype)

    def leg(carry: tuple[StepState, Array, Array], row: Float[Array, " 2"]) -> tuple[tuple, None]:
        at, velocity, acceleration = carry
        path, weight = row
        data, lost = forward(sim, model, blank, at)
        velocity, acceleration = velocity + weight * at.qvel, acceleration + weight * data.qacc
        qpos = integrate_positions(model, start.qpos, at.qvel, path * h)
        qvel = start.qvel + path * h * data.qacc
        return (StepState(qpos, qvel, data.qacc, at.dropped + lost), velocity, acceleration), None

    zero = jnp.zeros_like(start.qvel)
    (last, velocity, acceleration), _ = jax.lax.scan(leg, (start, zero, zero), table)
    qpos = integrate_positions(model, start.qpos, velocity, h)
    return StepState(qpos, start.qvel + h * acceleration, last.warm, last.dropped)


def integrate_positions(
    model: mjx.Model, qpos: Float[Array, " nq"], velocity: Float[Array, " nv"], h: Float[Array, ""]
) -> Float[Array, " nq"]:
    """Positions after `h` seconds at constant velocity; only the first joint may be free."""
    if model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE:
        return qpos + h * velocity
    quat = mjx_math.quat_integrate(qpos[3:7], velocity[3:6], h)
    return jnp.concatenate([qpos[:3] + h * velocity[:3], quat, qpos[7:] + h * velocity[6:]])
