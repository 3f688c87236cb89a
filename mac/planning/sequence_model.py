"""Shared parts of methods that plan with a sequence model of states, actions, rewards and values.

A transition is a row of numbers: the state, the action, the reward, and the value, which is the discounted
return of the data *after* that reward. Sequences are windows of the data, padded beyond an episode's end.
"""

from typing import TypeVar

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mac.algorithm import AbstractLossAlgorithm, Nets
from mac.config import CommonConfig
from mac.data.sampler import actions_at
from mac.data.transitions import transition_rows
from mac.errors import no_rewards
from mac.nn.transformer import matmul_weights
from mac.ops.optimisers import Rate
from mac.types import Batch, SampleSpec, Window

Cfg = TypeVar("Cfg", bound="SequenceConfig")


class SequenceConfig(CommonConfig):
    """Hyperparameters of sequence models that plan."""

    lr: float = 6e-4
    """highest learning rate of AdamW"""
    heads: int = 4
    """attention heads of a block; they divide its width"""
    dropout: float = 0.1
    """dropout rate of the transformers in training, in [0, 1)"""
    weight_decay: float = 0.1
    """decay of the weights of matmuls, times the learning rate per update"""
    clip: float = 1.0
    """largest norm of the gradient"""
    window: int = 10
    """transitions of a training sequence"""
    horizon: int = 15
    """steps of a plan"""
    action_weight: float = 5.0
    """weight of actions in the loss; states, rewards and values have weight 1"""
    terminal_reward: float = -100.0
    """reward of an action that led to termination, where data record terminations (gym); 0: the data's own"""

    STATIC = (*CommonConfig.STATIC, "discount", "dropout", "terminal_reward")

    def __check_init__(self):
        self._require_positive("heads", "window", "horizon")
        width = self.hidden[0]
        self._require("hidden", len(set(self.hidden)) == 1, "give equal widths")
        self._require("heads", width % self.heads == 0, f"must divide the width {width} of --hp.hidden")
        self._require("dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        self._require("terminal_reward", abs(self.terminal_reward) < float("inf"), "must be finite")
        self._require("clip", 0 < self.clip < float("inf"), "must be positive and finite")
        self._require_at_least_0("action_weight", "weight_decay")
        self._require_default("tau_ema", reason="there are no target networks")

    def adamw(self, rate: Rate) -> optax.GradientTransformation:
        """AdamW after clipping, whose decay spares biases and embeddings."""
        adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=matmul_weights)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


class AbstractSequencePlanner(AbstractLossAlgorithm[Cfg, Nets]):
    """A method that plans for rewards with a sequence model."""

    @property
    def sample(self) -> SampleSpec:
        cfg = self.cfg
        ending = cfg.terminal_reward if self.env.recorded and cfg.terminal_reward else None
        return SampleSpec(
            cfg.batch, cfg.window, reward_scale=cfg.reward_scale, padded=True, states=True,
            return_to_go=True, return_discount=cfg.discount, terminal_reward=ending,
        )  # fmt: skip

    def all_transitions(self, window: Window) -> tuple[Float[Array, "N K"], Bool[Array, " N"]]:
        """Every transition of the data, for statistics, and which of the rows count."""
        if window.reward is None or window.return_to_go is None:
            raise no_rewards(or_goals=False)
        rows, valid = transition_rows(window)
        scale = self.cfg.reward_scale
        reward, value = scale * window.reward[rows], scale * window.return_to_go[rows + 1]
        return join(window.obs[rows], actions_at(window, rows), reward, value), valid


def join(
    obs: Float[Array, "*B D"],
    action: Float[Array, "*B A"],
    reward: Float[Array, "*B"],
    value: Float[Array, "*B"],
) -> Float[Array, "*B K"]:
    """Transitions as rows of numbers."""
    return jnp.concatenate([obs, action, reward[..., None], value[..., None]], axis=-1)


def join_batch(batch: Batch) -> Float[Array, "B H K"]:
    """The sequences of a batch; a value excludes the reward of its own step."""
    if batch.rewards is None or batch.return_to_go is None:
        raise no_rewards(or_goals=False)
    return join(batch.chunk_obs, batch.actions, batch.rewards, batch.return_to_go[:, 1:])
