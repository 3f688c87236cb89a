"""The normaliser, the device window, and the chunks that are drawn from it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mac.data.convert import prepare
from mac.data.normalize import Normalize, fit_minmax, fit_normalizer
from mac.data.quantize import summarize
from mac.data.sampler import sample
from mac.data.store import ShardRows, Statistics, Store
from mac.data.window import make_window, start_counts
from mac.errors import UserError
from mac.types import SampleSpec
from tests.helpers.small_datasets import SPEC, identity, write_pair


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_pair(tmp_path)


# Normaliser.


def test_normaliser_is_minmax_with_a_floor():
    norm = fit_minmax(np.array([[-1.0, 5.0], [1.0, 5.0], [0.5, 5.0]], np.float32))
    # 3 / (1 + 1e-3) = 2.997003; a constant entry is divided by 1e-3 alone.
    out = norm.apply(jnp.array([[3.0, 5.002]], jnp.float32))
    np.testing.assert_allclose(out[0], [2.997003, 2.0], rtol=1e-3)
    # The midpoint and half range of (-1, 3) are 1 and 2: (3 - 1) / 2.001 = 0.9995002498750625.
    norm = fit_minmax(np.array([[-1.0], [3.0]], np.float32))
    np.testing.assert_allclose(norm.apply(jnp.array([3.0])), [0.9995002498750625], rtol=1e-6)


@pytest.mark.parametrize("how", ["minmax", "standard"])
def test_constant_validation_columns_use_training_statistics(how: Normalize):
    rng = np.random.default_rng(0)
    train, val = (rng.normal(size=(rows, 4)).astype(np.float32) for rows in (500, 50))
    train[:, 1] = rng.integers(0, 2, 500)  # a button that nobody pressed in the validation episodes
    train[:, 3], val[:, 3] = train[:, 3] * 1e-4 + 5, val[:, 3] * 1e-4  # nearly constant, elsewhere
    val[:, 1] = 0
    norm, notes = fit_normalizer(how, Statistics(summarize(train), summarize(val)))
    assert len(notes) == 1 and "observation columns 1, 3 hardly vary in the validation rows" in notes[0]
    assert np.abs(norm.apply(jnp.asarray(train))).max() < 5
    alone, none = fit_normalizer(how, Statistics(summarize(val), None))
    assert none == ()
    for name in ("center", "half_range"):  # all other columns, to the bit
        ours, theirs = np.asarray(getattr(norm, name)), np.asarray(getattr(alone, name))
        np.testing.assert_array_equal(ours[[0, 2]], theirs[[0, 2]])


def test_ordinary_columns_keep_the_bits_of_the_validation_rows():
    rng = np.random.default_rng(1)
    train, val = (rng.normal(size=(rows, 28)).astype(np.float32) for rows in (2000, 100_000))
    low, high, wide = val.min(axis=0), val.max(axis=0), val.astype(np.float64)
    want = {"minmax": (high / 2 + low / 2, high / 2 - low / 2)}
    want["standard"] = tuple(np.float32(x) for x in (wide.mean(axis=0), wide.std(axis=0)))
    for how in ("minmax", "standard"):
        norm, notes = fit_normalizer(how, Statistics(summarize(train), summarize(val)))
        np.testing.assert_array_equal(norm.center, want[how][0])
        np.testing.assert_array_equal(norm.half_range, want[how][1])
        assert notes == ()


@pytest.mark.parametrize("seed", range(5))
def test_invert_undoes_apply(seed: int):
    rng = np.random.default_rng(seed)
    obs = (rng.normal(size=(50, 4)) * [1e-3, 1, 10, 0] + [0, 5, -3, 2]).astype(np.float32)
    norm = fit_minmax(obs)
    np.testing.assert_allclose(norm.invert(norm.apply(jnp.asarray(obs))), obs, rtol=1e-6, atol=1e-6)


def test_some_entries_are_normalised_as_they_are_among_all():
    obs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    norm = fit_minmax(obs[:30])
    part = norm.part((2, 0)).apply(jnp.asarray(obs[:, [2, 0]]))
    np.testing.assert_array_equal(part, norm.apply(jnp.asarray(obs))[:, jnp.asarray([2, 0])])


def reachable(first: np.ndarray, length: np.ndarray, chunk: int) -> np.ndarray:
    """Every row at which a chunk may begin, from the counts of each episode."""
    return np.concatenate([f + np.arange(n) for f, n in zip(first, start_counts(length, chunk), strict=True)])


# Window.


@pytest.mark.parametrize(("chunk", "count"), [(1, 998), (5, 994), (10, 989), (25, 974), (32, 967)])
def test_number_of_starts_per_thousand_transitions(chunk: int, count: int):
    first, length = np.array([0, 1001]), np.array([1001, 1001])
    starts = reachable(first, length, chunk)
    np.testing.assert_array_equal(starts, np.concatenate([np.arange(count), 1001 + np.arange(count)]))


@pytest.mark.parametrize("seed", range(20))
def test_starts_are_the_rows_whose_chunk_meets_no_terminal(seed: int):
    """The reference knows episodes by compact flags, set on the last two rows of each."""
    rng = np.random.default_rng(seed)
    length = rng.integers(2, 30, size=rng.integers(1, 8))
    first = np.cumsum(length) - length
    chunk = int(rng.integers(1, 12))
    rows = int(length.sum())
    flagged = set((first + length - 1).tolist()) | set((first + length - 2).tolist())
    want = [i for i in range(rows - chunk) if flagged.isdisjoint(range(i, i + chunk + 1))]
    np.testing.assert_array_equal(reachable(first, length, chunk), want)


def test_window_rows_are_normalised_clipped_and_relabelled(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    norm = fit_minmax(store.statistics_obs)
    raw = store.train[0]

    def relabel(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.testing.assert_array_equal(obs, raw.obs)  # raw, not normalised
        return np.where(obs[:, 1] > 0, 0.0, -1.0), obs[:, 1] <= 0

    window = make_window(store, norm, SampleSpec(1, 3), relabel)
    np.testing.assert_allclose(window.obs[:], norm.apply(jnp.asarray(raw.obs)), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(window.action[:], raw.action)
    assert window.reward is not None and window.mask is not None
    np.testing.assert_array_equal(window.reward, np.where(raw.obs[:, 1] > 0, 0, -1))
    np.testing.assert_array_equal(window.mask, np.where(raw.obs[:, 1] > 0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(window)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    # Episodes of 16, 14, 19 rows: 11 + 9 + 14 starts, 15 + 13 + 18 transitions.
    assert int(window.episodes.n_starts) == 34 and int(window.episodes.n_steps) == 46
    np.testing.assert_array_equal(window.episodes.starts_before, [0, 11, 20])
    np.testing.assert_array_equal(window.episodes.steps_before, [0, 15, 28])


def test_returns_are_sums_of_the_rewards_to_each_episodes_end(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    rng = np.random.default_rng(0)
    reward = rng.integers(-5, 1, len(store.train[0].obs)).astype(np.float32)

    def relabel(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return reward, np.ones_like(reward)

    without, window = (
        make_window(store, identity(), SampleSpec(1, 3, return_to_go=x), relabel) for x in (False, True)
    )
    assert without.return_to_go is None and window.return_to_go is not None
    want, start = [], 0
    for length in (16, 14, 19):
        rewards = reward[start : start + length - 1]  # the final state's action has no meaning
        want += [rewards[t:].sum() for t in range(length)]
        start += length
    np.testing.assert_array_equal(window.return_to_go, want)


def test_a_batch_holds_the_states_and_returns_of_its_chunks(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)

    def relabel(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(obs), dtype=np.float32), np.ones(len(obs), np.float32)

    spec = SampleSpec(batch=200, chunk=4, reward_scale=0.5, states=True, return_to_go=True)
    with pytest.raises(ValueError, match="no returns"):
        sample(make_window(store, identity(), SampleSpec(1, 4), relabel), spec, jax.random.key(0))
    window = make_window(store, identity(), SampleSpec(1, 4, return_to_go=True), relabel)
    batch = sample(window, spec, jax.random.key(0))
    row = np.rint(np.asarray(batch.obs[:, 0])).astype(int)  # column 0 is the row number
    assert batch.states is not None and batch.return_to_go is not None
    np.testing.assert_array_equal(batch.states, window.obs[row[:, None] + 1 + np.arange(4)])
    np.testing.assert_array_equal(batch.states[:, -1], batch.next_obs)
    last = np.asarray([14, 28, 47])[np.searchsorted([15, 29], row, side="right")]
    want = [
        [0.5 * np.arange(r + j, end + 1).sum() for j in range(5)] for r, end in zip(row, last, strict=True)
    ]
    np.testing.assert_allclose(batch.return_to_go, want, rtol=1e-6)


def test_saturated_actions_are_clipped_when_drawn(tmp_path: Path):
    split = ShardRows(
        np.zeros((9, 3), np.float32), np.full((9, 2), -1.0, np.float32), np.array([0]), np.array([9])
    )
    window = make_window(Store(tmp_path, "toy-v0", (split,), None, ()), identity(), SampleSpec(1, 2))
    batch = sample(window, SampleSpec(batch=5, chunk=2), jax.random.key(0))
    np.testing.assert_array_equal(batch.actions, np.float32(-0.99999))
    assert window.reward is None and window.mask is None


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_chunks_stay_in_one_episode_and_reach_every_start(tmp_path: Path, train: Path, chunk: int):
    store = prepare(train, tmp_path / "store", SPEC)
    window = make_window(store, identity(), SampleSpec(1, chunk))
    batch = sample(window, SampleSpec(batch=2000, chunk=chunk), jax.random.key(0))
    row = np.rint(np.asarray(batch.obs[:, 0])).astype(int)  # column 0 is the row number
    last = np.rint(np.asarray(batch.next_obs[:, 0]))
    np.testing.assert_array_equal(last, row + chunk)
    split = store.train[0]
    episode = np.searchsorted(split.first, row, side="right") - 1
    final = (split.first + split.length - 1)[episode]
    assert (last <= final - 2).all()
    assert set(row) == set(reachable(split.first, split.length, chunk).tolist())
    np.testing.assert_array_equal(batch.actions[:, -1], np.asarray(window.action[:])[row + chunk - 1])


def test_chunk_longer_than_every_episode_is_an_error(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    window = make_window(store, identity(), SampleSpec(1, 16))
    assert int(window.episodes.n_starts) == 1  # 18 transitions: T - 1 - 16
    with pytest.raises(UserError, match=r"chunk=17: the longest has 18 transitions, 19 are needed"):
        make_window(store, identity(), SampleSpec(1, 17))


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_must_be_positive(tmp_path: Path, train: Path, chunk: int):
    store = prepare(train, tmp_path / "store", SPEC)
    with pytest.raises(UserError, match=f"chunk={chunk}: a chunk has at least 1 action"):
        make_window(store, identity(), SampleSpec(1, chunk))
