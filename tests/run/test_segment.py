"""The compiled training loop: what it computes, how often it is traced, and what may run at the same time."""

import dataclasses
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import Mesh

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.sampler import sample
from mac.mac import MAC, DistilledFlow
from mac.run import mesh as devices
from mac.run import segment
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.rng_streams import Stream, stream
from mac.types import Batch, EnvSpec, Metrics, SampleSpec
from tests.helpers.platforms import mesh_of
from tests.helpers.toy_env import SMALL, SPEC, mac, window

SEEDS = 4
ROOT = Path(__file__).parents[2]


def steps(first: int, last: int) -> np.ndarray:
    return np.arange(first, last, dtype=np.int32)


def run(
    algo: AbstractAlgorithm, seed: int, seeds: int, *spans: tuple[int, int]
) -> tuple[TrainState, list[dict]]:
    """Segments from a fresh state, one for each span of steps."""
    mesh, state, logs = seed_mesh(seeds), start(algo, seed, seeds), []
    for span in spans:
        state, metrics = segment.segment(algo, *placed(mesh, seed, seeds, span, state))
        logs.append(jax.device_get(metrics))
    return jax.device_get(state), logs


@cache
def start(algo: AbstractAlgorithm, seed: int, seeds: int) -> TrainState:
    """Fresh states, on the host."""
    mesh = seed_mesh(seeds)
    return jax.device_get(segment.init(algo, mesh, place(mesh, seed_keys(seed, seeds), SEED)))


def placed(mesh: Mesh, seed: int, seeds: int, span: tuple[int, int], state: TrainState) -> tuple[Any, ...]:
    """Arguments of a segment after the algorithm, all where the devices expect them."""
    keys = place(mesh, seed_keys(seed, seeds), SEED)
    rows, numbers = place(mesh, window(), ALL), place(mesh, steps(*span), ALL)
    return mesh, rows, keys, numbers, place(mesh, state, SEED)


def pick(tree: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: x[seed], tree)


# What an update is given: a probe that learns nothing and reports what it saw.


class Probe(AbstractAlgorithm):
    """Counts its updates, and reports the step, a draw from its key and the rows of its batch."""

    env: EnvSpec = eqx.field(static=True, default=SPEC)

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(3, 2)

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

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        raise NotImplementedError


def test_keys_are_the_seeds_folded_with_the_step():
    """Every number that an update sees, drawn again outside the loop."""
    _, (log,) = run(Probe(), 5, 2, (3, 6))
    rows = window(2)
    for k, step in enumerate(range(3, 6)):
        for s, seed in enumerate((5, 6)):
            k_sample, k_update = jr.split(jr.fold_in(stream(jr.key(seed), Stream.UPDATES), step))
            assert log["probe/draw"][k, s] == jr.uniform(k_update)
            batch = sample(rows, SampleSpec(3, 2), k_sample)
            assert log["probe/obs"][k, s] == pytest.approx(float(jnp.sum(batch.obs)), rel=1e-6)
            assert (log["probe/step"][k, s], log["probe/turn"][k, s]) == (step, 2.0 - step % 2)
            assert log["probe/count"][k, s] == k


@pytest.mark.parametrize("seeds", [2, 4])
def test_seeds_are_mapped_on_a_gpu_as_on_a_cpu(seeds: int, monkeypatch: pytest.MonkeyPatch):
    """Runs the GPU's form of the loop here: two devices with one seed each, or with two."""
    expected = run(Probe(), 5, seeds, (3, 6))
    monkeypatch.setattr(devices, "target_platform", lambda: "gpu")
    monkeypatch.setattr(segment, "segment", jax.jit(segment.segment.__wrapped__, static_argnums=(0, 1)))
    chex.assert_trees_all_equal(run(Probe(), 5, seeds, (3, 6)), expected)


def test_initial_states_are_those_of_the_seeds_own_keys():
    state, _ = run(Probe(), 2, 3)
    want = [float(jr.uniform(stream(jr.key(seed), Stream.INIT))) for seed in (2, 3, 4)]
    np.testing.assert_array_equal(state.nets, np.asarray(want, np.float32))


def test_metrics_have_one_row_per_step_and_a_column_per_seed():
    _, (log,) = run(Probe(), 0, SEEDS, (0, 3))
    assert {value.shape for value in log.values()} == {(3, SEEDS)}


def equations(jaxpr: Any) -> list[Any]:
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        for sub in core.jaxprs_in_params(eqn.params):
            found += equations(sub)
    return found


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_branch_on_the_step_computes_one_side_only(platform: str):
    """The step is common to all seeds, so mapping over them leaves the branch a branch."""
    updates, seeds = 11, 7
    keys = seed_keys(0, seeds)
    state = jax.eval_shape(jax.vmap(Probe().init), keys)
    traced = jax.make_jaxpr(partial(segment.segment, Probe(), mesh_of(platform)))(
        window(), keys, steps(0, updates), state
    )
    found = equations(traced.jaxpr)
    assert "cond" in [eqn.primitive.name for eqn in found]
    # By length: JAX's own loops (the search for a row's episode) are scans in some of its versions.
    scans = [eqn.params["length"] for eqn in found if eqn.primitive.name == "scan"]
    assert scans.count(updates) == 1
    assert scans.count(seeds) == (1 if platform == "cpu" else 0)


# Seeds and devices.


@pytest.mark.parametrize(("seeds", "most", "share"), [(4, 2, 2), (3, 2, 1), (1, 8, 1), (6, 4, 3), (7, 7, 7)])
def test_devices_take_equal_numbers_of_seeds(seeds: int, most: int, share: int):
    assert devices._even_share(seeds, most) == share


def test_seeds_are_spread_over_the_devices():
    mesh = seed_mesh(SEEDS)
    share = SEEDS // mesh.devices.size
    assert share == SEEDS / devices._even_share(SEEDS, jax.local_device_count())
    state = segment.init(Probe(), mesh, place(mesh, seed_keys(0, SEEDS), SEED))
    shards = state.nets.addressable_shards
    assert [(shard.device, shard.data.shape) for shard in shards] == [(d, (share,)) for d in mesh.devices]


@pytest.mark.parametrize(("cores", "seeds", "devices"), [(4, 6, 3), (2, 3, 1)])
def test_cpu_counts_as_one_device_per_core_that_gets_seeds(cores: int, seeds: int, devices: int):
    """In a process of its own, since JAX counts its devices once."""
    script = f"""
import os
os.sched_getaffinity = lambda pid: set(range({cores}))
from mac.run.mesh import seed_mesh, use_cpu_devices
use_cpu_devices({seeds})
assert seed_mesh({seeds}).devices.size == {devices}
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# MAC in the loop.


class CountingFlow(DistilledFlow):
    """MAC's policy, which notes each time Python runs its loss: only while an update is traced."""

    traces: ClassVar[list[int]] = []

    def behavior_loss(self, *args: Any) -> Any:
        self.traces.append(1)
        return super().behavior_loss(*args)


COUNTING = MAC(SMALL, SPEC, policy=CountingFlow())


@pytest.fixture(scope="module")
def whole() -> tuple[TrainState, dict[str, np.ndarray]]:
    """Four seeds, six updates, three segments of two; with the metrics of all six."""
    CountingFlow.traces.clear()
    state, logs = run(COUNTING, 0, SEEDS, (0, 2), (2, 4), (4, 6))
    return state, {name: np.concatenate([log[name] for log in logs]) for name in logs[0]}


def test_three_segments_are_traced_once(whole: Any):
    assert len(CountingFlow.traces) == 1


def test_training_is_finite_and_moves_every_weight(whole: Any):
    state, log = whole
    chex.assert_tree_all_finite((state, log))
    for before, after in zip(
        jax.tree.leaves(start(COUNTING, 0, SEEDS).nets), jax.tree.leaves(state.nets), strict=True
    ):
        assert not np.array_equal(before, after)


def test_loop_equals_updates_called_one_by_one(whole: Any):
    state, log = whole
    algo, rows, key = mac(), window(), jr.key(1)

    @jax.jit
    def one(state: TrainState, step: jax.Array) -> tuple[TrainState, Metrics]:
        k_sample, k_update = jr.split(jr.fold_in(stream(key, Stream.UPDATES), step))
        return algo.update(state, sample(rows, algo.sample, k_sample), step, k_update)

    alone = pick(start(COUNTING, 0, SEEDS), 1)
    for step in range(6):
        alone, metrics = one(alone, jnp.asarray(step, jnp.int32))
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
            {k: float(v[step, 1]) for k, v in log.items()}, rel=1e-4, abs=1e-5
        )
    chex.assert_trees_all_close(pick(state, 1).nets, alone.nets, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_seed_in_a_group_equals_the_seed_alone(whole: Any):
    """Start and batches exactly; trained numbers to rounding."""
    state, log = whole
    alone, (alone_log,) = run(COUNTING, 2, 1, (0, 6))
    chex.assert_trees_all_equal(pick(start(COUNTING, 0, SEEDS), 2), pick(start(COUNTING, 2, 1), 0))
    for name, value in log.items():
        np.testing.assert_allclose(value[:, 2], alone_log[name][:, 0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(pick(state, 2), pick(alone, 0), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_both_ways_to_map_seeds_give_the_same_numbers(whole: Any, monkeypatch: pytest.MonkeyPatch):
    """As on an accelerator: products of several seeds at once, summed in another order and no more."""
    _, log = whole
    monkeypatch.setattr(segment, "map_seeds", lambda f, *args: jax.vmap(f)(*args))
    mesh, *arguments = placed(seed_mesh(SEEDS), 0, SEEDS, (0, 2), start(COUNTING, 0, SEEDS))
    untraced = partial(segment.segment.__wrapped__, mac(), mesh)
    _, metrics = jax.jit(untraced)(*arguments)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, log[name][:2], rtol=1e-4, atol=1e-5)


def test_stopped_and_continued_run_ends_with_the_same_bits(whole: Any):
    state, _ = whole
    half, _ = run(COUNTING, 0, SEEDS, (0, 2), (2, 4))  # comes back to the host, as from a checkpoint
    end, _ = segment.segment(COUNTING, *placed(seed_mesh(SEEDS), 0, SEEDS, (4, 6), half))
    chex.assert_trees_all_equal(jax.device_get(end), state)


def test_nothing_is_transferred_while_a_segment_runs(whole: Any):
    arguments = placed(seed_mesh(SEEDS), 0, SEEDS, (0, 2), start(COUNTING, 0, SEEDS))
    double = jax.jit(lambda x: 2 * x)
    double(np.ones(2, np.float32))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(segment.segment(COUNTING, *arguments))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):  # the guard is on
            double(np.ones(2, np.float32))


def test_old_state_is_given_up_to_the_new_one(whole: Any):
    arguments = placed(seed_mesh(SEEDS), 0, SEEDS, (0, 2), start(COUNTING, 0, SEEDS))
    _, rows, keys, _, old = arguments
    jax.block_until_ready(segment.segment(COUNTING, *arguments))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not rows.obs.stored.is_deleted() and not keys.is_deleted()
