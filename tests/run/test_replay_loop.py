"""The imagined replay in the training loop: when it is filled, with what, and what that costs."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend import core

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.ops.replay import Replay, ReplaySpec, empty_replay
from mac.run import mesh as devices
from mac.run import segment
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.rng_streams import Stream, stream
from mac.types import Batch, EnvSpec, Metrics, SampleSpec, Window
from tests.helpers.key_usage import recorded, used_twice
from tests.helpers.platforms import mesh_of
from tests.helpers.toy_env import SPEC, window

SEEDS = 2
calls: list[int] = []
"""Updates at whose beginning a rollout ran, once for each seed."""


class Row(NamedTuple):
    """A transition that says which draw and update it is of."""

    draw: jax.Array
    made: jax.Array


@jax.jit
def imagine(key: jax.Array, weight: jax.Array, step: jax.Array, rows: jax.Array) -> Row:
    """A function whose name marks rollouts in a traced program."""
    return Row(weight + jr.normal(key, rows.shape), jnp.broadcast_to(step, rows.shape).astype(jnp.float32))


class Imagining(AbstractAlgorithm):
    """Imagines at random with its only weight, which grows by 1 per update, and reports what it is given."""

    env: EnvSpec = eqx.field(static=True, default=SPEC)
    spec: ReplaySpec = eqx.field(static=True, default=ReplaySpec(rows=4, kept=2, every=3, batch=5))

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(3, 2)

    @property
    def replay(self) -> ReplaySpec:
        return self.spec

    def init(self, key: jax.Array) -> TrainState:
        row = Row(jnp.zeros(()), jnp.zeros(()))
        return TrainState(jr.uniform(key), (), (), memory=empty_replay(self.spec, row))

    def rollout(
        self, state: TrainState, window: Window, step: jax.Array, key: jax.Array
    ) -> tuple[Row, jax.Array]:
        jax.debug.callback(lambda step: calls.append(int(step)), step)
        return imagine(key, state.nets, step, jnp.zeros(self.spec.rows)), 1 + step % self.spec.rows

    def update(
        self, state: TrainState, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        assert state.memory == ()
        drawn = batch.imagined
        metrics = {"imagined/draw": jnp.sum(drawn.draw), "imagined/oldest": jnp.min(drawn.made)}
        return dataclasses.replace(state, nets=state.nets + 1), metrics | {"key/draw": jr.uniform(key)}

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        raise NotImplementedError


def run(
    algo: Imagining, *spans: tuple[int, int], seed: int = 0, seeds: int = SEEDS
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Segments from a fresh state, one for each span of updates."""
    mesh, logs = seed_mesh(seeds), []
    keys = place(mesh, seed_keys(seed, seeds), SEED)
    state = segment.init(algo, mesh, keys)
    for span in spans:
        steps = place(mesh, np.arange(*span, dtype=np.int32), ALL)
        state, log = segment.segment(algo, mesh, place(mesh, window(), ALL), keys, steps, state)
        logs.append(jax.device_get(log))
    jax.effects_barrier()
    return jax.device_get(state), {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


# When.


@pytest.mark.parametrize("spans", [((0, 7),), ((0, 2), (2, 3), (3, 7))])
def test_rollouts_run_when_due_and_in_no_other_update(spans: tuple[tuple[int, int], ...]):
    run(Imagining(), *spans)
    assert sorted(calls) == sorted([0, 3, 6] * SEEDS)


def test_ring_may_be_filled_at_the_start():
    state, _ = run(Imagining(spec=ReplaySpec(4, 3, 2, 5, fill_at_start=True)), (0, 4))
    assert sorted(calls) == sorted([0, 0, 0, 2] * SEEDS)
    draws = np.asarray(state.memory.rows.draw)
    assert len(np.unique(draws[:, [0, 4, 8]])) == 3 * SEEDS  # a key for each of them


def test_a_segment_that_begins_between_rollouts_makes_none():
    run(Imagining(), (4, 6))
    assert calls == []


# With what.


def by_hand(algo: Imagining, seed: int, updates: int) -> tuple[np.ndarray, list[float]]:
    """The newest rollouts, slot by slot, and each update's draws, from separate calls with the same keys."""
    key, spec = stream(jr.key(seed), Stream.REPLAY), algo.spec
    weight = jr.uniform(stream(jr.key(seed), Stream.INIT))
    slots: dict[int, jax.Array] = {}
    pool, sums = np.empty(0), []
    for step in range(updates):
        fill, take = (jr.fold_in(jr.fold_in(key, step), purpose) for purpose in (0, 1))
        if step % spec.every == 0:
            state = TrainState(weight + step, (), ())
            rows, count = algo.rollout(state, window(), jnp.asarray(step), jr.fold_in(fill, 0))
            slots[step // spec.every % spec.kept] = rows.draw[: int(count)]
        pool = np.concatenate([slots[slot] for slot in sorted(slots)])
        sums.append(float(np.sum(pool[np.asarray(jr.randint(take, (spec.batch,), 0, len(pool)))])))
    return pool, sums


def valid(memory: Replay, seed: int, spec: ReplaySpec) -> np.ndarray:
    draws, count = np.asarray(memory.rows.draw)[seed].reshape(spec.kept, spec.rows), memory.count[seed]
    return np.concatenate([slot[:n] for slot, n in zip(draws, count, strict=True)])


def test_ring_and_draws_are_those_of_separate_calls():
    algo, updates = Imagining(), 11
    state, log = run(algo, (0, 5), (5, updates), seed=3)
    for seed in range(SEEDS):
        kept, sums = by_hand(algo, 3 + seed, updates)
        np.testing.assert_allclose(valid(state.memory, seed, algo.spec), kept, rtol=1e-6)
        np.testing.assert_allclose(log["imagined/draw"][:, seed], sums, rtol=1e-5)


def test_draws_come_from_the_newest_rollouts_only():
    _, log = run(Imagining(), (0, 30))
    step = np.arange(30)[:, None]
    assert np.all(log["imagined/oldest"] >= np.maximum(step // 3 - 1, 0) * 3)
    assert np.any(log["imagined/oldest"] < step // 3 * 3)


@pytest.mark.parametrize("seeds", [2, 4])
def test_seeds_are_mapped_on_a_gpu_as_on_a_cpu(seeds: int, monkeypatch: pytest.MonkeyPatch):
    """Runs the GPU's form of the loop here: devices with one seed each, or with two."""
    expected = run(Imagining(), (0, 8), seed=5, seeds=seeds)
    monkeypatch.setattr(devices, "target_platform", lambda: "gpu")
    monkeypatch.setattr(segment, "segment", jax.jit(segment.segment.__wrapped__, static_argnums=(0, 1)))
    chex.assert_trees_all_equal(run(Imagining(), (0, 8), seed=5, seeds=seeds), expected)


def test_seed_alone_equals_the_seed_in_a_group():
    group, group_log = run(Imagining(), (0, 8), seed=0, seeds=3)
    alone, alone_log = run(Imagining(), (0, 8), seed=2, seeds=1)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[2:], group), alone)
    chex.assert_trees_all_equal({k: v[:, 2:] for k, v in group_log.items()}, alone_log)


def test_no_key_is_used_twice(monkeypatch: pytest.MonkeyPatch):
    algo = Imagining(spec=ReplaySpec(rows=3, kept=2, every=2, batch=7, fill_at_start=True))
    with recorded(monkeypatch) as seen:
        run(algo, (0, 6), seed=7, seeds=1)
    # Rollouts: two at the start, and at updates 2 and 4.
    assert sum(use.name == "normal" for use in seen) == 4 and used_twice(seen) == {}


# What it costs.


def contains_rollout(jaxpr: Any) -> bool:
    return any(
        eqn.params.get("name") == "imagine" or any(map(contains_rollout, core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def loops_with_rollouts(jaxpr: Any) -> list[Any]:
    """The loops of unknown length that contain a rollout."""
    found = []
    for eqn in jaxpr.eqns:
        inner = list(core.jaxprs_in_params(eqn.params))
        if eqn.primitive.name == "while" and any(map(contains_rollout, inner)):
            found.append(eqn)
        for each in inner:
            found += loops_with_rollouts(each)
    return found


def outside_of_loops(jaxpr: Any) -> bool:
    """Whether a rollout is computed whatever the step."""
    return any(
        eqn.params.get("name") == "imagine"
        or (eqn.primitive.name != "while" and any(map(outside_of_loops, core.jaxprs_in_params(eqn.params))))
        for eqn in jaxpr.eqns
    )


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rollouts_are_iterations_of_one_loop_for_all_seeds(platform: str, seeds: int):
    """Its condition looks at numbers that all seeds have in common, so that it stays one loop."""
    keys, algo = seed_keys(0, seeds), Imagining()
    state = jax.eval_shape(jax.vmap(algo.init), keys)
    traced = jax.make_jaxpr(partial(segment.segment, algo, mesh_of(platform)))(
        window(), keys, np.arange(11, dtype=np.int32), state
    )
    (rolling,) = loops_with_rollouts(traced.jaxpr)
    assert rolling.params["cond_jaxpr"].jaxpr.outvars[0].aval.shape == ()
    assert not outside_of_loops(traced.jaxpr)


@pytest.mark.parametrize("seeds", [1, SEEDS])
def test_a_larger_ring_takes_no_temporary_memory(seeds: int):
    """So none is copied: not by the loop of rollouts, by the map over seeds, or from update to update."""

    def scratch(kept: int) -> tuple[int, int]:
        algo, mesh = Imagining(spec=ReplaySpec(rows=4000, kept=kept, every=3, batch=5)), seed_mesh(1)
        keys = seed_keys(0, seeds)
        state = jax.eval_shape(jax.vmap(algo.init), keys)
        steps = np.arange(11, dtype=np.int32)
        memory = segment.segment.lower(algo, mesh, window(), keys, steps, state).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes, memory.alias_size_in_bytes

    (small, small_state), (large, large_state) = scratch(2), scratch(50)
    more = 48 * 4000 * 2 * 4 * seeds
    assert large_state - small_state == pytest.approx(more, rel=0.01)
    assert large - small < 0.01 * more
