"""F-MPC: planning with flows of actions and of states, and values of the data's own returns.

The flow variant of diffusion model predictive control (Zhou et al. 2024, D-MPC, arXiv 2410.05364) that Park
et al. 2025 (MAC, arXiv 2512.08108) compare with. V is a Monte Carlo return, and Q bootstraps from it alone.
No policy is improved: all four networks are fitted to the data, and planning chooses.

1. a flow of action chunks a, given the state (and goal);
2. a flow of the block of n states that follow, given the state and the chunk;
3. V, the data's return from a state on: the undiscounted sum of rewards to the episode's end, or, with goals,
   whether the goal comes later in the episode;
4. Q of a block and its chunk: the chunk's reward, then V where the block ends.

To act, N chunks are sampled and a block for each; the first action of the chunk with the highest Q is taken.

The runs behind the published numbers differ, each by an option: policy and model read one action while the
model predicts n states (`policy_chunk=1`), Q takes the logit of V for its value (`release_bce`), and V is
fitted to the returns of all n + 1 rows of a chunk at once (`release_return_to_go`, single tasks).
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractLossAlgorithm, TrainState
from mac.config import CommonConfig
from mac.data.sampler import sample
from mac.errors import UserError, no_rewards
from mac.nn.mlp import MLP, scalar, value_net
from mac.ops.best_of_n import best_of_n
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import output_to_value, sum_losses, value_loss
from mac.ops.returns import chunk_reward
from mac.types import Batch, Metrics, SampleSpec, Window

Goal = Float[Array, "E G"] | None
DIAGNOSED = 256
"""States on which a diagnosis looks at the model."""


class FMPCConfig(CommonConfig):
    """Hyperparameters of F-MPC; the defaults are those of the authors' code, for single tasks."""

    discount: float = 0.999
    """discount factor γ per environment step, in (0, 1)"""
    chunk: int = 32
    """states that the model predicts, n"""
    policy_chunk: int = 0
    """actions that the policy proposes and the model reads, at most n; 0 = n (the published runs: 1)"""
    candidates: int = 64
    """chunks among which planning chooses, N"""
    flow_steps: int = 10
    """Euler steps of both flows"""
    execute: int = 1
    """actions of a chunk executed before planning anew"""
    chunk_reward: Literal["mean", "sum"] = "mean"
    """a chunk's reward: discounted mean of its rewards (the published runs), which counts 1/n of what V
    counts, or sum"""
    value: Literal["squared", "bce"] = "squared"
    """loss of V and Q: squared error, or cross-entropy of values in [0, 1] (only with goals)"""
    release_bce: bool = False
    """a known bug of the authors' code: with value bce, Q's target takes the logit of V for its value"""
    release_return_to_go: bool = False
    """a known bug of the authors' code: V is fitted to the returns of all rows of a chunk (single tasks)"""

    ACTING = ("candidates", "flow_steps", "execute")

    def __check_init__(self):
        self._require_positive("chunk", "candidates", "flow_steps", "execute")
        self._require(
            "policy_chunk", 0 <= self.policy_chunk <= self.chunk, f"must be 0 to --hp.chunk={self.chunk}"
        )
        self._require("execute", self.execute <= self.actions, f"must be at most {self.actions}")
        self._require("release_bce", not self.release_bce or self.value == "bce", "needs --hp.value bce")

    @property
    def actions(self) -> int:
        """Actions that the policy proposes at once."""
        return self.policy_chunk or self.chunk


class Nets(eqx.Module):
    """F-MPC's networks; `a` is a flattened chunk, `x` a flattened block of states or a chunk."""

    flow: MLP  # s, g, x, time -> velocity of x, a chunk
    model: MLP  # s, a, x, time -> velocity of x, the states after it
    v: MLP  # s, g -> value
    q: MLP  # states, g, a -> value


class FMPC(AbstractLossAlgorithm[FMPCConfig, Nets]):
    """Model predictive control with flows; it has no target networks, and predicts no return."""

    def __check_init__(self):
        cfg, goals = self.cfg, self.env.goal_dim is not None
        if cfg.value == "bce" and not goals:
            raise UserError(
                f"--hp.value=bce: {self.env.name} has no goals; take squared, or an oraclerep task"
            )
        if cfg.release_return_to_go and goals:
            raise UserError(f"--hp.release-return-to-go: {self.env.name} has goals; leave it out")

    @property
    def sample(self) -> SampleSpec:
        cfg, goals = self.cfg, self.cfg.goals(self.env)
        return SampleSpec(
            cfg.batch, cfg.chunk, goals, reward_scale=cfg.reward_scale, states=True, return_to_go=True
        )

    def nets(self, key: Key[Array, ""]) -> Nets:
        cfg, env = self.cfg, self.env
        obs, goal, hidden = env.obs_dim, env.goal_dim, cfg.hidden
        chunk, block = cfg.actions * env.action_dim, cfg.chunk * obs
        k = jr.split(key, 4)
        return Nets(
            flow=MLP((obs, goal, chunk, 1), hidden, chunk, key=k[0]),
            model=MLP((obs, chunk, block, 1), hidden, block, key=k[1]),
            v=value_net((obs, goal), hidden, key=k[2]),
            q=value_net((block, goal, chunk), hidden, key=k[3]),
        )

    def target_nets(self, nets: Nets) -> tuple[()]:
        del nets
        return ()

    def loss(
        self, nets: Nets, target: tuple[()], batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        del target
        assert batch.states is not None and batch.return_to_go is not None
        k_policy, k_model = jr.split(key)
        s, a, block = batch.obs, self.proposed(batch.actions), batch.states.reshape(len(batch.states), -1)
        g, g_actor = (batch.goals.value, batch.goals.actor) if batch.goals else (None, None)
        (reward, mask), kind = self.outcome(batch), self.cfg.value
        ret = batch.return_to_go if self.cfg.release_return_to_go else batch.return_to_go[:, :1]

        v, q, next_v = scalar(nets.v, s, g), scalar(nets.q, block, g, a), scalar(nets.v, batch.next_obs, g)
        next_v = next_v if self.cfg.release_bce else output_to_value(next_v, kind)
        target_q = reward + self.cfg.discount**self.cfg.chunk * mask * next_v
        losses = {
            "policy/flow_loss": flow_matching_loss(lambda x, t: nets.flow(s, g_actor, x, t), a, k_policy),
            "model/flow_loss": flow_matching_loss(lambda x, t: nets.model(s, a, x, t), block, k_model),
            "value/loss": value_loss(jnp.broadcast_to(v[:, None], ret.shape), ret, kind),
            "critic/loss": value_loss(q, target_q, kind),
        }
        return sum_losses(losses, value__v_mean=v, critic__q_mean=q)

    def proposed(self, actions: Float[Array, "B n A"]) -> Float[Array, "B C"]:
        """Returns the first actions of chunks, as many as the policy proposes, flattened."""
        return actions[:, : self.cfg.actions].reshape(len(actions), -1)

    def outcome(self, batch: Batch) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Reward of the data's chunks, and a mask: 0 where nothing follows.

        With goals the reward is 1 where the goal is reached, else 0. Single tasks of OGBench go on after
        success, as in the authors' sampler; recorded terminations end the return.
        """
        if batch.goals is not None:
            return batch.goals.reached, 1 - batch.goals.reached
        if batch.rewards is None or batch.masks is None:
            raise no_rewards("F-MPC", or_goals=True)
        reward = chunk_reward(batch.rewards, discount=self.cfg.discount, reduce=self.cfg.chunk_reward)
        return reward, jnp.min(batch.masks, axis=-1) if self.env.recorded else jnp.ones_like(reward)

    def imagine(
        self, nets: Nets, s: Float[Array, "E D"], a: Float[Array, "*N E C"], key: Key[Array, ""]
    ) -> Float[Array, "*N E X"]:
        """Samples the blocks of states that follow chunks `a`, flattened."""
        noise = jr.normal(key, (*a.shape[:-1], self.cfg.chunk * self.env.obs_dim))
        return euler(lambda x, t: nets.model(s, a, x, t), noise, self.cfg.flow_steps)

    def act(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E n A"]:
        cfg, nets = self.cfg, state.nets
        k_policy, k_model = jr.split(key)
        noise = jr.normal(k_policy, (cfg.candidates, len(obs), cfg.actions * self.env.action_dim))
        chunks = euler(lambda x, t: nets.flow(obs, goal, x, t), noise, cfg.flow_steps)
        chunks = jnp.clip(chunks, -1, 1)
        q = scalar(nets.q, self.imagine(nets, obs, chunks, k_model), goal, chunks)
        return best_of_n(chunks, q).reshape(len(obs), cfg.actions, -1)[:, : cfg.execute]

    def diagnose(self, state: TrainState, window: Window, key: Key[Array, ""]) -> Metrics:
        """Errors of sampled states after 1 and n actions of the data, and how far real states move (RMS)."""
        k_batch, k_model = jr.split(key)
        spec = self.sample._replace(batch=DIAGNOSED, return_to_go=False)
        batch = sample(window, spec, k_batch)
        assert batch.states is not None
        block = self.imagine(state.nets, batch.obs, self.proposed(batch.actions), k_model)
        error = block.reshape(batch.states.shape) - batch.states
        moved = batch.states - batch.obs[:, None]
        found = {}
        for step in sorted({1, self.cfg.chunk}):
            found[f"drift_{step}"] = jnp.sqrt(jnp.mean(jnp.square(error[:, step - 1])))
            found[f"motion_{step}"] = jnp.sqrt(jnp.mean(jnp.square(moved[:, step - 1])))
        return {f"diagnostics/{name}": value for name, value in found.items()}
