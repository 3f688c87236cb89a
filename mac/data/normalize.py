"""Normalisation of observations."""

from collections.abc import Sequence
from typing import Literal

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

    Statistics come from a validation split, so training observations may leave [-1, 1]. Where observations
    are normalised by mean and deviation, as D4RL's methods do, `half_range` is the deviation.
    Source: the authors' implementation of MAC (Park et al. 2025), which the paper does not detail.
    """

    center: Float[Array, " D"]
    half_range: Float[Array, " D"]

    def apply(self, obs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Observations in the environment's units to normalised ones."""
        return (obs - jnp.broadcast_to(self.center, obs.shape)) / jnp.broadcast_to(self.width, obs.shape)

    def invert(self, obs: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalised observations back to the environment's units."""
        return obs * jnp.broadcast_to(self.width, obs.shape) + jnp.broadcast_to(self.center, obs.shape)

    def part(self, columns: Sequence[int]) -> "Normalizer":
        """The map of some entries alone, such as those that make up a goal."""
        at = jnp.asarray(tuple(columns), jnp.int32)
        return Normalizer(self.center[at], self.half_range[at])

    @property
    def width(self) -> Float[Array, " D"]:
        """What each entry is divided by."""
        return self.half_range + EPSILON


Normalize = Literal["minmax", "standard", "none"]
"""By half range; by deviation; or not at all."""


def fit(how: Normalize, obs: Float[np.ndarray, "N D"]) -> Normalizer:
    """The map of a kind, from observations in the environment's units."""
    if how == "minmax":
        return fit_minmax(obs)
    if how == "standard":
        wide = np.asarray(obs, np.float64)
        mean, deviation = wide.mean(axis=0), wide.std(axis=0)
        return Normalizer(jnp.asarray(mean, jnp.float32), jnp.asarray(deviation, jnp.float32))
    return Normalizer(jnp.zeros(obs.shape[1]), jnp.full(obs.shape[1], 1 - EPSILON))


def fit_minmax(obs: Float[np.ndarray, "N D"]) -> Normalizer:
    """Centre and half range of each column of `obs`, in the environment's units."""
    low, high = np.min(obs, axis=0), np.max(obs, axis=0)
    # Halved first: the sum of two large float32 must not overflow.
    return Normalizer(jnp.asarray(high / 2 + low / 2), jnp.asarray(high / 2 - low / 2))
