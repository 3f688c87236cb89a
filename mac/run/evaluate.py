"""Evaluation: every seed, task and episode in one call, the third compiled function."""

import dataclasses
from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer
from mac.run import hosts
from mac.run.mesh import map_seeds
from mac.run.report.realized_return import ended_itself, realised_return, steady_reward, step_reward
from mac.run.rng_streams import Stream, stream
from mac.types import Env, EnvState, Episodes, Number, Past, StateT

Discount = Number | Float[Array, "S 1"]
"""A factor per step, or one for each seed."""

UNSTABLE = 1e10
"""Magnitude from which an entry of a state means that the simulation is unstable, MuJoCo's `mjMAXVAL`."""


class Policies(eqx.Module):
    """Trained policies of S seeds: all that is needed to act.

    Attributes:
        algo: chooses the actions.
        normalizer: map of observations and goals to what the networks read.
        state: networks, leading axis S.
    """

    algo: AbstractAlgorithm
    normalizer: Normalizer
    state: TrainState


def evaluation_keys(seeds: Int[Array, " S"], step: int, draw: int = 0) -> Key[Array, " S"]:
    """Returns the keys of the evaluation after update `step` of the seeds with the numbers `seeds`.

    `draw` 0 is the evaluation that training makes; any other number stands for other episodes.
    """

    def one(seed: Int[Array, ""]) -> Key[Array, ""]:
        key = jr.fold_in(stream(jr.key(seed), Stream.EVALUATION), step)
        return jr.fold_in(stream(key, Stream.DRAWS), draw) if draw else key

    return jax.vmap(one)(seeds)


def episode_keys(
    keys: Key[Array, " S"], task: Int[Array, " E"], episode: Int[Array, " E"]
) -> tuple[Key[Array, "S E"], Key[Array, "S E"]]:
    """Returns the keys of the start state and of the policy's noise, of E episodes of each seed.

    The keys depend on the seed's key, the task and the episode's number only. Which other episodes are
    played, and how many at a time, changes no episode.
    """

    def one(key: Key[Array, ""], task: Int[Array, ""], episode: Int[Array, ""]) -> Key[Array, " 2"]:
        return jr.split(jr.fold_in(jr.fold_in(key, task), episode))

    both = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))(keys, task, episode)
    return both[..., 0], both[..., 1]


def select_actions(
    policies: Policies,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
    decision: Int[Array, "S E"],
    past: Past | None = None,
) -> Float[Array, "S E n A"]:
    """Returns the next `n` actions of every episode, to be executed open loop.

    Args:
        obs, goal: in the environment's units; a goal's entries are those of `EnvSpec.goal_columns`.
        keys: of each episode's policy, as `episode_keys` gives them.
        decision: how many chunks each episode has executed.
        past: the last steps of each episode, if the algorithm acts with a `history` (`no_past`, `remember`);
            observations in the environment's units.
    """
    if past is None:
        return _call_per_episode(lambda algo: algo.act, policies, obs, goal, keys, decision)

    def act(algo: AbstractAlgorithm) -> Callable[..., Any]:
        return lambda state, past, *args: algo.act_after(state, past, *args)

    return _call_per_episode(act, policies, obs, goal, keys, decision, past)


def planned_states(
    policies: Policies,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
    decision: Int[Array, "S E"],
    past: Past | None = None,
) -> Float[Array, "S E T D"] | None:
    """Returns the states that `select_actions`, given the same, plans to pass, in the environment's units.

    None where the algorithm plans no states.
    """
    if type(policies.algo).planned_states is AbstractAlgorithm.planned_states:
        return None

    def ask(algo: AbstractAlgorithm) -> Callable[..., Any]:
        if past is None:
            return lambda state, *args: algo.planned_states(state, None, *args)
        return algo.planned_states

    states = _call_per_episode(ask, policies, obs, goal, keys, decision, past)
    return policies.normalizer.invert(states)


def no_past(algo: AbstractAlgorithm, shape: tuple[int, ...]) -> Past | None:
    """The history of episodes that have just begun, [*shape]; None if the algorithm acts without any."""
    env, lead = algo.env, (*shape, algo.history)
    if not algo.history:
        return None
    return Past(
        jnp.zeros((*lead, env.obs_dim)),
        jnp.zeros((*lead, env.action_dim)),
        jnp.zeros(lead),
        jnp.zeros(lead, bool),
    )


def remember(
    past: Past, obs: Float[Array, "S E D"], action: Float[Array, "S E A"], reward: Float[Array, "S E"]
) -> Past:
    """The history after one more step, whose oldest step is forgotten."""
    step = Past(obs[:, :, None], action[:, :, None], reward[:, :, None], jnp.ones((*reward.shape, 1), bool))
    return jax.tree.map(lambda old, new: jnp.concatenate([old[:, :, 1:], new], axis=2), past, step)


def predict_returns(
    policies: Policies,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
) -> Float[Array, "S E"]:
    """Predicts the return of each episode, with the chunk that the algorithm then begins with.

    The arguments are those of `select_actions` at the start.
    """
    first = jnp.zeros(keys.shape, jnp.int32)
    return _call_per_episode(lambda algo: algo.predict, policies, obs, goal, keys, first)


def _call_per_episode(
    method: Callable[[AbstractAlgorithm], Callable[..., Any]],
    policies: Policies,
    obs: Float[Array, "S E D"],
    goal: Float[Array, "S E G"] | None,
    keys: Key[Array, "S E"],
    decision: Int[Array, "S E"],
    past: Past | None = None,
) -> Array:
    """Calls a method with the arguments of `AbstractAlgorithm.act` for each episode of each seed.

    `past`, if given, comes before the observations.
    """

    def one(
        state: TrainState,
        past: Past | None,
        obs: Float[Array, " D"],
        goal: Float[Array, " G"] | None,
        key: Key[Array, ""],
    ) -> Array:
        call = method(policies.algo.with_hparams(state.swept))
        before, obs, goal = jax.tree.map(lambda x: x[None], (() if past is None else (past,), obs, goal))
        with policies.algo.numerics.matmuls():
            return call(state, *before, obs, goal, key)[0]

    normalizer = policies.normalizer
    if past is not None:
        past = dataclasses.replace(past, obs=normalizer.apply(past.obs))
    noise = jax.vmap(jax.vmap(jr.fold_in))(keys, decision)
    if goal is not None:
        goal = normalizer.part(policies.algo.env.goal_columns).apply(goal)
    per_seed = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
    return map_seeds(per_seed, policies.state, past, normalizer.apply(obs), goal, noise)


class _Rollout(eqx.Module, Generic[StateT]):
    """Carry of the loop over a batch of episodes; leading axes seeds, then episodes.

    `discounted` and `last` are arguments of `realised_return`; `unstable` and `bad_action` are those of
    `Episodes`; `past` is what acting remembers.
    """

    env: StateT
    total: Float[Array, "S E"]
    discounted: Float[Array, "S E"]
    last: Float[Array, "S E"]
    decision: Int[Array, ""]
    unstable: Bool[Array, "S E"]
    bad_action: Bool[Array, "S E"]
    past: Past | None


@eqx.filter_jit
def evaluate(
    policies: Policies,
    env: Env[Any],
    episodes: int,
    keys: Key[Array, " S"],
    *,
    batch: int = 0,
    tasks: tuple[int, ...] = (),
    columns: tuple[int, int] | None = None,
) -> Episodes:
    """Runs `episodes` episodes of each of the environment's tasks for every seed.

    The policy sees normalised observations and returns chunks, executed open loop. An episode
    that has ended is frozen while the others go on; a batch ends with its last episode.

    Args:
        keys: one per seed (`evaluation_keys`), for start states and the policy's noise.
        batch: most environments simulated at a time; 0 simulates all at once. Batches follow one another
            within the call, and take memory for one of them. Results are the same for every `batch`, up to
            the rounding of actions where XLA orders the matmuls of a few rows differently (1e-6, seen on
            CPU below 32 rows).
        tasks: ids of the tasks to play; empty for all of the environment's.
        columns: plays only these of the episodes, counted over all tasks, from the first number to before the
            second; results then have axes seeds, 1, episodes.
    """
    tasks = tasks or env.spec.tasks
    task, episode = jnp.repeat(jnp.asarray(tasks), episodes), jnp.tile(jnp.arange(episodes), len(tasks))
    shape = (len(tasks), episodes)
    if columns is not None:
        task, episode, shape = task[slice(*columns)], episode[slice(*columns)], (1, columns[1] - columns[0])

    def play(rows: Int[Array, " s"], columns: Int[Array, " e"]) -> dict[str, Array]:
        """Plays seeds `rows` times episodes `columns`; numbers beyond the last are padding."""
        wanted = (rows < len(keys))[:, None] & (columns < len(task))[None]
        rows, columns = jnp.minimum(rows, len(keys) - 1), jnp.minimum(columns, len(task) - 1)
        k_reset, k_act = episode_keys(keys[rows], task[columns], episode[columns])
        start = jax.vmap(jax.vmap(env.reset), in_axes=(0, None))(k_reset, task[columns])
        start = eqx.tree_at(lambda s: s.done, start, start.done | ~wanted)
        players = dataclasses.replace(policies, state=jax.tree.map(lambda x: x[rows], policies.state))
        discount = _discounts(players)
        policy = partial(select_actions, players, keys=k_act)
        past = no_past(policies.algo, start.done.shape)
        end = _play(env, start, policy, 0.0 if discount is None else discount, past)
        success, length = end.env.success, end.env.t
        facts = {"success": success, "episode_return": end.total, "length": length}
        facts |= {"dropped": end.env.dropped, "unstable": end.unstable, "bad_action": end.bad_action}
        if discount is None:
            return facts
        expected = predict_returns(players, start.obs, start.goal, k_act)
        ended = ended_itself(env.spec, success, length)
        steady = steady_reward(env.spec, end.last, end.total, length)
        realised = realised_return(end.discounted, steady, ended, length, discount)
        return facts | {"predicted": expected, "realised": realised}

    # A batch takes all seeds if possible: splitting seeds would call each policy more often on fewer states.
    group = _even_share(len(keys), batch or len(keys))
    width = _even_share(len(task), batch // group or len(task))
    row_chunks, column_chunks = _chunks(len(keys), group), _chunks(len(task), width)
    results = jax.lax.map(
        lambda rows: jax.lax.map(lambda columns: play(rows, columns), column_chunks), row_chunks
    )

    def arrange(x: Array) -> Array:
        """Reorders [row chunks, column chunks, rows, columns] to [S, tasks, E]."""
        table = jnp.moveaxis(x, 2, 1).reshape(row_chunks.size, column_chunks.size)
        return table[: len(keys), : len(task)].reshape(len(keys), *shape)

    return Episodes(**jax.tree.map(arrange, results))


def evaluate_on_all(
    play: Callable[[slice, tuple[int, int]], Episodes], seeds: int, tasks: int, episodes: int
) -> Episodes:
    """Results of all seeds, tasks and episodes, of which every process of the run plays its part.

    As far as they divide, processes take seeds; those that have the same seeds share out the episodes.

    Args:
        play: calls `evaluate` for some seeds and some of its `columns`; results on the host.
    """
    groups = gcd(hosts.count(), seeds)
    within = hosts.count() // groups
    whole = tasks * episodes

    def part(number: int) -> tuple[slice, slice]:
        return hosts.share(seeds, groups, number // within), hosts.share(whole, within, number % within)

    rows, columns = part(hosts.number())
    mine: dict[str, np.ndarray] = {}
    if columns.stop > columns.start:
        found = play(rows, (columns.start, columns.stop))
        named = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        mine = {name: np.asarray(x)[:, 0] for name, x in named.items() if x is not None}
    parts = hosts.gather_arrays(mine)
    filled = next(each for each in parts if each)
    tables = {name: np.zeros((seeds, whole), x.dtype) for name, x in filled.items()}
    for number, each in enumerate(parts):
        for name, x in each.items():
            tables[name][part(number)] = x
    shaped = {name: jnp.asarray(x.reshape(seeds, tasks, episodes)) for name, x in tables.items()}
    return jax.device_get(Episodes(**shaped))


def _play(
    env: Env[StateT],
    start: StateT,
    policy: Callable[..., Float[Array, "S E n A"]],
    discount: Discount,
    past: Past | None,
) -> _Rollout[StateT]:
    """Plays from the states `start` until all are done; `policy(obs=, goal=, decision=, past=)` gives chunks.

    An action that is not finite, or a next state that is not sound, ends the episode before that step,
    without success. Policies never see an unsound state, so the two causes can be told apart.
    """

    def step(c: _Rollout[StateT], action: Float[Array, "S E A"]) -> tuple[_Rollout[StateT], None]:
        after, unstable, bad_action = jax.vmap(jax.vmap(partial(_advance, env)))(c.env, action)
        over = c.env.done | unstable | bad_action
        paid = step_reward(env.spec, after.reward)
        discounted = c.discounted + jnp.where(over, 0, discount ** c.env.t.astype(paid.dtype) * paid)
        total, last = c.total + jnp.where(over, 0, after.reward), jnp.where(over, c.last, paid)
        marks = (c.unstable | unstable, c.bad_action | bad_action)
        past = c.past and remember(c.past, c.env.obs, jnp.clip(action, -1, 1), after.reward)
        return _Rollout(after, total, discounted, last, c.decision, *marks, past), None

    def decide(c: _Rollout[StateT]) -> _Rollout[StateT]:
        decision = jnp.broadcast_to(c.decision, c.env.done.shape)
        actions = policy(obs=c.env.obs, goal=c.env.goal, decision=decision, past=c.past)
        c, _ = jax.lax.scan(step, c, jnp.moveaxis(actions, 2, 0))
        return eqx.tree_at(lambda c: c.decision, c, c.decision + 1)

    zero, no = jnp.zeros(start.done.shape), jnp.zeros(start.done.shape, bool)
    unstable = ~start.done & ~jax.vmap(jax.vmap(_sound))(start)
    start = eqx.tree_at(lambda s: s.done, start, start.done | unstable)
    fresh = _Rollout(start, zero, zero, zero, jnp.zeros((), jnp.int32), unstable, no, past)
    return jax.lax.while_loop(lambda c: ~jnp.all(c.env.done), decide, fresh)


def _advance(
    env: Env[StateT], before: StateT, action: Float[Array, " A"]
) -> tuple[StateT, Bool[Array, ""], Bool[Array, ""]]:
    """Steps one episode; returns also whether the simulation became unstable, and whether the action is not
    finite.

    In both cases the episode is done, without success, and stays in the state before.
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


def _sound(state: EnvState) -> Bool[Array, ""]:
    """Returns whether observation and reward of a state are finite and below `UNSTABLE`."""
    return jnp.all(jnp.abs(state.obs) <= UNSTABLE) & (jnp.abs(state.reward) <= UNSTABLE)


def _discounts(policies: Policies) -> Discount | None:
    """Returns `step_discount`, of each seed where seeds differ in it."""
    swept, discount = policies.state.swept, policies.algo.step_discount
    return discount if "discount" not in swept or discount is None else swept["discount"][:, None]


def _even_share(count: int, most: int) -> int:
    """Returns the size of the fewest even chunks of at most `most` that cover `count`."""
    return -(-count // -(-count // min(most, count)))


def _chunks(count: int, size: int) -> Int[Array, "chunks size"]:
    """Returns 0, 1, ... in rows of `size`; the last row may exceed `count`."""
    rows = -(-count // size)
    return jnp.arange(rows * size).reshape(rows, size)
