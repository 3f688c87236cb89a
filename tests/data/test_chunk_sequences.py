"""Sequences of chunks drawn on the device, against the rows they were drawn from."""

import dataclasses

import jax
import jax.random as jr
import numpy as np
import pytest

from mac.data.chunk_sequences import Sequences, check_sequences, sample_sequences
from mac.data.sampler import ACTION_LIMIT
from mac.data.window import index_episodes
from mac.errors import UserError
from mac.types import Window
from tests.helpers.toy_env import from_rows

draw = jax.jit(sample_sequences, static_argnums=(1, 2, 3))
ROWS = 400  # actions hold a row's number as a share of this, and so are never clipped


def numbered(lengths: list[int]) -> Window:
    """Episodes whose observations are (row, episode), and whose actions are (row, -row) / ROWS."""
    row = np.arange(sum(lengths), dtype=np.float32)
    episode = np.repeat(np.arange(len(lengths), dtype=np.float32), lengths)
    action = np.stack([row, -row], -1) / ROWS
    return from_rows(np.stack([row, episode], -1), action, np.asarray(lengths), chunk=1)


def must_be_stretches_of_the_data(got: Sequences, window: Window, chunk: int, count: int) -> None:
    """Follows each sequence row by row, from the row that it says it starts at."""
    obs, action = np.asarray(window.obs.stored), np.asarray(window.action.stored)
    for states, chunks in zip(np.asarray(got.obs), np.asarray(got.actions), strict=True):
        row = int(states[0, 0])
        for i in range(count):
            np.testing.assert_array_equal(states[i], obs[row])
            for j in range(chunk):
                assert obs[row, 1] == states[0, 1], "a row of another episode"
                np.testing.assert_array_equal(chunks[i, j], action[row])
                row += 1
        np.testing.assert_array_equal(states[count], obs[row])
        assert obs[row, 1] == states[0, 1], "ends in another episode"


@pytest.mark.parametrize("seed", range(6))
def test_sequences_are_stretches_of_one_episode_in_order(seed: int):
    rng = np.random.default_rng(seed)
    chunk, count = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    lengths = rng.integers(2, 40, 6).tolist()
    lengths[int(rng.integers(6))] = 40  # one episode is long enough whatever the draw
    window = numbered(lengths)
    got = draw(window, chunk, count, 32, jr.key(seed))
    assert got.obs.shape == (32, count + 1, 2) and got.actions.shape == (32, count, chunk, 2)
    must_be_stretches_of_the_data(got, window, chunk, count)


def test_rows_reshaped_without_a_transpose_are_no_stretches():
    """A stack over steps is [L n, B]; read as [B, L, n] it mixes trajectories, and looks right in shape."""
    window, chunk, count, batch = numbered([30, 30]), 2, 3, 8
    got = draw(window, chunk, count, batch, jr.key(0))
    must_be_stretches_of_the_data(got, window, chunk, count)
    by_step = np.asarray(got.actions).reshape(batch, count * chunk, 2).swapaxes(0, 1)
    scrambled = got._replace(actions=by_step.reshape(batch, count, chunk, 2))
    with pytest.raises(AssertionError):
        must_be_stretches_of_the_data(scrambled, window, chunk, count)


def test_starts_are_uniform_over_rows_whose_sequence_fits():
    # 6 transitions per sequence: episodes of 9, 3 and 6 rows less one leave 9 - 6 = 3 starts, none, and 1
    # (of 7 rows: 6 transitions fill it), then 14 - 6 = 8.
    window = numbered([9, 4, 7, 14])
    got = draw(window, 2, 3, 12 * 1000, jr.key(0))
    rows, counts = np.unique(np.asarray(got.obs)[:, 0, 0], return_counts=True)
    np.testing.assert_array_equal(rows, [0, 1, 2, 13, *range(20, 28)])
    # Chi-squared with 11 degrees of freedom: above 31.3 once in a thousand.
    assert np.sum((counts - 1000) ** 2 / 1000) < 31.3


def test_padding_in_the_table_of_episodes_changes_no_draw():
    window = numbered([9, 3, 12])
    first, length = np.asarray([0, 9, 12]), np.asarray([9, 3, 12])
    wide = dataclasses.replace(window, episodes=index_episodes(first, length, 1, room=8))
    for got, want in zip(draw(wide, 2, 2, 256, jr.key(3)), draw(window, 2, 2, 256, jr.key(3)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_chunk_lengths_of_one_horizon_see_the_same_stretches():
    """Equal keys give equal starts, so models of different chunk lengths are compared on the same data."""
    window = numbered([50, 40])
    short, long = draw(window, 1, 20, 64, jr.key(0)), draw(window, 10, 2, 64, jr.key(0))
    np.testing.assert_array_equal(np.asarray(short.obs)[:, ::10], long.obs)
    np.testing.assert_array_equal(
        np.asarray(short.actions).reshape(64, 20, 2), np.asarray(long.actions).reshape(64, 20, 2)
    )


def test_sequences_are_normalised_and_clipped_as_in_training():
    window = numbered([12])
    column = dataclasses.replace(window.obs, center=window.obs.center + 3, width=window.obs.width * 2)
    bold = dataclasses.replace(window.action, stored=window.action.stored * ROWS)
    got = draw(dataclasses.replace(window, obs=column, action=bold), 2, 3, 16, jr.key(0))
    rows = np.asarray(draw(window, 2, 3, 16, jr.key(0)).obs)
    np.testing.assert_allclose(got.obs, (rows - 3) / 2)
    assert np.abs(np.asarray(got.actions)).max() == np.float32(ACTION_LIMIT)


def test_sequence_that_fits_no_episode_is_one_line():
    length = np.asarray([5, 11])
    check_sequences("here", length, 5, 2)
    with pytest.raises(
        UserError, match=r"--horizon=12: .* 3 chunks of 4 actions .* longest has 10"
    ) as caught:
        check_sequences("--horizon=12", length, 4, 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="at least 1"):
        check_sequences("here", length, 0, 3)
