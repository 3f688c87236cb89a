"""Critic ensembles (twin critics), which counter overestimation."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.nn.mlp import STANDARD, Network, Style, scalar, value_net

Critics = tuple[Network, ...]
Combine = Literal["min", "mean"]


def twin_critics(
    in_sizes: Sequence[int | None], hidden: Sequence[int], *, key: Key[Array, ""], style: Style = STANDARD
) -> Critics:
    """Two value networks, initialised independently."""
    return tuple(value_net(in_sizes, hidden, key=k, style=style) for k in jr.split(key))


def q_values(critics: Critics, *inputs: Float[Array, "..."] | None) -> Float[Array, " E *B"]:
    """Returns the values of E critics at the same inputs."""
    return jnp.stack([scalar(critic, *inputs) for critic in critics])


def aggregate(values: Float[Array, " E *B"], how: Combine) -> Float[Array, "*B"]:
    """Aggregates the values of several critics: their minimum (Fujimoto et al. 2018, TD3) or mean."""
    return jnp.min(values, axis=0) if how == "min" else jnp.mean(values, axis=0)


def critic_loss(values: Float[Array, " E *B"], target: Float[Array, "*B"]) -> Float[Array, ""]:
    """Mean squared error of all critics; no gradient passes to the target."""
    return jnp.mean(jnp.square(values - jnp.broadcast_to(sg(target), values.shape)))
