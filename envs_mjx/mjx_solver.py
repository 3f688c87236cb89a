"""Newton's method for MuJoCo's constraint problem, for a batch of scenes at once.

The problem is MuJoCo's: find the acceleration that minimises the Gauss cost plus the penalties of
equalities, limits, friction losses and contacts (Todorov 2014; "Computation" chapter of MuJoCo's
documentation). It is strictly convex, so any solver that converges finds the same acceleration.

Made for batches: arrays end with the batch axis B, so that every operation is one vectorised loop over
scenes. Equalities are part of the quadratic and cost nothing per iteration; limits and friction losses
concern one dof each and are no rows of a matrix; the Hessians of cones stay 3x3 blocks. Dofs that meet each
other only through the first `core` ones (buttons: a press couples one to the arm) are eliminated from
the linear system one by one. The line search is one safeguarded Newton iteration on the derivative.
"""

import functools
import operator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.mjx_stage import stage

_NOISE = 8.0
"""Derivatives below this many roundings of their terms count as zero."""

_MARGIN = 100.0
"""How much larger the gain may be than its estimate; 1 to 100 give the same iterations as C takes."""


class Ties(eqx.Module):
    """Equalities, penalised by `weight x^2 / 2` at x = jacobian acc - aref; they move the first h dofs."""

    jacobian: Float[Array, "e h B"]
    aref: Float[Array, "e B"]
    weight: Float[Array, "e B"]


class Ends(eqx.Module):
    """Limits, penalised like equalities where x = side acc[dof] - aref is negative."""

    dof: tuple[int, ...] = eqx.field(static=True)
    side: Float[Array, "l B"]
    aref: Float[Array, "l B"]
    weight: Float[Array, "l B"]


class Losses(eqx.Module):
    """Friction losses, penalised like equalities up to a force of `bound`, then linearly."""

    dof: tuple[int, ...] = eqx.field(static=True)
    aref: Float[Array, "f B"]
    weight: Float[Array, "f B"]
    bound: Float[Array, " f #B"]


class Cones(eqx.Module):
    """Contacts with elliptic cones; row 0 is the normal, 1 and 2 are tangents with the same friction.

    `mu` is friction / sqrt(impratio), `weight` that of the normal row; the tangents' is `impratio` times it.
    """

    jacobian: Float[Array, "3 k nv B"]
    aref: Float[Array, "3 k B"]
    weight: Float[Array, "k B"]
    mu: Float[Array, "k B"]
    friction: Float[Array, "k B"]


class Problem(eqx.Module):
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
    ties: Ties
    ends: Ends
    losses: Losses
    cones: Cones
    impratio: float = eqx.field(static=True)


class Rows(NamedTuple):
    """One number per constraint row: residuals J a - aref, or J v."""

    ties: Float[Array, "e B"]
    ends: Float[Array, "l B"]
    losses: Float[Array, "f B"]
    cones: Float[Array, "3 k B"]


class Iterate(NamedTuple):
    """A point `acc` of the search, its residuals, forces and gradient, and progress of every scene.

    `noise` is the norm below which the gradient is rounding error, `promise` a generous estimate of what is
    still to be gained, `improvement` what the last step gained.
    """

    acc: Float[Array, "nv B"]
    rows: Rows
    forces: Rows
    gradient: Float[Array, "nv B"]
    noise: Float[Array, " B"]
    promise: Float[Array, " B"]
    improvement: Float[Array, " B"]
    niter: Int[Array, " B"]


class Limits(NamedTuple):
    """When to stop: iterations, and the smallest scaled improvement or gradient worth going on for."""

    iterations: int
    ls_iterations: int
    tolerance: float
    ls_tolerance: float


def total(parts: list[Array] | Array) -> Array:
    """Sum along the first axis, written out: XLA on CPU does not vectorise such a reduction over scenes."""
    return functools.reduce(operator.add, [parts[i] for i in range(len(parts))])


def product(matrix: Float[Array, "*m n B"], v: Float[Array, "n B"]) -> Float[Array, "*m B"]:
    """`matrix @ v` of every scene."""
    return total([matrix[..., i, :] * v[i] for i in range(v.shape[0])])


def newton(p: Problem, start: Float[Array, "nv B"], limits: Limits) -> Iterate:
    """Minimises the problem from `start`.

    Scenes that are done wait for the others. Most need one or two iterations and few of them ten, so the
    scenes that go on are gathered into a smaller batch when they fit.
    """
    whole, it = _begin(p, start)
    return _narrowing(whole, it, limits, [start.shape[-1] // k for k in _SHARES])


_SHARES = (2, 8)
"""Parts of the batch to which the solver shrinks."""

_FEWEST = 4
"""Batches are not made smaller than this."""


def _narrowing(w: "_Whole", it: Iterate, limits: Limits, sizes: list[int]) -> Iterate:
    if not sizes or sizes[0] < _FEWEST:
        return _iterate(w, it, limits, 0)
    it = _iterate(w, it, limits, sizes[0])
    lanes = jax.lax.top_k(_alive(w, it, limits).astype(jnp.int32), sizes[0])[1]
    part, rest = _gathered((w, it), lanes, it.niter.shape[0])
    return _scattered(it, _narrowing(part, rest, limits, sizes[1:]), lanes)


class _Whole(eqx.Module):
    """A problem with what does not change between iterations."""

    problem: Problem
    quadratic: "_Quadratic"
    scale: Float[Array, " B"]


def _begin(p: Problem, start: Float[Array, "nv B"]) -> tuple[_Whole, Iterate]:
    trace = _trace(p)
    rows = _residuals(p, start)
    forces = _forces(p, rows)
    gradient, noise, promise = _gradient(p, start, forces)
    endless, never = jnp.full_like(trace, jnp.inf), jnp.zeros_like(trace, jnp.int32)
    first = Iterate(start, rows, forces, gradient, noise, promise, endless, never)
    return _Whole(p, _with_ties(p), 1 / trace), first


@stage
def _trace(p: Problem) -> Float[Array, " B"]:
    return total([p.mass[i, i] for i in range(p.mass.shape[0])]) + jnp.sum(p.rim_mass)


@functools.partial(stage, static=(2,))
def _gathered(tree: tuple[_Whole, Iterate], lanes: Int[Array, " b"], batch: int) -> tuple[_Whole, Iterate]:
    """The scenes `lanes`; arrays whose last axis is 1 hold for all."""
    return jax.tree.map(lambda x: jnp.take(x, lanes, axis=-1) if x.shape[-1] == batch else x, tree)


@stage
def _scattered(it: Iterate, rest: Iterate, lanes: Int[Array, " b"]) -> Iterate:
    return jax.tree.map(lambda x, y: x.at[..., lanes].set(y), it, rest)


def _alive(w: _Whole, it: Iterate, limits: Limits) -> Bool[Array, " B"]:
    more = (it.niter < limits.iterations) & (w.scale * it.improvement >= limits.tolerance)
    more &= w.scale * it.promise >= limits.tolerance
    return more & (_norm(it.gradient) >= jnp.maximum(limits.tolerance / w.scale, it.noise))


def _iterate(w: _Whole, it: Iterate, limits: Limits, enough: int) -> Iterate:
    """Newton iterations until at most `enough` scenes want more."""
    p = w.problem

    def advance(it: Iterate) -> Iterate:
        going = _alive(w, it, limits)
        search = -_solve(p, w.quadratic, it)
        ahead = _rows(p, search)
        size, improvement = _line_search(p, it, search, ahead, limits, going)
        acc, rows = _moved(it, search, ahead, jnp.where(going, size, 0))
        forces = _forces(p, rows)
        gradient, noise, promise = _gradient(p, acc, forces)
        improvement = jnp.where(going, improvement, it.improvement)
        return Iterate(acc, rows, forces, gradient, noise, promise, improvement, it.niter + going)

    def more(it: Iterate) -> Bool[Array, ""]:
        return jnp.sum(_alive(w, it, limits)) > enough

    return jax.lax.while_loop(more, advance, it)


@stage
def _moved(
    it: Iterate, search: Float[Array, "nv B"], ahead: Rows, step: Float[Array, " B"]
) -> tuple[Float[Array, "nv B"], Rows]:
    rows = Rows(*(x + step * v for x, v in zip(it.rows, ahead, strict=True)))
    return it.acc + step * search, rows


@stage
def pushed(p: Problem, solution: Iterate) -> Float[Array, "nv B"]:
    """All forces on the dofs, those of the constraints included."""
    return _mass_times(p, solution.acc) - solution.gradient


def _norm(x: Float[Array, "n B"]) -> Float[Array, " B"]:
    return jnp.sqrt(total(x * x))


@stage
def _rows(p: Problem, a: Float[Array, "nv B"]) -> Rows:
    """J a."""
    return Rows(
        product(p.ties.jacobian, a[: p.ties.jacobian.shape[1]]),
        p.ends.side * _at(a, p.ends.dof),
        _at(a, p.losses.dof),
        product(p.cones.jacobian, a),
    )


def _at(a: Float[Array, "nv B"], dofs: tuple[int, ...]) -> Float[Array, "n B"]:
    """`a[dofs]` of fixed dofs."""
    return jnp.stack([a[d] for d in dofs]) if len(dofs) else a[:0]


@stage
def _residuals(p: Problem, a: Float[Array, "nv B"]) -> Rows:
    arefs = (p.ties.aref, p.ends.aref, p.losses.aref, p.cones.aref)
    return Rows(*(x - aref for x, aref in zip(_rows(p, a), arefs, strict=True)))


def _mass_times(p: Problem, a: Float[Array, "nv B"]) -> Float[Array, "nv B"]:
    core = p.mass.shape[0]
    return jnp.concatenate([product(p.mass, a[:core]), p.rim_mass * a[core:]])


def _spread(p: Problem, dofs: tuple[int, ...], values: Float[Array, "n B"]) -> Float[Array, "nv B"]:
    """Sums values by dof."""
    zero = jnp.zeros_like(p.force[0])
    of = [[i for i, at in enumerate(dofs) if at == d] for d in range(p.force.shape[0])]
    return jnp.stack([total([values[i] for i in rows]) if rows else zero for rows in of])


@stage
def _gradient(
    p: Problem, a: Float[Array, "nv B"], forces: Rows
) -> tuple[Float[Array, "nv B"], Float[Array, " B"], Float[Array, " B"]]:
    """Gradient of the cost, the norm below which it is rounding error, and what might still be gained.

    The last is g D^-1 g / 2 with D the diagonal of M, times a margin for D^-1 not being the Hessian's
    inverse, which is smaller but for what couples the arm's joints.
    """
    inertial = _mass_times(p, a) - p.force
    tied = total(p.ties.jacobian * forces.ties[:, None])
    pad = jnp.zeros((p.force.shape[0] - tied.shape[0], tied.shape[1]), tied.dtype)
    tied = jnp.concatenate([tied, pad])
    at_joints = _spread(p, p.ends.dof, forces.ends * p.ends.side)
    at_joints += _spread(p, p.losses.dof, forces.losses)
    touching = total([total(p.cones.jacobian[r] * forces.cones[r][:, None]) for r in range(3)])
    size = _norm(inertial) + _norm(tied) + _norm(touching) + _norm(at_joints)
    gradient = inertial - tied - at_joints - touching
    core = p.mass.shape[0]
    masses = jnp.stack([p.mass[i, i] for i in range(core)])
    promise = total(gradient[:core] ** 2 / masses)
    return gradient, _NOISE * jnp.finfo(a.dtype).eps * size, 0.5 * _MARGIN * promise


@stage
def _forces(p: Problem, rows: Rows) -> Rows:
    """Constraint forces: minus the derivative of each row's penalty."""
    c = _cone_state(p, rows.cones)
    weight = p.cones.weight
    slide = c.gap * c.stiff * c.middle
    normal = -weight * c.bottom * rows.cones[0] - slide * p.cones.mu
    tangents = [
        -p.impratio * weight * c.bottom * rows.cones[r]
        + slide * p.cones.mu * p.cones.friction * c.unit[r - 1]
        for r in (1, 2)
    ]
    losses = jnp.clip(-p.losses.weight * rows.losses, -p.losses.bound, p.losses.bound)
    return Rows(
        -p.ties.weight * rows.ties,
        -p.ends.weight * jnp.minimum(rows.ends, 0),
        losses,
        jnp.stack([normal, *tangents]),
    )


class _ConeState(NamedTuple):
    """Where residuals lie relative to their cones, in the coordinates N = mu x0, T = friction |x12|.

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


def _cone_state(p: Problem, x: Float[Array, "3 k B"]) -> _ConeState:
    mu, friction = p.cones.mu, p.cones.friction
    normal, first, second = mu * x[0], friction * x[1], friction * x[2]
    radius = jnp.sqrt(first**2 + second**2)
    slips = radius > 0
    inverse = 1 / jnp.where(slips, radius, 1)
    bottom = jnp.where(slips, mu * normal + radius <= 0, normal < 0)
    middle = slips & ~bottom & (normal < mu * radius)
    stiff = p.cones.weight / (mu**2 * (1 + mu**2))
    return _ConeState(
        radius, (first * inverse, second * inverse), normal - mu * radius, stiff, bottom, middle
    )


class _Quadratic(NamedTuple):
    """Mass matrix and equalities: the part of the Hessian that does not change."""

    core: Float[Array, "core core B"]


@stage
def _with_ties(p: Problem) -> _Quadratic:
    j, core = p.ties.jacobian, p.mass.shape[0]
    tied = total([(p.ties.weight[e] * j[e])[:, None] * j[e][None] for e in range(j.shape[0])])
    rest = core - tied.shape[0]
    return _Quadratic(p.mass + jnp.pad(tied, ((0, rest), (0, rest), (0, 0))))


@stage
def _curvatures(p: Problem, rows: Rows) -> Float[Array, "3 3 k B"]:
    """Hessian of every cone's penalty by its rows."""
    c = _cone_state(p, rows.cones)
    mu, friction = p.cones.mu, p.cones.friction
    stiff = jnp.where(c.middle, c.stiff, 0)
    full = jnp.where(c.bottom, p.cones.weight, 0)
    out = [mu, -mu * friction * c.unit[0], -mu * friction * c.unit[1]]
    turn = [-friction * c.unit[1], friction * c.unit[0]]
    bend = -mu * c.gap / jnp.where(c.middle, c.radius, 1)

    def entry(i: int, j: int) -> Float[Array, "k B"]:
        value = out[i] * out[j]
        if i and j:
            value += bend * turn[i - 1] * turn[j - 1]
        value = stiff * value
        return value + full * (p.impratio if i else 1) if i == j else value

    return jnp.stack([jnp.stack([entry(i, j) for j in range(3)]) for i in range(3)])


def _solve(p: Problem, quadratic: _Quadratic, it: Iterate) -> Float[Array, "nv B"]:
    """The Hessian's inverse times the gradient."""
    core = p.mass.shape[0]
    weighted = _weighted(p, it.rows)
    hessian = _joint_curvature(p, quadratic, it.rows)
    slots = p.cones.jacobian.shape[1]
    for k in range(0, slots, _CHUNK):
        few = slice(k, min(k + _CHUNK, slots))
        hessian = _plus_outer(hessian, p.cones.jacobian[:, few, :core], weighted[:, few, :core])
    return cholesky_solve(hessian, it.gradient)


@stage
def _weighted_rows(blocks: Float[Array, "3 3 k B"], j: Float[Array, "3 k nv B"]) -> Float[Array, "3 k nv B"]:
    return jnp.stack([total([blocks[r, s][:, None] * j[s] for s in range(3)]) for r in range(3)])


def _weighted(p: Problem, rows: Rows) -> Float[Array, "3 k nv B"]:
    """Hessians of the cones times their Jacobians."""
    return _weighted_rows(_curvatures(p, rows), p.cones.jacobian)


@stage
def _joint_curvature(p: Problem, quadratic: _Quadratic, rows: Rows) -> Float[Array, "core core B"]:
    core = p.mass.shape[0]
    slopes = p.ends.weight * (rows.ends < 0)
    held = jnp.abs(p.losses.weight * rows.losses) < p.losses.bound
    diagonal = _spread(p, p.ends.dof, slopes) + _spread(p, p.losses.dof, p.losses.weight * held)
    return quadratic.core + jnp.eye(core, dtype=diagonal.dtype)[..., None] * diagonal[:core]


@stage
def _plus_outer(
    hessian: Float[Array, "n n B"], left: Float[Array, "3 c n B"], right: Float[Array, "3 c n B"]
) -> Float[Array, "n n B"]:
    pairs = [(r, c) for r in range(3) for c in range(left.shape[1])]
    return hessian + total([left[r, c][:, None] * right[r, c][None] for r, c in pairs])


_CHUNK = 4


def cholesky_solve(a: Float[Array, "n n B"], b: Float[Array, "n B"]) -> Float[Array, "n B"]:
    """Solution of a x = b for symmetric positive definite matrices: Cholesky's, column by column.

    The right side rides along as one more row, which is the forward substitution.
    """
    n = b.shape[0]
    rest = jnp.concatenate([a, b[None]])  # rows j.. of the trailing matrix, and the right side
    columns: list[Array] = []
    for _ in range(n):
        column, rest = _eliminated(rest)
        columns.append(column)
    solution: list[Array] = []
    for j in reversed(range(n)):
        solution.insert(0, _substituted(columns[j], solution))
    return jnp.stack(solution)


@stage
def _eliminated(rest: Float[Array, "m1 m B"]) -> tuple[Float[Array, "m1 B"], Float[Array, "m m-1 B"]]:
    """First column of the factor, and what is left without its row and column."""
    least = jnp.finfo(rest.dtype).tiny
    column = rest[:, 0] / jnp.sqrt(jnp.maximum(rest[0, 0], least))
    return column, rest[1:, 1:] - column[1:, None] * column[None, 1:-1]


@stage
def _substituted(column: Float[Array, "m1 B"], known: list[Array]) -> Float[Array, " B"]:
    return total([column[-1], *(-column[1 + i] * x for i, x in enumerate(known))]) / column[0]


class _Bracket(NamedTuple):
    size: Float[Array, " B"]
    slope: Float[Array, " B"]
    curvature: Float[Array, " B"]
    low: Float[Array, " B"]
    high: Float[Array, " B"]
    niter: Int[Array, " B"]


def _line_search(
    p: Problem,
    it: Iterate,
    search: Float[Array, "nv B"],
    ahead: Rows,
    limits: Limits,
    alive: Bool[Array, " B"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Step size along `search` at which the cost's derivative vanishes, and the decrease it brings.

    The decrease is that of a parabola with the same end slopes: unlike a difference of costs it keeps
    its precision near the minimum, in float32 too.
    """
    drift, bend, start, enough = _along_start(p, it, search, ahead, limits)

    def slopes(size: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        rows = Rows(*(x + size * v for x, v in zip(it.rows, ahead, strict=True)))
        first, second = _along(p, rows, ahead)
        return drift + size * bend + first, bend + second

    def more(b: _Bracket) -> Bool[Array, " B"]:
        return alive & (jnp.abs(b.slope) > enough) & (b.niter < limits.ls_iterations)

    @stage
    def narrow(b: _Bracket) -> _Bracket:
        low, high = jnp.where(b.slope < 0, b.size, b.low), jnp.where(b.slope < 0, b.high, b.size)
        step = b.size - b.slope / b.curvature
        halfway = jnp.where(jnp.isinf(high), 2 * b.size, 0.5 * (low + high))
        size = jnp.where((low < step) & (step < high), step, halfway)
        new = _Bracket(size, *slopes(size), low, high, b.niter + 1)
        return _Bracket(*(jnp.where(more(b), x, y) for x, y in zip(new, b, strict=True)))

    one, zero = jnp.ones_like(start), jnp.zeros_like(start)
    first = _Bracket(one, *stage(slopes)(one), zero, one * jnp.inf, jnp.ones_like(it.niter))
    found = jax.lax.while_loop(lambda b: jnp.any(more(b)), narrow, first)
    size = jnp.where(jnp.abs(found.slope) <= enough, found.size, found.low)
    slope = jnp.where(size == found.size, found.slope, 0)
    return size, -0.5 * size * (start + slope)


@functools.partial(stage, static=(4,))
def _along_start(
    p: Problem, it: Iterate, search: Float[Array, "nv B"], ahead: Rows, limits: Limits
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Slope and curvature of the Gauss cost along `search`, slope of all at its start, and what is 0."""
    drift = total(search * (_mass_times(p, it.acc) - p.force))
    bend = total(search * _mass_times(p, search))
    pairs = zip(it.forces, ahead, strict=True)
    terms = [total(jnp.abs(f * v).reshape(-1, v.shape[-1])) for f, v in pairs if f.shape[0]]
    terms = total([jnp.abs(drift), *terms])
    enough = limits.tolerance * limits.ls_tolerance * _norm(search) * _trace(p)
    enough = jnp.maximum(enough, _NOISE * jnp.finfo(terms.dtype).eps * terms)
    return drift, bend, total(search * it.gradient), enough


def _along(p: Problem, rows: Rows, v: Rows) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """First and second derivative of the penalties at `rows` in the direction `v`."""
    c = _cone_state(p, rows.cones)
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
    slope, bend = [total(first)], [total(second)]
    pulls = p.losses.weight * rows.losses
    held = jnp.abs(pulls) < p.losses.bound
    touching = p.ends.weight * (rows.ends < 0)
    for weights, clipped, y in (
        (p.ties.weight, p.ties.weight * rows.ties, v.ties),
        (touching, touching * rows.ends, v.ends),
        (p.losses.weight * held, jnp.clip(pulls, -p.losses.bound, p.losses.bound), v.losses),
    ):
        if y.shape[0]:
            slope.append(total(clipped * y))
            bend.append(total(weights * y * y))
    return total(slope), total(bend)
