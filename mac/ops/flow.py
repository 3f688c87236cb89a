"""Flow matching: noise at time 0, data at time 1, straight lines between."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

Field = Callable[[Float[Array, "*B X"], Float[Array, "*B 1"]], Float[Array, "*B X"]]
"""A velocity field: `field(x, time)`, time in [0, 1]."""


def flow_matching_loss(field: Field, data: Float[Array, "B X"], key: Key[Array, ""]) -> Float[Array, ""]:
    """Mean squared error, over batch and dimensions, of the velocity along straight paths to `data`.

    Source: Park et al. 2025 (MAC), eq. 7, in the standard orientation (x_t = (1-t) noise + t data).
    """
    key_noise, key_time = jr.split(key)
    noise = jr.normal(key_noise, data.shape)
    time = jr.uniform(key_time, (*data.shape[:-1], 1))
    x = (1 - time) * noise + time * data
    return jnp.mean(jnp.square(field(x, time) - (data - noise)))


def euler(
    field: Field, noise: Float[Array, "*B X"], steps: int, *, unroll: bool = False
) -> Float[Array, "*B X"]:
    """Integrates `field` from `noise` at time 0 to time 1 in `steps` equal steps of Euler's rule.

    The field is evaluated at the left end of each step: times 0, 1/steps, ..., 1 - 1/steps. `unroll` writes
    the loop out.
    """

    def step(x, time):
        return x + field(x, jnp.full((*x.shape[:-1], 1), time)) / steps, None

    return jax.lax.scan(step, noise, jnp.arange(steps) / steps, unroll=unroll)[0]
