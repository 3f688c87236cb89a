"""One control step of a batch of scenes: substeps of contacts, constraints, solver and integration."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from envs_mjx.engines.base import StepState
from envs_mjx.engines.newton_line_search import StoppingCriteria
from envs_mjx.engines.solver_parameters import impedance, stiffness_damping
from envs_mjx.engines.tabletop_mjx import dynamics, solver
from envs_mjx.engines.tabletop_mjx.batched_linalg import cholesky_solve, product, sum_leading
from envs_mjx.engines.tabletop_mjx.collision import detection as mjx_contacts
from envs_mjx.engines.tabletop_mjx.collision.collision_model import CollisionModel
from envs_mjx.engines.tabletop_mjx.collision.detection import (
    PairTable,
    TabletopContactCapacity,
)
from envs_mjx.engines.tabletop_mjx.constraints import (
    Equalities,
    FrictionCones,
    FrictionLosses,
    JointLimits,
    TabletopProblem,
)
from envs_mjx.engines.tabletop_mjx.dynamics import Poses, SmoothDynamics, const, cross, mat_vec
from envs_mjx.engines.tabletop_mjx.model import SceneConstants
from envs_mjx.engines.tabletop_mjx.solver import TabletopIterate
from envs_mjx.manipulation.scenes import LOCKED_DAMPING


@dataclasses.dataclass(frozen=True, eq=False)
class TabletopSim:
    """A scene and how it is simulated; hashed by identity. The last `slides` dofs can be locked."""

    constants: SceneConstants
    collisions: CollisionModel
    table: PairTable
    slots: TabletopContactCapacity
    limits: StoppingCriteria
    substeps: int
    slides: int
    fresh: bool


class StepOutputs(NamedTuple):
    """Outputs of a control step besides its state: tracked sites and the force on the sensing pad."""

    site_pos: Float[Array, "sites 3 B"]
    site_mat: Float[Array, "sites 3 3 B"]
    touch: Float[Array, "6 B"]


def control_step(
    sim: TabletopSim, state: StepState, ctrl: Float[Array, "nu B"], locked: Bool[Array, "slides B"]
) -> tuple[StepState, StepOutputs]:
    """Takes all substeps under constant control. Poses and force are those of the last substep's start,
    except that site poses are those of the end where the machine is `fresh`.
    """
    c = sim.constants
    damping = jnp.broadcast_to(const(c.damping, state.qvel), state.qvel.shape)
    if locked.shape[0]:
        held = jnp.where(locked, LOCKED_DAMPING, const(c.damping[-locked.shape[0] :], state.qvel))
        damping = jnp.concatenate([damping[: -locked.shape[0]], held.astype(damping.dtype)])

    def advance(carry: tuple[StepState, StepOutputs], _: None) -> tuple[tuple[StepState, StepOutputs], None]:
        return substep(sim, carry[0], ctrl, damping), None

    batch = state.qpos.shape[-1]
    sites = len(c.sites.body)
    shapes = (sites, 3, batch), (sites, 3, 3, batch), (6, batch)
    nothing = StepOutputs(*(jnp.zeros(s, state.qpos.dtype) for s in shapes))
    (state, seen), _ = jax.lax.scan(advance, (state, nothing), length=sim.substeps)
    if sim.fresh:
        seen = seen._replace(**sites_of(c, state.qpos)._asdict())
    return state, seen


class _Sites(NamedTuple):
    site_pos: Float[Array, "sites 3 B"]
    site_mat: Float[Array, "sites 3 3 B"]


def sites_of(c: SceneConstants, qpos: Float[Array, "nq B"]) -> _Sites:
    """World poses of the tracked sites."""
    return _Sites(*dynamics.attached_poses(c.sites, dynamics.poses(c, qpos)))


def substep(
    sim: TabletopSim, state: StepState, ctrl: Float[Array, "nu B"], damping: Float[Array, "nv B"]
) -> tuple[StepState, StepOutputs]:
    """`mj_step`: forward dynamics at the state, then implicitfast integration."""
    c = sim.constants
    at = dynamics.poses(c, state.qpos)
    smooth = dynamics.smooth_dynamics(c, at, state.qpos, state.qvel, ctrl, damping)
    contacts = mjx_contacts.detect_contacts(sim.collisions, sim.slots, at)
    cones = mjx_contacts.cone_rows(sim.table, contacts, smooth.motions, state.qvel)
    problem = constraint_problem(sim, at, smooth, state, cones)
    solution = solver.newton(problem, state.warm, sim.limits)
    acc = _implicit_acceleration(c, smooth, solver.total_force(problem, solution))
    qvel = state.qvel + c.timestep * acc
    touch = contact_wrench(solution, contacts, cones, smooth)
    new = StepState(_moved(c, state.qpos, qvel), qvel, solution.acc, state.dropped + contacts.dropped)
    return new, StepOutputs(*dynamics.attached_poses(c.sites, at), touch)


def constraint_problem(
    sim: TabletopSim,
    at: Poses,
    smooth: SmoothDynamics,
    state: StepState,
    cones: mjx_contacts.ConeRows,
) -> TabletopProblem:
    """All constraints of a scene at its state."""
    c = sim.constants
    hinges = len(c.hinges.parent)
    # Buttons touch the arm only, unless there are cubes to lie on them.
    rim = 0 if len(c.cube_dof) else len(c.slide_dof)
    core = c.nv - rim
    fixed = const(np.diag(c.fixed_mass[:core] * (np.arange(core) >= hinges)), state.qvel)
    mass = jnp.pad(smooth.hinge_mass, ((0, core - hinges), (0, core - hinges), (0, 0))) + fixed
    mu = cones.friction / np.sqrt(c.impratio)
    return TabletopProblem(
        mass=mass,
        rim_mass=const(c.fixed_mass[core:], state.qvel),
        force=smooth.force,
        equalities=_equalities(c, at, smooth, state),
        joint_limits=_joint_limits(sim, state),
        friction_losses=_friction_losses(c, state.qvel),
        cones=FrictionCones(cones.jacobian, cones.aref, cones.weight, mu, cones.friction),
        impratio=c.impratio,
    )


def _equalities(c: SceneConstants, at: Poses, smooth: SmoothDynamics, state: StepState) -> Equalities:
    """Builds the equalities: anchors that coincide, joints that move alike."""
    link, hinges = c.linkage, len(c.hinges.parent)
    qpos, qvel = state.qpos[:hinges], state.qvel[:hinges]
    stiffness, damping = stiffness_damping(link.solref, link.solimp, c.timestep)
    angular, linear, origin = (x[:hinges] for x in smooth.motions)
    rows, gaps, sizes, drifts = [], [], [], []
    for bodies, anchors in zip(link.bodies, link.anchors, strict=True):
        ends = [_anchor(c, at, smooth, int(b), a) for b, a in zip(bodies, anchors, strict=True)]
        gap = ends[0].pos - ends[1].pos
        jacobian = []
        for body, end in zip(bodies, ends, strict=True):
            moved = linear + cross(angular, end.pos[None] - origin)
            jacobian.append(moved * const(c.hinges.ancestors[body].astype(float)[:, None], qpos))
        rows.append(jnp.swapaxes(jacobian[0] - jacobian[1], 0, 1))
        gaps.append(gap)
        sizes.append(jnp.broadcast_to(jnp.sqrt(jnp.sum(gap**2, axis=0)), gap.shape))
        drifts.append(ends[0].drift - ends[1].drift)
    for (first, second), rest in zip(link.joints, link.gap, strict=True):
        unit = np.zeros((1, hinges))
        unit[0, first], unit[0, second] = 1, -1
        rows.append(jnp.broadcast_to(const(unit, qpos), (1, hinges, qpos.shape[-1])))
        gap = (qpos[first] - qpos[second] - rest)[None]
        gaps.append(gap)
        sizes.append(gap)
        drifts.append(jnp.zeros_like(gap))
    jacobian, gap, size, drift = (jnp.concatenate(x) for x in (rows, gaps, sizes, drifts))
    pairs = len(link.bodies)
    of = np.concatenate([np.repeat(np.arange(pairs), 3), np.arange(pairs, len(link.invweight))])
    d = impedance(const(link.solimp[of], qpos), size)
    weight = 1 / jnp.maximum(const(link.invweight[of], qpos) * (1 - d) / d, 1e-15)
    speed = product(jacobian, qvel)
    aref = -const(damping[of], qpos) * speed - const(stiffness[of], qpos) * d * gap - drift
    return Equalities(jacobian, aref, weight)


class _End(NamedTuple):
    pos: Float[Array, "3 B"]
    drift: Float[Array, "3 B"]


def _anchor(c: SceneConstants, at: Poses, smooth: SmoothDynamics, body: int, local: np.ndarray) -> _End:
    """A point of a hinge's body, and its acceleration at zero `acc` of the joints."""
    pos = at.pos[body] + mat_vec(at.mat[body], const(local, at.pos))
    r = pos - smooth.motions.origin[0]
    turn, slide = smooth.velocity[body, :3], smooth.velocity[body, 3:]
    bent, slid = smooth.drift[body, :3], smooth.drift[body, 3:]
    speed = slide + cross(turn, r)
    return _End(pos, slid + cross(bent, r) + cross(turn, speed))


def _joint_limits(sim: TabletopSim, state: StepState) -> JointLimits:
    """Joint limits, and stops of slides."""
    c, stops = sim.constants, sim.collisions.stops
    limited = np.isfinite(c.limits).all(axis=1)
    dofs = np.concatenate([c.joint_dof[limited], c.slide_dof[stops.slide]])
    places = np.concatenate([c.joint_qpos[limited], c.slide_qpos[stops.slide]])
    low = np.concatenate([c.limits[limited, 0], np.where(stops.side > 0, stops.at, -np.inf)])
    high = np.concatenate([c.limits[limited, 1], np.where(stops.side < 0, stops.at, np.inf)])
    solref = np.concatenate([c.joint_solref[limited], stops.solref])
    solimp = np.concatenate([c.joint_solimp[limited], stops.solimp])
    invweight = np.concatenate([c.joint_invweight[limited], stops.invweight])
    count = np.concatenate([np.ones(limited.sum()), stops.count])
    q = jnp.stack([state.qpos[int(k)] for k in places])
    v = jnp.stack([state.qvel[int(k)] for k in dofs])
    below, above = q - const(low, q), const(high, q) - q
    gap = jnp.minimum(below, above)
    side = jnp.where(below < above, 1.0, -1.0).astype(q.dtype)
    stiffness, damping = (const(x, q) for x in stiffness_damping(solref, solimp, c.timestep))
    used = gap < 0
    gap = jnp.where(used, gap, 0)
    d = impedance(const(solimp, q), gap)
    weight = const(count, q) / jnp.maximum(const(invweight, q) * (1 - d) / d, 1e-15)
    return JointLimits(tuple(dofs.tolist()), side, -damping * side * v - stiffness * d * gap, weight * used)


def _friction_losses(c: SceneConstants, qvel: Float[Array, "nv B"]) -> FrictionLosses:
    rubbing = c.friction_loss > 0
    dofs, solref, solimp = c.joint_dof[rubbing], c.friction_solref[rubbing], c.friction_solimp[rubbing]
    v = jnp.stack([qvel[int(k)] for k in dofs]) if len(dofs) else qvel[:0]
    _, damping = stiffness_damping(solref, solimp, c.timestep)
    d = np.clip(solimp[:, 0], 1e-4, 0.9999)
    weight = 1 / np.maximum(c.joint_invweight[rubbing] * (1 - d) / d, 1e-15)
    weight = jnp.broadcast_to(const(weight, qvel), v.shape)
    bound = const(c.friction_loss[rubbing], qvel)
    return FrictionLosses(tuple(dofs.tolist()), -const(damping, qvel) * v, weight, bound)


def _implicit_acceleration(
    c: SceneConstants, smooth: SmoothDynamics, total_force: Float[Array, "nv B"]
) -> Float[Array, "nv B"]:
    """Acceleration of (M - h dF/dv) acc = all forces."""
    n = len(c.hinges.parent)
    slope = c.timestep * smooth.slope
    eye = const(np.eye(n), total_force)
    arm = cholesky_solve(smooth.hinge_mass + eye * slope[:n], total_force[:n])
    return jnp.concatenate([arm, total_force[n:] / (const(c.fixed_mass[n:], total_force) + slope[n:])])


def _moved(c: SceneConstants, qpos: Float[Array, "nq B"], qvel: Float[Array, "nv B"]) -> Float[Array, "nq B"]:
    """Positions a substep later. Quaternions are normalised."""
    h, hinges = c.timestep, len(c.hinges.parent)
    parts = [qpos[:hinges] + h * qvel[:hinges]]
    for q, v in zip(c.cube_qpos, c.cube_dof, strict=True):
        parts.append(qpos[q : q + 3] + h * qvel[v : v + 3])
        parts.append(_turned(qpos[q + 3 : q + 7], h * qvel[v + 3 : v + 6]))
    slides = len(c.slide_dof)
    return jnp.concatenate([*parts, qpos[c.nq - slides :] + h * qvel[c.nv - slides :]])


def _turned(quat: Float[Array, "4 B"], rotation: Float[Array, "3 B"]) -> Float[Array, "4 B"]:
    """A quaternion turned by a rotation vector in its own frame."""
    angle = jnp.sqrt(sum_leading(rotation * rotation))
    half = 0.5 * angle
    small = angle < 1e-4  # where sin(x) / x is 1 - x^2 / 6 to the last bit
    share = jnp.where(small, 0.5 - angle**2 / 48, jnp.sin(half) / jnp.where(small, 1, angle))
    c, (x, y, z) = jnp.cos(half), (rotation[k] * share for k in range(3))
    qw, qx, qy, qz = quat
    new = [
        qw * c - qx * x - qy * y - qz * z,
        qw * x + qx * c + qy * z - qz * y,
        qw * y - qx * z + qy * c + qz * x,
        qw * z + qx * y - qy * x + qz * c,
    ]
    length = jnp.sqrt(sum_leading([q * q for q in new]))
    return jnp.stack([q / length for q in new])


def contact_wrench(
    solution: TabletopIterate,
    contacts: mjx_contacts.Contacts,
    cones: mjx_contacts.ConeRows,
    smooth: SmoothDynamics,
) -> Float[Array, "6 B"]:
    """Contact torque and force on the sensing pad, about the centre of mass of the arm and gripper."""
    force = solution.forces.cones
    world = sum_leading([force[r][:, None] * cones.frame[r] for r in range(3)]) * cones.sensor_sign[:, None]
    torque = cross(contacts.pos - smooth.center[None], world)
    return jnp.concatenate([sum_leading(torque), sum_leading(world)])
