"""Policies that are distributions: a diagonal Gaussian squashed by tanh into (-1, 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.nn.mlp import MLP, STANDARD, Dense, Norm, Style

HEAD_VARIANCE = 0.01
"""Share of Glorot's variance that the heads' weights start with: means near 0, standard deviations near 1."""
LOG_STD = (-5.0, 2.0)
"""Range to which the logarithm of the standard deviation is clipped."""


class TanhGaussian(NamedTuple):
    """Independent entries `tanh(x)`, `x` normal with `mean` and `exp(log_std)`."""

    mean: Float[Array, "*B A"]
    log_std: Float[Array, "*B A"]

    def at(self, noise: Float[Array, "*N A"]) -> Float[Array, "*N A"]:
        """Samples by reparametrization: of standard normal `noise`, which may have more leading axes."""
        mean, log_std = (jnp.broadcast_to(x, noise.shape) for x in self)
        return jnp.tanh(mean + jnp.exp(log_std) * noise)

    def log_prob(self, action: Float[Array, "*B A"]) -> Float[Array, " *B"]:
        """Logarithm of the density, summed over entries; `action` lies strictly within (-1, 1)."""
        x = jnp.arctanh(action)
        normal = -0.5 * jnp.square((x - self.mean) / jnp.exp(self.log_std)) - self.log_std
        slope = jnp.log1p(-action) + jnp.log1p(action)  # log of d tanh(x) / dx = 1 - tanh(x)²
        return jnp.sum(normal - 0.5 * jnp.log(2 * jnp.pi) - slope, axis=-1)

    def sample(self, noise: Float[Array, "*N A"]) -> tuple[Float[Array, "*N A"], Float[Array, " *N"]]:
        """`at(noise)`, and the logarithm of the density there: finite where tanh rounds to ±1, too."""
        mean, log_std = (jnp.broadcast_to(x, noise.shape) for x in self)
        x = mean + jnp.exp(log_std) * noise
        slope = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))
        normal = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
        return jnp.tanh(x), jnp.sum(normal - slope, axis=-1)


def normal_log_prob(
    x: Float[Array, "*B A"], mean: Float[Array, "*B A"], log_std: Float[Array, "..."] | None = None
) -> Float[Array, " *B"]:
    """Logarithm of a normal density, summed over entries; standard deviations are 1 where none are given.

    `log_std` broadcasts to `x`.
    """
    log_std = jnp.zeros(x.shape[-1]) if log_std is None else log_std
    wide = jnp.broadcast_to(log_std, x.shape)
    entry = -0.5 * jnp.square((x - mean) * jnp.exp(-wide)) - wide - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.sum(entry, axis=-1)


class GaussianPolicy(eqx.Module):
    """Network of a `TanhGaussian` whose standard deviations depend on the inputs, as its means do.

    Both heads read one trunk: hidden layers as those of `MLP`, the last one included.

    Source: the actors of OGBench (Park et al. 2025) and of MAC (Gau) in Park et al. 2025 (MAC), table 3.
    """

    trunk: MLP  # up to the last hidden layer, whose activation and norm follow here
    norm: Norm
    mean: Dense
    log_std: Dense

    def __init__(
        self,
        in_sizes: Sequence[int | None],
        hidden: Sequence[int],
        out_size: int,
        *,
        key: Key[Array, ""],
        style: Style = STANDARD,
    ):
        """Args: widths of the inputs in order, of the hidden layers, and of an action."""
        k_trunk, k_mean, k_std = jr.split(key, 3)
        *earlier, width = hidden
        self.trunk = MLP(in_sizes, earlier, width, key=k_trunk, style=style)
        self.norm = style.norm(width)
        self.mean = Dense(width, out_size, key=k_mean, variance=HEAD_VARIANCE)
        self.log_std = Dense(width, out_size, key=k_std, variance=HEAD_VARIANCE)

    def __call__(self, *inputs: Float[Array, "..."] | None) -> TanhGaussian:
        """The distribution at inputs as `MLP` takes them."""
        x = self.trunk.style(self.trunk(*inputs), self.norm)
        return TanhGaussian(self.mean(x), jnp.clip(self.log_std(x), *LOG_STD))
