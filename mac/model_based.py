"""Shared parts of methods that imagine single steps: a stochastic model of the world, and how it is trained.

The model has an ensemble of dynamics, and networks of what a step brings. With goals that is whether the goal
is reached, and the reward is 0 there, else -1. For single tasks it is the reward, and whether the step
terminates. All are trained on the data's steps: along with the policy, or before it (`mac.pretraining`).
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Int, Key

from mac.actor_critic import AbstractActorCritic, ActorCriticConfig, Goal, Step, one_step
from mac.config import CommonConfig
from mac.data.chunk_sequences import sample_sequences
from mac.data.sampler import sample
from mac.errors import UserError
from mac.mac_diagnostics import STATES, drift, horizons, no_change_error
from mac.nn.critics import Critics
from mac.nn.dynamics_ensemble import DynamicsEnsemble, LogStd
from mac.nn.mlp import MLP, Activation, Style, scalar, value_net
from mac.ops.losses import Losses, cross_entropy, mse
from mac.ops.optimisers import at_some_updates, by_network, polyak
from mac.pretraining import ModelRecord, fresh_record, held_out, judge
from mac.types import Batch, EnvSpec, Metrics, SampleSpec, Window

Cfg = TypeVar("Cfg", bound="ModelBasedConfig")
Nets = TypeVar("Nets", bound="AbstractModelBasedNets")


class ModelBasedConfig(ActorCriticConfig):
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
    model_decay: tuple[float, ...] = ()
    """decay of the weights of each layer of the dynamics, as a share of squared errors; empty = none"""
    termination: Literal["learned", "rule"] = "learned"
    """whether a network says if an imagined step terminates, or the environment's rule (gym)"""
    model_lr: float = 0.0
    """learning rate of the models; 0 = as --hp.lr"""
    actor_lr: float = 0.0
    """learning rate of the policy, and of its temperature if it has one; 0 = as --hp.lr"""
    actor_cosine: bool = False
    """whether the policy's learning rate falls to 0 over the run, as half a cosine wave"""
    pretrain: int = 0
    """updates at the start in which only the models are trained; then they rest. 0: along with the policy"""
    holdout: float = 0.02
    """share of the data's steps on which models are judged while they are trained alone, in (0, 1)"""
    patience: int = 5
    """times 1,000 updates without a better model after which they stop learning"""
    elites: int = 0
    """models with the least error on held-out steps that the policy learns from; 0 = all"""
    rollout_starts: int = 50_000
    """rollouts that are made at a time and kept, each from a state of the data"""
    rollout_every: int = 1000
    """updates between these times, K"""
    rollouts_kept: int = 5
    """times, the newest, whose imagined steps are kept and drawn from"""

    STATIC: ClassVar[tuple[str, ...]] = (
        *CommonConfig.STATIC,
        "model_beta",
        "model_lr",
        "actor_lr",
        "holdout",
    )
    NEED_STEPS: ClassVar[tuple[str, ...]] = (*CommonConfig.NEED_STEPS, "actor_cosine")

    def __check_init__(self):
        self._require_positive("rollout", "members", "patience")
        self._require_positive("rollout_starts", "rollout_every", "rollouts_kept")
        self._require_at_least_0("model_lr", "actor_lr", "pretrain")
        self._require("holdout", 0 < self.holdout < 1, "must be in (0, 1)")
        self._require("elites", 0 <= self.elites <= self.members, f"must be at most {self.members}")
        self._require("elites", not self.elites or self.pretrain > 0, "needs --hp.pretrain")
        twice = self.actor_cosine and self.cooldown
        self._require("actor_cosine", not twice, "learning rates fall already; leave out --hp.cooldown")
        layers = len(self.model_hidden or self.hidden) + 1
        decays = not self.model_decay or len(self.model_decay) == layers
        self._require("model_decay", decays, f"give {layers} numbers, one for each layer of the models")
        each = all(0 <= decay < float("inf") for decay in self.model_decay)
        self._require("model_decay", each, "each must be at least 0 and finite")
        self._require("model_beta", 0 <= self.model_beta <= 1, "must be in [0, 1]")
        self._require("model_hidden", min(self.model_hidden, default=1) >= 1, "each width must be at least 1")

    @property
    def model_style(self) -> Style:
        """Of the hidden layers of the models."""
        return Style(self.model_activation, self.model_norm)


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
    decay: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, cfg: ModelBasedConfig, env: EnvSpec, key: Key[Array, ""]):
        k_dynamics, k_outcome, k_end = jr.split(key, 3)
        obs, goal, action = env.obs_dim, env.goal_dim, env.action_dim
        hidden, style = cfg.model_hidden or cfg.hidden, cfg.model_style
        self.dynamics = DynamicsEnsemble(
            obs, action, hidden, cfg.members,
            key=k_dynamics, reward=cfg.joint_reward, log_std=cfg.model_std, style=style,
        )  # fmt: skip
        self.soft, self.beta, self.decay = env.recorded, cfg.model_beta, cfg.model_decay
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
        if self.decay:
            losses["model/decay_loss"] = self.dynamics.decay_loss(self.decay)
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


class StateScale(NamedTuple):
    """Numbers by which states of the data are normalised: `(obs - center) / width`."""

    center: Float[Array, " D"]
    width: Float[Array, " D"]


def state_scale(window: Window) -> StateScale:
    """The numbers by which a window's states are normalised.

    Raises:
        TypeError: they are stored otherwise than as float32.
    """
    column = window.obs
    if column.stored.dtype != jnp.float32:
        raise TypeError("states in the environment's units need data that are stored as float32")
    shape = column.stored.shape[-1:]
    return StateScale(jnp.broadcast_to(column.center, shape), jnp.broadcast_to(column.width, shape))


class Start(NamedTuple):
    """`B` states that rollouts start in, and goals for critics and policy (`Step`)."""

    obs: Float[Array, "B D"]
    goal: Goal
    actor_goal: Goal


class AbstractModelBasedNets(eqx.Module):
    """Networks of a method that imagines: the model, critics, and those of its own."""

    model: eqx.AbstractVar[WorldModel]
    q: eqx.AbstractVar[Critics]


class ModelBasedTarget(NamedTuple):
    """Target critics, and what else no gradient trains.

    `record` is what models that are trained beforehand have shown so far, and `scale` how states are
    normalised, for losses that need to know; None where that does not matter.
    """

    q: Critics
    record: ModelRecord | None
    scale: StateScale | None = None


class AbstractModelBased(AbstractActorCritic[Cfg, Nets]):
    """A method whose policy learns from steps that a model imagines.

    The models learn along with the policy, or alone in the first updates and then rest (`cfg.pretrain`).
    """

    ACTOR: ClassVar[tuple[str, ...]] = ("actor",)
    """Networks that have the policy's learning rate."""

    def __check_init__(self):
        if self.cfg.joint_reward and self.env.goal_dim is not None:
            raise UserError(f"--hp.joint-reward: {self.env.name} has goals instead of rewards; leave it out")
        if self.cfg.termination == "rule" and self.env.terminal is None:
            name = self.env.name
            raise UserError(f"--hp.termination=rule: {name} has no rule that observations tell; take learned")

    @property
    def model_rows(self) -> int:
        """Hook: steps of a batch that the models are trained on; by default all."""
        return self.cfg.batch

    # The models.

    def model_losses(self, nets: Nets, record: ModelRecord | None, data: Step) -> Losses:
        """Returns the losses of the models on a batch of data, 0 for those that rest."""
        data = first_steps(data, self.model_rows)
        if record is None:
            return nets.model.losses(data)
        counts = 1 - held_out(data.obs, self.cfg.holdout).astype(data.obs.dtype)

        def resting() -> Losses:
            zero = 0 * sg(jax.tree.leaves(nets)[0].ravel()[0])  # of a seed's own, as the other branch's
            return {name: zero for name in jax.eval_shape(nets.model.losses, data, counts)}

        return jax.lax.cond(record.learning, lambda: nets.model.losses(data, counts), resting)

    def trusted(self, nets: Nets, record: ModelRecord | None) -> Nets:
        """Returns networks with the models to imagine with: the elites, if they are trained beforehand."""
        if record is None:
            return nets
        dynamics = record.elites(self.cfg.elites)
        return eqx.tree_at(lambda nets: nets.model.dynamics, nets, dynamics)

    def goes_on(self, next_obs: Float[Array, "B D"], scale: StateScale) -> Float[Array, " B"]:
        """0 in states that the environment's rule calls terminal, else 1."""
        assert self.env.terminal is not None
        center, width = (jnp.broadcast_to(x, next_obs.shape) for x in scale)
        return 1 - self.env.terminal(next_obs * width + center).astype(next_obs.dtype)

    def draw_starts(self, window: Window, key: Key[Array, ""]) -> Start:
        """Draws the states of the data that the rollouts for the memory start in, `cfg.rollout_starts`."""
        batch = sample(window, self.sample._replace(batch=self.cfg.rollout_starts), key)
        goals = (batch.goals.value, batch.goals.actor) if batch.goals else (None, None)
        return Start(batch.obs, *goals)

    # Training.

    def target_nets(self, nets: Nets) -> ModelBasedTarget:
        """Hook: by default without `scale`."""
        return ModelBasedTarget(nets.q, fresh_record(nets.model.dynamics) if self.cfg.pretrain else None)

    def update_target(self, target: Any, online: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        cfg, target = self.cfg, target._replace(q=polyak(target.q, online.q, self.cfg.tau_ema))
        if target.record is None:
            return target
        data = first_steps(one_step(batch), self.model_rows)

        def judged() -> ModelRecord:
            record = judge(
                target.record, online.record.best, data.obs, data.action,
                predicted(data, cfg.joint_reward), step, share=cfg.holdout, patience=cfg.patience,
            )  # fmt: skip
            return dataclasses.replace(record, learning=record.learning & (step + 1 < cfg.pretrain))

        # Once the models rest, looking at them would cost every update a pass through all of them.
        return target._replace(record=jax.lax.cond(step < cfg.pretrain, judged, lambda: target.record))

    def optimiser(self) -> optax.GradientTransformation:
        cfg, first = self.cfg, self.cfg.pretrain
        if not (first or cfg.model_lr or cfg.actor_lr or cfg.actor_cosine):
            return optax.adam(self.rate)
        model: Any = optax.adam(self.rate_of(cfg.model_lr or cfg.lr))
        actor_rate = self.cosine_of if cfg.actor_cosine else self.rate_of
        actor: Any = optax.adam(actor_rate(cfg.actor_lr or cfg.lr, first))
        other: Any = optax.adam(self.rate_of(cfg.lr, first))
        if first:
            model = at_some_updates(model, lambda step: step < first, coast=False)
            actor, other = (
                at_some_updates(each, lambda step: step >= first, coast=False) for each in (actor, other)
            )
        return by_network({"model": model} | {name: actor for name in self.ACTOR}, other)


def first_steps(step: Step, count: int) -> Step:
    """The first steps of several."""
    return jax.tree.map(lambda x: x[:count], step)
