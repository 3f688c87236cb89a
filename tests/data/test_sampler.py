"""Chunks drawn on the device, against the rows they were drawn from."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.data.sampler import sample
from mac.data.window import index_episodes
from mac.types import Batch, GoalDistribution, GoalSpec, SampleSpec, Window
from tests.helpers.toy_env import from_rows

draw = jax.jit(sample, static_argnums=1)


def numbered(lengths: list[int], chunk: int) -> Window:
    """Episodes whose observations are (row, episode), and whose actions are (row, -row) / 1000."""
    row = np.arange(sum(lengths), dtype=np.float32)
    episode = np.repeat(np.arange(len(lengths), dtype=np.float32), lengths)
    obs, action = np.stack([row, episode], -1), np.stack([row, -row], -1) / 1000
    window = from_rows(obs, action, np.asarray(lengths), chunk)
    return dataclasses.replace(window, reward=jnp.asarray(10 * row), mask=jnp.asarray(row % 3))


def expected(start: np.ndarray, chunk: int) -> list[list[float]]:
    """Rows of each chunk, one at a time."""
    return [[float(i + j) for j in range(chunk)] for i in start]


@pytest.mark.parametrize("seed", range(6))
def test_chunks_hold_consecutive_rows_of_one_episode(seed: int):
    rng = np.random.default_rng(seed)
    chunk = int(rng.integers(1, 6))
    lengths = rng.integers(3, 30, 5).tolist()
    lengths[0] = 30  # one episode is long enough whatever the draw
    batch = draw(numbered(lengths, chunk), SampleSpec(64, chunk), jr.key(seed))
    start = np.asarray(batch.obs)[:, 0]
    rows = expected(start, chunk)
    np.testing.assert_allclose(batch.actions[..., 0] * 1000, rows, rtol=1e-6)
    np.testing.assert_allclose(batch.actions[..., 1] * 1000, -np.asarray(rows), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(batch.next_obs)[:, 0], start + chunk)
    np.testing.assert_array_equal(np.asarray(batch.next_obs)[:, 1], np.asarray(batch.obs)[:, 1])


def test_rewards_and_masks_are_those_of_each_actions_state():
    batch = draw(numbered([20], 3), SampleSpec(16, 3), jr.key(0))
    assert batch.rewards is not None and batch.masks is not None
    rows = np.asarray(expected(np.asarray(batch.obs)[:, 0], 3))
    np.testing.assert_array_equal(batch.rewards, 10 * rows)
    np.testing.assert_array_equal(batch.masks, rows % 3)


def test_starts_are_drawn_uniformly_with_replacement():
    chunk, lengths = 4, [16, 5, 27]  # T-1-n starts for T transitions: 10, none, 21
    batch = draw(numbered(lengths, chunk), SampleSpec(31 * 1000, chunk), jr.key(0))
    rows, counts = np.unique(np.asarray(batch.obs)[:, 0], return_counts=True)
    np.testing.assert_array_equal(rows, [*range(10), *range(21, 42)])
    # Chi-squared with 30 degrees of freedom: above 59.7 once in a thousand.
    assert np.sum((counts - 1000) ** 2 / 1000) < 59.7


def test_padding_in_the_table_of_episodes_changes_no_draw():
    window = numbered([9, 3, 12], 2)
    first, length = np.asarray([0, 9, 12]), np.asarray([9, 3, 12])
    wide = dataclasses.replace(window, episodes=index_episodes(first, length, 2, room=8))
    assert wide.episodes.first.shape == (8,)
    spec = SampleSpec(
        512,
        2,
        GoalSpec((0, 1), GoalDistribution(0.2, 0.4, 0.4, False, 0.9), GoalDistribution(0, 0, 1, True, 0.9)),
    )
    for got, want in zip(
        jax.tree.leaves(draw(wide, spec, jr.key(0))),
        jax.tree.leaves(draw(window, spec, jr.key(0))),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_windows_of_unequal_episodes_share_one_program():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(window: Window, key: jax.Array) -> Batch:
        return sample(window, SampleSpec(4, 2), key)

    for lengths in ([20, 20], [15, 25], [3, 37]):
        traced(numbered(lengths, 2), jr.key(0))


def test_one_key_gives_one_batch_and_another_key_another():
    window, spec = numbered([50], 2), SampleSpec(32, 2)
    first, again, other = (np.asarray(draw(window, spec, jr.key(k)).obs) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_window_without_rewards_gives_batches_without_them():
    window = dataclasses.replace(numbered([20], 2), reward=None, mask=None)
    batch = draw(window, SampleSpec(4, 2), jr.key(0))
    assert batch.rewards is None and batch.masks is None
