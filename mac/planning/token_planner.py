"""Planning with a language model of trajectories: beam search over tokens (Janner et al. 2021).

The planner is conditioned on no return or goal: it reads the transitions of its context only. As in the
authors' code the context slides with the plan, and holds one transition less than `context` besides the
present one.
"""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.nn.trajectory_model import TrajectoryModel, TrajectoryReader
from mac.ops.beam_search import beam_search, repeat
from mac.ops.quantile_tokens import decode, encode, expectation, keep_top_k, keep_top_mass
from mac.types import Number, Past


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


class TokenPlanner(eqx.Module):
    """Beam search for the sequence of greatest expected return.

    Attributes:
        thresholds: quantile bins of each dimension.
        obs_dim: entries of a state.
        context: transitions that the model sees at a time, the present one included.
        beams: plans that are kept at each step of the search.
        expand: actions that are sampled for each beam.
        horizon: steps of a plan.
        action_cdf: probability mass of the least probable actions, which are never sampled.
        action_top: most probable values of each action entry that may be sampled; 0 = all.
        obs_top: most probable values of each state entry that may be sampled; 0 = all.
    """

    model: TrajectoryModel
    thresholds: Float[Array, "K bins_1"]
    obs_dim: int = eqx.field(static=True)
    discount: Number
    context: int = eqx.field(static=True)
    beams: int = eqx.field(static=True)
    expand: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)
    action_cdf: float = eqx.field(static=True)
    action_top: int = eqx.field(static=True)
    obs_top: int = eqx.field(static=True)

    def __call__(self, past: Past, obs: Float[Array, " D"], key: Key[Array, ""]) -> Float[Array, " A"]:
        """The first action of the best plan in the state `obs` after the steps `past`."""
        beams, _ = self.search(past, obs, key)
        return decode(beams.first[0], self.thresholds[self.obs_dim : -2])

    def search(
        self, past: Past, obs: Float[Array, " D"], key: Key[Array, ""]
    ) -> tuple[Beam, Float[Array, " beams"]]:
        """The plans that are kept at the end, best first, and their expected returns."""
        width = self.obs_dim
        unknown = jnp.full((*past.rewards.shape, 1), jnp.inf)  # the value: a large placeholder
        before = encode(
            jnp.concatenate([past.obs, past.actions, past.rewards[..., None], unknown], -1), self.thresholds
        )
        now = jnp.pad(encode(obs, self.thresholds[:width]), (0, len(self.thresholds) - width))
        tokens = jnp.concatenate([before, now[None]])
        start = Beam(tokens, jnp.zeros(len(self.thresholds) - width - 2, jnp.int32), jnp.zeros(()))
        beams = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (self.beams, *x.shape)), start)
        return beam_search(partial(self.extend, jnp.sum(past.valid)), beams, self.horizon, key)

    def extend(
        self, seen: Int[Array, ""], beams: Beam, stage: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Beam, Float[Array, " candidates"]]:
        """Samples a state for each beam and actions for each candidate; predicts reward and value.

        `seen` counts the real transitions before the present one.
        """
        width, k = self.obs_dim, len(self.thresholds)
        k_obs, k_action = jr.split(key)
        reader = TrajectoryReader(self.model, self.context, jnp.minimum(seen + stage, self.context - 1))
        y, cache = reader.read(beams.tokens[:, :-1])
        given = beams.tokens[:, -1, :width]

        def choose_obs(logits: Array, dim: Int[Array, ""], key: Key[Array, ""]) -> Int[Array, " beams"]:
            known = jax.lax.dynamic_index_in_dim(given, dim, axis=1, keepdims=False)
            return jnp.where(stage == 0, known, choose(logits, key, top=self.obs_top))

        def choose_action(
            logits: Array, dim: Int[Array, ""], key: Key[Array, ""]
        ) -> Int[Array, " candidates"]:
            del dim
            return choose(logits, key, top=self.action_top, cdf=self.action_cdf)

        (y, cache), obs = reader.write(y, cache, 0, width, choose_obs, k_obs)
        beams, y, cache = repeat((beams, y, cache), self.expand)
        (y, cache), action = reader.write(y, cache, width, k - 2, choose_action, k_action)
        reward_probs = jax.nn.softmax(reader.logits(y, k - 2), axis=-1)
        reward = jnp.argmax(reward_probs, axis=-1).astype(jnp.int32)
        y, _ = reader.step(reward, cache, k - 2)
        value_probs = jax.nn.softmax(reader.logits(y, k - 1), axis=-1)
        value = jnp.argmax(value_probs, axis=-1).astype(jnp.int32)

        gain = expectation(reward_probs, self.thresholds[k - 2])
        ahead = expectation(value_probs, self.thresholds[k - 1])
        paid, score = returns(beams.paid, gain, ahead, stage, self.discount)
        done = jnp.concatenate([repeat(obs, self.expand), action, reward[:, None], value[:, None]], axis=-1)
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
    discount: Number,
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
