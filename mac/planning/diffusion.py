"""Shared parts of methods that plan by denoising trajectories towards a goal.

A trajectory is a row of tokens, each an action and the observation in which it is taken. Its first
observation is known, and so are some columns of its last one: those of the goal. A sampled plan is the
trajectory that a temporal U-Net denoises around these entries.
"""

import abc
from typing import Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mac.algorithm import AbstractLossAlgorithm, Nets, TrainState
from mac.config import CommonConfig
from mac.nn.temporal_unet import TemporalUNet, stride_of
from mac.ops.diffusion import Condition, Predicts, cosine_betas, inpaint, trajectory_loss
from mac.ops.optimisers import polyak
from mac.types import Batch, Number, Past, SampleSpec

Cfg = TypeVar("Cfg", bound="PlannerConfig")
Goal = Float[Array, "E G"] | None


class PlannerConfig(CommonConfig):
    """Hyperparameters of planning by diffusion; the defaults are those of Diffuser's mazes."""

    batch: int = 64
    """windows of the data per update (published: 32, and gradients of two batches are added)"""
    hidden: tuple[int, ...] = (32, 128, 256)
    """channels of each level of the U-Net; from one level to the next the number of tokens halves"""
    lr: float = 2e-4
    """learning rate of Adam"""
    tau_ema: float = 0.005
    """rate of the weights' average, per step of it, in (0, 1]; plans are sampled with the average"""
    ema_every: int = 10
    """updates from one step of the weights' average to the next"""
    ema_start: int = 2000
    """updates before which the average is a copy of the weights"""
    horizon: int = 256
    """states of a plan; rounded up to what the U-Net can halve"""
    diffusion_steps: int = 256
    """steps from noise to a plan"""
    predict: Predicts = "data"
    """what the U-Net predicts: the trajectory without noise (data), or the noise in it"""
    action_weight: float = 1.0
    """weight of the first token's actions in the loss"""
    padded: bool = True
    """windows begin at every transition and rest in the final state beyond the episode's end; off: windows
    lie within an episode, which must be as long"""
    execute: int = 100
    """actions of a plan that are executed before planning anew"""
    goal_at: Literal["end", "due"] = "end"
    """where a plan has the goal: at its end; or where the first plan had it, and in all states after that, so
    that a later plan has less time"""

    ACTING = ("execute", "goal_at")

    def __check_init__(self):
        self._require_positive("ema_every", "diffusion_steps", "execute")
        self._require("ema_start", self.ema_start >= 0, "must be at least 0")
        self._require("horizon", self.horizon >= 2, "must be at least 2: a plan has a start and an end")
        self._require("hidden", self.hidden[0] % 2 == 0, "the first number of channels must be even")
        self._require_at_least_0("action_weight")
        goals = ("value_goals", "value_goals_later", "actor_goals", "actor_goals_later")
        self._require_default(*goals, reason="the goal of a window is its own last state")
        self._require_default("reward_scale", "discount", reason="plans know no rewards")

    def divisible(self, tokens: int) -> int:
        """Returns the least number of tokens that the U-Net can halve, of at least `tokens`."""
        stride = stride_of(len(self.hidden))
        return -(-tokens // stride) * stride


class TrajectoryDiffusion(NamedTuple):
    """A diffusion of trajectories `[B, tokens, action + obs]` whose two ends are known in part.

    Attributes:
        action: entries of a token's actions, which come first.
        obs: entries of a token's observation.
        last: columns of the last observation that are known; of the first all are.
        steps: diffusion steps.
        weight: of the first token's actions in the loss.
    """

    tokens: int
    action: int
    obs: int
    last: tuple[int, ...]
    steps: int
    predicts: Predicts = "data"
    weight: Number = 1.0

    @property
    def known(self) -> Bool[np.ndarray, "T C"]:
        """Returns which entries are known."""
        mask = np.zeros((self.tokens, self.action + self.obs), bool)
        mask[0, self.action :] = True
        mask[-1, self.action + np.asarray(self.last)] = True
        return mask

    def condition(self, values: Float[Array, "B T C"], arrival: Int[Array, " B"] | None = None) -> Condition:
        """Returns what sets the known entries to those of `values`.

        Args:
            arrival: token from which on the columns `last` are known, at least 1; None: the last token.
        """
        known = jnp.broadcast_to(jnp.asarray(self.known), values.shape)
        if arrival is not None:
            late = jnp.arange(self.tokens)[None, :] >= arrival[:, None]
            known |= late[:, :, None] & jnp.asarray(self.known[-1])[None, None]
        return lambda x: jnp.where(known, values, x)

    def net(self, channels: tuple[int, ...], key: Key[Array, ""]) -> TemporalUNet:
        """A fresh network."""
        return TemporalUNet(self.action + self.obs, channels, key=key)

    def loss(
        self,
        net: TemporalUNet,
        actions: Float[Array, "B T K"],
        states: Float[Array, "B T D"],
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        """Error of the network on trajectories of the data, given their own ends."""
        data = jnp.concatenate([actions, states], axis=-1)
        weight = jnp.ones(data.shape[1:]).at[0, : self.action].set(self.weight)
        return trajectory_loss(
            net, data, cosine_betas(self.steps), key,
            condition=self.condition(data), weight=weight, predicts=self.predicts,
        )  # fmt: skip

    def sample(
        self,
        net: TemporalUNet,
        first: Float[Array, "B D"],
        last: Float[Array, "B G"],
        key: Key[Array, ""],
        arrival: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T K"], Float[Array, "B T D"]]:
        """Samples actions and states of trajectories from `first` to `last` (`condition`)."""
        k_start, k_steps = jr.split(key)
        noise = jr.normal(k_start, (len(first), self.tokens, self.action + self.obs))
        columns = self.action + jnp.asarray(self.last)
        values = jnp.zeros_like(noise).at[:, :, columns].set(last[:, None])
        values = values.at[:, 0, self.action :].set(first)
        condition, betas = self.condition(values, arrival), cosine_betas(self.steps)
        x = inpaint(net, noise, betas, k_steps, condition=condition, predicts=self.predicts)
        return jnp.clip(x[..., : self.action], -1, 1), x[..., self.action :]


class Plan(NamedTuple):
    """Plans of E episodes, and the distant states that the high level of a hierarchy planned before."""

    actions: Float[Array, "E H A"]
    states: Float[Array, "E H D"]
    distant: Float[Array, "E M D"] | None = None


class AbstractPlanner(AbstractLossAlgorithm[Cfg, Nets]):
    """A method that plans towards goals with diffusions of trajectories, and executes plans open loop.

    It learns from windows of the data, without rewards. All networks have an average, which plans.
    """

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(self.cfg.batch, self.steps_of_a_window, states=True, padded=self.cfg.padded)

    @property
    @abc.abstractmethod
    def steps_of_a_window(self) -> int:
        """Actions of a window of the data, and states in which they are taken."""

    @abc.abstractmethod
    def plan(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"],
        key: Key[Array, ""],
        elapsed: Int[Array, " E"] | None = None,
    ) -> Plan:
        """Samples plans with at least as many actions as are executed.

        Args:
            elapsed: steps since the episode's start, where the goal is due (`goal_at`); None: the goal is at
                the plan's end.
        """

    def act(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E n A"]:
        assert goal is not None
        return self.plan(state, obs, goal, key).actions[:, : self.cfg.execute]

    @property
    def history(self) -> int:
        return self.steps_of_a_window if self.cfg.goal_at == "due" else 0

    def act_after(
        self, state: TrainState, past: Past, obs: Array, goal: Goal, key: Key[Array, ""]
    ) -> Float[Array, "E n A"]:
        assert goal is not None
        elapsed = jnp.sum(past.valid, axis=-1)
        return self.plan(state, obs, goal, key, elapsed).actions[:, : self.cfg.execute]

    def planned_states(
        self, state: TrainState, past: Past | None, obs: Array, goal: Goal, key: Key[Array, ""]
    ) -> Float[Array, "E T D"]:
        """The states of a plan; of a hierarchy those that its high level plans, which reach the goal."""
        assert goal is not None
        elapsed = None if past is None else jnp.sum(past.valid, axis=-1)
        plan = self.plan(state, obs, goal, key, elapsed)
        return plan.states if plan.distant is None else plan.distant

    def arrival(
        self, elapsed: Int[Array, " E"] | None, tokens: int, jump: int = 1
    ) -> Int[Array, " E"] | None:
        """Returns the token that has the goal where a token is `jump` steps; never one that is executed."""
        if elapsed is None:
            return None
        left = jnp.maximum(tokens - 1 - elapsed // jump, -(-self.cfg.execute // jump))
        return jnp.minimum(left, tokens - 1)

    def target_nets(self, nets: Nets) -> Nets:
        return nets

    def update_target(self, target: Nets, online: Nets, batch: Batch, step: Int[Array, ""]) -> Nets:
        del batch
        cfg = self.cfg
        rate = jnp.where(step < cfg.ema_start, 1.0, cfg.tau_ema)
        return polyak(target, online, jnp.where(step % cfg.ema_every == 0, rate, 0.0))
