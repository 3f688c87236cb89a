"""Normalisation of observations."""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mac.data.quantize import ColumnSummary, summarize
from mac.data.store import Statistics

EPSILON = 1e-3
"""Added to the half range, in the observation's units, so that a constant entry does not divide by 0.

Some entries are nearly constant (a wrist joint of OGBench's arm has a half range of 0.005), so
the value matters and is the one of the authors' implementation.
"""

LARGEST = 10.0
"""Largest half range (or standard deviation, or distance of the centres) of training rows, in normalised
units, at which the statistics of a validation split still stand for them. Measured on 5 training episodes
and 1 for validation of four scenes: at most 8 in ordinary columns, 12 to 135 in those of buttons that are not
pressed in the validation episode."""

_SHOWN = 10  # columns that a note names


class Normalizer(eqx.Module):
    """The map `(x - center) / (half_range + 1e-3)`, per entry, without clipping.

    Statistics come from a validation split, so training observations may leave [-1, 1]. Where observations
    are normalised by mean and standard deviation, as D4RL's methods do, `half_range` is the latter.
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
        """Divisor of each entry."""
        return self.half_range + EPSILON


Normalize = Literal["minmax", "standard", "none"]
"""By half range; by standard deviation; or not at all."""


def fit_normalizer(how: Normalize, found: Statistics) -> tuple[Normalizer, tuple[str, ...]]:
    """The map of a kind for a dataset, and notes on it.

    The statistics are those of the validation rows (the authors' implementation: of the first file of them),
    and of the training rows if there are none. A column that hardly varies in the validation rows, but does
    in the training rows, takes the statistics of the latter: divided by `EPSILON` alone, a column of zeros
    and ones would reach 1000, and outweigh all others in every loss.
    """
    if how == "none":
        width = len(found.train.low)
        return Normalizer(jnp.zeros(width), jnp.full(width, 1 - EPSILON)), ()
    center, spread = _of(how, found.train)
    if found.val is None:
        return Normalizer(jnp.asarray(center), jnp.asarray(spread)), ()
    c, s = _of(how, found.val)
    wide = np.asarray(s, np.float64) + EPSILON
    apart = np.maximum(np.abs(np.subtract(center, c, dtype=np.float64)), spread) / wide
    rare = apart > LARGEST
    where = np.flatnonzero(rare).tolist()
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    notes = (
        f"observation columns {', '.join(map(str, where[:_SHOWN]))}{more} hardly vary in the validation "
        f"rows (training rows spread up to {apart.max():,.0f} times further), so they are normalised by the "
        "training rows",
    )
    found_map = Normalizer(jnp.asarray(np.where(rare, center, c)), jnp.asarray(np.where(rare, spread, s)))
    return found_map, notes if where else ()


def fit_minmax(obs: Float[np.ndarray, "N D"]) -> Normalizer:
    """Centre and half range of each column of `obs`, in the environment's units."""
    return fit_normalizer("minmax", Statistics(summarize(obs), None))[0]


def _of(how: Normalize, rows: ColumnSummary) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Centre and spread of each column, float32."""
    if how == "standard":
        return rows.mean.astype(np.float32), rows.std.astype(np.float32)
    low, high = rows.low.astype(np.float32), rows.high.astype(np.float32)
    # Halved first: the sum of two large float32 must not overflow.
    return high / 2 + low / 2, high / 2 - low / 2
