"""Devices that share the batch of a seed: which do, that only rounding changes, and what they exchange."""

import dataclasses
import zlib
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments.benchmarks.hosts import Collective, collectives
from mac.batch_axis import batch_devices, share_rows
from mac.data.normalize import Normalizer
from mac.errors import UserError
from mac.mac import MAC
from mac.run import hosts
from mac.run.evaluate import Policies, evaluate, evaluate_on_all, evaluation_keys
from mac.run.io.checkpoint import _part_checksums, _whole_checksum, crc32_combine
from mac.run.mesh import ALL, SEED, mesh_shape, over_seeds, place, run_mesh, seed_keys, seed_mesh
from mac.run.segment import init, segment
from mac.types import Episodes
from tests.helpers.toy_env import GOAL_SPEC, SMALL, SPEC, PointEnv, mac, window

HALF = dataclasses.replace(SMALL, rollout_batch=4)
"""Imagination begins in half of the batch, which some devices would hold alone."""


@pytest.mark.parametrize(
    ("seeds", "batch", "devices", "processes", "shape"),
    [
        (4, 256, 1, 1, (1, 1)),
        (4, 256, 8, 1, (4, 2)),
        (1, 1024, 8, 1, (1, 8)),
        (1, 1024, 64, 8, (1, 64)),
        (3, 256, 8, 1, (3, 2)),  # two stay idle
        (4, 255, 8, 1, (4, 1)),
        (2, 8, 4, 2, (2, 2)),
        (3, 8, 4, 2, (1, 4)),  # each process takes part
    ],
)
def test_seeds_come_first_then_their_batches(
    seeds: int, batch: int, devices: int, processes: int, shape: tuple[int, int]
):
    assert mesh_shape(seeds, batch, devices, processes) == shape


@pytest.mark.parametrize(
    ("seeds", "devices", "processes", "share", "shape"),
    [(2, 4, 1, 0, (2, 1)), (2, 4, 1, 2, (2, 2)), (1, 2, 2, 0, (1, 2)), (2, 2, 2, 0, (2, 1))],
)
def test_cpus_share_batches_only_where_asked(
    seeds: int, devices: int, processes: int, share: int, shape: tuple[int, int]
):
    assert mesh_shape(seeds, 8, devices, processes, share=share, on_cpu=True) == shape


@pytest.mark.parametrize(
    ("seeds", "batch", "devices", "processes", "share", "named"),
    [(1, 8, 3, 3, 0, "3 processes"), (1, 8, 4, 1, 3, "--run.batch-devices=3"), (1, 8, 2, 1, 4, "=4")],
)
def test_a_mesh_that_cannot_be_is_one_line(
    seeds: int, batch: int, devices: int, processes: int, share: int, named: str
):
    with pytest.raises(UserError, match=named) as error:
        mesh_shape(seeds, batch, devices, processes, share=share)
    assert "\n" not in str(error.value)


def test_mesh_without_shared_batches_is_that_of_seeds():
    """So the program, and every bit, is the one that there was before batches could be shared."""
    assert run_mesh(2, 8) == seed_mesh(2)
    assert run_mesh(1, 8) == seed_mesh(1)
    assert run_mesh(1, 8, 2).axis_names == ("seed", "batch")


def test_rows_are_shared_only_within_such_a_mesh():
    x = {"even": jnp.ones((4, 3)), "odd": jnp.ones(3), "number": jnp.ones(())}
    assert share_rows(x) is x and batch_devices() == 1
    seen = []

    def look(tree: Any) -> Any:
        seen.append(batch_devices())
        return share_rows(tree)

    mesh = run_mesh(1, 8, 2)
    shared = jax.jit(over_seeds(look, mesh, (ALL,), ALL))(x)
    assert seen == [2]
    chex.assert_trees_all_equal(shared, x)
    # As on a GPU, where the seeds of a device are mapped over at once.
    mapped = jax.jit(over_seeds(jax.vmap(look), mesh, (SEED,), SEED))({"x": jnp.ones((3, 4))})
    chex.assert_trees_all_equal(mapped, {"x": jnp.ones((3, 4))})


def trained(algo: MAC, mesh: jax.sharding.Mesh) -> tuple[Any, str]:
    """State and metrics after three updates of one seed on `mesh`, and the text of the compiled program."""
    keys = place(mesh, seed_keys(3, 1), SEED)
    rows = place(mesh, window(algo.sample.chunk), ALL)
    steps = place(mesh, np.arange(3, dtype=np.int32), ALL)
    state = init(algo, mesh, keys)
    program = segment.lower(algo, mesh, rows, keys, steps, state).compile()
    return jax.device_get(program(rows, keys, steps, state)), program.as_text()


@pytest.mark.parametrize("algo", [mac(), MAC(HALF, GOAL_SPEC, 10)], ids=["rewards", "goals"])
def test_shared_batch_gives_the_update_of_the_whole(algo: MAC):
    (state, metrics), text = trained(algo, run_mesh(1, algo.sample.batch, 2))
    (alone, alone_metrics), _ = trained(algo, seed_mesh(1))
    chex.assert_trees_all_close(state.nets, alone.nets, rtol=0, atol=1e-6)
    chex.assert_trees_all_close(state.target, alone.target, rtol=0, atol=1e-6)
    chex.assert_trees_all_close(metrics, alone_metrics, rtol=1e-5, atol=1e-6)
    # Each update sums gradients, and moves no activations: those of half a batch are spread anew, narrow.
    found = [each for each in collectives(text) if each.loops]
    assert all(each.loops <= 2 for each in found), found
    sums = sum(each.bytes for each in found if each.kind == "all-reduce")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(alone.nets))
    assert weights <= sums < 1.1 * weights + 100
    narrow = algo.sample.batch * (algo.env.obs_dim + (algo.env.goal_dim or 0)) * 4
    assert sum(each.bytes for each in found if each.kind != "all-reduce") <= narrow


def test_collectives_are_read_from_a_program():
    text = (
        '  %a = (f32[8,4]{1,0}, f32[]) all-reduce(%x, %y), metadata={op_name="jit(f)/while/body/sum"}\n'
        "  %b = f32[2]{0} all-gather-start(%z), dimensions={0}\n  %c = f32[3]{0} add(%x, %all-reduce)\n"
    )
    assert list(collectives(text)) == [Collective("all-reduce", 132, 1), Collective("all-gather", 8, 0)]


# Evaluations in parts.


def test_parts_of_an_evaluation_make_the_whole(monkeypatch: pytest.MonkeyPatch):
    """Of 3 seeds and 2 x 5 episodes by 2 processes, and of 2 seeds by 4: seeds first, then episodes."""
    algo = MAC(SMALL, SPEC, 10)
    states = jax.jit(jax.vmap(algo.init))(jr.split(jr.key(0), 3))
    normalizer = Normalizer(jnp.zeros(2), jnp.ones(2))
    for seeds, processes in ((3, 2), (2, 4)):
        state = jax.tree.map(lambda x, seeds=seeds: x[:seeds], states)
        keys = evaluation_keys(jnp.arange(seeds), 7)
        whole = jax.device_get(evaluate(Policies(algo, normalizer, state), PointEnv(), 5, keys))

        def play(lanes: slice, columns: tuple[int, int], state=state, keys=keys) -> Episodes:
            mine = jax.tree.map(lambda x: x[lanes], state)
            policies = Policies(algo, normalizer, mine)
            return jax.device_get(evaluate(policies, PointEnv(), 5, keys[lanes], columns=columns))

        parts = []
        monkeypatch.setattr(hosts, "count", lambda processes=processes: processes)
        for number in range(processes):
            monkeypatch.setattr(hosts, "number", lambda number=number: number)
            with pytest.raises(StopIteration):
                monkeypatch.setattr(hosts, "gather_arrays", _keep(parts))
                evaluate_on_all(play, seeds, 2, 5)
        monkeypatch.setattr(hosts, "gather_arrays", lambda mine, parts=parts: parts)
        found = evaluate_on_all(play, seeds, 2, 5)
        np.testing.assert_array_equal(found.success, whole.success)
        np.testing.assert_array_equal(found.length, whole.length)
        np.testing.assert_allclose(found.episode_return, whole.episode_return, atol=1e-5)
        np.testing.assert_allclose(found.predicted, whole.predicted, atol=1e-5)


def _keep(parts: list[dict[str, np.ndarray]]) -> Any:
    def gather(mine: dict[str, np.ndarray]) -> Any:
        parts.append(mine)
        raise StopIteration

    return gather


# Checksums of arrays that several processes write.


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (7, 0), (100, 3), (3, 100_001)])
def test_checksums_of_two_pieces_combine(first: int, second: int):
    data = np.random.default_rng(0).bytes(first + second)
    a, b = data[:first], data[first:]
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(data)


def test_checksum_of_parts_is_that_of_the_array():
    values = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    for mesh in (seed_mesh(4), run_mesh(1, 8, 2)):
        placed = place(mesh, values, SEED)
        parts = _part_checksums(placed)
        assert sum(size for _, size, _ in parts) == values.nbytes
        assert _whole_checksum([parts[1:], parts[:1]]) == zlib.crc32(values.data)


def test_shared_batches_refuse_fused_kernels():
    from mac.run.train import RunConfig

    with pytest.raises(UserError, match="batch-devices"):
        RunConfig(batch_devices=2, kernels="fused")
    assert eqx.tree_equal(RunConfig(batch_devices=2, kernels="plain").numerics.kernels, "plain")
