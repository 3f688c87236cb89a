"""The environment interface: pure functions of one environment, vmapped by the caller."""

import abc
import dataclasses
from typing import Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mac.errors import UserError
from mac.types import EnvSpec, EnvState, StateT

__all__ = ["AbstractEnv", "EnvState"]


class AbstractEnv(eqx.Module, Generic[StateT]):
    """An environment: `reset` and `step` are pure, written for one environment, and vmappable.

    `step` begins with `check_action` and ends with `end_step`, so that what holds for every environment is
    written once.
    """

    spec: eqx.AbstractVar[EnvSpec]

    @abc.abstractmethod
    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> StateT:
        """Starts an episode of `task` (1-based, may be traced)."""

    @abc.abstractmethod
    def step(self, state: StateT, action: Float[Array, " A"]) -> StateT:
        """Advances one control step; a state that is `done` is returned unchanged, at no physics cost
        on engine `c`. Actions are in [-1, 1] and are clipped to it.

        Environments of this package replace an action with an entry that is not finite by zeros, and the
        step's reward is then NaN.

        Raises:
            UserError: if the action has another shape.
        """

    @abc.abstractmethod
    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns reward and mask (0 = terminal: solved) of each of the observations `obs[N, D]` for
        `task`."""

    def check_action(self, action: Float[Array, " A"]) -> tuple[Float[Array, " A"], Bool[Array, ""]]:
        """Returns the action clipped to [-1, 1], or zeros if an entry is not finite; and whether all are
        finite.

        Raises:
            UserError: if the action has another shape.
        """
        if action.shape != (self.spec.action_dim,):
            raise UserError(
                f"action of {self.spec.name} has shape {action.shape}, expected "
                f"({self.spec.action_dim},); vmap `step` over a batch"
            )
        finite = jnp.all(jnp.isfinite(action))
        return jnp.clip(jnp.where(finite, action, 0.0), -1.0, 1.0), finite

    def end_step(self, before: StateT, after: StateT, finite: Bool[Array, ""] | bool = True) -> StateT:
        """Ends a step: counts it, applies the time limit, and freezes a state that was done before.

        Args:
            before: state that `step` was called with.
            after: state after the action; its `done` says whether the episode terminated, by success or
                otherwise, and its `t` is not read.
            finite: whether all entries of the action were finite (`check_action`); else the reward is NaN.
        """
        t = before.t + 1
        after = dataclasses.replace(
            after,
            reward=jnp.where(finite, after.reward, jnp.nan),
            done=after.done | (t >= self.spec.max_steps),
            t=t,
        )
        return jax.tree.map(lambda old, new: jnp.where(before.done, old, new), before, after)

    def check_observations(self, obs: np.ndarray) -> None:
        """Checks that `obs` are observations of this environment.

        Raises:
            UserError: if their shape is not (N, D).
        """
        if obs.ndim != 2 or obs.shape[1] != self.spec.obs_dim:
            raise UserError(
                f"observations of {self.spec.name} have shape {obs.shape}, expected (N, {self.spec.obs_dim})"
            )
