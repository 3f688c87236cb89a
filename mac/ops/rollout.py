"""Rolling a learned model forward: under a policy, or with given actions."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.batch_axis import share_rows

Policy = Callable[[Float[Array, "B D"], Key[Array, ""]], Float[Array, "B A"]]
Model = Callable[..., Float[Array, "B D"]]
"""From states [B, D] and flat chunks [B, A] to the states after them; one that draws them takes a key too."""


class Trajectory(eqx.Module):
    """`T` imagined steps: the state before each, the action, and the state after."""

    obs: Float[Array, "T B D"]
    action: Float[Array, "T B A"]
    next_obs: Float[Array, "T B D"]


def residual_model(net: Callable[..., Float[Array, "B D"]]) -> Model:
    """The model whose network predicts changes: from states and flat chunks to the states after them."""
    return lambda obs, action: obs + net(obs, action)


def imagine(
    policy: Policy,
    model: Model,
    obs: Float[Array, "B D"],
    steps: int,
    key: Key[Array, ""],
    k_model: Key[Array, ""] | None = None,
    *,
    unroll: bool = False,
) -> Trajectory:
    """Alternates `policy(obs, key)` and `model(obs, action)` for `steps` steps, with fresh keys.

    Args:
        k_model: key of a model that draws its states, which is called as `model(obs, action, key)`.
        unroll: whether the loop is written out, which pays where a step is a few kernels.
    """

    def step(obs, keys):
        k_policy, *k_draw = keys
        action = policy(obs, k_policy)
        next_obs = model(obs, action, *k_draw)
        return next_obs, (action, next_obs)

    obs = share_rows(obs)  # they may be some of a batch's, which few devices hold
    keys = (jr.split(key, steps), *_step_keys(k_model, steps))
    action, next_obs = jax.lax.scan(step, obs, keys, unroll=unroll)[1]
    return Trajectory(jnp.concatenate([obs[None], next_obs[:-1]]), action, next_obs)


def _step_keys(key: Key[Array, ""] | None, steps: int) -> tuple[Key[Array, " steps"], ...]:
    return () if key is None else (jr.split(key, steps),)


def open_loop(
    model: Model,
    obs: Float[Array, "B D"],
    actions: Float[Array, "B L A"],
    k_model: Key[Array, ""] | None = None,
) -> Float[Array, "L B D"]:
    """States after each of L given actions, every one predicted from the prediction before it.

    `k_model` is the key of a model that draws its states.
    """

    def step(obs, given):
        obs = model(obs, *given)
        return obs, obs

    given = (jnp.moveaxis(actions, 1, 0), *_step_keys(k_model, actions.shape[1]))
    return jax.lax.scan(step, obs, given)[1]


def squared_error(
    model: Model,
    obs: Float[Array, "B states D"],
    actions: Float[Array, "B L *A"],
    k_model: Key[Array, ""] | None = None,
) -> Float[Array, "L B"]:
    """Error of `model`, run open loop, after each of L real chunks; mean over the entries of the state.

    Args:
        obs: real states before each chunk, and the one after the last: L + 1 of them.
        actions: `actions[b, l]` lead from `obs[b, l]` to `obs[b, l + 1]`.
        k_model: key of a model that draws its states; its spread then counts as error too.
    Source: figure 2 of Park et al. 2025 (MAC), along consecutive rows of one trajectory each.
    """
    predicted = open_loop(model, obs[:, 0], actions.reshape(*actions.shape[:2], -1), k_model)
    return jnp.mean(jnp.square(predicted - jnp.moveaxis(obs[:, 1:], 1, 0)), axis=-1)
