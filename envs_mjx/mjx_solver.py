"""Newton's method for MuJoCo's constraint problem, written for batches.

The problem is MuJoCo's: find the acceleration that minimises the Gauss cost plus the penalties of
equalities, limits and contacts (Todorov 2014; "Computation" chapter of MuJoCo's documentation). It
is strictly convex, so any solver that converges finds the acceleration that MJX's own solver finds.
What differs is the cost in a batch. Where MJX builds a dense matrix over constraint rows with one
scatter per contact, here the cones' 3x3 Hessians stay blocks; the line search is one safeguarded
Newton iteration on the derivative instead of three candidates per round; and it stops as soon as
every scene of the batch has, where MJX's runs all its rounds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from mujoco import mjx

_NOISE = 8.0
"""Derivatives below this many roundings of their terms count as zero."""


class Problem(NamedTuple):
    """Minimise over a: (M a - f) . (a - M^-1 f) / 2 + penalty(J a - aref).

    The first `equalities` rows are always penalised, `weight * x^2 / 2`; the following ones, where
    x < 0; the last three of every contact, by the elliptic cone with normal row first.

    Attributes:
        mass, force, free: M, the smooth force f, and M^-1 f.
        jacobian, aref, weight: rows of J, reference acceleration, inverse regulariser.
        mu: regularised friction coefficient of each cone, the tangential one / sqrt(impratio).
        friction: coefficients of the two tangents of each cone.
        equalities: number of leading equality rows.
    """

    mass: Float[Array, "nv nv"]
    force: Float[Array, " nv"]
    free: Float[Array, " nv"]
    jacobian: Float[Array, "rows nv"]
    aref: Float[Array, " rows"]
    weight: Float[Array, " rows"]
    mu: Float[Array, " cones"]
    friction: Float[Array, "cones 2"]
    equalities: int


class Iterate(NamedTuple):
    """A point `acc` of the search, its constraint residual J a - aref and forces, and progress."""

    acc: Float[Array, " nv"]
    residual: Float[Array, " rows"]
    efc_force: Float[Array, " rows"]
    gradient: Float[Array, " nv"]
    improvement: Float[Array, ""]
    niter: Int[Array, ""]


class Limits(NamedTuple):
    """When to stop: iterations, and the smallest scaled improvement or gradient worth going on for."""

    iterations: int
    ls_iterations: int
    tolerance: float | Float[Array, ""]
    ls_tolerance: float | Float[Array, ""]


def supports(model: mjx.Model, data: mjx.Data) -> bool:
    """Whether `solve` covers the model: no friction loss; a pyramidal cone, or contacts of dimension 3."""
    pyramidal = model.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL
    return data._impl.nf == 0 and (pyramidal or bool(np.all(data._impl.contact.dim == 3)))


def solve(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """`data` with `qacc` and the constraint forces, from the better of warm start and `qacc_smooth`."""
    problem = _problem(model, data)
    option = model.opt
    limits = Limits(option.iterations, option.ls_iterations, option.tolerance, option.ls_tolerance)
    cold = option.disableflags & mujoco.mjtDisableBit.mjDSBL_WARMSTART
    last = newton(problem, data.qacc_smooth if cold else data.qacc_warmstart, limits)
    return data.tree_replace(
        {
            "qacc": last.acc,
            "qfrc_constraint": last.efc_force @ problem.jacobian,
            "_impl.efc_force": last.efc_force,
            "_impl.solver_niter": last.niter,
        }
    )


def _problem(model: mjx.Model, data: mjx.Data) -> Problem:
    impl = data._impl
    cones = 0 if model.opt.cone == mujoco.mjtCone.mjCONE_PYRAMIDAL else impl.contact.dim.size
    friction = impl.contact.friction[:cones]
    return Problem(
        mass=mjx.full_m(model, data),
        force=data.qfrc_smooth,
        free=data.qacc_smooth,
        jacobian=impl.efc_J,
        aref=impl.efc_aref,
        weight=impl.efc_D,
        mu=friction[:, 0] / jnp.sqrt(model.opt.impratio),
        friction=friction[:, :2],
        equalities=int(impl.ne),
    )


def newton(p: Problem, warmstart: Float[Array, " nv"], limits: Limits) -> Iterate:
    """Minimises the problem from the better of `warmstart` and the unconstrained acceleration."""
    scale = 1 / jnp.trace(p.mass)

    def alive(it: Iterate) -> Bool[Array, ""]:
        more = it.niter < limits.iterations
        more &= scale * it.improvement >= limits.tolerance
        return more & (scale * jnp.linalg.norm(it.gradient) >= limits.tolerance)

    def advance(it: Iterate) -> Iterate:
        factor = jax.scipy.linalg.cho_factor(p.mass + _hessian(p, it.residual), lower=True)
        search = -jax.scipy.linalg.cho_solve(factor, it.gradient)
        size, improvement = _line_search(p, it, search, limits, alive(it))
        acc = it.acc + size * search
        new = _iterate(p, acc, it.residual + size * (p.jacobian @ search))
        return new._replace(improvement=improvement, niter=it.niter + 1)

    starts = jnp.stack([warmstart, p.free])
    costs = jax.vmap(lambda acc: _cost(p, acc))(starts)
    acc = jnp.where(costs[0] < costs[1], starts[0], starts[1])
    return jax.lax.while_loop(alive, advance, _iterate(p, acc, p.jacobian @ acc - p.aref))


def _iterate(p: Problem, acc: Float[Array, " nv"], residual: Float[Array, " rows"]) -> Iterate:
    _, efc_force = _penalty(p, residual)
    gradient = p.mass @ acc - p.force - efc_force @ p.jacobian
    return Iterate(acc, residual, efc_force, gradient, jnp.asarray(jnp.inf, acc.dtype), jnp.int32(0))


def _cost(p: Problem, acc: Float[Array, " nv"]) -> Float[Array, ""]:
    gauss = 0.5 * jnp.dot(p.mass @ acc - p.force, acc - p.free)
    return gauss + _penalty(p, p.jacobian @ acc - p.aref)[0]


class Cones(NamedTuple):
    """Contact residuals in the coordinates that make each cone round, and which piece they lie in.

    Attributes:
        scale: factors from residual to round coordinates, normal first.
        normal, radius: normal coordinate N and length T of the tangential ones.
        unit: direction of the tangential coordinates.
        stiff: regularised inverse mass of the cone's surface, D / (mu^2 (1 + mu^2)).
        bottom: full contact, penalised row by row.
        middle: slipping, penalised by the distance N - mu T from the cone. Elsewhere: no force.
    """

    scale: Float[Array, "cones 3"]
    normal: Float[Array, " cones"]
    radius: Float[Array, " cones"]
    unit: Float[Array, "cones 2"]
    stiff: Float[Array, " cones"]
    bottom: Bool[Array, " cones"]
    middle: Bool[Array, " cones"]


def _split(p: Problem, rows: Float[Array, " rows"]) -> tuple[Array, Array]:
    """Rows of equalities and limits, and those of cones as [cones, 3]."""
    plain = rows.size - 3 * p.mu.size
    return rows[:plain], rows[plain:].reshape(-1, 3)


def _cones(p: Problem, residual: Float[Array, " rows"]) -> Cones:
    _, x = _split(p, residual)
    scale = jnp.concatenate([p.mu[:, None], p.friction], axis=1)
    normal, tangent = x[:, 0] * scale[:, 0], x[:, 1:] * scale[:, 1:]
    radius = jnp.sqrt(jnp.sum(tangent**2, axis=1))
    slips = radius > 0
    unit = tangent / jnp.where(slips, radius, 1)[:, None]
    stiff = _split(p, p.weight)[1][:, 0] / jnp.maximum(p.mu**2 * (1 + p.mu**2), mujoco.mjMINVAL)
    bottom = jnp.where(slips, p.mu * normal + radius <= 0, normal < 0)
    middle = slips & ~bottom & (normal < p.mu * radius)
    return Cones(scale, normal, radius, unit, stiff, bottom, middle)


def _active(p: Problem, plain: Float[Array, " plain"]) -> Bool[Array, " plain"]:
    return (plain < 0) | (jnp.arange(plain.size) < p.equalities)


def _surface_normal(p: Problem, cones: Cones) -> Float[Array, "cones 3"]:
    """Derivative of N - mu T with respect to the residual."""
    one = jnp.ones_like(p.mu)[:, None]
    return jnp.concatenate([one, -p.mu[:, None] * cones.unit], axis=1) * cones.scale


def _penalty(p: Problem, residual: Float[Array, " rows"]) -> tuple[Float[Array, ""], Float[Array, " rows"]]:
    """Cost of the constraints and minus its derivative, the constraint force."""
    plain, x = _split(p, residual)
    weight, weight3 = _split(p, p.weight)
    cones = _cones(p, residual)
    weight = weight * _active(p, plain)
    weight3 = weight3 * cones.bottom[:, None]
    gap = (cones.normal - p.mu * cones.radius) * cones.middle
    cost = jnp.sum(weight * plain**2) + jnp.sum(weight3 * x**2) + jnp.sum(cones.stiff * gap**2)
    force3 = -weight3 * x - (cones.stiff * gap)[:, None] * _surface_normal(p, cones)
    return 0.5 * cost, jnp.concatenate([-weight * plain, force3.ravel()])


def _hessian(p: Problem, residual: Float[Array, " rows"]) -> Float[Array, "nv nv"]:
    """Second derivative of the penalty with respect to the acceleration, J^T C J."""
    plain, _ = _split(p, residual)
    weight, weight3 = _split(p, p.weight)
    cones = _cones(p, residual)
    out = _surface_normal(p, cones)
    curl = jnp.stack([jnp.zeros_like(p.mu), -cones.unit[:, 1], cones.unit[:, 0]], axis=1) * cones.scale
    gap = cones.normal - p.mu * cones.radius
    bend = -p.mu * gap / jnp.where(cones.middle, cones.radius, 1)
    surface = out[:, :, None] * out[:, None] + bend[:, None, None] * curl[:, :, None] * curl[:, None]
    blocks = jnp.where(cones.middle[:, None, None], cones.stiff[:, None, None] * surface, 0)
    blocks += (weight3 * cones.bottom[:, None])[:, :, None] * jnp.eye(3, dtype=weight3.dtype)
    j, j3 = p.jacobian[: plain.size], p.jacobian[plain.size :].reshape(-1, 3, p.mass.shape[0])
    weighted = jnp.concatenate(
        [(weight * _active(p, plain))[:, None] * j, (blocks @ j3).reshape(-1, j.shape[1])]
    )
    return p.jacobian.T @ weighted


class _Bracket(NamedTuple):
    size: Float[Array, ""]
    slope: Float[Array, ""]
    curvature: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    niter: Int[Array, ""]


def _line_search(
    p: Problem, it: Iterate, search: Float[Array, " nv"], limits: Limits, alive: Bool[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Step size along `search` at which the cost's derivative vanishes, and the decrease it brings.

    The decrease is that of a parabola with the same end slopes: unlike a difference of costs it keeps
    its precision near the minimum, in float32 too.
    """
    direction = p.jacobian @ search
    drift, bend = jnp.dot(search, p.mass @ it.acc - p.force), jnp.dot(search, p.mass @ search)

    def slopes(size: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        first, second = _along(p, it.residual + size * direction, direction)
        return drift + size * bend + first, bend + second

    start = jnp.dot(search, it.gradient)
    terms = jnp.abs(drift) + jnp.sum(jnp.abs(it.efc_force * direction))
    enough = limits.tolerance * limits.ls_tolerance * jnp.linalg.norm(search) * jnp.trace(p.mass)
    enough = jnp.maximum(enough, _NOISE * jnp.finfo(terms.dtype).eps * terms)

    def more(b: _Bracket) -> Bool[Array, ""]:
        return alive & (jnp.abs(b.slope) > enough) & (b.niter < limits.ls_iterations)

    def narrow(b: _Bracket) -> _Bracket:
        low, high = jnp.where(b.slope < 0, b.size, b.low), jnp.where(b.slope < 0, b.high, b.size)
        step = b.size - b.slope / b.curvature
        halfway = jnp.where(jnp.isinf(high), 2 * b.size, 0.5 * (low + high))
        size = jnp.where((low < step) & (step < high), step, halfway)
        return _Bracket(size, *slopes(size), low, high, b.niter + 1)

    one, zero = jnp.ones_like(start), jnp.zeros_like(start)
    found = jax.lax.while_loop(more, narrow, _Bracket(one, *slopes(one), zero, one * jnp.inf, jnp.int32(1)))
    size = jnp.where(jnp.abs(found.slope) <= enough, found.size, found.low)
    slope = jnp.where(size == found.size, found.slope, 0)
    return size, -0.5 * size * (start + slope)


def _along(
    p: Problem, residual: Float[Array, " rows"], direction: Float[Array, " rows"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """First and second derivative of the penalty at `residual` in `direction`."""
    (plain, x), (v, v3) = _split(p, residual), _split(p, direction)
    weight, weight3 = _split(p, p.weight)
    cones = _cones(p, residual)
    weight, weight3 = weight * _active(p, plain), weight3 * cones.bottom[:, None]
    turn = v3 * cones.scale
    widen = jnp.sum(cones.unit * turn[:, 1:], axis=1)
    around = (jnp.sum(turn[:, 1:] ** 2, axis=1) - widen**2) / jnp.where(cones.middle, cones.radius, 1)
    gap, closing = cones.normal - p.mu * cones.radius, turn[:, 0] - p.mu * widen
    stiff = cones.stiff * cones.middle
    first = jnp.sum(weight * plain * v) + jnp.sum(weight3 * x * v3) + jnp.sum(stiff * gap * closing)
    second = jnp.sum(weight * v**2) + jnp.sum(weight3 * v3**2)
    return first, second + jnp.sum(stiff * (closing**2 - gap * p.mu * around))
