"""A codebook: vectors that continuous ones are rounded to, each the running mean of what was rounded to it.

Source: van den Oord et al. 2017 (VQ-VAE), arXiv 1711.00937, with the exponential averages of its appendix A.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Int, Key

from mac.nn.mlp import broadcast_add

LEAST_COUNT = 1e-6
"""Average count below which the statistics of a code that is not used stop shrinking."""


class Quantised(NamedTuple):
    """Vectors that are rounded to codes.

    Attributes:
        code: numbers of the nearest codes.
        vector: the codes themselves, without gradient.
        passed: `vector`, whose gradient is passed on to the rounded vectors as it is (straight-through).
    """

    code: Int[Array, "*B"]
    vector: Float[Array, "*B W"]
    passed: Float[Array, "*B W"]


class Codebook(eqx.Module):
    """`K` vectors, the ratios of two exponential averages: of sums of vectors, and of counts.

    An exponential average with decay γ, `x <- γ x + (1 - γ) new`, is a step of gradient descent at rate 1 - γ
    on half the squared distance from `new`. So `average_loss` and `optax.sgd(1 - decay)` train a codebook
    like any other network. No update needs a second pass through an encoder, or state outside the networks.

    A code that is never used keeps its place: both of its averages shrink alike. They stop shrinking at
    `LEAST_COUNT`, since the ratio of two numbers that underflow is not a number. Counts have no additive
    (Laplace) smoothing, as in TAP.

    Attributes:
        count: average number of vectors per batch that are rounded to each code.
        total: average sum of these vectors.
    """

    count: Float[Array, " K"]
    total: Float[Array, "K W"]

    def __init__(self, size: int, width: int, *, key: Key[Array, ""]):
        """Makes `size` codes, uniform in ±1/size, with counts of 1."""
        self.count = jnp.ones(size)
        self.total = jr.uniform(key, (size, width), minval=-1 / size, maxval=1 / size)

    @property
    def vectors(self) -> Float[Array, "K W"]:
        """All codes, without gradient."""
        return sg(self.total / jnp.broadcast_to(self.count[:, None], self.total.shape))

    def __call__(self, x: Float[Array, "*B W"]) -> Quantised:
        """Rounds each vector to the nearest code."""
        codes = self.vectors
        flat = sg(x).reshape(-1, x.shape[-1])
        size = jnp.sum(jnp.square(codes), axis=-1)  # |x|² is the same for all codes
        nearest = jnp.argmin(broadcast_add(-2 * flat @ codes.T, size), axis=-1).reshape(x.shape[:-1])
        vector = codes[nearest]
        return Quantised(nearest, vector, x + sg(vector - x))

    def average_loss(self, x: Float[Array, "*B W"], code: Int[Array, "*B"]) -> Float[Array, ""]:
        """Half the squared distance of both averages from the counts and sums of vectors `x` of a batch.

        The gradient reaches the averages only.
        """
        flat = sg(x).reshape(-1, x.shape[-1])
        chosen = jax.nn.one_hot(code.reshape(-1), len(self.count))
        count, total = jnp.sum(chosen, axis=0), chosen.T @ flat
        moving = ((count > 0) | (sg(self.count) > LEAST_COUNT)).astype(flat.dtype)
        distance = jnp.square(self.count - count) + jnp.sum(jnp.square(self.total - total), axis=-1)
        return 0.5 * jnp.sum(moving * distance)


def perplexity(code: Int[Array, "*B"], size: int) -> Float[Array, ""]:
    """Exponential of the entropy of how often each of `size` codes is used: 1 for a single one, at most
    `size`."""
    share = jnp.mean(jax.nn.one_hot(code.reshape(-1), size), axis=0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(share)))
