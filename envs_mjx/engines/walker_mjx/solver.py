"""Newton's method for the constraint problem of a walker, written for batches.

The problem is MuJoCo's with pyramidal cones: find the acceleration that minimises the Gauss cost plus a
quadratic penalty of every row that is violated (Todorov 2014; chapter "Computation" of MuJoCo's
documentation). It is strictly convex, so any solver that converges finds the acceleration that C and MJX
find. Unlike MJX's, the line search is one safeguarded Newton iteration on the derivative. It ends as soon as
it has converged in every walker of the batch, which makes batches cheaper.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.engines.newton_line_search import StepBracket, StoppingCriteria, first_bracket, slope_tolerance


class WalkerProblem(NamedTuple):
    """Minimise over a: (M a - f) . (a - free) / 2 + sum of weight x^2 / 2 over rows x = J a - aref < 0.

    Attributes:
        mass, force, free: M, the smooth force f, and M^-1 f.
        jacobian, aref, weight: J, reference acceleration, inverse regulariser; weight 0 leaves a row out.
    """

    mass: Float[Array, "nv nv"]
    force: Float[Array, " nv"]
    free: Float[Array, " nv"]
    jacobian: Float[Array, "rows nv"]
    aref: Float[Array, " rows"]
    weight: Float[Array, " rows"]


class WalkerIterate(NamedTuple):
    """A point of the search: acceleration, J a - aref, gradient, last decrease, iterations."""

    acc: Float[Array, " nv"]
    rows: Float[Array, " rows"]
    gradient: Float[Array, " nv"]
    improvement: Float[Array, ""]
    niter: Int[Array, ""]


def solve(
    p: WalkerProblem, warm: Float[Array, " nv"], criteria: StoppingCriteria
) -> tuple[Float[Array, " nv"], Float[Array, " nv"]]:
    """Returns the acceleration and the force of the constraints on the dofs. The search starts from the
    better of `warm` and the acceleration without constraints.
    """
    scale = 1 / jnp.trace(p.mass)

    def alive(it: WalkerIterate) -> Bool[Array, ""]:
        more = (it.niter < criteria.iterations) & (scale * it.improvement >= criteria.tolerance)
        return more & (scale * jnp.sqrt(it.gradient @ it.gradient) >= criteria.tolerance)

    def advance(it: WalkerIterate) -> WalkerIterate:
        active = jnp.where(it.rows < 0, p.weight, 0)
        factor = jax.scipy.linalg.cho_factor(p.mass + (p.jacobian.T * active) @ p.jacobian, lower=True)
        search = -jax.scipy.linalg.cho_solve(factor, it.gradient)
        ahead = p.jacobian @ search
        size, gain = _line_search(p, it, search, ahead, criteria, alive(it))
        new = _iterate(p, it.acc + size * search, it.rows + size * ahead)
        return new._replace(improvement=gain, niter=it.niter + 1)

    starts = jnp.stack([warm, p.free])
    rows = starts @ p.jacobian.T - p.aref
    gauss = jnp.sum((starts @ p.mass - p.force) * (starts - p.free), axis=1)
    costs = gauss + jnp.sum(jnp.where(rows < 0, p.weight, 0) * rows**2, axis=1)
    first = costs[0] < costs[1]
    start = _iterate(p, jnp.where(first, *starts), jnp.where(first, *rows))
    last = jax.lax.while_loop(alive, advance, start)
    return last.acc, p.mass @ last.acc - p.force - last.gradient


def _iterate(p: WalkerProblem, acc: Float[Array, " nv"], rows: Float[Array, " rows"]) -> WalkerIterate:
    push = jnp.where(rows < 0, p.weight, 0) * rows
    gradient = p.mass @ acc - p.force + push @ p.jacobian
    return WalkerIterate(acc, rows, gradient, jnp.asarray(jnp.inf, acc.dtype), jnp.int32(0))


def _line_search(
    p: WalkerProblem,
    it: WalkerIterate,
    search: Float[Array, " nv"],
    ahead: Float[Array, " rows"],
    criteria: StoppingCriteria,
    alive: Bool[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the step size along `search` at which the cost's derivative vanishes, and the decrease."""
    drift, bend = search @ (p.mass @ it.acc - p.force), search @ (p.mass @ search)

    def slopes(size: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        rows = it.rows + size * ahead
        active = jnp.where(rows < 0, p.weight, 0) * ahead
        return drift + size * bend + active @ rows, bend + active @ ahead

    start = search @ it.gradient
    terms = jnp.abs(drift) + jnp.sum(jnp.abs(jnp.where(it.rows < 0, p.weight, 0) * it.rows * ahead))
    enough = slope_tolerance(criteria, jnp.sqrt(search @ search), jnp.trace(p.mass), terms)

    def more(b: StepBracket) -> Bool[Array, ""]:
        return alive & b.unfinished(enough, criteria)

    first = first_bracket(start, it.niter, slopes)
    return jax.lax.while_loop(more, lambda b: b.narrowed(slopes), first).result(start, enough)
