"""Sums and linear systems of every scene of a batch, written for one contiguous batch axis, the last."""

import functools
import operator

import jax.numpy as jnp
from jaxtyping import Array, Float

from envs_mjx.engines.tabletop_mjx.xla_stages import stage


def sum_leading(parts: list[Array] | Array) -> Array:
    """Sums along the first axis, written out: XLA on CPU does not vectorise such a reduction over scenes."""
    return functools.reduce(operator.add, [parts[i] for i in range(len(parts))])


def product(matrix: Float[Array, "*m n B"], v: Float[Array, "n B"]) -> Float[Array, "*m B"]:
    """Returns `matrix @ v` of every scene."""
    return sum_leading([matrix[..., i, :] * v[i] for i in range(v.shape[0])])


@stage
def plus_outer(
    matrix: Float[Array, "n m B"], left: Float[Array, "3 c n B"], right: Float[Array, "3 c m B"]
) -> Float[Array, "n m B"]:
    """Returns a matrix plus the outer products of rows."""
    pairs = [(r, c) for r in range(3) for c in range(left.shape[1])]
    return matrix + sum_leading([left[r, c][:, None] * right[r, c][None] for r, c in pairs])


def cholesky_solve(a: Float[Array, "n n B"], b: Float[Array, "n B"]) -> Float[Array, "n B"]:
    """Solves a x = b for symmetric positive definite matrices by Cholesky's method, column by column.

    The right side is one more row of the matrix, which makes it the forward substitution.
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
    """Returns the first column of the factor, and the remainder without its row and column."""
    least = jnp.finfo(rest.dtype).tiny
    column = rest[:, 0] / jnp.sqrt(jnp.maximum(rest[0, 0], least))
    return column, rest[1:, 1:] - column[1:, None] * column[None, 1:-1]


@stage
def _substituted(column: Float[Array, "m1 B"], known: list[Array]) -> Float[Array, " B"]:
    return sum_leading([column[-1], *(-column[1 + i] * x for i, x in enumerate(known))]) / column[0]
