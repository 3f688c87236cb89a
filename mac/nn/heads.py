"""Policies that are distributions: a diagonal Gaussian squashed by tanh into (-1, 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.nn.mlp import MLP, Dense, layer_norm

HEAD_VARIANCE = 0.01
"""Share of Glorot's variance that the heads' weights start with: means near 0, deviations near 1."""
LOG_STD = (-5.0, 2.0)
"""Range to which the logarithm of the deviation is clipped."""


class TanhGaussian(NamedTuple):
    """Independent entries `tanh(x)`, `x` normal with `mean` and `exp(log_std)`."""

    mean: Float[Array, "*B A"]
    log_std: Float[Array, "*B A"]

    def at(self, noise: Float[Array, "*N A"]) -> Float[Array, "*N A"]:
        """The samples that standard normal `noise` stands for; its leading axes may be more."""
        mean, log_std = (jnp.broadcast_to(x, noise.shape) for x in self)
        return jnp.tanh(mean + jnp.exp(log_std) * noise)

    def log_prob(self, action: Float[Array, "*B A"]) -> Float[Array, " *B"]:
        """Logarithm of the density, summed over entries; `action` lies strictly within (-1, 1)."""
        x = jnp.arctanh(action)
        normal = -0.5 * jnp.square((x - self.mean) / jnp.exp(self.log_std)) - self.log_std
        slope = jnp.log1p(-action) + jnp.log1p(action)  # log of d tanh(x) / dx = 1 - tanh(x)²
        return jnp.sum(normal - 0.5 * jnp.log(2 * jnp.pi) - slope, axis=-1)


class GaussianPolicy(eqx.Module):
    """Network of a `TanhGaussian` whose deviations depend on the inputs, as its means do.

    Both heads read one trunk: hidden layers as those of `MLP`, the last one included.

    Source: the actors of OGBench (Park et al. 2025) and of MAC (Gau) in Park et al. 2025 (MAC), table 3.
    """

    trunk: MLP  # up to the last hidden layer, whose activation and norm follow here
    norm: tuple[Float[Array, " W"], Float[Array, " W"]]
    mean: Dense
    log_std: Dense

    def __init__(
        self, in_sizes: Sequence[int | None], hidden: Sequence[int], out_size: int, *, key: Key[Array, ""]
    ):
        """Args: widths of the inputs in order, of the hidden layers, and of an action."""
        k_trunk, k_mean, k_std = jr.split(key, 3)
        *earlier, width = hidden
        self.trunk = MLP(in_sizes, earlier, width, key=k_trunk)
        self.norm = jnp.ones(width), jnp.zeros(width)
        self.mean = Dense(width, out_size, key=k_mean, variance=HEAD_VARIANCE)
        self.log_std = Dense(width, out_size, key=k_std, variance=HEAD_VARIANCE)

    def __call__(self, *inputs: Float[Array, "..."] | None) -> TanhGaussian:
        """The distribution at inputs as `MLP` takes them."""
        x = layer_norm(jax.nn.gelu(self.trunk(*inputs), approximate=True), *self.norm)
        return TanhGaussian(self.mean(x), jnp.clip(self.log_std(x), *LOG_STD))
