"""Min-max normalisation of observations."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EPSILON = 1e-3
"""Added to the half range, in the observation's units, so that a constant entry does not divide by 0.

Some entries are nearly constant (a wrist joint of OGBench's arm has a half range of 0.005), so
the value matters and is the one of the authors' implementation.
"""


class Normalizer(eqx.Module):
    """The map `(x - center) / (half_range + 1e-3)`, per entry, without clipping.

    Statistics come from a validation split, so training observations may leave [-1, 1].
    Source: the authors' implementation of MAC (Park et al. 2025), which the paper does not detail.
    """

    center: Float[Array, " D"]
    half_range: Float[Array, " D"]

    def apply(self, obs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Observations in the environment's units to normalised ones."""
        center, half_range = self._wide(obs)
        return (obs - center) / (half_range + EPSILON)

    def invert(self, obs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalised observations back to the environment's units."""
        center, half_range = self._wide(obs)
        return obs * (half_range + EPSILON) + center

    def _wide(self, obs: Float[Array, "*batch D"]) -> tuple[Array, Array]:
        """Both statistics in the shape of `obs`: spelled out, since implicit promotion hides mistakes."""
        return jnp.broadcast_to(self.center, obs.shape), jnp.broadcast_to(self.half_range, obs.shape)

    def apply_host(self, obs: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """`apply` on the host: one new array, where the device would hold input and output together."""
        out = obs - np.asarray(self.center)
        out /= np.asarray(self.half_range + EPSILON)
        return out


def fit_minmax(obs: Float[np.ndarray, "N D"]) -> Normalizer:
    """Centre and half range of each column of `obs`, in the environment's units."""
    low, high = np.min(obs, axis=0), np.max(obs, axis=0)
    # Halved first: the sum of two large float32 must not overflow.
    return Normalizer(jnp.asarray(high / 2 + low / 2), jnp.asarray(high / 2 - low / 2))
