"""Losses that several methods share; each is a mean over all axes unless it says otherwise."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float

from mac.types import Metrics, Number

Losses = dict[str, Float[Array, ""]]
ValueKind = Literal["squared", "bce"]
"""Loss of V and Q: squared error, or cross-entropy of values in [0, 1]."""

MOST_WEIGHT = 100.0
"""Largest weight of an action in advantage-weighted regression."""


def mse(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean squared error over batch and dimensions."""
    return jnp.mean(jnp.square(x - y))


def cross_entropy(logit: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean binary cross-entropy of `logit` with a target in [0, 1]."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logit, target))


def output_to_value(output: Float[Array, "..."], kind: ValueKind) -> Float[Array, "..."]:
    """Maps an output of V or Q to a value; of the kind "bce" it is a logit."""
    return jax.nn.sigmoid(output) if kind == "bce" else output


def value_loss(output: Float[Array, "..."], target: Float[Array, "..."], kind: ValueKind) -> Float[Array, ""]:
    """Loss of outputs of V or Q; no gradient passes to the target."""
    if kind == "bce":
        return cross_entropy(output, jnp.clip(sg(target), 0, 1))
    return mse(output, sg(target))


def expectile_loss(error: Float[Array, "..."], expectile: Number) -> Float[Array, ""]:
    """Mean of |expectile - 1[error < 0]| error²; its minimum over v in `error = x - v` is that expectile.

    Source: Kostrikov et al. 2022 (IQL), eq. 5.
    """
    weight = jnp.where(error < 0, 1 - expectile, expectile)
    return jnp.mean(weight * jnp.square(error))


def expectile_value_loss(
    output: Float[Array, "..."], target: Float[Array, "..."], kind: ValueKind, expectile: Number
) -> Float[Array, ""]:
    """Loss of outputs of V or Q whose value is to be that expectile of targets; no gradient passes to these.

    Of the kind "squared" it is `expectile_loss`; of "bce" the same weights times cross-entropies, which have
    the same minimum.
    """
    target = sg(target)
    if kind == "squared":
        return expectile_loss(target - output, expectile)
    target = jnp.clip(target, 0, 1)
    weight = jnp.where(target < output_to_value(output, kind), 1 - expectile, expectile)
    return jnp.mean(weight * optax.sigmoid_binary_cross_entropy(output, target))


def advantage_weight(advantage: Float[Array, "..."], alpha: Number) -> Float[Array, "..."]:
    """`exp(alpha * advantage)`, at most 100: how much to imitate each action of the data.

    Source: Kostrikov et al. 2022 (IQL), eq. 7; the bound is that of its authors' implementation.
    """
    # Bounded before the exponential, too, which might be infinite.
    most = jnp.log(MOST_WEIGHT)
    return jnp.minimum(jnp.exp(jnp.minimum(alpha * advantage, most)), MOST_WEIGHT)


def scale_normalised_q(q: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean of `q` over its mean size: a value to maximize, whose slope does not depend on the rewards' units.

    Source: Fujimoto and Gu 2021 (TD3+BC), eq. 5.
    """
    return jnp.mean(q) / sg(jnp.mean(jnp.abs(q)) + 1e-6)


def sac_loss(
    weight: Float[Array, ""], log_prob: Float[Array, "..."], q: Float[Array, "..."]
) -> Float[Array, ""]:
    """Loss of a policy's samples: `weight * log_prob - q`; no gradient passes to the weight.

    Source: Haarnoja et al. 2018 (SAC), arXiv 1812.05905, eq. 7.
    """
    return jnp.mean(sg(weight) * log_prob - q)


def entropy_loss(
    weight: Float[Array, ""], log_prob: Float[Array, "..."], entropy: Number
) -> Float[Array, ""]:
    """Loss of the entropy's weight, or of its logarithm, which holds the policy's entropy at `entropy`.

    Source: Haarnoja et al. 2018 (SAC), arXiv 1812.05905, eq. 18.
    """
    return weight * sg(-jnp.mean(log_prob) - entropy)


def sum_losses(losses: Losses, **logged: Float[Array, "..."]) -> tuple[Float[Array, ""], Metrics]:
    """Sum of all losses, and what to log: each of them, and the means of other arrays.

    The name of such an array has `__` for the `/` of its metric: `critic__q_mean`.
    """
    means = {name.replace("__", "/"): jnp.mean(x) for name, x in logged.items()}
    return sum(losses.values(), jnp.zeros(())), losses | means
