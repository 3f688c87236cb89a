"""Soft actor-critic on real and imagined steps, from which MOPO and MOBILE differ in a penalty.

Every K updates a rollout of H steps of the model under the policy starts at many states of the data. Its
steps go into a ring that holds the newest few rollouts. Each batch mixes steps of the data with steps of the
ring; rewards of the latter are lowered where the model is uncertain, or models disagree.

Source: Janner et al. 2019 (MBPO), arXiv 1906.08253, as Yu et al. 2020 (MOPO) made it an offline method. The
arrangement is that of the runs of Park et al. 2025 (MAC): models are trained along with the policy, on the
real part of each batch, and the penalty is that of the current models.
"""

import abc
from typing import ClassVar, Literal, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Int, Key

from mac.actor_critic import Goal, Step, one_step
from mac.algorithm import TrainState
from mac.errors import UserError
from mac.model_based import (
    AbstractModelBased,
    AbstractModelBasedNets,
    ModelBasedConfig,
    ModelBasedTarget,
    WorldModel,
    data_steps,
    first_steps,
    model_drift,
    state_scale,
)
from mac.nn.critics import Combine, Critics, aggregate, critic_loss, q_values, twin_critics
from mac.nn.gaussian_policy import GaussianPolicy
from mac.ops.losses import entropy_loss, sac_loss, sum_losses
from mac.ops.replay import ReplaySpec
from mac.types import Batch, Metrics, SampleSpec, Window

Cfg = TypeVar("Cfg", bound="MBPOConfig")


class MBPOConfig(ModelBasedConfig):
    """Hyperparameters of soft actor-critic on imagined steps."""

    batch: int = 256
    """steps that critics and policy learn from per update, real and imagined together"""
    penalty: float = 1.0
    """weight of the uncertainty that imagined rewards are lowered by, β"""
    real_fraction: float = 0.5
    """share of each batch that is real, in [0, 1]; the rest is imagined"""
    model_batch: int = 0
    """steps of the data that the models are trained on per update; 0 = the real part of the batch"""
    combine: Combine = "min"
    """how targets aggregate the two target critics"""
    actor_combine: Combine = "mean"
    """how the policy's loss aggregates the two critics"""
    entropy: float = 0.5
    """the policy's target entropy is minus this times the number of an action's entries (SAC's own: 1)"""
    entropy_in_target: bool = False
    """whether targets of the critics have the policy's entropy in them"""
    target_range: tuple[float, ...] = ()
    """least and greatest target of the critics without goals, such as 0 inf; empty = any"""
    temperature: float = 0.0
    """SAC's temperature α, the entropy's weight; 0 = learned"""
    temperature_limit: float = 0.0
    """most that a learned temperature counts; 0 = no limit"""
    penalty_at: Literal["update", "rollout"] = "update"
    """whether the penalty is that of the current models, or of those at the rollout"""
    release_initial_buffer: bool = False
    """a known bug of the authors' code: update 0 fills the whole ring with rollouts of untrained models,
    whose states it normalises twice"""

    STATIC: ClassVar[tuple[str, ...]] = (
        *ModelBasedConfig.STATIC,
        "real_fraction",
        "temperature",
        "temperature_limit",
    )

    def __check_init__(self):
        self._require_at_least_0("penalty", "model_batch", "temperature", "temperature_limit")
        self._require("real_fraction", 0 <= self.real_fraction <= 1, "must be in [0, 1]")
        low, high = self.target_range if len(self.target_range) == 2 else (0.0, 1.0)
        ordered = low < high and len(self.target_range) in (0, 2)
        self._require("target_range", ordered, "give two numbers, the lesser one first")
        limited = self.temperature and self.temperature_limit
        self._require("temperature_limit", not limited, "is of a learned temperature; leave one of them out")
        empty = self.real_rows == 0 and self.model_batch == 0
        self._require("real_fraction", not empty, "leaves no real step for the models; give --hp.model-batch")

    @property
    def real_rows(self) -> int:
        """Real steps in a batch."""
        return int(self.batch * self.real_fraction)


class MBPONets(AbstractModelBasedNets):
    """Models, critics, the policy, and the logarithm of SAC's temperature α, the entropy's weight."""

    model: WorldModel
    q: Critics  # s, g, a -> value
    actor: GaussianPolicy  # s, g -> distribution of a
    log_weight: Float[Array, ""]


class AbstractMBPO(AbstractModelBased[Cfg, MBPONets]):
    """Soft actor-critic on real and imagined steps, less a penalty."""

    ACTOR = ("actor", "log_weight")

    def __check_init__(self):
        if self.cfg.target_range and self.env.goal_dim is not None:
            name = self.env.name
            raise UserError(
                f"--hp.target-range: {name} has goals, whose targets are clipped already; leave it out"
            )

    @abc.abstractmethod
    def uncertainty(
        self, nets: MBPONets, target: Critics, step: Step, key: Key[Array, ""]
    ) -> Float[Array, " B"]:
        """Uncertainty about imagined steps; `penalty` gives it the units of the reward."""

    def sample_spec(self, steps: SampleSpec) -> SampleSpec:
        rows = max(self.cfg.real_rows, self.cfg.model_batch)
        return data_steps(steps, self.env)._replace(batch=rows)

    def nets(self, key: Key[Array, ""]) -> MBPONets:
        k_model, k_q, k_actor = jr.split(key, 3)
        cfg, (*given, action) = self.cfg, self.inputs
        return MBPONets(
            model=WorldModel(cfg, self.env, k_model),
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            actor=GaussianPolicy(given, cfg.hidden, action, key=k_actor, style=cfg.actor_style),
            log_weight=jnp.zeros(()),
        )

    @property
    def model_rows(self) -> int:
        return self.cfg.model_batch or self.cfg.real_rows

    def temperature(self, nets: MBPONets) -> Float[Array, ""]:
        """SAC's temperature α, the weight of the policy's entropy."""
        if self.cfg.temperature:
            return jnp.full_like(nets.log_weight, self.cfg.temperature)
        weight = jnp.exp(nets.log_weight)
        return jnp.minimum(weight, self.cfg.temperature_limit) if self.cfg.temperature_limit else weight

    # 1. Imagine.

    @property
    def replay(self) -> ReplaySpec | None:
        cfg = self.cfg
        if cfg.real_rows == cfg.batch:
            return None
        rows, imagined = cfg.rollout_starts * cfg.rollout, cfg.batch - cfg.real_rows
        return ReplaySpec(
            rows, cfg.rollouts_kept, cfg.rollout_every, imagined,
            first=cfg.pretrain, fill_at_start=cfg.release_initial_buffer,
        )  # fmt: skip

    def imagined_row(self) -> Step:
        state, action, one = (jnp.zeros(n) for n in (self.env.obs_dim, self.env.action_dim, 1))
        goal = None if self.env.goal_dim is None else jnp.zeros(self.env.goal_dim)
        return Step(state, action, one[0], one[0], state, goal, goal)

    def rollout(
        self, state: TrainState, window: Window, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Step, Int[Array, ""]]:
        """Steps of rollouts under the policy, which stop, where data record it, after a termination."""
        k_start, k_steps = jr.split(key)
        nets = self.trusted(state.nets, state.target.record)
        start, g, g_actor = self.draw_starts(window, k_start)

        def one(s: Array, key: Key[Array, ""]) -> tuple[Array, Step]:
            k_action, k_model, k_penalty = jr.split(key, 3)
            a = nets.actor(s, g).at(jr.normal(k_action, (len(s), self.env.action_dim)))
            after = nets.model.imagine(s, g, a, k_model)
            if self.cfg.termination == "rule":
                after = after._replace(mask=self.goes_on(after.next_obs, state_scale(window)))
            made = Step(s, a, after.reward, after.mask, after.next_obs, g, g_actor)
            if self.cfg.penalty_at == "rollout":
                penalty = self.cfg.penalty * self.uncertainty(nets, state.target.q, made, k_penalty)
                made = made._replace(reward=made.reward - penalty)
            return after.next_obs, made

        _, steps = jax.lax.scan(one, start, jr.split(k_steps, self.cfg.rollout))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
        if self.cfg.release_initial_buffer:
            rows = rows._replace(**self._normalised_again(rows, window, step))
        if not self.env.recorded:
            return rows, jnp.asarray(len(rows.mask), jnp.int32)
        ends = (steps.mask <= 0.5).astype(jnp.int32)
        ended = jnp.cumsum(ends, axis=0) > ends  # in an earlier step
        order = jnp.argsort(ended.reshape(-1), stable=True)
        return jax.tree.map(lambda x: x[order], rows), jnp.sum(~ended, dtype=jnp.int32)

    def _normalised_again(self, rows: Step, window: Window, step: Int[Array, ""]) -> dict[str, Array]:
        """States that are normalised a second time at update 0."""

        center, width = state_scale(window)

        def again(x: Array) -> Array:
            twice = (x - jnp.broadcast_to(center, x.shape)) / jnp.broadcast_to(width, x.shape)
            return jnp.where(step == 0, twice, x)

        return {"obs": again(rows.obs), "next_obs": again(rows.next_obs)}

    # 2. Learn.

    def loss(
        self, nets: MBPONets, target: ModelBasedTarget, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_penalty, k_next, k_now = jr.split(key, 3)
        cfg, data = self.cfg, one_step(batch)
        with jax.named_scope("model"):
            losses = self.model_losses(nets, target.record, data)
        trusted = self.trusted(sg(nets), target.record)
        step, penalty = self.mixed(trusted, target.q, data, batch.imagined, k_penalty)
        shape, weight = step.action.shape, self.temperature(nets)
        with jax.named_scope("critic"):
            policy = nets.actor(step.next_obs, step.goal)
            next_action, next_log_prob = policy.sample(jr.normal(k_next, shape))
            next_q = aggregate(q_values(target.q, step.next_obs, step.goal, next_action), cfg.combine)
            if cfg.entropy_in_target:
                next_q = next_q - weight * next_log_prob
            backup = step.reward + cfg.discount * step.mask * next_q
            if step.goal is not None:  # -1 per step until the goal
                backup = jnp.clip(backup, -1 / (1 - cfg.discount), 0)
            elif cfg.target_range:
                backup = jnp.clip(backup, *cfg.target_range)
            q = q_values(nets.q, step.obs, step.goal, step.action)
            losses["critic/loss"] = critic_loss(q, backup)
            errors = jnp.mean(jnp.square(q - jnp.broadcast_to(backup, q.shape)), axis=0)
        with jax.named_scope("policy"):
            action, log_prob = nets.actor(step.obs, step.actor_goal).sample(jr.normal(k_now, shape))
            actor_q = aggregate(q_values(sg(nets.q), step.obs, step.actor_goal, action), cfg.actor_combine)
            losses["policy/sac_loss"] = sac_loss(weight, log_prob, actor_q)
            if not cfg.temperature:  # learned, also where it counts less than it is
                learned, wanted = jnp.exp(nets.log_weight), -cfg.entropy * shape[-1]
                losses["policy/entropy_loss"] = entropy_loss(learned, log_prob, wanted)
        logged = {"critic__q_mean": q, "policy__temperature": weight, "policy__entropy": -log_prob}
        logged["critic__worst_share"] = jnp.max(errors) / jnp.maximum(jnp.sum(errors), 1e-30)
        if self.replay is not None:
            logged["imagined__reward"] = step.reward[cfg.real_rows :]
        if penalty is not None:
            logged["imagined__penalty"] = penalty
        return sum_losses(losses, **logged)

    def mixed(
        self, nets: MBPONets, target: Critics, data: Step, imagined: Step | None, key: Key[Array, ""]
    ) -> tuple[Step, Float[Array, " B"] | None]:
        """The real part of a batch and the imagined one, less the penalty, which is returned too.

        The penalty is None where there are no imagined steps, or where their rewards contain it already.
        """
        cfg, real = self.cfg, first_steps(data, self.cfg.real_rows)
        if self.replay is None:
            return real, None
        if imagined is None:
            raise TypeError("this method needs a batch with imagined steps (`AbstractAlgorithm.replay`)")
        penalty = None
        if cfg.penalty_at == "update":
            penalty = cfg.penalty * self.uncertainty(nets, target, imagined, key)
            imagined = imagined._replace(reward=imagined.reward - penalty)
        return jax.tree.map(lambda *x: jnp.concatenate(x), real, imagined), penalty

    # 3. Act.

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal).mean)

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        share = jnp.asarray(1 - self.cfg.real_rows / self.cfg.batch)
        model = self.trusted(state.nets, state.target.record).model
        found = model_drift(model, window, self.cfg.rollout, key)
        return found | {"diagnostics/imagined_share": share}
