"""Rows so far into an array that their elements have numbers beyond 2**31."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.data.sampler import sample
from mac.data.window import aligned_empty, index_episodes, make_column
from mac.free_memory import free_memory
from mac.types import SampleSpec, Window

LENGTH = 1001


def numbered_codes(rows: int, width: int) -> np.ndarray:
    """Codes whose first two columns spell the row number and whose last is a check of it; the rest is 0."""
    codes = aligned_empty((rows, width), np.dtype(np.uint16))
    codes[:] = 0
    row = np.arange(rows)
    codes[:, 0], codes[:, 1] = row % 2**16, row // 2**16
    codes[:, -1] = (row * 7 + 3) % 2**16
    return codes


def check_rows_far_out(rows: int, width: int) -> None:
    """Draws chunks from the last episodes of a window of so many rows, and looks at what they hold."""
    episodes = rows // LENGTH
    rows = episodes * LENGTH
    assert rows * width > 2**31 + 2**26 and rows < 2**31
    length = np.full(episodes, LENGTH)
    length[: episodes - 60] = 1  # of one row, where no chunk may begin: all are drawn from the far end
    first = np.arange(episodes) * LENGTH
    far = first[episodes - 60]
    assert far * width > 2**31
    window = Window(
        obs=make_column(jax.device_put(numbered_codes(rows, width))),
        action=make_column(jnp.zeros((rows, 1), jnp.uint16)),
        reward=None,
        mask=None,
        episodes=index_episodes(first, length, 10),
    )
    batch = jax.jit(sample, static_argnums=1)(window, SampleSpec(4096, 10), jr.key(0))
    obs, after = (np.asarray(x).astype(np.int64) for x in (batch.obs, batch.next_obs))
    row = obs[:, 0] + 2**16 * obs[:, 1]
    assert far <= row.min() and rows - LENGTH < row.max() < rows and len(np.unique(row)) > 3500
    np.testing.assert_array_equal(obs[:, -1], (row * 7 + 3) % 2**16)
    np.testing.assert_array_equal(after[:, 0] + 2**16 * after[:, 1], row + 10)
    np.testing.assert_array_equal(obs[:, 2:-1], 0)


@pytest.mark.slow
def test_rows_beyond_two_to_the_31_elements_are_read():
    free = free_memory().host
    if free is not None and free < 7e9:
        pytest.skip("needs 7 GB of memory")
    check_rows_far_out(24_000_000, 99)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_are_read_on_an_accelerator():
    check_rows_far_out(100_100_000, 104)
