"""Choosing the best of several candidates."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def best_of_n(candidates: Float[Array, "N *B A"], score: Float[Array, " N *B"]) -> Float[Array, "*B A"]:
    """The candidate of highest score, per batch element; the first of equal ones.

    Source: rejection sampling, Park et al. 2025 (MAC), eq. 4.
    """
    if len(candidates) == 1:  # the compiler then drops the scores
        return candidates[0]
    best = jnp.argmax(score, axis=0)
    return jnp.take_along_axis(candidates, best[None, ..., None], axis=0)[0]
