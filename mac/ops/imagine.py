"""Rolling a learned model forward: under a policy, or with given actions."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

Policy = Callable[[Float[Array, "B D"], Key[Array, ""]], Float[Array, "B A"]]
Model = Callable[[Float[Array, "B D"], Float[Array, "B A"]], Float[Array, "B D"]]


class Trajectory(eqx.Module):
    """`T` imagined steps: the state before each, what was done there, and the state after."""

    obs: Float[Array, "T B D"]
    action: Float[Array, "T B A"]
    next_obs: Float[Array, "T B D"]


def imagine(
    policy: Policy, model: Model, obs: Float[Array, "B D"], steps: int, key: Key[Array, ""]
) -> Trajectory:
    """Alternates `policy(obs, key)` and `model(obs, action)` for `steps` steps, with fresh keys."""

    def step(obs, key):
        action = policy(obs, key)
        next_obs = model(obs, action)
        return next_obs, (obs, action, next_obs)

    return Trajectory(*jax.lax.scan(step, obs, jr.split(key, steps))[1])


def open_loop(
    model: Model, obs: Float[Array, "B D"], actions: Float[Array, "B L A"]
) -> Float[Array, "L B D"]:
    """States after each of L given actions, every one predicted from the prediction before it."""

    def step(obs, action):
        obs = model(obs, action)
        return obs, obs

    return jax.lax.scan(step, obs, jnp.moveaxis(actions, 1, 0))[1]
