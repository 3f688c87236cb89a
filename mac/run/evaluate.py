"""The third compiled function: every seed, task and episode of an evaluation in one call."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer
from mac.run.report.episode_returns import ended_itself, realised_return, steady_reward, step_reward
from mac.run.rng_streams import Stream, stream
from mac.run.segment import map_seeds
from mac.types import Episodes, Number

Discount = Number | Float[Array, "S 1"]
"""A factor per step, or one for each seed."""

UNSTABLE = 1e10
"""Magnitude from which an entry of a state means that the simulation is unstable, MuJoCo's `mjMAXVAL`."""


def evaluation_keys(seeds: Int[Array, " S"], step: int, draw: int = 0) -> Key[Array, " S"]:
    """Keys of the evaluation after update `step` of the seeds with the numbers `seeds`.

    `draw` 0 is the evaluation that training makes; any other number stands for other episodes.
    """

    def one(seed: Int[Array, ""]) -> Key[Array, ""]:
        key = jr.fold_in(stream(jr.key(seed), Stream.EVALUATION), step)
        return jr.fold_in(stream(key, Stream.DRAWS), draw) if draw else key

    return jax.vmap(one)(seeds)


def episode_keys(
    keys: Key[Array, " S"], task: Int[Array, " E"], episode: Int[Array, " E"]
) -> tuple[Key[Array, "S E"], Key[Array, "S E"]]:
    """Keys of the start state and of the policy's noise, of each of E episodes of each seed.

    They depend on the seed's key, the task and the episode's number only: what else is played, and
    how many at a time, changes no episode.
    """

    def one(key: Key[Array, ""], task: Int[Array, ""], episode: Int[Array, ""]) -> Key[Array, " 2"]:
        return jr.split(jr.fold_in(jr.fold_in(key, task), episode))

    both = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))(keys, task, episode)
    return both[..., 0], both[..., 1]


def select_actions(
    algo: AbstractAlgorithm,
    normalizer: Normalizer,
    state: TrainState,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
    decision: Int[Array, "S E"],
) -> Float[Array, "S E n A"]:
    """The next `n` actions of every episode, to be executed open loop.

    Args:
        state: leading axis S.
        obs, goal: in the environment's units; a goal's entries are those of `EnvSpec.goal_columns`.
        keys: of each episode's policy, as `episode_keys` gives them.
        decision: how many chunks each episode has executed.
    """
    return _call_per_episode(lambda here: here.act, algo, normalizer, state, obs, goal, keys, decision)


def predict_returns(
    algo: AbstractAlgorithm,
    normalizer: Normalizer,
    state: TrainState,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
) -> Float[Array, "S E"]:
    """What an algorithm that predicts returns expects of each episode, with the chunk it then begins with.

    The arguments are those of `select_actions` at the start.
    """
    first = jnp.zeros(keys.shape, jnp.int32)
    return _call_per_episode(lambda here: here.predict, algo, normalizer, state, obs, goal, keys, first)


def _call_per_episode(
    method: Callable[[AbstractAlgorithm], Callable[..., Any]],
    algo: AbstractAlgorithm,
    normalizer: Normalizer,
    state: TrainState,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
    decision: Int[Array, "S E"],
) -> Array:
    """What a method with the arguments of `AbstractAlgorithm.act` answers for each episode of each seed."""

    def one(
        state: TrainState, obs: Float[Array, " D"], goal: Float[Array, " G"] | None, key: Key[Array, ""]
    ) -> Array:
        asked = method(algo.with_hparams(state.swept))
        return asked(state, obs[None], None if goal is None else goal[None], key)[0]

    noise = jax.vmap(jax.vmap(jr.fold_in))(keys, decision)
    if goal is not None:
        goal = normalizer.part(algo.env.goal_columns).apply(goal)
    return map_seeds(jax.vmap(one, in_axes=(None, 0, 0, 0)), state, normalizer.apply(obs), goal, noise)


class _Rollout(eqx.Module):
    """What a batch of episodes carries; leading axes seeds, then episodes.

    `discounted` and `last` are as `realised_return` wants them, `unstable` and `bad_action` as in `Episodes`.
    """

    env: Any
    total: Float[Array, "S E"]
    discounted: Float[Array, "S E"]
    last: Float[Array, "S E"]
    decision: Int[Array, ""]
    unstable: Bool[Array, "S E"]
    bad_action: Bool[Array, "S E"]


@eqx.filter_jit
def evaluate(
    algo: AbstractAlgorithm,
    env: Any,
    episodes: int,
    normalizer: Normalizer,
    state: TrainState,
    keys: Key[Array, " S"],
    *,
    batch: int = 0,
    tasks: tuple[int, ...] = (),
) -> Episodes:
    """Runs `episodes` episodes of each of the environment's tasks for every seed.

    The policy sees normalised observations and returns chunks, executed open loop; an episode
    that has ended stands still while the others go on, and a batch ends with its last one.

    Args:
        env: an `envs_mjx.base.AbstractEnv`.
        state: leading axis S.
        keys: one per seed (`evaluation_keys`); they decide start states and the policy's noise.
        batch: most environments simulated at a time; batches follow one another within the call,
            and take memory for one of them. 0 simulates all at once. The episodes and their noise are
            the same for every `batch`, so the results are too, up to the rounding of actions where XLA
            multiplies very few rows in another order (seen on CPU below 32 rows: 1e-6).
        tasks: ids of the tasks to play; empty for all of the environment's.
    """
    tasks = tasks or env.spec.tasks
    task, episode = jnp.repeat(jnp.asarray(tasks), episodes), jnp.tile(jnp.arange(episodes), len(tasks))

    def play(rows: Int[Array, " s"], columns: Int[Array, " e"]) -> dict[str, Array]:
        """Those seeds times those episodes; numbers beyond the last stand for nothing."""
        wanted = (rows < len(keys))[:, None] & (columns < len(task))[None]
        rows, columns = jnp.minimum(rows, len(keys) - 1), jnp.minimum(columns, len(task) - 1)
        k_reset, k_act = episode_keys(keys[rows], task[columns], episode[columns])
        start = jax.vmap(jax.vmap(env.reset), in_axes=(0, None))(k_reset, task[columns])
        start = eqx.tree_at(lambda s: s.done, start, start.done | ~wanted)
        policies = jax.tree.map(lambda x: x[rows], state)
        players, discount = (algo, normalizer, policies), _discounts(algo, policies)
        end = _play(
            env, start, partial(select_actions, *players, keys=k_act), 0.0 if discount is None else discount
        )
        success, length = end.env.success, end.env.t
        facts = {"success": success, "episode_return": end.total, "length": length}
        facts |= {"dropped": end.env.dropped, "unstable": end.unstable, "bad_action": end.bad_action}
        if discount is None:
            return facts
        expected = predict_returns(*players, start.obs, start.goal, k_act)
        ended = ended_itself(env.spec, success, length)
        steady = steady_reward(env.spec, end.last, end.total, length)
        realised = realised_return(end.discounted, steady, ended, length, discount)
        return facts | {"predicted": expected, "realised": realised}

    # A batch takes all seeds if it can, so that no policy is asked twice as often for half as much.
    group = _even_share(len(keys), batch or len(keys))
    width = _even_share(len(task), batch // group or len(task))
    row_chunks, column_chunks = _chunks(len(keys), group), _chunks(len(task), width)
    results = jax.lax.map(
        lambda rows: jax.lax.map(lambda columns: play(rows, columns), column_chunks), row_chunks
    )

    def arrange(x: Array) -> Array:
        """[row chunks, column chunks, rows, columns] to [S, tasks, E]."""
        table = jnp.moveaxis(x, 2, 1).reshape(row_chunks.size, column_chunks.size)
        return table[: len(keys), : len(task)].reshape(len(keys), len(tasks), episodes)

    return Episodes(**jax.tree.map(arrange, results))


def _play(
    env: Any, start: Any, policy: Callable[..., Float[Array, "S E n A"]], discount: Discount
) -> _Rollout:
    """Plays from the states `start` until all are done; `policy(obs=, goal=, decision=)` gives chunks.

    An episode whose policy gives an action that is not finite, or whose next state is unsound, ends before
    that step, without success: policies never see an unsound state, so that the two can be told apart.
    """

    def step(c: _Rollout, action: Float[Array, "S E A"]) -> tuple[_Rollout, None]:
        after, unstable, bad_action = jax.vmap(jax.vmap(partial(_advance, env)))(c.env, action)
        over = c.env.done | unstable | bad_action
        paid = step_reward(env.spec, after.reward)
        discounted = c.discounted + jnp.where(over, 0, discount ** c.env.t.astype(paid.dtype) * paid)
        total, last = c.total + jnp.where(over, 0, after.reward), jnp.where(over, c.last, paid)
        marks = (c.unstable | unstable, c.bad_action | bad_action)
        return _Rollout(after, total, discounted, last, c.decision, *marks), None

    def decide(c: _Rollout) -> _Rollout:
        actions = policy(
            obs=c.env.obs, goal=c.env.goal, decision=jnp.broadcast_to(c.decision, c.env.done.shape)
        )
        c, _ = jax.lax.scan(step, c, jnp.moveaxis(actions, 2, 0))
        return eqx.tree_at(lambda c: c.decision, c, c.decision + 1)

    zero, no = jnp.zeros(start.done.shape), jnp.zeros(start.done.shape, bool)
    unstable = ~start.done & ~jax.vmap(jax.vmap(_sound))(start)
    start = eqx.tree_at(lambda s: s.done, start, start.done | unstable)
    fresh = _Rollout(start, zero, zero, zero, jnp.zeros((), jnp.int32), unstable, no)
    return jax.lax.while_loop(lambda c: ~jnp.all(c.env.done), decide, fresh)


def _advance(
    env: Any, before: Any, action: Float[Array, " A"]
) -> tuple[Any, Bool[Array, ""], Bool[Array, ""]]:
    """A step of one episode, and whether that makes it unstable, or its action is not finite.

    Either way the episode is done, without success, and stays in the state before.
    """
    after, plays = env.step(before, action), ~before.done
    bad_action = plays & ~jnp.all(jnp.isfinite(action))
    unstable = plays & ~bad_action & ~_sound(after)
    broken = bad_action | unstable
    return (
        dataclasses.replace(
            after,
            obs=jnp.where(broken, before.obs, after.obs),
            reward=jnp.where(broken, before.reward, after.reward),
            success=after.success & ~broken,
            done=after.done | broken,
            t=jnp.where(broken, before.t, after.t),
        ),
        unstable,
        bad_action,
    )


def _sound(state: Any) -> Bool[Array, ""]:
    """Whether observation and reward of a state are numbers, and not huge."""
    return jnp.all(jnp.abs(state.obs) <= UNSTABLE) & (jnp.abs(state.reward) <= UNSTABLE)


def _discounts(algo: AbstractAlgorithm, state: TrainState) -> Discount | None:
    """`step_discount`, of each seed where seeds differ in it."""
    if "discount" not in state.swept or algo.step_discount is None:
        return algo.step_discount
    return state.swept["discount"][:, None]


def _even_share(count: int, most: int) -> int:
    """Size of the chunks of at most `most`, as even as can be, that cover `count`."""
    return -(-count // -(-count // min(most, count)))


def _chunks(count: int, size: int) -> Int[Array, "chunks size"]:
    """0, 1, ... in rows of `size`, the last of which may run over `count`."""
    rows = -(-count // size)
    return jnp.arange(rows * size).reshape(rows, size)
