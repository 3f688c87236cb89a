"""Evaluation against episodes played one step at a time, and learning on a problem solved in seconds."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend import core

from envs_mjx.base import AbstractEnv, EnvState
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer
from mac.run.evaluate import Policies, evaluate
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from mac.types import EnvSpec, Episodes, Past
from tests.helpers.fixed_policy import ActsOnly
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import RADIUS, SPEC, STARTS, STRIDE, TARGET, PointEnv, identity, mac, window

# An environment that writes down what was done, in its return.

LIMIT = 7
WEIGHTS = np.asarray([1.0, 0.3, -2.0, 0.7, 5.0, -0.1, 0.9], np.float32)
"""What an action at each step counts for: no two orders of the same actions have one sum."""


class Recorder(AbstractEnv):
    """Observes (step, task); pays `WEIGHTS[step] * action`; task k is solved, and over, at step 2 k + 1.

    Every step of task 9 drops a contact.
    """

    spec: EnvSpec = eqx.field(
        static=True,
        default=EnvSpec("recorder", 2, 1, None, tasks=(1, 2, 3, 9), max_steps=LIMIT, control_dt=1.0),
    )

    def reset(self, key: jax.Array, task: jax.Array) -> EnvState:
        obs = jnp.stack([jnp.zeros(()), task.astype(jnp.float32)])
        return EnvState(obs=obs, goal=None)

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        t = state.t + 1
        solved = t == 2 * state.obs[1].astype(jnp.int32) + 1
        after = dataclasses.replace(
            state,
            obs=state.obs.at[0].set(t.astype(jnp.float32)),
            reward=jnp.asarray(WEIGHTS)[state.t] * action[0],
            success=solved,
            done=solved,
            dropped=state.dropped + (state.obs[1] == 9).astype(jnp.int32),
        )
        return self.end_step(state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class Scripted(ActsOnly):
    """A policy without learning; `nets` is one number per seed."""

    env: EnvSpec = eqx.field(static=True, default=SPEC)
    chunk: int = eqx.field(static=True, default=1)


class Counting(Scripted):
    """Acts 10 * (step observed) + (place in the chunk), times the seed's number."""

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        place = jnp.broadcast_to(jnp.arange(self.chunk, dtype=jnp.float32), (len(obs), self.chunk))
        return (state.nets * (10 * jnp.broadcast_to(obs[:, :1], place.shape) + place))[..., None]


class Noisy(Scripted):
    """Acts at random."""

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        return jr.normal(key, (len(obs), self.chunk, 1))


class Steering(Scripted):
    """Heads for the point's target, at the seed's speed."""

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        way = jnp.broadcast_to(jnp.asarray(TARGET), obs.shape) - obs
        return jnp.clip(state.nets * way / STRIDE, -1, 1)[:, None, :]


class Wandering(Scripted):
    """Heads for the point's target, at the seed's speed, with noise."""

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        way = jnp.broadcast_to(jnp.asarray(TARGET), obs.shape) - obs
        noise = 0.5 * jr.normal(key, (len(obs), 3, 2))
        return jnp.clip(jnp.broadcast_to((state.nets * way / STRIDE)[:, None], noise.shape) + noise, -1, 1)


def inner(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those of its loops and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in core.jaxprs_in_params(eqn.params):
            yield from inner(sub)


def play(
    algo: AbstractAlgorithm, env: Any, episodes: int, numbers: list[float], key: int = 0, **how: Any
) -> Episodes:
    """Results as NumPy arrays, one seed per number."""
    state = TrainState(jnp.asarray(numbers), (), ())
    keys = seed_keys(key, len(numbers))
    return jax.device_get(evaluate(Policies(algo, identity(), state), env, episodes, keys, **how))


@pytest.mark.parametrize("chunk", slow_except([3], [1, 3, 7]))
def test_chunks_are_executed_in_order_and_then_planned_anew(chunk: int):
    numbers = [1.0, -0.5]
    got = play(Counting(chunk=chunk), Recorder(), 2, numbers)
    length = [3, 5, 7, 7]  # of tasks 1, 2, 3 and 9; the last is cut off by the limit
    actions = np.asarray([10 * (t - t % chunk) + t % chunk for t in range(LIMIT)])
    total = [np.sum((WEIGHTS * actions)[:n]) for n in length]
    assert got.episode_return.shape == got.success.shape == got.length.shape == (2, 4, 2)
    for s, number in enumerate(numbers):
        for e in range(2):
            np.testing.assert_array_equal(got.length[s, :, e], length)
            np.testing.assert_array_equal(got.success[s, :, e], [True, True, True, False])
            np.testing.assert_allclose(got.episode_return[s, :, e], number * np.asarray(total), rtol=1e-5)


def test_every_decision_and_seed_draws_its_own_noise():
    got = play(Noisy(chunk=2), Recorder(), 1, [0.0, 0.0], key=4)
    for s in range(2):
        for column, (task, length) in enumerate({1: 3, 2: 5, 3: 7, 9: 7}.items()):
            k_act = jr.split(jr.fold_in(jr.fold_in(jr.key(4 + s), task), 0))[1]
            noise = [jr.normal(jr.fold_in(k_act, d), (1, 2, 1)) for d in range(4)]
            actions = np.concatenate([np.asarray(x)[0, :, 0] for x in noise])[:LIMIT]
            want = np.sum((WEIGHTS * actions)[:length])
            assert got.episode_return[s, column, 0] == pytest.approx(float(want), rel=1e-4, abs=1e-5)


def test_policy_sees_normalised_observations():
    state = TrainState(jnp.ones(1), (), ())
    normalizer = Normalizer(jnp.asarray([2.0, 0.0]), jnp.asarray([0.5, 1.0]))
    got = evaluate(Policies(Counting(), normalizer, state), Recorder(), 1, seed_keys(0, 1))
    actions = 10 * (np.arange(LIMIT) - 2.0) / 0.501
    np.testing.assert_allclose(got.episode_return[0, 3, 0], np.sum(WEIGHTS * actions), rtol=1e-5)


class Remembering(Scripted):
    """Acts the sum of its last `history` actions and of what they earned, plus the first observation seen."""

    @property
    def history(self) -> int:
        return 3

    def act(self, *_: Any) -> jax.Array:
        raise AssertionError("the loop calls act_after")

    def act_after(
        self, state: TrainState, past: Past, obs: jax.Array, goal: None, key: jax.Array
    ) -> jax.Array:
        valid = past.valid.astype(jnp.float32)
        told = jnp.sum(valid * (past.actions[..., 0] + past.rewards + past.obs[..., 0]), axis=-1)
        place = jnp.broadcast_to(jnp.arange(self.chunk, dtype=jnp.float32), (len(obs), self.chunk))
        return (0.01 * state.nets * (1 + obs[:, :1] + told[:, None]) + 0.001 * place)[..., None]


@pytest.mark.parametrize("chunk", [1, 2])
def test_history_is_the_last_steps_of_the_episode(chunk: int):
    got = play(Remembering(Recorder().spec, chunk), Recorder(), 2, [1.0, -0.5], batch=4)
    for s, number in enumerate((1.0, -0.5)):
        for column, length in enumerate((3, 5, 7, 7)):
            steps: list[tuple[float, float, float]] = []
            while len(steps) < length:
                t, told = len(steps), sum(map(sum, steps[-3:]))
                for k in range(chunk):
                    action = 0.01 * number * (1 + t + told) + 0.001 * k
                    if t + k < LIMIT:
                        steps.append((t + k, action, WEIGHTS[t + k] * action))
            total = sum(reward for *_, reward in steps[:length])
            np.testing.assert_allclose(got.episode_return[s, column], total, rtol=1e-4)


def by_hand(start: np.ndarray, speed: float) -> tuple[bool, float, int]:
    """One episode of the point under `Steering`."""
    point, total = start.astype(np.float64), 0.0
    for t in range(1, SPEC.max_steps + 1):
        point = point + STRIDE * np.clip(speed * (np.asarray(TARGET) - point) / STRIDE, -1, 1)
        if np.sum((point - np.asarray(TARGET)) ** 2) < RADIUS**2:
            return True, total, t
        total -= 1
    return False, total, SPEC.max_steps


def test_success_return_and_length_of_each_seed_task_and_episode():
    speeds = [0.0, 0.1, 0.3]
    got = play(Steering(), PointEnv(), 3, speeds)
    for s, speed in enumerate(speeds):
        for i in range(6):
            task, episode = divmod(i, 3)
            key = jr.split(jr.fold_in(jr.fold_in(jr.key(s), task + 1), episode))[0]
            offset = np.asarray(jr.uniform(key, (2,), minval=-0.1, maxval=0.1))
            want = by_hand(np.asarray(STARTS[task]) + offset, speed)
            at = (s, task, episode)
            assert (got.success[at], got.episode_return[at], got.length[at]) == want
    assert got.success.any() and not got.success.all() and len(np.unique(got.length)) > 3


def test_seed_in_a_group_plays_as_the_seed_alone():
    group, alone = play(Noisy(), Recorder(), 2, [0.0] * 3), play(Noisy(), Recorder(), 2, [0.0], key=2)
    np.testing.assert_array_equal(group.episode_return[2], alone.episode_return[0])


@pytest.mark.parametrize("batch", slow_except([1, 5], [1, 2, 3, 5, 7, 23, 24, 99]))
def test_results_do_not_depend_on_the_batch(batch: int):
    """Three seeds, two tasks and four episodes; numbers that divide evenly and that do not."""
    whole = play(Wandering(), PointEnv(), 4, [0.1, 0.2, 0.3])
    split = play(Wandering(), PointEnv(), 4, [0.1, 0.2, 0.3], batch=batch)
    for got, want in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(np.unique(whole.length)) > 3


@pytest.mark.parametrize(
    ("batch", "most"), slow_except([(0, 24), (5, 3)], [(0, 24), (24, 24), (9, 9), (5, 3), (2, 2), (1, 1)])
)
def test_at_most_the_asked_environments_are_simulated_at_once(batch: int, most: int):
    """Three seeds of eight episodes: 9 = 3 x 3; 5 leaves room for one column of 3."""
    policies = Policies(Wandering(), identity(), TrainState(jnp.ones(3), (), ()))
    program = jax.make_jaxpr(lambda keys: evaluate(policies, PointEnv(), 4, keys, batch=batch))(
        seed_keys(0, 3)
    )
    (play_all,) = [eqn for eqn in inner(program.jaxpr) if eqn.primitive.name == "while"]
    (points,) = {v.aval.shape for v in play_all.outvars if len(v.aval.shape) == 3}  # seeds, episodes, xy
    assert points[0] * points[1] == most


def test_episodes_of_a_task_do_not_depend_on_what_else_is_played():
    whole = play(Wandering(), PointEnv(), 4, [0.1, 0.2])
    part = play(Wandering(), PointEnv(), 3, [0.1, 0.2], tasks=(2,))
    np.testing.assert_array_equal(part.length[:, 0], whole.length[:, 1, :3])
    np.testing.assert_array_equal(part.episode_return[:, 0], whole.episode_return[:, 1, :3])


def test_contacts_left_out_are_counted_by_episode():
    got = play(Counting(), Recorder(), 2, [1.0])
    np.testing.assert_array_equal(got.dropped, [[[0, 0], [0, 0], [0, 0], [LIMIT, LIMIT]]])


def test_second_evaluation_is_not_traced_again():
    traces = []

    class Watched(Counting):
        def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
            traces.append(1)
            return super().act(state, obs, goal, key)

    play(Watched(), Recorder(), 3, [1.0], key=0, batch=2)
    first = len(traces)
    play(Watched(), Recorder(), 3, [2.0], key=1, batch=2)
    assert len(traces) == first > 0


# Learning.


@pytest.mark.slow
def test_mac_learns_to_reach_the_target():
    """Two seeds, 1000 small updates: from hardly ever to mostly."""
    algo = mac(
        batch=64,
        hidden=(32, 32),
        rollout=4,
        candidates=8,
        candidates_test=16,
        flow_steps=5,
        discount=0.95,
        lr=3e-3,
        tau_ema=0.05,
    )
    mesh = seed_mesh(4)
    keys = place(mesh, seed_keys(0, 4), SEED)
    rows = place(mesh, window(episodes=50), ALL)
    steps = place(mesh, np.arange(1000, dtype=np.int32), ALL)

    def success(state: TrainState) -> float:
        here = jax.device_put(state, jax.local_devices()[0])
        played = evaluate(Policies(algo, identity(), here), PointEnv(), 20, seed_keys(9, 4))
        return float(played.success.mean())  # single seeds start lucky, or fail

    state = init(algo, mesh, keys)
    assert success(state) <= 0.3
    state, _ = segment(algo, mesh, rows, keys, steps, state)
    assert success(state) >= 0.5
