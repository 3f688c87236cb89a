"""TT: the Trajectory Transformer, a language model of trajectories and beam search for their rewards (Janner
et al. 2021, arXiv 2106.02039).

Each number of a transition is one token: the state, the action, the reward, and the value, which is the
discounted return of the data *after* that reward. A token is a quantile bin of its dimension, an embedding of
its own, and predicted by a head of its own. Value tokens are hidden from attention, so that a plan does not
follow from the return that the data happened to get. Planning at every step: beams of sampled actions,
predicted rewards and values, and most probable next states; the first action of the best beam is executed.

The planner is conditioned on no return or goal: it reads the transitions of its context only. As in the
authors' code the context slides with the plan, and holds one transition less than `context` besides the
present one.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from mac.algorithm import AbstractLossAlgorithm, Rate, TrainState
from mac.config import CommonConfig
from mac.data.transitions import transition_rows
from mac.errors import UserError
from mac.nn.trajectory_model import TrajectoryModel, TrajectoryReader
from mac.nn.transformer import Transformer, matmul_weights
from mac.ops.beam_search import beam_search, repeat
from mac.ops.quantile_tokens import (
    decode,
    encode,
    expectation,
    keep_top_k,
    keep_top_mass,
    quantile_thresholds,
)
from mac.types import Batch, EnvSpec, Metrics, Number, Past, SampleSpec, Window

LEAST_RATE = 0.1
"""Share of the learning rate at which its cosine ends."""


class TTConfig(CommonConfig):
    """Hyperparameters of the Trajectory Transformer."""

    hidden: tuple[int, ...] = (128, 128, 128, 128)
    """width of each transformer block, all equal"""
    lr: float = 6e-4
    """highest learning rate of AdamW"""
    heads: int = 4
    """attention heads of a block; they divide its width"""
    dropout: float = 0.1
    """dropout rate of embeddings, attention and residual branches in training, in [0, 1)"""
    window: int = 10
    """transitions of a training sequence"""
    bins: int = 100
    """quantile bins of each dimension"""
    action_weight: float = 5.0
    """weight of action tokens in the loss; all other tokens have weight 1"""
    terminal_reward: float = -100.0
    """reward of an action that led to termination, where data record terminations (gym); 0: the data's own"""
    weight_decay: float = 0.1
    """decay of the weights of matmuls, times the learning rate per update"""
    clip: float = 1.0
    """largest norm of the whole gradient"""
    warmup: float = 0.02
    """share of the run over which the learning rate rises from 0, in [0, 1); then it falls as a cosine, to a
    tenth. 0: it is constant"""
    context: int = 5
    """transitions that planning sees at a time, the present one included; 2 to `window`"""
    beams: int = 128
    """plans that are kept at each step of the search"""
    expand: int = 2
    """actions that are sampled for each beam"""
    horizon: int = 15
    """steps of a plan"""
    action_cdf: float = 0.6
    """probability mass of the least probable actions that are never sampled, in [0, 1)"""
    action_top: int = 0
    """most probable values of each action entry that may be sampled; 0 = all"""
    obs_top: int = 1
    """most probable values of each state entry that may be sampled; 0 = all"""

    ACTING = ("context", "beams", "expand", "horizon", "action_cdf", "action_top", "obs_top")
    STATIC = (*CommonConfig.STATIC, "discount", "dropout", "terminal_reward", "warmup", "action_cdf")
    NEED_STEPS = ("warmup",)

    def __check_init__(self):
        self._require("hidden", len(set(self.hidden)) == 1, "give equal widths")
        self._require_positive("heads", "window", "bins", "beams", "expand", "horizon")
        self._require("heads", self.hidden[0] % self.heads == 0, f"must divide the width {self.hidden[0]}")
        self._require("dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        self._require("warmup", 0 <= self.warmup < 1, "must be in [0, 1)")
        self._require("action_cdf", 0 <= self.action_cdf < 1, "must be in [0, 1)")
        self._require("clip", 0 < self.clip < float("inf"), "must be positive and finite")
        self._require_at_least_0("action_weight", "weight_decay", "action_top", "obs_top")
        rule = f"must be 2 to --hp.window={self.window}; change either"
        self._require("context", 2 <= self.context <= self.window, rule)
        self._require_default("cooldown", reason="the learning rate falls as --hp.warmup says")
        self._require_default("reward_scale", reason="quantiles do not depend on the scale")


class Nets(eqx.Module):
    """The language model of trajectories."""

    model: TrajectoryModel


class Beam(NamedTuple):
    """Partial plans.

    Attributes:
        tokens: the last C transitions, of which the newest is unfinished.
        first: tokens of the first action.
        paid: discounted sum of the plan's expected rewards.
    """

    tokens: Int[Array, "beams C K"]
    first: Int[Array, "beams A"]
    paid: Float[Array, " beams"]


class TT(AbstractLossAlgorithm[TTConfig, Nets]):
    """A language model of trajectories whose tokens are planned with; `target` are the quantiles."""

    def __check_init__(self):
        if self.env.goal_dim is not None:
            raise UserError(
                f"--algo tt: it plans for rewards, and {self.env.name} has goals instead; take a single task"
            )

    @property
    def dims(self) -> int:
        """Tokens of a transition: state, action, reward and value."""
        return self.env.obs_dim + self.env.action_dim + 2

    @property
    def sample(self) -> SampleSpec:
        cfg = self.cfg
        ending = cfg.terminal_reward if self.env.recorded and cfg.terminal_reward else None
        return SampleSpec(
            cfg.batch, cfg.window, padded=True, states=True, return_to_go=True,
            return_discount=cfg.discount, terminal_reward=ending,
        )  # fmt: skip

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
        if window.reward is None or window.return_to_go is None:
            raise TypeError("this method needs a window with rewards and returns")
        rows, valid = transition_rows(window)
        columns = self.joined(
            window.obs[rows], window.action[rows], window.reward[rows], window.return_to_go[rows + 1]
        )
        # One column after another: sorting takes memory.
        fit = partial(quantile_thresholds, valid=valid, bins=self.cfg.bins)
        return eqx.tree_at(lambda s: s.target, state, jax.lax.map(fit, columns.T))

    def joined(
        self,
        obs: Float[Array, "*B D"],
        action: Float[Array, "*B A"],
        reward: Float[Array, "*B"],
        value: Float[Array, "*B"],
    ) -> Float[Array, "*B K"]:
        """Transitions in the order of their tokens."""
        return jnp.concatenate([obs, action, reward[..., None], value[..., None]], axis=-1)

    def tokens(self, thresholds: Float[Array, "K bins_1"], batch: Batch) -> Int[Array, "B H K"]:
        """Tokens of a batch of sequences; padding is the token of an episode's end."""
        assert batch.rewards is not None and batch.return_to_go is not None and batch.valid is not None
        joined = self.joined(batch.chunk_obs, batch.actions, batch.rewards, batch.return_to_go[:, 1:])
        tokens = encode(joined, thresholds)
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
        counted = jnp.broadcast_to(weight, shape) * jnp.broadcast_to(_known(batch)[..., None], shape)
        loss, width = jnp.mean(error * counted.reshape(count, -1)[:, 1:]), self.env.obs_dim
        mean = jnp.mean(jnp.pad(error, ((0, 0), (1, 0))).reshape(shape), axis=(0, 1))
        parts = {"obs": mean[:width], "action": mean[width:-2], "reward": mean[-2:-1], "value": mean[-1:]}
        return loss, {"model/token_loss": loss} | {f"tokens/{k}": jnp.mean(v) for k, v in parts.items()}

    def optimiser(self) -> optax.GradientTransformation:
        cfg = self.cfg
        adamw = optax.adamw(
            self.schedule, b1=0.9, b2=0.95, weight_decay=cfg.weight_decay, mask=matmul_weights
        )
        return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw)

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
        planner = Planner(self.cfg, self.env, state.nets.model, state.target)
        return jnp.clip(jax.vmap(planner)(past, obs, jr.split(key, len(obs))), -1, 1)[:, None]


def _known(batch: Batch) -> Float[Array, "B H"]:
    """1 for transitions of the data and for those after a termination, 0 for those that nobody has seen."""
    assert batch.valid is not None and batch.masks is not None
    last = jnp.sum(batch.valid, axis=1).astype(jnp.int32) - 1
    ended = jnp.take_along_axis(batch.masks, last[:, None], axis=1) == 0
    return jnp.where(jnp.broadcast_to(ended, batch.valid.shape), 1.0, batch.valid)


class Planner(eqx.Module):
    """Beam search for the sequence of greatest expected return."""

    cfg: TTConfig
    env: EnvSpec = eqx.field(static=True)
    model: TrajectoryModel
    thresholds: Float[Array, "K bins_1"]

    def __call__(self, past: Past, obs: Float[Array, " D"], key: Key[Array, ""]) -> Float[Array, " A"]:
        """The first action of the best plan in the state `obs` after the steps `past`."""
        beams, _ = self.search(past, obs, key)
        return decode(beams.first[0], self.thresholds[self.env.obs_dim : -2])

    def search(
        self, past: Past, obs: Float[Array, " D"], key: Key[Array, ""]
    ) -> tuple[Beam, Float[Array, " beams"]]:
        """The plans that are kept at the end, best first, and their expected returns."""
        width, cfg = self.env.obs_dim, self.cfg
        unknown = jnp.full((*past.rewards.shape, 1), jnp.inf)  # the value: a large placeholder
        before = encode(
            jnp.concatenate([past.obs, past.actions, past.rewards[..., None], unknown], -1), self.thresholds
        )
        now = jnp.pad(encode(obs, self.thresholds[:width]), (0, len(self.thresholds) - width))
        tokens = jnp.concatenate([before, now[None]])
        start = Beam(tokens, jnp.zeros(self.env.action_dim, jnp.int32), jnp.zeros(()))
        beams = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (cfg.beams, *x.shape)), start)
        return beam_search(partial(self.extend, jnp.sum(past.valid)), beams, cfg.horizon, key)

    def extend(
        self, seen: Int[Array, ""], beams: Beam, stage: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Beam, Float[Array, " candidates"]]:
        """Samples a state for each beam and actions for each candidate; predicts reward and value.

        `seen` counts the real transitions before the present one.
        """
        cfg, width, k = self.cfg, self.env.obs_dim, len(self.thresholds)
        k_obs, k_action = jr.split(key)
        reader = TrajectoryReader(self.model, cfg.context, jnp.minimum(seen + stage, cfg.context - 1))
        y, cache = reader.read(beams.tokens[:, :-1])
        given = beams.tokens[:, -1, :width]

        def choose_obs(logits: Array, dim: Int[Array, ""], key: Key[Array, ""]) -> Int[Array, " beams"]:
            known = jax.lax.dynamic_index_in_dim(given, dim, axis=1, keepdims=False)
            return jnp.where(stage == 0, known, choose(logits, key, top=cfg.obs_top))

        def choose_action(
            logits: Array, dim: Int[Array, ""], key: Key[Array, ""]
        ) -> Int[Array, " candidates"]:
            del dim
            return choose(logits, key, top=cfg.action_top, cdf=cfg.action_cdf)

        (y, cache), obs = reader.write(y, cache, 0, width, choose_obs, k_obs)
        beams, y, cache = repeat((beams, y, cache), cfg.expand)
        (y, cache), action = reader.write(y, cache, width, k - 2, choose_action, k_action)
        reward_probs = jax.nn.softmax(reader.logits(y, k - 2), axis=-1)
        reward = jnp.argmax(reward_probs, axis=-1).astype(jnp.int32)
        y, _ = reader.step(reward, cache, k - 2)
        value_probs = jax.nn.softmax(reader.logits(y, k - 1), axis=-1)
        value = jnp.argmax(value_probs, axis=-1).astype(jnp.int32)

        gain = expectation(reward_probs, self.thresholds[k - 2])
        ahead = expectation(value_probs, self.thresholds[k - 1])
        paid, score = returns(beams.paid, gain, ahead, stage, cfg.discount)
        done = jnp.concatenate([repeat(obs, cfg.expand), action, reward[:, None], value[:, None]], axis=-1)
        tokens = jnp.concatenate(
            [beams.tokens[:, 1:-1], done[:, None], jnp.zeros_like(done)[:, None]], axis=1
        )
        first = jnp.where(stage == 0, action, beams.first)
        return Beam(tokens, first, paid), score


def returns(
    paid: Float[Array, " n"],
    reward: Float[Array, " n"],
    value: Float[Array, " n"],
    stage: Int[Array, ""],
    discount: float,
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The discounted rewards of a plan up to step `stage`, and its score: these, and the value after them.

    Args:
        paid: discounted rewards before the step.
        value: discounted return after the step's own reward.
    """
    factor = discount ** stage.astype(jnp.float32)
    paid = paid + factor * reward
    return paid, paid + discount * factor * value


def choose(
    logits: Float[Array, "n V"], key: Key[Array, ""], *, top: int, cdf: Number = 0.0
) -> Int[Array, " n"]:
    """Samples tokens, maybe of the most probable ones only."""
    if top == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if cdf:
        logits = keep_top_mass(logits, cdf)
    if top:
        logits = keep_top_k(logits, top)
    return jr.categorical(key, logits, axis=-1).astype(jnp.int32)
