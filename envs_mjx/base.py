"""The environment interface: pure functions of one environment, vmapped by the caller."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mac.errors import UserError
from mac.types import EnvSpec


class EnvState(eqx.Module):
    """State of one environment: arrays only, so it may be carried by `lax.scan` and checkpointed.

    Environments add what they need: physics, targets, random keys.

    Attributes:
        obs: observation of the current state, in the dataset's units (not normalised).
        goal: goal representation of a goal-conditioned environment, None for a single task.
        reward: reward of the last `step` (0 after a reset).
        success: whether the last `step` reported success (False after a reset).
        done: whether the episode has ended, by success, another termination or the time limit.
        t: control steps taken since the reset.
        dropped: contacts that the physics engine left out in this episode (`TabletopPhysics.dropped`).
    """

    obs: Float[Array, " D"]
    goal: Float[Array, " G"] | None
    reward: Float[Array, ""]
    success: Bool[Array, ""]
    done: Bool[Array, ""]
    t: Int[Array, ""]
    dropped: Int[Array, ""]


class AbstractEnv(eqx.Module):
    """An environment: `reset` and `step` are pure, written for one environment, and vmappable."""

    spec: eqx.AbstractVar[EnvSpec]

    @abc.abstractmethod
    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> EnvState:
        """Starts an episode of `task` (1-based, may be traced)."""

    @abc.abstractmethod
    def step(self, state: EnvState, action: Float[Array, " A"]) -> EnvState:
        """Advances one control step; a state that is `done` is returned unchanged, at no physics cost
        on engine `c`. Actions are in [-1, 1] and are clipped to it.
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

    def check_observations(self, obs: np.ndarray) -> None:
        """Checks that `obs` are observations of this environment.

        Raises:
            UserError: if their shape is not (N, D).
        """
        if obs.ndim != 2 or obs.shape[1] != self.spec.obs_dim:
            raise UserError(
                f"observations of {self.spec.name} have shape {obs.shape}, expected (N, {self.spec.obs_dim})"
            )
