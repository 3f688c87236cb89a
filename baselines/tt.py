"""TT: the Trajectory Transformer, a language model of trajectories and beam search for their rewards (Janner
et al. 2021, arXiv 2106.02039).

Each number of a transition is one token: the state, the action, the reward, and the value, which is the
discounted return of the data *after* that reward. A token is a quantile bin of its dimension, an embedding of
its own, and predicted by a head of its own. Value tokens are hidden from attention, so that a plan does not
follow from the return that the data happened to get. Planning at every step: beams of sampled actions,
predicted rewards and values, and most probable next states; the first action of the best beam is executed
(`mac/planning/token_planner.py`).
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from mac.actor_critic import require_rewards
from mac.algorithm import TrainState
from mac.nn.trajectory_model import TrajectoryModel
from mac.nn.transformer import Transformer
from mac.ops.optimisers import Rate
from mac.ops.quantile_tokens import encode, thresholds_of
from mac.planning.sequence_model import AbstractSequencePlanner, SequenceConfig, join_batch
from mac.planning.token_planner import TokenPlanner
from mac.types import Batch, EnvSpec, Metrics, Past, Window

LEAST_RATE = 0.1
"""Share of the learning rate at which its cosine ends."""


class TTConfig(SequenceConfig):
    """Hyperparameters of the Trajectory Transformer."""

    hidden: tuple[int, ...] = (128, 128, 128, 128)
    """width of each transformer block, all equal"""
    bins: int = 100
    """quantile bins of each dimension"""
    warmup: float = 0.02
    """share of the run over which the learning rate rises from 0, in [0, 1); then it falls as a cosine, to a
    tenth. 0: it is constant"""
    context: int = 5
    """transitions that planning sees at a time, the present one included; 2 to `window`"""
    beams: int = 128
    """plans that are kept at each step of the search"""
    expand: int = 2
    """actions that are sampled for each beam"""
    action_cdf: float = 0.6
    """probability mass of the least probable actions that are never sampled, in [0, 1)"""
    action_top: int = 0
    """most probable values of each action entry that may be sampled; 0 = all"""
    obs_top: int = 1
    """most probable values of each state entry that may be sampled; 0 = all"""

    ACTING = ("context", "beams", "expand", "horizon", "action_cdf", "action_top", "obs_top")
    STATIC = (*SequenceConfig.STATIC, "warmup", "action_cdf")
    NEED_STEPS = ("warmup",)

    def __check_init__(self):
        self._require_positive("bins", "beams", "expand")
        self._require("warmup", 0 <= self.warmup < 1, "must be in [0, 1)")
        self._require("action_cdf", 0 <= self.action_cdf < 1, "must be in [0, 1)")
        self._require_at_least_0("action_top", "obs_top")
        rule = f"must be 2 to --hp.window={self.window}; change either"
        self._require("context", 2 <= self.context <= self.window, rule)
        self._require_default("cooldown", reason="the learning rate falls as --hp.warmup says")
        self._require_default("reward_scale", reason="quantiles do not depend on the scale")


class Nets(eqx.Module):
    """The language model of trajectories."""

    model: TrajectoryModel


class TT(AbstractSequencePlanner[TTConfig, Nets]):
    """A language model of trajectories whose tokens are planned with; `target` are the quantiles."""

    def __check_init__(self):
        require_rewards("tt", self.env)

    @property
    def dims(self) -> int:
        """Tokens of a transition: state, action, reward and value."""
        return self.env.obs_dim + self.env.action_dim + 2

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_blocks, k_model = jr.split(key)
        cfg, width = self.cfg, self.cfg.hidden[0]
        blocks = Transformer(width, len(cfg.hidden), cfg.heads, cfg.dropout, k_blocks)
        return Nets(TrajectoryModel(blocks, width, self.dims, cfg.bins, cfg.window, k_model))

    def target_nets(self, nets: Nets) -> Float[Array, "K bins_1"]:
        del nets
        return jnp.tile(jnp.linspace(-1.0, 1.0, self.cfg.bins + 1), (self.dims, 1))

    def update_target(self, target: Any, online: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        del online, batch, step
        return target

    def prepare(self, state: TrainState, window: Window) -> TrainState:
        columns, valid = self.all_transitions(window)
        # One column after another: sorting takes memory.
        fit = partial(thresholds_of, valid=valid, bins=self.cfg.bins)
        return eqx.tree_at(lambda s: s.target, state, jax.lax.map(fit, columns.T))

    def tokens(self, thresholds: Float[Array, "K bins_1"], batch: Batch) -> Int[Array, "B H K"]:
        """Tokens of a batch of sequences; padding is the token of an episode's end."""
        assert batch.valid is not None
        tokens = encode(join_batch(batch), thresholds)
        return jnp.where(jnp.broadcast_to(batch.valid[..., None] > 0, tokens.shape), tokens, self.cfg.bins)

    def loss(
        self, nets: Nets, target: Float[Array, "K bins_1"], batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Weighted cross-entropy of each token but the first, a mean over all of them.

        The padding after a termination is to be predicted; the one after an episode that was cut off is not.
        """
        tokens = self.tokens(target, batch)
        logits = nets.model.logits(tokens, key)
        count, cfg = tokens.shape[0], self.cfg
        error = optax.softmax_cross_entropy_with_integer_labels(logits, tokens.reshape(count, -1)[:, 1:])
        dim = jnp.arange(self.dims, dtype=jnp.int32)
        is_action = (dim >= self.env.obs_dim) & (dim < self.dims - 2)
        weight = jnp.where(is_action, cfg.action_weight, 1.0)[None, None]
        shape = tokens.shape
        known = _known(batch, self.env)[..., None]
        counted = jnp.broadcast_to(weight, shape) * jnp.broadcast_to(known, shape)
        loss, width = jnp.mean(error * counted.reshape(count, -1)[:, 1:]), self.env.obs_dim
        mean = jnp.mean(jnp.pad(error, ((0, 0), (1, 0))).reshape(shape), axis=(0, 1))
        parts = {"obs": mean[:width], "action": mean[width:-2], "reward": mean[-2:-1], "value": mean[-1:]}
        return loss, {"model/token_loss": loss} | {f"tokens/{k}": jnp.mean(v) for k, v in parts.items()}

    def optimiser(self) -> optax.GradientTransformation:
        return self.cfg.adamw(self.schedule)

    @property
    def schedule(self) -> Rate:
        """Learning rate by the number of updates."""
        lr, warmup, steps = self.cfg.lr, max(round(self.cfg.warmup * self.steps), 1), self.steps
        if not self.cfg.warmup:
            return lr

        def rate(count: Any) -> Float[Array, ""]:
            done = jnp.asarray(count, jnp.float32)
            share = jnp.clip((done - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            falling = jnp.maximum(LEAST_RATE, 0.5 * (1 + jnp.cos(jnp.pi * share)))
            return lr * jnp.where(done < warmup, (done + 1) / warmup, falling)

        return rate

    @property
    def history(self) -> int:
        return self.cfg.context - 1

    def act(self, state: TrainState, obs: Array, goal: Any, key: Key[Array, ""]) -> Float[Array, "E 1 A"]:
        shape = (len(obs), self.history)
        zeros = jnp.zeros((*shape, self.env.action_dim))
        past = Past(jnp.zeros((*shape, self.env.obs_dim)), zeros, jnp.zeros(shape), jnp.zeros(shape, bool))
        return self.act_after(state, past, obs, goal, key)

    def act_after(
        self, state: TrainState, past: Past, obs: Array, goal: Any, key: Key[Array, ""]
    ) -> Float[Array, "E 1 A"]:
        del goal
        return jnp.clip(jax.vmap(self.planner(state))(past, obs, jr.split(key, len(obs))), -1, 1)[:, None]

    def planner(self, state: TrainState) -> TokenPlanner:
        """The search for the best plan."""
        cfg = self.cfg
        return TokenPlanner(
            state.nets.model, state.target, self.env.obs_dim, cfg.discount, cfg.context, cfg.beams,
            cfg.expand, cfg.horizon, cfg.action_cdf, cfg.action_top, cfg.obs_top,
        )  # fmt: skip


def _known(batch: Batch, env: EnvSpec) -> Float[Array, "B H"]:
    """1 for transitions of the data and for those after a termination, 0 for those that nobody has seen.

    Where rewards are of states, as in OGBench, nothing terminates: a mask of 0 tells that the task is solved.
    """
    assert batch.valid is not None and batch.masks is not None
    if not env.recorded:
        return batch.valid
    last = jnp.sum(batch.valid, axis=1).astype(jnp.int32) - 1
    ended = jnp.take_along_axis(batch.masks, last[:, None], axis=1) == 0
    return jnp.where(jnp.broadcast_to(ended, batch.valid.shape), 1.0, batch.valid)
