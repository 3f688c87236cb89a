"""Parts of Newton's method that both solvers of engine `mjx` share: stopping criteria and the line search.

The line search is one safeguarded Newton iteration on the derivative of the cost along the search direction:
a Newton step that leaves the bracket is replaced by bisection. Arrays may have any batch axes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mac.errors import UserError

NOISE = 8.0
"""Derivatives below this many roundings of their terms count as zero."""

Slopes = Callable[[Array], tuple[Array, Array]]
"""First and second derivative of the cost at a step size."""


class StoppingCriteria(NamedTuple):
    """Stopping criteria: iterations, and the smallest scaled improvement or gradient to continue for."""

    iterations: int
    ls_iterations: int
    tolerance: float
    ls_tolerance: float


class StepBracket(NamedTuple):
    """Bracket of a line search: the current step size, the cost's slope and curvature there, and bounds."""

    size: Float[Array, "*B"]
    slope: Float[Array, "*B"]
    curvature: Float[Array, "*B"]
    low: Float[Array, "*B"]
    high: Float[Array, "*B"]
    niter: Int[Array, "*B"]

    def unfinished(self, enough: Float[Array, "*B"], criteria: StoppingCriteria) -> Bool[Array, "*B"]:
        """Returns whether the slope exceeds `enough` and iterations are left."""
        return (jnp.abs(self.slope) > enough) & (self.niter < criteria.ls_iterations)

    def narrowed(self, slopes: Slopes) -> "StepBracket":
        """Returns the bracket after one iteration."""
        low, high = (
            jnp.where(self.slope < 0, self.size, self.low),
            jnp.where(self.slope < 0, self.high, self.size),
        )
        step = self.size - self.slope / self.curvature
        halfway = jnp.where(jnp.isinf(high), 2 * self.size, 0.5 * (low + high))
        size = jnp.where((low < step) & (step < high), step, halfway)
        return StepBracket(size, *slopes(size), low, high, self.niter + 1)

    def result(
        self, start: Float[Array, "*B"], enough: Float[Array, "*B"]
    ) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
        """Returns the step size, and the decrease of the cost.

        The decrease is that of a parabola with the same end slopes. Unlike a difference of costs it keeps its
        precision near the minimum, in float32 too.

        Args:
            start: slope at step size 0.
            enough: slope that counts as zero (`slope_tolerance`).
        """
        size = jnp.where(jnp.abs(self.slope) <= enough, self.size, self.low)
        slope = jnp.where(size == self.size, self.slope, 0)
        return size, -0.5 * size * (start + slope)


def first_bracket(start: Float[Array, "*B"], niter: Int[Array, "*B"], slopes: Slopes) -> StepBracket:
    """Returns the bracket at step size 1, unbounded above; `start` and `niter` give shapes and types."""
    one, zero = jnp.ones_like(start), jnp.zeros_like(start)
    return StepBracket(one, *slopes(one), zero, one * jnp.inf, jnp.ones_like(niter))


def slope_tolerance(
    criteria: StoppingCriteria,
    search_norm: Float[Array, "*B"],
    trace: Float[Array, "*B"],
    terms: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """Returns the slope at which the line search ends.

    Args:
        search_norm: norm of the search direction.
        trace: of the mass matrix.
        terms: sum of the absolute terms of the slope at its start.
    """
    enough = criteria.tolerance * criteria.ls_tolerance * search_norm * trace
    return jnp.maximum(enough, NOISE * jnp.finfo(terms.dtype).eps * terms)


def require_positive(iterations: int, ls_iterations: int, slots: tuple[int, ...]) -> None:
    """Checks the settings of an engine.

    Raises:
        UserError: if a number is less than 1.
    """
    if min(iterations, ls_iterations, *slots) < 1:
        raise UserError(
            f"iterations={iterations}, ls_iterations={ls_iterations}, {slots}: each must be at least 1"
        )
