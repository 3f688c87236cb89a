"""Choosing the best of several candidates."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def best_of_n(candidates: Float[Array, "N *B A"], score: Float[Array, " N *B"]) -> Float[Array, "*B A"]:
    """The candidate of highest score, per batch element; the first of equal ones.

    Source: rejection sampling, Park et al. 2025 (MAC), eq. 4.
    """
    best = jnp.argmax(score, axis=0)
    return jnp.take_along_axis(candidates, best[None, ..., None], axis=0)[0]
