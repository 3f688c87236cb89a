"""The ring of imagined transitions: what it holds after wrapping around, and what is drawn from it."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.ops.replay import Replay, ReplaySpec, draw, empty_replay, write

SPEC = ReplaySpec(rows=5, kept=3, every=10, batch=4)
ROW = {"state": jnp.zeros(2), "reward": jnp.zeros(())}
SEEDS = 2
VOID = -1.0


def rollout(number: int, counts: tuple[int, ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Transitions that say which rollout, seed and row they are; those beyond a seed's count are `VOID`."""
    name = np.full((len(counts), SPEC.rows), VOID, np.float32)
    for seed, count in enumerate(counts):
        name[seed, :count] = 1000 * number + 100 * seed + np.arange(count)
    return {"state": np.stack([name, -name], axis=-1), "reward": name}, np.asarray(counts)


def filled(counts: list[tuple[int, ...]]) -> Replay:
    """The rings of the seeds after rollouts 0, 1, ... with so many valid transitions of each seed."""
    rings = jax.vmap(lambda _: empty_replay(SPEC, ROW))(jnp.arange(len(counts[0])))
    put = jax.jit(write, static_argnames="room")
    for number, each in enumerate(counts):
        rows, count = rollout(number, each)
        rings = put(rings, jnp.asarray(number % SPEC.kept), rows, jnp.asarray(count), room=SPEC.rows)
    return rings


def names(ring: Replay, seed: int) -> list[float]:
    """The valid transitions of a seed's ring."""
    slots = np.asarray(ring.rows["reward"][seed]).reshape(SPEC.kept, SPEC.rows)
    count = np.asarray(ring.count[seed])
    return [float(x) for slot, n in zip(slots, count, strict=True) for x in slot[:n]]


def drawn(ring: Replay, seed: int, batch: int, key: int = 0) -> Any:
    taken = jax.jit(draw, static_argnames=("batch", "room"))
    return taken(ring, jnp.asarray(seed), jr.key(key), batch, room=SPEC.rows)


def test_capacity_is_that_of_all_slots():
    assert SPEC.capacity == 15
    ring = empty_replay(SPEC, ROW)
    assert ring.rows["state"].shape == (15, 2) and ring.rows["reward"].shape == (15,)
    np.testing.assert_array_equal(ring.count, [0, 0, 0])


@pytest.mark.parametrize("rollouts", [1, 3, 4, 8])
def test_ring_holds_the_newest_rollouts_as_a_list_does(rollouts: int):
    rng = np.random.default_rng(rollouts)
    counts = [tuple(int(n) for n in rng.integers(0, SPEC.rows + 1, SEEDS)) for _ in range(rollouts)]
    ring = filled(counts)
    for seed in range(SEEDS):
        kept: list[list[float]] = []
        for number, each in enumerate(counts):
            kept.append([float(1000 * number + 100 * seed + i) for i in range(each[seed])])
            kept = kept[-SPEC.kept :]
        assert sorted(names(ring, seed)) == sorted(x for each in kept for x in each)


def test_new_rollout_leaves_the_other_slots_alone():
    before, after = filled([(5, 5)] * 3), filled([(5, 5)] * 4)
    for x, y in zip(jax.tree.leaves(before.rows), jax.tree.leaves(after.rows), strict=True):
        np.testing.assert_array_equal(x[:, SPEC.rows :], y[:, SPEC.rows :])
        assert not np.array_equal(x[:, : SPEC.rows], y[:, : SPEC.rows])


@pytest.mark.parametrize("counts", [[(5, 2)], [(3, 1), (0, 5), (2, 0)], [(1, 5), (0, 1), (2, 2), (0, 3)]])
def test_draws_are_uniform_over_valid_rows_of_the_own_ring(counts: list[tuple[int, ...]]):
    """In slots that are partly filled, empty, or were filled before; 4 standard deviations at most."""
    ring, draws = filled(counts), 20_000
    for seed in range(SEEDS):
        rows = drawn(ring, seed, draws, key=seed)
        found, times = np.unique(np.asarray(rows["reward"]), return_counts=True)
        valid = sorted(names(ring, seed))
        assert list(found) == valid and VOID not in found
        np.testing.assert_array_equal(rows["state"], np.stack([rows["reward"], -rows["reward"]], -1))
        share = 1 / len(valid)
        assert np.abs(times - draws * share).max() <= 4 * np.sqrt(draws * share * (1 - share)) + 1e-9


def test_draws_depend_on_key_and_ring_only():
    """A ring among others gives what it gives alone."""
    ring = filled([(5, 3), (4, 5)])
    alone = jax.tree.map(lambda x: x[1:], ring)
    for key in range(3):
        got, want = drawn(ring, 1, 64, key), drawn(alone, 0, 64, key)
        np.testing.assert_array_equal(got["reward"], want["reward"])
    assert not np.array_equal(drawn(ring, 1, 64, 0)["reward"], drawn(ring, 1, 64, 1)["reward"])


def test_draws_of_mapped_seeds_are_those_of_each():
    """As the loop maps them on an accelerator: the rings stay one argument, the seed's number is mapped."""
    ring, keys = filled([(5, 3), (2, 4), (1, 1)]), jr.split(jr.key(0), SEEDS)
    got = jax.vmap(lambda n, k: draw(ring, n, k, 16, room=SPEC.rows))(jnp.arange(SEEDS), keys)
    for seed in range(SEEDS):
        want = draw(ring, jnp.asarray(seed), keys[seed], 16, room=SPEC.rows)
        np.testing.assert_array_equal(got["state"][seed], want["state"])


def test_empty_ring_draws_zeros():
    """No rollout had a valid transition: nothing is read out of bounds."""
    ring = filled([(0, 0)])
    row = drawn(jax.tree.map(jnp.zeros_like, ring), 1, 3)
    assert np.isfinite(np.asarray(row["state"])).all()
