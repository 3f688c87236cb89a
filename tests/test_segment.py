"""The compiled training loop: what it computes, how often it is traced, and what may run beside it."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.sampler import sample
from mac.mac import MAC
from mac.run import segment as loop
from mac.types import Batch, EnvSpec, Metrics, SampleSpec
from tests.toy import SMALL, SPEC, mac, window

SEEDS = 4


def steps(first: int, last: int) -> np.ndarray:
    return np.arange(first, last, dtype=np.int32)


def run(
    algo: AbstractAlgorithm, seed: int, seeds: int, *spans: tuple[int, int]
) -> tuple[TrainState, list[dict]]:
    """Segments from a fresh state, one for each span of steps."""
    mesh = loop.seed_mesh(seeds)
    keys = loop.place(mesh, loop.seed_keys(seed, seeds), loop.SEED)
    rows = loop.place(mesh, window(algo.sample.chunk), loop.ALL)
    state, logs = loop.init(algo, mesh, keys), []
    for span in spans:
        numbers = loop.place(mesh, steps(*span), loop.ALL)
        state, metrics = loop.segment(algo, mesh, rows, keys, numbers, state)
        logs.append(jax.device_get(metrics))
    return jax.device_get(state), logs


def pick(tree: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: x[seed], tree)


def assert_same(got: Any, want: Any) -> None:
    """Equal bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_close(got: Any, want: Any, rtol: float, atol: float) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# What an update is given: a probe that learns nothing and reports what it saw.


class Probe(AbstractAlgorithm):
    """Counts its updates, and reports the step, a draw from its key and the rows of its batch."""

    env: EnvSpec = eqx.field(static=True, default=SPEC)
    sample: SampleSpec = eqx.field(static=True, default=SampleSpec(3, 2))

    def init(self, key: jax.Array) -> TrainState:
        return TrainState(jr.uniform(key), (), jnp.zeros((), jnp.int32))

    def update(
        self, state: TrainState, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        turn = jax.lax.cond(step % 2 == 0, lambda: 2.0, lambda: 1.0)
        metrics = {
            "probe/step": step.astype(jnp.float32),
            "probe/draw": jr.uniform(key),
            "probe/obs": jnp.sum(batch.obs),
            "probe/turn": turn,
            "probe/count": state.opt_state.astype(jnp.float32),
        }
        return dataclasses.replace(state, opt_state=state.opt_state + 1), metrics

    def act(self, state: TrainState, obs: jax.Array, key: jax.Array) -> jax.Array:
        raise NotImplementedError


def test_keys_are_the_seeds_folded_with_the_step():
    """Every number that an update sees, drawn again outside the loop."""
    _, (log,) = run(Probe(), 5, 2, (3, 6))
    rows = window(2)
    for k, step in enumerate(range(3, 6)):
        for s, seed in enumerate((5, 6)):
            k_sample, k_update = jr.split(jr.fold_in(jr.key(seed), step))
            assert log["probe/draw"][k, s] == jr.uniform(k_update)
            batch = sample(rows, SampleSpec(3, 2), k_sample)
            assert log["probe/obs"][k, s] == pytest.approx(float(jnp.sum(batch.obs)), rel=1e-6)
            assert (log["probe/step"][k, s], log["probe/turn"][k, s]) == (step, 2.0 - step % 2)
            assert log["probe/count"][k, s] == k


def test_initial_states_are_those_of_the_seeds_own_keys():
    state, _ = run(Probe(), 2, 3)
    want = [float(jr.uniform(jr.key(seed))) for seed in (2, 3, 4)]
    np.testing.assert_array_equal(state.nets, np.asarray(want, np.float32))


def test_metrics_have_one_row_per_step_and_a_column_per_seed():
    _, (log,) = run(Probe(), 0, SEEDS, (0, 3))
    assert {value.shape for value in log.values()} == {(3, SEEDS)}


def primitives(jaxpr: Any) -> list[str]:
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for sub in jax.core.jaxprs_in_params(eqn.params):
            names += primitives(sub)
    return names


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_branch_on_the_step_computes_one_side_only(platform: str, monkeypatch: pytest.MonkeyPatch):
    """The step is common to all seeds, so mapping over them leaves the branch a branch."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    mesh, keys = loop.seed_mesh(1), loop.seed_keys(0, 2)
    state = jax.eval_shape(jax.vmap(Probe().init), keys)
    jaxpr = jax.make_jaxpr(loop.segment.__wrapped__, static_argnums=(0, 1))(
        Probe(), mesh, window(), keys, steps(0, 2), state
    )
    names = primitives(jaxpr.jaxpr)
    assert "cond" in names
    assert names.count("scan") == (2 if platform == "cpu" else 1)  # steps, and on CPU seeds


# Seeds and devices.


@pytest.mark.parametrize(("seeds", "most", "share"), [(4, 2, 2), (3, 2, 1), (1, 8, 1), (6, 4, 3), (7, 7, 7)])
def test_devices_take_equal_numbers_of_seeds(seeds: int, most: int, share: int):
    assert loop._even_share(seeds, most) == share


def test_seeds_are_spread_over_the_devices():
    mesh = loop.seed_mesh(SEEDS)
    assert mesh.devices.size == 2
    state = loop.init(Probe(), mesh, loop.place(mesh, loop.seed_keys(0, SEEDS), loop.SEED))
    shards = state.nets.addressable_shards
    assert [(shard.device, shard.data.shape) for shard in shards] == [(d, (2,)) for d in mesh.devices]


def mapped(platform: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    algo, rows = mac(), window()

    def one(state: TrainState, key: jax.Array) -> tuple[TrainState, Metrics]:
        k_sample, k_update = jr.split(key)
        return algo.update(state, sample(rows, algo.sample, k_sample), jnp.zeros((), jnp.int32), k_update)

    return jax.jit(lambda state, keys: loop.map_seeds(one, state, keys))


def test_both_ways_to_map_seeds_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    """Products of several seeds are summed in another order, no more."""
    keys = loop.seed_keys(0, 2)
    state = jax.jit(jax.vmap(mac().init))(keys)
    (one, one_log), (two, two_log) = (mapped(p, monkeypatch)(state, keys) for p in ("cpu", "gpu"))
    assert_close(one_log, two_log, rtol=1e-4, atol=1e-5)
    # Adam's first step is the sign of the gradient, of either sign where it vanishes; its moments are not.
    assert_close(one.opt_state, two.opt_state, rtol=1e-3, atol=1e-6)


# MAC in the loop.


class CountingMAC(MAC):
    """MAC that notes each time Python runs its update, which it does while it is traced only."""

    traces: ClassVar[list[int]] = []

    def update(self, *args: Any) -> tuple[TrainState, Metrics]:
        self.traces.append(1)
        return super().update(*args)


COUNTING = CountingMAC(SMALL, SPEC)


@pytest.fixture(scope="module")
def whole() -> tuple[TrainState, dict[str, np.ndarray]]:
    """Four seeds, six updates, three segments of two; with the metrics of all six."""
    CountingMAC.traces.clear()
    state, logs = run(COUNTING, 0, SEEDS, (0, 2), (2, 4), (4, 6))
    return state, {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}


def test_three_segments_are_traced_once(whole: Any):
    assert len(CountingMAC.traces) == 1


def test_training_is_finite_and_moves_every_weight(whole: Any):
    state, log = whole
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state, log)))
    start, _ = run(COUNTING, 0, SEEDS)
    for before, after in zip(jax.tree.leaves(start.nets), jax.tree.leaves(state.nets), strict=True):
        assert not np.array_equal(before, after)


def test_loop_equals_updates_called_one_by_one(whole: Any):
    state, log = whole
    algo, rows, key = mac(), window(), jr.key(1)

    @jax.jit
    def one(state: TrainState, step: jax.Array) -> tuple[TrainState, Metrics]:
        k_sample, k_update = jr.split(jr.fold_in(key, step))
        return algo.update(state, sample(rows, algo.sample, k_sample), step, k_update)

    alone = jax.jit(algo.init)(key)
    for step in range(6):
        alone, metrics = one(alone, jnp.asarray(step, jnp.int32))
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
            {k: float(v[step, 1]) for k, v in log.items()}, rel=1e-4, abs=1e-5
        )
    assert_close(pick(state, 1).nets, alone.nets, rtol=1e-3, atol=1e-4)


def test_seed_in_a_group_equals_the_seed_alone(whole: Any):
    """Start and batches exactly; trained numbers to rounding."""
    state, log = whole
    alone, (alone_log,) = run(COUNTING, 2, 1, (0, 6))
    assert_same(pick(run(COUNTING, 0, SEEDS)[0], 2), pick(run(COUNTING, 2, 1)[0], 0))
    for name, value in log.items():
        np.testing.assert_allclose(value[:, 2], alone_log[name][:, 0], rtol=1e-5, atol=1e-6)
    assert_close(pick(state, 2), pick(alone, 0), rtol=1e-4, atol=1e-6)


def test_stopped_and_continued_run_ends_with_the_same_bits(whole: Any):
    state, _ = whole
    mesh = loop.seed_mesh(SEEDS)
    keys = loop.place(mesh, loop.seed_keys(0, SEEDS), loop.SEED)
    rows = loop.place(mesh, window(), loop.ALL)
    half, _ = run(COUNTING, 0, SEEDS, (0, 2), (2, 4))  # comes back to the host, as from a checkpoint
    numbers = loop.place(mesh, steps(4, 6), loop.ALL)
    end, _ = loop.segment(COUNTING, mesh, rows, keys, numbers, loop.place(mesh, half, loop.SEED))
    assert_same(jax.device_get(end), state)


def test_nothing_is_transferred_while_a_segment_runs(whole: Any):
    mesh = loop.seed_mesh(SEEDS)
    keys = loop.place(mesh, loop.seed_keys(0, SEEDS), loop.SEED)
    rows, numbers = loop.place(mesh, window(), loop.ALL), loop.place(mesh, steps(0, 2), loop.ALL)
    state = loop.init(COUNTING, mesh, keys)
    with jax.transfer_guard("disallow"):
        state, metrics = loop.segment(COUNTING, mesh, rows, keys, numbers, state)
        jax.block_until_ready(metrics)
        # The guard is on: the same call with steps still on the host is refused.
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            loop.segment(COUNTING, mesh, rows, keys, steps(2, 4), state)


def test_old_state_is_given_up_to_the_new_one(whole: Any):
    mesh = loop.seed_mesh(SEEDS)
    keys = loop.place(mesh, loop.seed_keys(0, SEEDS), loop.SEED)
    rows, numbers = loop.place(mesh, window(), loop.ALL), loop.place(mesh, steps(0, 2), loop.ALL)
    old = loop.init(COUNTING, mesh, keys)
    new, _ = loop.segment(COUNTING, mesh, rows, keys, numbers, old)
    jax.block_until_ready(new)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not rows.obs.is_deleted() and not keys.is_deleted()
