"""Shared parts of methods that imagine single steps: a stochastic model of the world, and its settings.

The model has an ensemble of dynamics, and networks of what a step brings. With goals that is whether the goal
is reached, and the reward is 0 there, else -1. For single tasks it is the reward, and whether the step
terminates. All are trained on the data's steps, along with the policy unless the method says otherwise.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.config import CommonConfig
from mac.data.chunk_sequences import sample_sequences
from mac.errors import UserError
from mac.mac_diagnostics import STATES, drift, horizons, no_change_error
from mac.model_free import Goal, ModelFreeConfig, Step
from mac.nn.dynamics_ensemble import DynamicsEnsemble, LogStd
from mac.nn.mlp import MLP, Activation, Style, scalar, value_net
from mac.ops.losses import Losses, cross_entropy, mse
from mac.types import EnvSpec, Metrics, SampleSpec, Window


class ModelBasedConfig(ModelFreeConfig):
    """Hyperparameters of methods that imagine single steps; the defaults are of the runs of MAC's authors."""

    discount: float = 0.999
    """discount factor γ per environment step, in (0, 1)"""
    actor_norm: bool = True
    """LayerNorm after the activations of policies"""
    rollout: int = 5
    """imagined steps per rollout, H"""
    members: int = 5
    """models in the dynamics ensemble (the paper: 5, its code: 7)"""
    model_hidden: tuple[int, ...] = ()
    """width of each hidden layer of the models; empty = as --hp.hidden"""
    model_activation: Activation = "gelu"
    """what follows each hidden layer's matmul in the models"""
    model_norm: bool = True
    """LayerNorm after the activations of the models"""
    model_std: LogStd = "bounded"
    """logarithms of the models' standard deviations: bounded to [-5, 1], or by learned bounds"""
    model_beta: float = 0.0
    """weight of each entry's likelihood in the models' loss: its variance to this power, in [0, 1]; 0 is
    maximum likelihood, 1 squared errors (Seitzer et al. 2022, β-NLL)"""
    joint_reward: bool = False
    """the dynamics ensemble also predicts the reward (single tasks)"""

    STATIC: ClassVar[tuple[str, ...]] = (*CommonConfig.STATIC, "model_beta")

    def __check_init__(self):
        self._require_positive("rollout", "members")
        self._require("model_beta", 0 <= self.model_beta <= 1, "must be in [0, 1]")
        self._require("model_hidden", min(self.model_hidden, default=1) >= 1, "each width must be at least 1")

    @property
    def model_style(self) -> Style:
        """Of the hidden layers of the models."""
        return Style(self.model_activation, self.model_norm)


def check_joint_reward(cfg: ModelBasedConfig, env: EnvSpec) -> None:
    """Raises UserError where dynamics are to predict rewards that there are not."""
    if cfg.joint_reward and env.goal_dim is not None:
        raise UserError(f"--hp.joint-reward: {env.name} has goals instead of rewards; leave it out")


def data_steps(steps: SampleSpec, env: EnvSpec) -> SampleSpec:
    """Returns the request for steps of the data that the authors' samplers give to these methods.

    For single tasks it leaves out each episode's last two steps.
    """
    return steps._replace(every_row=env.goal_dim is not None or env.recorded)


class Imagined(NamedTuple):
    """One imagined step of `B` rows: the next state, the reward, and a mask: 0 where nothing follows."""

    next_obs: Float[Array, "B D"]
    reward: Float[Array, " B"]
    mask: Float[Array, " B"]


def predicted(step: Step, joint_reward: bool) -> Float[Array, "B P"]:
    """Returns what the dynamics are to predict: the next state, maybe with the reward behind it."""
    return jnp.concatenate([step.next_obs, step.reward[:, None]], axis=-1) if joint_reward else step.next_obs


class WorldModel(eqx.Module):
    """Dynamics, and what a step brings; a network that a setting does not have is None."""

    dynamics: DynamicsEnsemble  # s, a -> densities of the next state
    reward: MLP | None  # s, a -> reward
    success: MLP | None  # s, g, a -> logit of being at the goal
    termination: MLP | None  # s, a -> logit of termination
    soft: bool = eqx.field(static=True)
    beta: float = eqx.field(static=True)

    def __init__(self, cfg: ModelBasedConfig, env: EnvSpec, key: Key[Array, ""]):
        k_dynamics, k_outcome, k_end = jr.split(key, 3)
        obs, goal, action = env.obs_dim, env.goal_dim, env.action_dim
        hidden, style = cfg.model_hidden or cfg.hidden, cfg.model_style
        self.dynamics = DynamicsEnsemble(
            obs, action, hidden, cfg.members,
            key=k_dynamics, reward=cfg.joint_reward, log_std=cfg.model_std, style=style,
        )  # fmt: skip
        self.soft, self.beta = env.recorded, cfg.model_beta
        self.reward = self.success = self.termination = None
        if goal is not None:
            self.success = value_net((obs, goal, action), hidden, key=k_outcome, style=style)
            return
        self.termination = value_net((obs, action), hidden, key=k_end, style=style)
        if not cfg.joint_reward:
            self.reward = value_net((obs, action), hidden, key=k_outcome, style=style)

    def losses(self, step: Step, counts: Float[Array, " B"] | None = None) -> Losses:
        """Returns the losses of all networks on steps of the data.

        Args:
            counts: 0 for steps that the dynamics do not learn from, else 1; None: they learn from all.
        """
        joint = self.success is None and self.reward is None
        loss = self.dynamics.loss(step.obs, step.action, predicted(step, joint), counts, beta=self.beta)
        losses = {"model/dynamics_loss": loss}
        if self.success is not None:
            logit = scalar(self.success, step.obs, step.goal, step.action)
            losses["model/success_loss"] = cross_entropy(logit, 1 - step.mask)
        if self.reward is not None:
            losses["model/reward_loss"] = mse(scalar(self.reward, step.obs, step.action), step.reward)
        if self.termination is not None:
            logit = scalar(self.termination, step.obs, step.action)
            losses["model/termination_loss"] = cross_entropy(logit, 1 - step.mask)
        return losses

    def imagine(
        self,
        s: Float[Array, "B D"],
        g: Goal,
        a: Float[Array, "B A"],
        key: Key[Array, ""],
        *,
        by_entry: bool = False,
    ) -> Imagined:
        """Samples one step, each row's state from a member of its own (`DynamicsEnsemble.sample`).

        With `by_entry` each entry has a member of its own, which takes all members for all rows.
        """
        after = self.dynamics(s, a).sample_by_entry(key) if by_entry else self.dynamics.sample(s, a, key)
        next_obs, rest = after[:, : s.shape[-1]], after[:, s.shape[-1] :]
        reward, mask = self.outcome(s, g, a)
        return Imagined(next_obs, rest[:, 0] if reward is None else reward, mask)

    def outcome(
        self, s: Float[Array, "*B D"], g: Goal, a: Float[Array, "*B A"]
    ) -> tuple[Float[Array, "*B"] | None, Float[Array, "*B"]]:
        """Predicts the reward, unless the dynamics do, and the mask.

        The mask is 0 where the goal, or a termination, is more likely than not. Where data record
        terminations it is the probability that there is none, since these are rare in any state.
        """
        if self.success is not None:
            reached = (scalar(self.success, s, g, a) > 0).astype(s.dtype)
            return reached - 1, 1 - reached
        assert self.termination is not None
        logit = scalar(self.termination, s, a)
        mask = jax.nn.sigmoid(-logit) if self.soft else (logit <= 0).astype(s.dtype)
        return None if self.reward is None else scalar(self.reward, s, a), mask


def model_drift(model: WorldModel, window: Window, steps: int, key: Key[Array, ""]) -> Metrics:
    """Errors of the mean prediction after 1, 2, 5, ... `steps` real actions, and how far real states move.

    Both are RMS over entries, in normalised units; NaN if no episode of the window is as long.
    """
    real = sample_sequences(window, 1, steps, STATES, key)
    long_enough = jnp.any(window.episodes.steps >= steps)

    def mean(s: Array, a: Array) -> Array:
        return jnp.mean(model.dynamics(s, a).mean, axis=0)[:, : s.shape[-1]]

    curves = {"drift": jnp.where(long_enough, drift(mean, real), jnp.nan)}
    curves["motion"] = jnp.where(long_enough, no_change_error(real), jnp.nan)
    return {f"diagnostics/{name}_{k}": x[k - 1] for name, x in curves.items() for k in horizons(steps)}
