"""MAC: model-based RL with action chunks (Park et al. 2025, arXiv 2512.08108).

From offline chunks of n actions, all at once and from scratch:

1. a dynamics model s, a[n] -> s', and a model of the chunk's outcome: its reward, or, for data with
   goals g instead of rewards, whether the goal is reached within it;
2. a flow-matching policy over whole chunks, distilled to a sampler of one step;
3. V from imagined rollouts of H chunks, each the best of N samples under Q;
4. Q, for that selection.

Where data record terminations (in D4RL: falls), a chunk's outcome is also whether it terminates, which
ends the return. The paper reports such tasks (table 14) without saying how, and the authors' sampler would
leave every termination out. So here every row up to a terminal state starts a chunk (`mac.data.sampler`), and
a network learns the probability of termination within the chunk, by cross-entropy. Returns after an imagined
chunk are weighted with the probability that it does not terminate. A threshold at one half, as for goals,
would not tell chunks that terminate once in three times from those that never do.

In an environment with goals every network but the dynamics model reads the goal too; a chunk's reward
is then -1, or 0 if the goal is reached within it, where the return ends.

Where the paper and the runs behind its tables differ, the defaults follow the runs: the chunk's
reward is the *mean* of its discounted rewards (`chunk_reward`), and only the first action of a
chunk is executed before planning anew (`execute`). Rollouts of single tasks do not terminate, as the
paper says; the released code also trains a termination network there, on labels that are always "no".
"""

import abc
import dataclasses
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac import mac_diagnostics
from mac.algorithm import AbstractLossAlgorithm, TrainState, replace_numerics
from mac.chunk_dynamics import AbstractChunkDynamics, make_dynamics
from mac.config import Config
from mac.errors import UserError, no_rewards
from mac.nn.frozen import Numerics
from mac.nn.mlp import MLP, Network, scalar, value_net
from mac.ops.best_of_n import best_of_n
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import (
    Losses,
    cross_entropy,
    expectile_value_loss,
    mse,
    output_to_value,
    sum_losses,
    value_loss,
)
from mac.ops.noise_search import noise_search
from mac.ops.returns import chunk_reward, lambda_return
from mac.ops.rollout import Trajectory, imagine
from mac.types import Batch, Metrics, Number, SampleSpec, Window

States = Float[Array, "B D"]
Goal = Float[Array, "B G"] | None
Cfg = TypeVar("Cfg", bound=Config)


class Nets(eqx.Module):
    """MAC's networks; `a` is a whole chunk, flattened in time order, `g` the goal of goal-conditioned tasks.

    A network that a setting does not have is None.
    """

    model: MLP  # s, a -> change of s over the chunk, or what `mac.chunk_dynamics` draws it with
    reward: MLP | None  # s, a -> reward of the chunk
    success: MLP | None  # s, g, a -> logit of reaching g within the chunk
    flow: Any  # s, g, x, time -> velocity of x
    policy: Any  # s, g, noise -> a, in one step
    v: MLP  # s, g -> value
    q: MLP  # s, g, a -> value
    termination: MLP | None = None  # s, a -> logit of termination within the chunk
    q_short: MLP | None = None  # s, g, first h actions -> value of the best chunks that begin so


class AbstractChunkPolicy(eqx.Module, Generic[Cfg]):
    """The part of MAC in which its ablations differ: the networks `flow` and `policy` of `Nets`.

    It has no state: the hyperparameters `cfg` and the networks are arguments.

    Attributes:
        numerics: that of the algorithm, for networks without gradient.
    """

    numerics: Numerics = eqx.field(static=True, kw_only=True, default=Numerics())

    @abc.abstractmethod
    def nets(self, cfg: Cfg, sizes: tuple[int, int | None, int], key: Key[Array, ""]) -> tuple[Any, Any]:
        """Fresh networks `flow` and `policy`, None for one that it lacks; `sizes` are those of s, g and a."""

    @abc.abstractmethod
    def behavior_loss(self, cfg: Cfg, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]) -> Losses:
        """Returns the behaviour-cloning losses."""

    @abc.abstractmethod
    def chunks(
        self, cfg: Cfg, nets: Nets, s: States, g: Goal, noise: Float[Array, "n B A"], *, acting: bool
    ) -> Float[Array, "n B A"]:
        """Returns the chunks, not clipped, of standard normal `noise`, in training or while `acting`."""

    def policy_loss(self, cfg: Cfg, nets: Nets, tau: Trajectory, g: Goal, key: Key[Array, ""]) -> Losses:
        """Hook: losses on imagined states; by default none, since best-of-N improves the policy."""
        del cfg, nets, tau, g, key
        return {}

    def value_discount(self, cfg: Cfg) -> Number:
        """Hook: factor per chunk in the returns that V learns; by default the discount of its n steps."""
        return cfg.discount**cfg.chunk


class DistilledFlow(AbstractChunkPolicy[Config]):
    """MAC's policy: a flow that clones the data's chunks, and a network that does its work in one step."""

    def nets(self, cfg: Config, sizes: tuple[int, int | None, int], key: Key[Array, ""]) -> tuple[MLP, MLP]:
        return flow_and_student(cfg, sizes, key)

    def behavior_loss(
        self, cfg: Config, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]
    ) -> Losses:
        k_flow, k_distil = jr.split(key)
        flow_loss = flow_matching_loss(lambda x, t: nets.flow(s, g, x, t), a, k_flow)
        noise = jr.normal(k_distil, a.shape)
        frozen = self.numerics.freeze(nets.flow)
        taught = integrate_flow(frozen, s, g, noise, cfg.flow_steps, unroll=self.numerics.unrolls())
        teacher = jnp.clip(taught, -1, 1)
        return {"policy/flow_loss": flow_loss, "policy/distil_loss": mse(nets.policy(s, g, noise), teacher)}

    def chunks(
        self, cfg: Config, nets: Nets, s: States, g: Goal, noise: Float[Array, "n B A"], *, acting: bool
    ) -> Float[Array, "n B A"]:
        if acting and cfg.flow_steps_test:
            return integrate_flow(nets.flow, s, g, noise, cfg.flow_steps_test)
        return nets.policy(s, g, noise)


class MAC(AbstractLossAlgorithm[Config, Nets]):
    """Model-based RL with action chunks; one file, Algorithm 1 of the paper."""

    policy: AbstractChunkPolicy = DistilledFlow()

    def __check_init__(self):
        if self.cfg.value == "bce" and self.env.goal_dim is None:
            raise UserError(
                f"--hp.value=bce: {self.env.name} has no goals; take squared, or an oraclerep task"
            )

    @property
    def sample(self) -> SampleSpec:
        cfg = self.cfg
        return SampleSpec(cfg.batch, cfg.chunk, cfg.goals(self.env), reward_scale=cfg.reward_scale)

    def with_numerics(self, numerics: Numerics) -> "MAC":
        return dataclasses.replace(self, numerics=numerics, policy=replace_numerics(self.policy, numerics))

    @property
    def discount(self) -> Number:
        """Factor per chunk."""
        return self.cfg.discount**self.cfg.chunk

    @property
    def dynamics(self) -> AbstractChunkDynamics:
        """What `nets.model` predicts, and how."""
        return make_dynamics(self.cfg, self.numerics)

    def nets(self, key: Key[Array, ""]) -> Nets:
        obs, goal, hidden = self.env.obs_dim, self.env.goal_dim, self.cfg.hidden
        chunk = self.cfg.chunk * self.env.action_dim
        k = jr.split(key, 6)
        outcome = value_net((obs, goal, chunk), hidden, key=k[1])
        flow, policy = self.policy.nets(self.cfg, (obs, goal, chunk), k[2])
        return Nets(
            model=self.dynamics.net(self.cfg, obs, chunk, k[0]),
            reward=outcome if goal is None else None,
            success=None if goal is None else outcome,
            flow=flow,
            policy=policy,
            v=value_net((obs, goal), hidden, key=k[3]),
            q=value_net((obs, goal, chunk), hidden, key=k[4]),
            termination=value_net((obs, chunk), hidden, key=k[5]) if self.env.recorded else None,
            q_short=self.short_critic(jr.fold_in(key, len(k))),
        )

    def short_critic(self, key: Key[Array, ""]) -> MLP | None:
        """A fresh critic of the first `critic_chunk` actions; None without them."""
        cfg, env = self.cfg, self.env
        if cfg.critic_chunk == 0:
            return None
        return value_net((env.obs_dim, env.goal_dim, cfg.critic_chunk * env.action_dim), cfg.hidden, key=key)

    def target_nets(self, nets: Nets) -> MLP:
        return nets.v

    def loss(
        self, nets: Nets, target: Network, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        dynamics, cfg, frozen = self.dynamics, self.cfg, self.numerics.freeze(nets)
        k_policy, k_roll, k_improve, *k_model = jr.split(key, 6 if dynamics.draws else 3)
        k_fit, k_dream, k_next = k_model or (None, None, None)
        s, a = batch.obs, batch.actions.reshape(len(batch.actions), -1)
        g, g_actor = (batch.goals.value, batch.goals.actor) if batch.goals else (None, None)

        # 1. Fit the models to the data (eq. 5, 6).
        with jax.named_scope("model"):
            losses = {"model/dynamics_loss": dynamics.loss(cfg, nets.model, s, a, batch.next_obs, k_fit)}
            losses |= self.outcome_loss(nets, batch, s, g, a)

        # 2. Clone the behaviour, and distil it to one step (eq. 7, 8).
        with jax.named_scope("policy"):
            losses |= self.policy.behavior_loss(cfg, nets, s, g_actor, a, k_policy)

        # 3. Imagine, choosing each chunk by Q (eq. 4), and expand V over the rollout (eq. 10).
        s, g = s[: cfg.rollout_batch], None if g is None else g[: cfg.rollout_batch]
        with jax.named_scope("imagination"):
            tau = imagine(
                lambda s, key: self.best_chunk(frozen, s, g, key, cfg.candidates),
                dynamics.sampler(cfg, frozen.model), s, cfg.rollout, k_roll, k_dream,
                unroll=self.numerics.unrolls(),
            )  # fmt: skip
            reward, mask = self.predict_outcome(frozen, tau.obs, g, tau.action)
        with jax.named_scope("value"):
            # At λ = 1 only the last state's value enters, so only that one is evaluated.
            next_value = self.to_value(scalar(target, tau.next_obs[-1:] if cfg.lam == 1 else tau.next_obs, g))
            next_value = jnp.broadcast_to(next_value, reward.shape)
            gamma = self.policy.value_discount(cfg)
            ret = lambda_return(reward, mask, next_value, discount=gamma, lam=cfg.lam)
            v = scalar(nets.v, tau.obs, g)
            losses["value/loss"] = self.value_loss(v, ret)

        # 4. Fit Q at the first chosen chunk, against the current V (eq. 11).
        with jax.named_scope("critic"):
            q = scalar(nets.q, s, g, tau.action[0])
            next_v = self.value_after_first_chunk(frozen, tau, g, k_next)
            losses["critic/loss"] = self.value_loss(q, reward[0] + self.discount * mask[0] * next_v)

        losses |= self.short_critic_loss(nets, frozen, batch)
        with jax.named_scope("policy"):
            losses |= self.policy.policy_loss(cfg, nets, tau, g, k_improve)
        return sum_losses(losses, value__v_mean=v, critic__q_mean=q, imagined__reward=reward)

    def outcome_loss(self, nets: Nets, batch: Batch, s: Array, g: Goal, a: Array) -> Losses:
        """Returns the losses of the models of a chunk's reward and termination, or of its success."""
        if nets.success is not None and batch.goals is not None:
            logit = scalar(nets.success, s, g, a)
            return {"model/success_loss": cross_entropy(logit, batch.goals.reached)}
        if nets.reward is None or batch.rewards is None:
            raise no_rewards("MAC", or_goals=True)
        r = chunk_reward(batch.rewards, discount=self.cfg.discount, reduce=self.cfg.chunk_reward)
        losses = {"model/reward_loss": mse(scalar(nets.reward, s, g, a), r)}
        if nets.termination is not None and batch.masks is not None:
            terminated = 1 - jnp.min(batch.masks, axis=-1)
            losses["model/termination_loss"] = cross_entropy(scalar(nets.termination, s, a), terminated)
        return losses

    def predict_outcome(self, nets: Nets, s: Array, g: Goal, a: Array) -> tuple[Array, Array]:
        """Predicts the reward of chunks, and the mask: 0 where they end the task, else 1, or the probability
        of no termination where data record terminations."""
        if nets.success is None:
            assert nets.reward is not None
            reward = scalar(nets.reward, s, g, a)
            if nets.termination is None:
                return reward, jnp.ones_like(reward)
            return reward, jax.nn.sigmoid(-scalar(nets.termination, s, a))
        reached = (scalar(nets.success, s, g, a) > 0).astype(s.dtype)
        # A return counts -1 for each chunk before the goal; as a probability it is 1 at the goal.
        reward = reached - 1 if self.cfg.value == "squared" else reached
        return reward, 1 - reached

    def short_critic_loss(self, nets: Nets, frozen: Nets, batch: Batch) -> Losses:
        """Distils Q to the critic of the first actions, optimistic about the others; nothing without it."""
        if nets.q_short is None:
            return {}
        cfg, s, a = self.cfg, batch.obs, batch.actions.reshape(len(batch.actions), -1)
        g = batch.goals and batch.goals.value
        with jax.named_scope("short_critic"):
            taught = self.to_value(scalar(frozen.q, s, g, a))
            short = scalar(nets.q_short, s, g, self.first_actions(a))
            return {"critic/short_loss": expectile_value_loss(short, taught, cfg.value, cfg.critic_expectile)}

    def value_after_first_chunk(
        self, nets: Nets, tau: Trajectory, g: Goal, key: Key[Array, ""] | None
    ) -> Float[Array, " B"]:
        """V of the state after the first chunk, a mean where several successors are drawn."""
        v = scalar(nets.v, self.first_successors(nets, tau, key), g)
        v = v if self.cfg.release_bce else self.to_value(v)
        return v if self.cfg.dynamics_samples == 1 else jnp.mean(v, axis=0)

    def first_successors(
        self, nets: Nets, tau: Trajectory, key: Key[Array, ""] | None
    ) -> Float[Array, "*m B D"]:
        """States after the first chunk, the imagined one first: m where several are drawn, else that one."""
        count = self.cfg.dynamics_samples
        if count == 1:
            return tau.next_obs[0]
        s, a = (jnp.broadcast_to(x[0], (count - 1, *x[0].shape)) for x in (tau.obs, tau.action))
        others = self.dynamics.sampler(self.cfg, nets.model)(s, a, key)
        return jnp.concatenate([tau.next_obs[:1], others])

    def to_value(self, v: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps an output of V or Q to a value."""
        return output_to_value(v, self.cfg.value)

    def value_loss(self, v: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, ""]:
        """Loss of outputs of V or Q; no gradient passes to the target."""
        return value_loss(v, target, self.cfg.value)

    def sample_chunks(
        self, nets: Nets, s: States, g: Goal, key: Key[Array, ""], n: int, *, acting: bool = False
    ) -> Float[Array, "n B A"]:
        """`n` samples of the policy, not clipped; maybe others where the policy is `acting`."""
        noise = jr.normal(key, (n, len(s), self.cfg.chunk * self.env.action_dim))
        return self.policy.chunks(self.cfg, nets, s, g, noise, acting=acting)

    def best_chunk(
        self, nets: Nets, s: States, g: Goal, key: Key[Array, ""], n: int, *, acting: bool = False
    ) -> Float[Array, "B A"]:
        """Best of `n` sampled chunks under Q (rejection sampling, eq. 4), clipped to [-1, 1].

        With `search_rounds` later samples are near the best noises; with `critic_chunk` the short critic
        judges while `acting`.
        """
        cfg = self.cfg
        rounds = cfg.search_rounds_test if acting else cfg.search_rounds

        def judge(noise: Float[Array, "n B A"]) -> tuple[Array, Array]:
            chunks = jnp.clip(self.policy.chunks(cfg, nets, s, g, noise, acting=acting), -1, 1)
            return chunks, self.judgement(nets, s, g, chunks, acting=acting)

        size = (n, len(s), cfg.chunk * self.env.action_dim)
        return best_of_n(*noise_search(judge, size, key, rounds=rounds, elites=cfg.elites(rounds, n)))

    def judgement(
        self, nets: Nets, s: States, g: Goal, chunks: Float[Array, "*n B A"], *, acting: bool
    ) -> Float[Array, "*n B"]:
        """Output of the critic that chooses among chunks: Q; while `acting` the short one, if there is."""
        if nets.q_short is None or not acting or self.cfg.long_critic_test:
            return scalar(nets.q, s, g, chunks)
        return scalar(nets.q_short, s, g, self.first_actions(chunks))

    def first_actions(self, chunks: Float[Array, "*n B A"]) -> Float[Array, "*n B a"]:
        """The first `critic_chunk` actions of flat chunks."""
        return chunks[..., : self.cfg.critic_chunk * self.env.action_dim]

    def act(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E n A"]:
        chunk = self.best_chunk(state.nets, obs, goal, key, self.cfg.candidates_test, acting=True)
        return chunk.reshape(len(obs), self.cfg.chunk, -1)[:, : self.cfg.execute]

    # What evaluations also report.

    @property
    def step_discount(self) -> Number:
        return self.cfg.discount

    def predict(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, " E"]:
        chunk = self.best_chunk(state.nets, obs, goal, key, self.cfg.candidates_test, acting=True)
        q = self.judgement(state.nets, obs, goal, chunk, acting=True)
        return mac_diagnostics.expected_return(self.cfg, q, goals=goal is not None)

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        return mac_diagnostics.compute_diagnostics(self, state.nets, window, key)


def flow_and_student(cfg: Config, sizes: tuple[int, int | None, int], key: Key[Array, ""]) -> tuple[MLP, MLP]:
    """Fresh networks: a velocity field of chunks, and a map from noise to chunks that has no time to read."""
    k_flow, k_policy = jr.split(key)
    flow = MLP((*sizes, 1), cfg.hidden, sizes[-1], key=k_flow)
    return flow, MLP(sizes, cfg.hidden, sizes[-1], key=k_policy)


def integrate_flow(
    flow: Network,
    s: Float[Array, "*T B D"],
    g: Goal,
    noise: Float[Array, "*N B A"],
    steps: int,
    *,
    unroll: bool = False,
) -> Float[Array, "*N B A"]:
    """Chunks of the flow policy: its velocity field followed from `noise`, not clipped."""
    return euler(lambda x, t: flow(s, g, x, t), noise, steps, unroll=unroll)
