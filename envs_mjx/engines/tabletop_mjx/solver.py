"""Newton's method for MuJoCo's constraint problem, for a batch of scenes at once.

The problem (`constraints.py`) is strictly convex, so any solver that converges finds the same acceleration.
Made for batches: every operation is one vectorised loop over scenes. The line search is one safeguarded
Newton iteration on the derivative. Converged scenes are removed from the batch.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.engines.newton_line_search import StepBracket, StoppingCriteria, first_bracket, slope_tolerance
from envs_mjx.engines.tabletop_mjx.batched_linalg import sum_leading
from envs_mjx.engines.tabletop_mjx.constraints import (
    ConstraintValues,
    TabletopProblem,
    directional_derivatives,
    forces_of,
    gradient_of,
    jacobian_times,
    mass_times,
    norm,
    residuals,
    trace,
)
from envs_mjx.engines.tabletop_mjx.hessian import QuadraticTerms, newton_step, with_equalities
from envs_mjx.engines.tabletop_mjx.xla_stages import stage


class TabletopIterate(NamedTuple):
    """A point `acc` of the search, its residuals, forces and gradient, and progress of every scene.

    `noise` is the norm below which the gradient is rounding error. `expected_improvement` is an upper
    estimate of the remaining improvement, and `improvement` is that of the last step.
    """

    acc: Float[Array, "nv B"]
    rows: ConstraintValues
    forces: ConstraintValues
    gradient: Float[Array, "nv B"]
    noise: Float[Array, " B"]
    expected_improvement: Float[Array, " B"]
    improvement: Float[Array, " B"]
    niter: Int[Array, " B"]


def newton(p: TabletopProblem, start: Float[Array, "nv B"], criteria: StoppingCriteria) -> TabletopIterate:
    """Minimises the problem from `start`.

    Converged scenes wait for the others. Most need one or two iterations and few of them ten, so the
    remaining scenes are gathered into a smaller batch when they fit.
    """
    whole, it = _begin(p, start)
    return _narrowing(whole, it, criteria, [start.shape[-1] // k for k in _SHARES])


_SHARES = (2, 8)
"""Parts of the batch to which the solver shrinks."""

_FEWEST = 4
"""Batches are not made smaller than this."""


def _narrowing(
    w: "_Whole", it: TabletopIterate, criteria: StoppingCriteria, sizes: list[int]
) -> TabletopIterate:
    if not sizes or sizes[0] < _FEWEST:
        return _iterate(w, it, criteria, 0)
    it = _iterate(w, it, criteria, sizes[0])
    lanes = jax.lax.top_k(_alive(w, it, criteria).astype(jnp.int32), sizes[0])[1]
    part, rest = _gathered((w, it), lanes, it.niter.shape[0])
    return _scattered(it, _narrowing(part, rest, criteria, sizes[1:]), lanes)


class _Whole(eqx.Module):
    """A problem with the quantities that do not change between iterations."""

    problem: TabletopProblem
    quadratic: QuadraticTerms
    scale: Float[Array, " B"]


def _begin(p: TabletopProblem, start: Float[Array, "nv B"]) -> tuple[_Whole, TabletopIterate]:
    weight = trace(p)
    rows = residuals(p, start)
    forces = forces_of(p, rows)
    gradient, noise, expected_improvement = gradient_of(p, start, forces)
    endless, never = jnp.full_like(weight, jnp.inf), jnp.zeros_like(weight, jnp.int32)
    first = TabletopIterate(start, rows, forces, gradient, noise, expected_improvement, endless, never)
    return _Whole(p, with_equalities(p), 1 / weight), first


@functools.partial(stage, static=(2,))
def _gathered(
    tree: tuple[_Whole, TabletopIterate], lanes: Int[Array, " b"], batch: int
) -> tuple[_Whole, TabletopIterate]:
    """The scenes `lanes`; arrays whose last axis is 1 hold for all."""
    return jax.tree.map(lambda x: jnp.take(x, lanes, axis=-1) if x.shape[-1] == batch else x, tree)


@stage
def _scattered(it: TabletopIterate, rest: TabletopIterate, lanes: Int[Array, " b"]) -> TabletopIterate:
    return jax.tree.map(lambda x, y: x.at[..., lanes].set(y), it, rest)


def _alive(w: _Whole, it: TabletopIterate, criteria: StoppingCriteria) -> Bool[Array, " B"]:
    more = (it.niter < criteria.iterations) & (w.scale * it.improvement >= criteria.tolerance)
    more &= w.scale * it.expected_improvement >= criteria.tolerance
    return more & (norm(it.gradient) >= jnp.maximum(criteria.tolerance / w.scale, it.noise))


def _iterate(w: _Whole, it: TabletopIterate, criteria: StoppingCriteria, enough: int) -> TabletopIterate:
    """Runs Newton iterations until at most `enough` scenes need more."""
    p = w.problem

    def advance(it: TabletopIterate) -> TabletopIterate:
        going = _alive(w, it, criteria)
        search = -newton_step(p, w.quadratic, it.rows, it.gradient)
        ahead = jacobian_times(p, search)
        size, improvement = _line_search(p, it, search, ahead, criteria, going)
        acc, rows = _moved(it, search, ahead, jnp.where(going, size, 0))
        forces = forces_of(p, rows)
        gradient, noise, expected_improvement = gradient_of(p, acc, forces)
        improvement = jnp.where(going, improvement, it.improvement)
        return TabletopIterate(
            acc, rows, forces, gradient, noise, expected_improvement, improvement, it.niter + going
        )

    def more(it: TabletopIterate) -> Bool[Array, ""]:
        return jnp.sum(_alive(w, it, criteria)) > enough

    return jax.lax.while_loop(more, advance, it)


@stage
def _moved(
    it: TabletopIterate, search: Float[Array, "nv B"], ahead: ConstraintValues, step: Float[Array, " B"]
) -> tuple[Float[Array, "nv B"], ConstraintValues]:
    rows = ConstraintValues(*(x + step * v for x, v in zip(it.rows, ahead, strict=True)))
    return it.acc + step * search, rows


@stage
def total_force(p: TabletopProblem, solution: TabletopIterate) -> Float[Array, "nv B"]:
    """Returns all forces on the dofs, those of the constraints included."""
    return mass_times(p, solution.acc) - solution.gradient


@functools.partial(stage, static=(4,))
def _along_start(
    p: TabletopProblem,
    it: TabletopIterate,
    search: Float[Array, "nv B"],
    ahead: ConstraintValues,
    criteria: StoppingCriteria,
) -> tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Returns slope and curvature of the Gauss cost along `search`, total slope at its start, and its
    tolerance."""
    drift = sum_leading(search * (mass_times(p, it.acc) - p.force))
    bend = sum_leading(search * mass_times(p, search))
    pairs = zip(it.forces, ahead, strict=True)
    terms = [sum_leading(jnp.abs(f * v).reshape(-1, v.shape[-1])) for f, v in pairs if f.shape[0]]
    terms = sum_leading([jnp.abs(drift), *terms])
    enough = slope_tolerance(criteria, norm(search), trace(p), terms)
    return drift, bend, sum_leading(search * it.gradient), enough


def _line_search(
    p: TabletopProblem,
    it: TabletopIterate,
    search: Float[Array, "nv B"],
    ahead: ConstraintValues,
    criteria: StoppingCriteria,
    alive: Bool[Array, " B"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns the step size along `search` at which the cost's derivative vanishes, and the decrease."""
    drift, bend, start, enough = _along_start(p, it, search, ahead, criteria)

    def slopes(size: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        rows = ConstraintValues(*(x + size * v for x, v in zip(it.rows, ahead, strict=True)))
        first, second = directional_derivatives(p, rows, ahead)
        return drift + size * bend + first, bend + second

    def more(b: StepBracket) -> Bool[Array, " B"]:
        return alive & b.unfinished(enough, criteria)

    @stage
    def narrow(b: StepBracket) -> StepBracket:
        new = b.narrowed(slopes)
        return StepBracket(*(jnp.where(more(b), x, y) for x, y in zip(new, b, strict=True)))

    first = first_bracket(start, it.niter, stage(slopes))
    return jax.lax.while_loop(lambda b: jnp.any(more(b)), narrow, first).result(start, enough)
