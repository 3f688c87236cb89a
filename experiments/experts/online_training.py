"""Trains SAC in environments that run beside it, all of it in one compiled scan.

An iteration takes one control step in each of the lanes, stores it, and does a few updates of the critics
and one of the policy. A run is a pure function of its seed and its configuration: stopping and going on
changes no bit.

Source: Haarnoja et al. 2018 (SAC).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from experiments.experts.sac import Learner, SacConfig, Transitions, init, update_actor, update_critics
from experiments.experts.tasks import AbstractExpertTask, TaskState
from mac.nn.gaussian_policy import GaussianPolicy
from mac.run.rng_streams import Stream, stream

STARTS = 256
"""Starts drawn before training; an errand that is over goes on at one of them, which costs no physics."""


class OnlineConfig(NamedTuple):
    """How much is done of what.

    Attributes:
        lanes: environments side by side.
        iterations: control steps of each of them, in all.
        random: of these, how many begin with uniform actions and without learning.
        critic_updates: updates of the critics per iteration.
        batch: transitions per update.
        capacity: iterations that the replay buffer holds, the newest ones.
    """

    lanes: int = 16
    iterations: int = 60_000
    random: int = 500
    critic_updates: int = 2
    batch: int = 256
    capacity: int = 30_000


class Training(eqx.Module):
    """State of a run: arrays only.

    Attributes:
        learner: networks and optimisers.
        lanes: the environments.
        starts: where they go on when they are over, `STARTS` of them.
        replay: the newest transitions, [capacity, lanes, ...]; a ring.
    """

    learner: Learner
    lanes: TaskState
    starts: TaskState
    replay: Transitions


class StepStats(NamedTuple):
    """What happened in an iteration, means over lanes: reward, falls, and what the losses say."""

    reward: Float[Array, ""]
    falls: Float[Array, ""]
    metrics: Any


@eqx.filter_jit
def begin(cfg: OnlineConfig, sac: SacConfig, errand: AbstractExpertTask, seed: Int[Array, ""]) -> Training:
    """The state before the first iteration."""
    starts_key, learner_key = (stream(jr.key(seed), x) for x in (Stream.EXPERT_STARTS, Stream.EXPERT_INIT))
    starts = jax.vmap(errand.start)(jr.split(starts_key, STARTS))
    lanes = jax.tree.map(lambda x: jnp.take(x, jnp.arange(cfg.lanes) % STARTS, axis=0), starts)

    def ring(*tail: int, dtype: Any = jnp.float32) -> Array:
        return jnp.zeros((cfg.capacity, cfg.lanes, *tail), dtype)

    seen = ring(errand.obs_dim)
    replay = Transitions(seen, ring(errand.action_dim), ring(), seen, ring(), ring(dtype=jnp.bool_))
    return Training(init(sac, errand.obs_dim, errand.action_dim, learner_key), lanes, starts, replay)


@eqx.filter_jit
def run(
    cfg: OnlineConfig,
    sac: SacConfig,
    errand: AbstractExpertTask,
    state: Training,
    seed: Int[Array, ""],
    first: Int[Array, ""],
    count: int,
    learn: bool,
) -> tuple[Training, StepStats]:
    """`count` iterations from number `first` on; without `learn`, of uniform actions only.

    Returns: the state after them, and the means over them of what happened.
    """

    def body(state: Training, i: Int[Array, ""]) -> tuple[Training, StepStats]:
        keys = jr.split(jr.fold_in(stream(jr.key(seed), Stream.EXPERT_STEPS), i), 3)
        learner, shape = state.learner, (cfg.lanes, errand.action_dim)
        if learn:
            action = learner.policy(state.lanes.obs).at(jr.normal(keys[0], shape))
        else:
            action = jr.uniform(keys[0], shape, minval=-1.0, maxval=1.0)
        lanes, seen = step_lanes(errand, state.lanes, state.starts, action, keys[1])
        replay = jax.tree.map(lambda ring, new: ring.at[i % cfg.capacity].set(new), state.replay, seen)
        metrics = {}
        if learn:
            learner, metrics = _learn(cfg, sac, learner, replay, i, keys[2])
        signs = StepStats(jnp.mean(seen.reward), jnp.mean(1.0 - seen.mask), metrics)
        return Training(learner, lanes, state.starts, replay), signs

    state, signs = jax.lax.scan(body, state, first + jnp.arange(count))
    return state, jax.tree.map(jnp.mean, signs)


def step_lanes(
    errand: AbstractExpertTask,
    lanes: TaskState,
    starts: TaskState,
    action: Float[Array, "L A"],
    key: Key[Array, ""],
) -> tuple[TaskState, Transitions]:
    """One control step of all lanes; those that are over then begin again."""
    step_key, start_key = jr.split(key)
    number = lanes.t.shape[0]
    lanes, seen = jax.vmap(errand.step)(lanes, action, jr.split(step_key, number))
    which = jr.randint(start_key, (number,), 0, starts.t.shape[0])
    over = lanes.over

    def renew(old: Array, pool: Array) -> Array:
        wide = over.reshape(number, *(1,) * (old.ndim - 1))
        return jnp.where(wide, jnp.take(pool, which, axis=0), old)

    return jax.tree.map(renew, lanes, starts), seen


def _learn(
    cfg: OnlineConfig,
    sac: SacConfig,
    learner: Learner,
    replay: Transitions,
    i: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[Learner, dict[str, Array]]:
    """The updates of iteration `i`, whose transitions are in `replay` already."""
    draw_key, actor_key, *keys = jr.split(key, 2 + cfg.critic_updates)
    shape, limit = (cfg.critic_updates, cfg.batch), jnp.minimum(i + 1, cfg.capacity)
    row = jr.randint(draw_key, shape, 0, limit * cfg.lanes)

    def take(x: Array) -> Array:
        return jnp.take(x.reshape(-1, *x.shape[2:]), row, axis=0)

    batches = jax.tree.map(take, replay)

    def step(learner: Learner, given: tuple[Transitions, Key[Array, ""]]) -> tuple[Learner, Any]:
        return update_critics(sac, learner, *given)

    learner, critic = jax.lax.scan(step, learner, (batches, jnp.stack(keys)))
    learner, actor = update_actor(sac, learner, batches.obs[-1], actor_key)
    return learner, jax.tree.map(jnp.mean, critic) | actor


@eqx.filter_jit
def play(
    errand: AbstractExpertTask,
    policy: GaussianPolicy,
    seed: Int[Array, ""],
    lanes: int,
    steps: int,
    noisy: bool,
) -> Transitions:
    """What a policy does from fresh starts, [steps, lanes, ...]; actions are its means unless `noisy`."""
    start_key, loop_key = jr.split(stream(jr.key(seed), Stream.EXPERT_PLAY))
    starts = jax.vmap(errand.start)(jr.split(start_key, lanes))

    def body(state: TaskState, key: Key[Array, ""]) -> tuple[TaskState, Transitions]:
        noise_key, step_key = jr.split(key)
        noise = jr.normal(noise_key, (lanes, errand.action_dim)) * float(noisy)
        return step_lanes(errand, state, starts, policy(state.obs).at(noise), step_key)

    return jax.lax.scan(body, starts, jr.split(loop_key, steps))[1]
