"""Online training of SAC: environments, replay buffer and updates in one compiled scan.

An iteration takes one control step in each lane, stores it, and does a few updates of the critics and one of
the policy. A run is a pure function of its seed and its configuration: stop and resume change no bit.

Source: Haarnoja et al. 2018 (SAC).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from experiments.expert_training.sac import (
    Learner,
    SacConfig,
    Transitions,
    initial_learner,
    update_actor,
    update_critics,
)
from experiments.expert_training.tasks import AbstractExpertTask, TaskState
from mac.nn.gaussian_policy import GaussianPolicy
from mac.run.rng_streams import Stream, stream

STARTS = 256
"""Number of initial states drawn before training; new episodes begin at one of them, at no physics cost."""


class OnlineConfig(NamedTuple):
    """Sizes of an online training.

    Attributes:
        lanes: number of parallel environments.
        iterations: control steps of each lane.
        random: first iterations, with uniform actions and without learning.
        critic_updates: updates of the critics per iteration.
        batch: transitions per update.
        capacity: newest iterations that the replay buffer holds.
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
        lanes: states of the environments.
        starts: `STARTS` initial states of new episodes.
        replay: newest transitions, [capacity, lanes, ...]; a ring buffer.
    """

    learner: Learner
    lanes: TaskState
    starts: TaskState
    replay: Transitions


class StepStats(NamedTuple):
    """Statistics of an iteration, means over lanes: reward, terminations, and metrics of the losses."""

    reward: Float[Array, ""]
    falls: Float[Array, ""]
    metrics: Any


@eqx.filter_jit
def initial_state(
    cfg: OnlineConfig, sac: SacConfig, task: AbstractExpertTask, seed: Int[Array, ""]
) -> Training:
    """Returns the state before the first iteration."""
    starts_key, learner_key = (stream(jr.key(seed), x) for x in (Stream.EXPERT_STARTS, Stream.EXPERT_INIT))
    starts = jax.vmap(task.start)(jr.split(starts_key, STARTS))
    lanes = jax.tree.map(lambda x: jnp.take(x, jnp.arange(cfg.lanes) % STARTS, axis=0), starts)

    def ring(*tail: int, dtype: Any = jnp.float32) -> Array:
        return jnp.zeros((cfg.capacity, cfg.lanes, *tail), dtype)

    transitions = ring(task.obs_dim)
    replay = Transitions(
        transitions, ring(task.action_dim), ring(), transitions, ring(), ring(dtype=jnp.bool_)
    )
    return Training(initial_learner(sac, task.obs_dim, task.action_dim, learner_key), lanes, starts, replay)


@eqx.filter_jit
def run_iterations(
    cfg: OnlineConfig,
    sac: SacConfig,
    task: AbstractExpertTask,
    state: Training,
    seed: Int[Array, ""],
    first: Int[Array, ""],
    count: int,
    learn: bool,
) -> tuple[Training, StepStats]:
    """Runs `count` iterations from number `first` on; without `learn`, with uniform actions only.

    Returns:
        The state after the iterations, and their mean statistics.
    """

    def body(state: Training, i: Int[Array, ""]) -> tuple[Training, StepStats]:
        keys = jr.split(jr.fold_in(stream(jr.key(seed), Stream.EXPERT_STEPS), i), 3)
        learner, shape = state.learner, (cfg.lanes, task.action_dim)
        if learn:
            action = learner.policy(state.lanes.obs).at(jr.normal(keys[0], shape))
        else:
            action = jr.uniform(keys[0], shape, minval=-1.0, maxval=1.0)
        lanes, transitions = step_lanes(task, state.lanes, state.starts, action, keys[1])
        replay = jax.tree.map(lambda ring, new: ring.at[i % cfg.capacity].set(new), state.replay, transitions)
        metrics = {}
        if learn:
            learner, metrics = _learn(cfg, sac, learner, replay, i, keys[2])
        stats = StepStats(jnp.mean(transitions.reward), jnp.mean(1.0 - transitions.mask), metrics)
        return Training(learner, lanes, state.starts, replay), stats

    state, stats = jax.lax.scan(body, state, first + jnp.arange(count))
    return state, jax.tree.map(jnp.mean, stats)


def step_lanes(
    task: AbstractExpertTask,
    lanes: TaskState,
    starts: TaskState,
    action: Float[Array, "L A"],
    key: Key[Array, ""],
) -> tuple[TaskState, Transitions]:
    """Takes one control step of all lanes; lanes that are over then start a new episode."""
    step_key, start_key = jr.split(key)
    number = lanes.t.shape[0]
    lanes, transitions = jax.vmap(task.step)(lanes, action, jr.split(step_key, number))
    which = jr.randint(start_key, (number,), 0, starts.t.shape[0])
    over = lanes.over

    def renew(old: Array, pool: Array) -> Array:
        wide = over.reshape(number, *(1,) * (old.ndim - 1))
        return jnp.where(wide, jnp.take(pool, which, axis=0), old)

    return jax.tree.map(renew, lanes, starts), transitions


def _learn(
    cfg: OnlineConfig,
    sac: SacConfig,
    learner: Learner,
    replay: Transitions,
    i: Int[Array, ""],
    key: Key[Array, ""],
) -> tuple[Learner, dict[str, Array]]:
    """Does the updates of iteration `i`, whose transitions are in `replay` already."""
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
def rollout_policy(
    task: AbstractExpertTask,
    policy: GaussianPolicy,
    seed: Int[Array, ""],
    lanes: int,
    steps: int,
    noisy: bool,
) -> Transitions:
    """Plays a policy from new starts, [steps, lanes, ...]; actions are its means unless `noisy`."""
    start_key, loop_key = jr.split(stream(jr.key(seed), Stream.EXPERT_PLAY))
    starts = jax.vmap(task.start)(jr.split(start_key, lanes))

    def body(state: TaskState, key: Key[Array, ""]) -> tuple[TaskState, Transitions]:
        noise_key, step_key = jr.split(key)
        noise = jr.normal(noise_key, (lanes, task.action_dim)) * float(noisy)
        return step_lanes(task, state, starts, policy(state.obs).at(noise), step_key)

    return jax.lax.scan(body, starts, jr.split(loop_key, steps))[1]
