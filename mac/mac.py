"""MAC: model-based RL with action chunks (Park et al. 2025, arXiv 2512.08108), reward mode.

From offline chunks of n actions, all at once and from scratch:

1. a dynamics model s, a[n] -> s', and a model of the chunk's reward;
2. a flow-matching policy over whole chunks, distilled to a sampler of one step;
3. V from imagined rollouts of H chunks, each the best of N samples under Q;
4. Q, for that selection.

Where the paper and the runs behind its tables differ, the defaults follow the runs: the chunk's
reward is the *mean* of its discounted rewards (`chunk_reward`), and only the first action of a
chunk is executed before planning anew (`execute`). Rollouts do not terminate, as the paper says;
the released code also trains a termination network here, on labels that are always "no".
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractLossAlgorithm, TrainState
from mac.errors import UserError
from mac.nn.mlp import MLP, scalar, value_net
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.imagine import imagine
from mac.ops.returns import chunk_reward, lambda_return
from mac.ops.select import best_of_n
from mac.types import Batch, EnvSpec, Metrics, SampleSpec


@dataclass(frozen=True)
class Config:
    """Hyperparameters of MAC; the defaults are the paper's for single-task reward data."""

    batch: int = 256
    """chunks per update"""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """width of each hidden layer, of every network"""
    lr: float = 3e-4
    """learning rate of Adam"""
    cooldown: float = 0.0
    """share of the run, at its end, over which the learning rate falls linearly to 0; in [0, 1]"""
    discount: float = 0.999
    """discount factor γ per environment step, in (0, 1)"""
    tau_ema: float = 0.005
    """rate at which the slow copy of V follows V, per update, in (0, 1]"""
    chunk: int = 10
    """actions per chunk, n"""
    rollout: int = 10
    """imagined chunks per rollout, H"""
    rollout_batch: int = 1024
    """rollouts per update, from the first states of the batch; at most `batch` of them exist"""
    candidates: int = 8
    """chunks sampled per choice while training, N"""
    candidates_test: int = 32
    """chunks sampled per choice while acting, N"""
    flow_steps: int = 10
    """Euler steps of the flow policy that the one-step policy imitates, F"""
    flow_steps_test: int = 0
    """Euler steps of the flow policy while acting; 0 acts with the one-step policy, as the paper does"""
    lam: float = 1.0
    """λ of the imagined returns, in [0, 1]"""
    chunk_reward: Literal["mean", "sum"] = "mean"
    """a chunk's reward: discounted mean of its rewards (the paper's runs) or sum (its eq. 6)"""
    execute: int = 1
    """actions of a chunk executed before planning anew, 1 to `chunk`"""

    def __post_init__(self):
        whole = ("batch", "chunk", "rollout", "rollout_batch", "candidates", "candidates_test", "flow_steps")
        for name in whole:
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("flow_steps_test", self.flow_steps_test >= 0, "must be at least 0")
        self._require("hidden", min(self.hidden, default=0) >= 1, "give at least one width, each at least 1")
        self._require("execute", 1 <= self.execute <= self.chunk, f"must be 1 to --hp.chunk={self.chunk}")
        self._require("discount", 0 < self.discount < 1, "must be in (0, 1)")
        self._require("lam", 0 <= self.lam <= 1, "must be in [0, 1]")
        self._require("tau_ema", 0 < self.tau_ema <= 1, "must be in (0, 1]")
        self._require("cooldown", 0 <= self.cooldown <= 1, "must be in [0, 1]")
        self._require("lr", 0 < self.lr < float("inf"), "must be positive and finite")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"--hp.{name.replace('_', '-')}={getattr(self, name)}: {rule}")


class Nets(eqx.Module):
    """MAC's networks; `a` is a whole chunk, flattened in time order."""

    model: MLP  # s, a -> change of s over the chunk
    reward: MLP  # s, a -> reward of the chunk
    flow: MLP  # s, x, time -> velocity of x
    policy: MLP  # s, noise -> a, in one step
    v: MLP  # s -> value
    q: MLP  # s, a -> value


class MAC(AbstractLossAlgorithm[Nets]):
    """Model-based RL with action chunks; one file, Algorithm 1 of the paper."""

    cfg: Config = eqx.field(static=True)
    env: EnvSpec = eqx.field(static=True)
    sample: SampleSpec = eqx.field(static=True)
    lr: float = eqx.field(static=True)
    cooldown: float = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    tau_ema: float = eqx.field(static=True)

    def __init__(self, cfg: Config, env: EnvSpec, steps: int = 0):
        """`steps`, the length of the run in updates, matters only if the learning rate cools down."""
        if cfg.cooldown and steps < 1:
            raise UserError(f"steps={steps}: --hp.cooldown={cfg.cooldown} needs the length of the run")
        self.cfg, self.env = cfg, env
        self.sample = SampleSpec(cfg.batch, cfg.chunk)
        self.lr, self.cooldown, self.tau_ema = cfg.lr, cfg.cooldown, cfg.tau_ema
        self.steps = steps if cfg.cooldown else 0

    def nets(self, key: Key[Array, ""]) -> Nets:
        obs, chunk, hidden = self.env.obs_dim, self.cfg.chunk * self.env.action_dim, self.cfg.hidden
        k = jr.split(key, 6)
        return Nets(
            model=MLP((obs, chunk), hidden, obs, key=k[0]),
            reward=value_net((obs, chunk), hidden, key=k[1]),
            flow=MLP((obs, chunk, 1), hidden, chunk, key=k[2]),
            policy=MLP((obs, chunk), hidden, chunk, key=k[3]),
            v=value_net((obs,), hidden, key=k[4]),
            q=value_net((obs, chunk), hidden, key=k[5]),
        )

    def targeted(self, nets: Nets) -> MLP:
        return nets.v

    def loss(
        self, nets: Nets, target: MLP, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        if batch.rewards is None:
            raise TypeError("MAC in reward mode needs a window with rewards: pass `relabel` to `make_window`")
        k_flow, k_distil, k_roll = jr.split(key, 3)
        cfg, discount = self.cfg, self.cfg.discount**self.cfg.chunk
        s, a = batch.obs, batch.actions.reshape(len(batch.actions), -1)

        # 1. Fit the models to the data (eq. 5, 6).
        model_loss = mse(s + nets.model(s, a), batch.next_obs)
        r = chunk_reward(batch.rewards, discount=cfg.discount, reduce=cfg.chunk_reward)
        reward_loss = mse(scalar(nets.reward, s, a), r)

        # 2. Clone the behaviour, and distil it to one step (eq. 7, 8).
        flow_loss = flow_matching_loss(lambda x, t: nets.flow(s, x, t), a, k_flow)
        noise = jr.normal(k_distil, a.shape)
        teacher = jnp.clip(integrate(sg(nets.flow), s, noise, cfg.flow_steps), -1, 1)
        distil_loss = mse(nets.policy(s, noise), teacher)

        # 3. Imagine, choosing each chunk by Q (eq. 4), and expand V over the rollout (eq. 10).
        frozen, s = sg(nets), s[: cfg.rollout_batch]
        policy = partial(propose, frozen, n=cfg.candidates)
        tau = imagine(policy, lambda s, a: s + frozen.model(s, a), s, cfg.rollout, k_roll)
        reward = scalar(frozen.reward, tau.obs, tau.action)
        # At λ = 1 only the last state's value enters, so only that one is evaluated.
        next_value = scalar(target, tau.next_obs[-1:] if cfg.lam == 1 else tau.next_obs)
        next_value, mask = jnp.broadcast_to(next_value, reward.shape), jnp.ones_like(reward)
        ret = lambda_return(reward, mask, next_value, discount=discount, lam=cfg.lam)
        v = scalar(nets.v, tau.obs)
        value_loss = mse(v, sg(ret))

        # 4. Fit Q at the first chosen chunk, against the current V (eq. 11).
        q = scalar(nets.q, s, tau.action[0])
        critic_loss = mse(q, sg(reward[0] + discount * scalar(nets.v, tau.next_obs[0])))

        losses = {
            "model/dynamics_loss": model_loss,
            "model/reward_loss": reward_loss,
            "policy/flow_loss": flow_loss,
            "policy/distil_loss": distil_loss,
            "value/loss": value_loss,
            "critic/loss": critic_loss,
        }
        means = {"value/v_mean": v, "critic/q_mean": q, "imagined/reward": reward}
        return sum(losses.values(), jnp.zeros(())), losses | {k: jnp.mean(x) for k, x in means.items()}

    def act(self, state: TrainState, obs: Float[Array, "E D"], key: Key[Array, ""]) -> Float[Array, "E n A"]:
        chunk = propose(state.nets, obs, key, n=self.cfg.candidates_test, flow_steps=self.cfg.flow_steps_test)
        return chunk.reshape(len(obs), self.cfg.chunk, -1)[:, : self.cfg.execute]


def propose(
    nets: Nets, s: Float[Array, "B D"], key: Key[Array, ""], *, n: int, flow_steps: int = 0
) -> Float[Array, "B A"]:
    """Best of `n` sampled chunks under Q (rejection sampling, eq. 4), clipped to [-1, 1].

    The chunks come from the one-step policy, or, with `flow_steps`, from its teacher.
    """
    noise = jr.normal(key, (n, len(s), nets.policy.in_sizes[1]))
    raw = integrate(nets.flow, s, noise, flow_steps) if flow_steps else nets.policy(s, noise)
    chunks = jnp.clip(raw, -1, 1)
    return best_of_n(chunks, scalar(nets.q, s, chunks))


def integrate(
    flow: MLP, s: Float[Array, "B D"], noise: Float[Array, "*N B A"], steps: int
) -> Float[Array, "*N B A"]:
    """Chunks of the flow policy: its velocity field followed from `noise`, not clipped."""
    return euler(lambda x, t: flow(s, x, t), noise, steps)


def mse(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean squared error over batch and dimensions."""
    return jnp.mean(jnp.square(x - y))
