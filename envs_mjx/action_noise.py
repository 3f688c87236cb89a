"""Noise on the actions of any environment, on every engine: what makes a deterministic simulation random."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from envs_mjx.base import AbstractEnv, EnvState
from mac.errors import UserError
from mac.types import EnvSpec


def disturb(action: Float[Array, "*B A"], sigma: float, key: Key[Array, ""] | None) -> Float[Array, "*B A"]:
    """The action that is executed in place of `action`: with normal noise, clipped to [-1, 1] again.

    Args:
        action: the intended one, which datasets record and policies see.
        sigma: standard deviation of every entry's noise; 0 returns `action` itself, and needs no key.
    """
    if not sigma:
        return action
    assert key is not None
    return jnp.clip(jnp.clip(action, -1, 1) + sigma * jr.normal(key, action.shape), -1, 1)


def check_sigma(flag: str, sigma: float) -> None:
    """Checks a standard deviation given as `flag`.

    Raises:
        UserError: it is negative or not finite.
    """
    if not 0 <= sigma < float("inf"):
        raise UserError(f"{flag}={sigma}: must be at least 0 and finite")


class NoisyState(EnvState):
    """State of an episode whose actions are disturbed.

    Attributes:
        inner: the environment's own state, from which the other fields are copied.
        key: source of the episode's noise.
    """

    inner: Any
    key: Key[Array, ""]


class NoisyActions(AbstractEnv[NoisyState]):
    """An environment that executes every action with noise of its own, and is otherwise the same.

    The noise of an episode depends on the key of its reset and the step's number only. Episodes start
    elsewhere than those of the same keys without noise, and alike for every `sigma`.
    """

    env: AbstractEnv[Any]
    sigma: float = eqx.field(static=True)
    spec: EnvSpec = eqx.field(static=True)

    def __init__(self, env: AbstractEnv[Any], sigma: float):
        self.env, self.sigma, self.spec = env, sigma, env.spec

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> NoisyState:
        k_env, k_noise = jr.split(key)
        return _outer(self.env.reset(k_env, task), k_noise)

    def step(self, state: NoisyState, action: Float[Array, " A"]) -> NoisyState:
        executed = disturb(action, self.sigma, jr.fold_in(state.key, state.t))
        # An evaluation may have ended the episode by itself.
        inner = dataclasses.replace(state.inner, done=state.done)
        after = _outer(self.env.step(inner, executed), state.key)
        return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        return self.env.relabel(obs, task)


def with_action_noise(env: AbstractEnv[Any], sigma: float) -> AbstractEnv[Any]:
    """The environment with noise of standard deviation `sigma` on its actions; itself if that is 0."""
    return NoisyActions(env, sigma) if sigma else env


def undisturbed(state: EnvState) -> EnvState:
    """The environment's own state, within that of an environment with noise."""
    return state.inner if isinstance(state, NoisyState) else state


def _outer(inner: EnvState, key: Key[Array, ""]) -> NoisyState:
    shared = {field.name: getattr(inner, field.name) for field in dataclasses.fields(EnvState)}
    return NoisyState(**shared, inner=inner, key=key)
