"""The third compiled function: every seed, task and episode of an evaluation in one call."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer
from mac.run.segment import map_seeds
from mac.types import Episodes


class _Rollout(eqx.Module):
    """What an evaluation carries; leading axes seeds, then tasks x episodes."""

    env: Any
    total: Float[Array, "S E"]
    decision: Int[Array, ""]


@eqx.filter_jit
def evaluate(
    algo: AbstractAlgorithm,
    env: Any,
    episodes: int,
    normalizer: Normalizer,
    state: TrainState,
    keys: Key[Array, " S"],
) -> Episodes:
    """Runs `episodes` episodes of each of the environment's tasks for every seed.

    The policy sees normalised observations and returns chunks, executed open loop; an episode
    that has ended stands still while the others go on, and the call ends with the last one.

    Args:
        env: an `envs_mjx.base.AbstractEnv`.
        state: leading axis S.
        keys: one per seed; they decide start states and the policy's noise.
    """
    tasks = env.spec.tasks
    count = len(tasks) * episodes
    task = jnp.repeat(jnp.asarray(tasks), episodes)

    def reset(key):
        return jax.vmap(env.reset)(jr.split(key, count), task)

    k_reset, k_act = jax.vmap(partial(jr.split, num=2))(keys).T
    start = _Rollout(jax.vmap(reset)(k_reset), jnp.zeros((len(keys), count)), jnp.zeros((), jnp.int32))

    def running(c: _Rollout):
        return ~jnp.all(c.env.done)

    def step(c: _Rollout, action: Float[Array, "S E A"]):
        was_done = c.env.done
        after = jax.vmap(jax.vmap(env.step))(c.env, action)
        return _Rollout(after, c.total + jnp.where(was_done, 0, after.reward), c.decision), None

    def decide(c: _Rollout):
        k = jax.vmap(jr.fold_in, in_axes=(0, None))(k_act, c.decision)
        actions = map_seeds(algo.act, state, normalizer.apply(c.env.obs), k)
        c, _ = jax.lax.scan(step, c, jnp.moveaxis(actions, 2, 0))
        return _Rollout(c.env, c.total, c.decision + 1)

    end = jax.lax.while_loop(running, decide, start)
    shape = (len(keys), len(tasks), episodes)
    return Episodes(end.env.success.reshape(shape), end.total.reshape(shape), end.env.t.reshape(shape))
