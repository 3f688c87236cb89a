"""MuJoCo's constraint problem: costs, forces and curvatures of equalities, limits, friction and contacts.

"Computation" chapter of MuJoCo's documentation (Todorov 2014). Arrays end with the batch axis B. Equalities
and inertia are one quadratic. Limits and friction losses concern one dof each and are not rows of a matrix.
The Hessians of cones stay 3x3 blocks.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from envs_mjx.engines.newton_line_search import NOISE
from envs_mjx.engines.tabletop_mjx.batched_linalg import product, sum_leading
from envs_mjx.engines.tabletop_mjx.xla_stages import stage

_MARGIN = 100.0
"""Margin of the expected improvement over its estimate; 1 to 100 give the same iterations as C takes."""


class Equalities(eqx.Module):
    """Equalities, penalised by `weight x^2 / 2` at x = jacobian acc - aref; they move the first h dofs."""

    jacobian: Float[Array, "e h B"]
    aref: Float[Array, "e B"]
    weight: Float[Array, "e B"]


class JointLimits(eqx.Module):
    """Limits, penalised like equalities where x = side acc[dof] - aref is negative."""

    dof: tuple[int, ...] = eqx.field(static=True)
    side: Float[Array, "l B"]
    aref: Float[Array, "l B"]
    weight: Float[Array, "l B"]


class FrictionLosses(eqx.Module):
    """Friction losses, penalised like equalities up to a force of `bound`, then linearly."""

    dof: tuple[int, ...] = eqx.field(static=True)
    aref: Float[Array, "f B"]
    weight: Float[Array, "f B"]
    bound: Float[Array, " f #B"]


class FrictionCones(eqx.Module):
    """Contacts with elliptic cones; row 0 is the normal, 1 and 2 are tangents with the same friction.

    `mu` is friction / sqrt(impratio), `weight` that of the normal row; the tangents' is `impratio` times it.
    """

    jacobian: Float[Array, "3 k nv B"]
    aref: Float[Array, "3 k B"]
    weight: Float[Array, "k B"]
    mu: Float[Array, "k B"]
    friction: Float[Array, "k B"]


class TabletopProblem(eqx.Module):
    """Minimise over a: a M a / 2 - f a + penalties.

    Attributes:
        mass: M of the first `core` dofs.
        rim_mass: diagonal of M for the others, which are coupled to none.
        force: f.
        impratio: ratio of the tangents' weights to the normal's.
    """

    mass: Float[Array, "core core B"]
    rim_mass: Float[Array, "rim 1"]
    force: Float[Array, "nv B"]
    equalities: Equalities
    joint_limits: JointLimits
    friction_losses: FrictionLosses
    cones: FrictionCones
    impratio: float = eqx.field(static=True)


class ConstraintValues(NamedTuple):
    """One number per constraint row: residuals J a - aref, or J v."""

    equalities: Float[Array, "e B"]
    joint_limits: Float[Array, "l B"]
    friction_losses: Float[Array, "f B"]
    cones: Float[Array, "3 k B"]


@stage
def jacobian_times(p: TabletopProblem, a: Float[Array, "nv B"]) -> ConstraintValues:
    """Returns J a."""
    return ConstraintValues(
        product(p.equalities.jacobian, a[: p.equalities.jacobian.shape[1]]),
        p.joint_limits.side * _at(a, p.joint_limits.dof),
        _at(a, p.friction_losses.dof),
        product(p.cones.jacobian, a),
    )


def _at(a: Float[Array, "nv B"], dofs: tuple[int, ...]) -> Float[Array, "n B"]:
    """Returns `a[dofs]` of fixed dofs."""
    return jnp.stack([a[d] for d in dofs]) if len(dofs) else a[:0]


@stage
def residuals(p: TabletopProblem, a: Float[Array, "nv B"]) -> ConstraintValues:
    arefs = (p.equalities.aref, p.joint_limits.aref, p.friction_losses.aref, p.cones.aref)
    return ConstraintValues(*(x - aref for x, aref in zip(jacobian_times(p, a), arefs, strict=True)))


def mass_times(p: TabletopProblem, a: Float[Array, "nv B"]) -> Float[Array, "nv B"]:
    core = p.mass.shape[0]
    return jnp.concatenate([product(p.mass, a[:core]), p.rim_mass * a[core:]])


def sum_by_dof(
    p: TabletopProblem, dofs: tuple[int, ...], values: Float[Array, "n B"]
) -> Float[Array, "nv B"]:
    """Sums values by dof."""
    zero = jnp.zeros_like(p.force[0])
    of = [[i for i, at in enumerate(dofs) if at == d] for d in range(p.force.shape[0])]
    return jnp.stack([sum_leading([values[i] for i in rows]) if rows else zero for rows in of])


@stage
def trace(p: TabletopProblem) -> Float[Array, " B"]:
    return sum_leading([p.mass[i, i] for i in range(p.mass.shape[0])]) + jnp.sum(p.rim_mass)


def norm(x: Float[Array, "n B"]) -> Float[Array, " B"]:
    return jnp.sqrt(sum_leading(x * x))


@stage
def gradient_of(
    p: TabletopProblem, a: Float[Array, "nv B"], forces: ConstraintValues
) -> tuple[Float[Array, "nv B"], Float[Array, " B"], Float[Array, " B"]]:
    """Returns the gradient of the cost, the norm below which it is rounding error, and the possible
    improvement.

    The last is g D^-1 g / 2 with D the diagonal of M, times a margin, because D^-1 is not the Hessian's
    inverse. That inverse is smaller except for the coupling of the arm's joints.
    """
    inertial = mass_times(p, a) - p.force
    tied = sum_leading(p.equalities.jacobian * forces.equalities[:, None])
    pad = jnp.zeros((p.force.shape[0] - tied.shape[0], tied.shape[1]), tied.dtype)
    tied = jnp.concatenate([tied, pad])
    at_joints = sum_by_dof(p, p.joint_limits.dof, forces.joint_limits * p.joint_limits.side)
    at_joints += sum_by_dof(p, p.friction_losses.dof, forces.friction_losses)
    touching = sum_leading([sum_leading(p.cones.jacobian[r] * forces.cones[r][:, None]) for r in range(3)])
    size = norm(inertial) + norm(tied) + norm(touching) + norm(at_joints)
    gradient = inertial - tied - at_joints - touching
    core = p.mass.shape[0]
    masses = jnp.stack([p.mass[i, i] for i in range(core)])
    expected_improvement = sum_leading(gradient[:core] ** 2 / masses)
    return gradient, NOISE * jnp.finfo(a.dtype).eps * size, 0.5 * _MARGIN * expected_improvement


@stage
def forces_of(p: TabletopProblem, rows: ConstraintValues) -> ConstraintValues:
    """Constraint forces: minus the derivative of each row's penalty."""
    c = cone_state(p, rows.cones)
    weight = p.cones.weight
    slide = c.gap * c.stiff * c.middle
    normal = -weight * c.bottom * rows.cones[0] - slide * p.cones.mu
    tangents = [
        -p.impratio * weight * c.bottom * rows.cones[r]
        + slide * p.cones.mu * p.cones.friction * c.unit[r - 1]
        for r in (1, 2)
    ]
    friction_losses = jnp.clip(
        -p.friction_losses.weight * rows.friction_losses, -p.friction_losses.bound, p.friction_losses.bound
    )
    return ConstraintValues(
        -p.equalities.weight * rows.equalities,
        -p.joint_limits.weight * jnp.minimum(rows.joint_limits, 0),
        friction_losses,
        jnp.stack([normal, *tangents]),
    )


class ConeState(NamedTuple):
    """Positions of residuals relative to their cones, in the coordinates N = mu x0, T = friction |x12|.

    Attributes:
        radius, unit: T, and the direction of (x1, x2).
        gap: N - mu T.
        stiff: D / (mu^2 (1 + mu^2)).
        bottom: full contact, penalised row by row.
        middle: slipping, penalised by the distance `gap` from the cone. Elsewhere: no force.
    """

    radius: Float[Array, "k B"]
    unit: tuple[Float[Array, "k B"], Float[Array, "k B"]]
    gap: Float[Array, "k B"]
    stiff: Float[Array, "k B"]
    bottom: Bool[Array, "k B"]
    middle: Bool[Array, "k B"]


def cone_state(p: TabletopProblem, x: Float[Array, "3 k B"]) -> ConeState:
    mu, friction = p.cones.mu, p.cones.friction
    normal, first, second = mu * x[0], friction * x[1], friction * x[2]
    radius = jnp.sqrt(first**2 + second**2)
    slips = radius > 0
    inverse = 1 / jnp.where(slips, radius, 1)
    bottom = jnp.where(slips, mu * normal + radius <= 0, normal < 0)
    middle = slips & ~bottom & (normal < mu * radius)
    stiff = p.cones.weight / (mu**2 * (1 + mu**2))
    return ConeState(radius, (first * inverse, second * inverse), normal - mu * radius, stiff, bottom, middle)


def directional_derivatives(
    p: TabletopProblem, rows: ConstraintValues, v: ConstraintValues
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """First and second derivative of the penalties at `rows` in the direction `v`."""
    c = cone_state(p, rows.cones)
    mu, friction, weight = p.cones.mu, p.cones.friction, p.cones.weight * c.bottom
    turn = friction * v.cones[1], friction * v.cones[2]
    widen = c.unit[0] * turn[0] + c.unit[1] * turn[1]
    around = (turn[0] ** 2 + turn[1] ** 2 - widen**2) / jnp.where(c.middle, c.radius, 1)
    closing = mu * v.cones[0] - mu * widen
    stiff = c.stiff * c.middle
    x, y = rows.cones, v.cones
    ratio = p.impratio
    first = weight * (x[0] * y[0] + ratio * (x[1] * y[1] + x[2] * y[2])) + stiff * c.gap * closing
    second = weight * (y[0] ** 2 + ratio * (y[1] ** 2 + y[2] ** 2))
    second += stiff * (closing**2 - c.gap * mu * around)
    slope, bend = [sum_leading(first)], [sum_leading(second)]
    pulls = p.friction_losses.weight * rows.friction_losses
    held = jnp.abs(pulls) < p.friction_losses.bound
    touching = p.joint_limits.weight * (rows.joint_limits < 0)
    for weights, clipped, y in (
        (p.equalities.weight, p.equalities.weight * rows.equalities, v.equalities),
        (touching, touching * rows.joint_limits, v.joint_limits),
        (
            p.friction_losses.weight * held,
            jnp.clip(pulls, -p.friction_losses.bound, p.friction_losses.bound),
            v.friction_losses,
        ),
    ):
        if y.shape[0]:
            slope.append(sum_leading(clipped * y))
            bend.append(sum_leading(weights * y * y))
    return sum_leading(slope), sum_leading(bend)
