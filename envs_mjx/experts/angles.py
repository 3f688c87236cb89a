"""Interpolation and angles, shared by plans and reactions."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def between(fraction: Array, low: Array | np.ndarray | float, high: Array | np.ndarray | float) -> Array:
    """Interpolates linearly from `low` to `high` (at `fraction` 1)."""
    start = jnp.asarray(low, fraction.dtype)
    return start + fraction * (jnp.asarray(high, fraction.dtype) - start)


def wrap(angle: Float[Array, ""], period: float = 2 * jnp.pi) -> Float[Array, ""]:
    """Returns the angle nearest to zero that differs from `angle` by a multiple of `period`."""
    return angle - period * jnp.round(angle / period)


def toward(yaw: Float[Array, ""], goal: Array | float, period: float = 2 * jnp.pi) -> Float[Array, ""]:
    """Returns the angle nearest to `yaw` that differs from `goal` by a multiple of `period`.

    An object that is symmetric under a rotation by `period` has many yaws; this is the one that an arm at
    `yaw` reaches with the least rotation.
    """
    return yaw + wrap(goal - yaw, period)


def raised(pos: Float[Array, " 3"], height: Array | float) -> Float[Array, " 3"]:
    """Returns the point `height` metres above `pos`."""
    return pos.at[2].add(height)
