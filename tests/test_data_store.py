"""The flat store, the normaliser and the device window."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mac.data import store as store_module
from mac.data.normalize import Normalizer, fit_minmax
from mac.data.npz import read
from mac.data.sampler import sample
from mac.data.store import Split, Store, prepare, shard_files
from mac.data.window import make_window, valid_starts
from mac.errors import UserError
from mac.types import EnvSpec, SampleSpec

SPEC = EnvSpec("toy-v0", obs_dim=3, action_dim=2, goal_dim=None, tasks=(1,), max_steps=9, control_dt=0.05)


def write(path: Path, lengths: tuple[int, ...], seed: int = 0) -> Path:
    """An OGBench file whose first observation column is the row number."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(lengths) - 1] = True
    obs = rng.normal(size=(rows, 3)).astype(np.float32)
    obs[:, 0] = np.arange(rows)
    action = rng.uniform(-1, 1, size=(rows, 2)).astype(np.float32)
    np.savez_compressed(path, observations=obs, actions=action, terminals=terminals)
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """A training file of three episodes with a validation file of one beside it."""
    write(tmp_path / "toy-val.npz", (20,), seed=1)
    return write(tmp_path / "toy.npz", (16, 14, 19))


def identity(dim: int = 3) -> Normalizer:
    return Normalizer(jnp.zeros(dim), jnp.full(dim, 1 - 1e-3))


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".new-" in p.name]


# Store.


def test_store_holds_what_the_file_holds(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    want = read(train)
    for name in ("obs", "action", "first", "length"):
        np.testing.assert_array_equal(getattr(store.train[0], name), getattr(want, name))
    assert store.val is not None
    np.testing.assert_array_equal(store.val.obs, read(tmp_path / "toy-val.npz").obs)
    assert (store.rows, store.episodes, store.env, store.notes) == (49, 3, "toy-v0", ())
    assert isinstance(store.train[0].obs, np.memmap)
    assert leftovers(tmp_path) == []


def test_second_prepare_converts_nothing(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(train, tmp_path / "store", SPEC)
    monkeypatch.setattr(store_module, "read", lambda path: pytest.fail("read again"))
    assert prepare(train, tmp_path / "store", SPEC).rows == 49


def test_changed_file_is_converted_again_while_old_rows_stay_readable(tmp_path: Path, train: Path):
    old = prepare(train, tmp_path / "store", SPEC)
    before = np.array(old.train[0].obs)
    write(train, (16, 14, 19), seed=7)
    os.utime(train, ns=(1, 1))  # a copy may carry any time, not only a later one
    new = prepare(train, tmp_path / "store", SPEC)
    np.testing.assert_array_equal(new.train[0].obs, read(train).obs)
    np.testing.assert_array_equal(old.train[0].obs, before)
    assert not np.array_equal(new.train[0].obs, before)
    assert leftovers(tmp_path) == []


def test_added_validation_file_is_noticed(tmp_path: Path):
    file = write(tmp_path / "toy.npz", (16,))
    store = prepare(file, tmp_path / "store", SPEC)
    assert store.val is None
    assert store.statistics_obs is store.train[0].obs
    assert "toy-val.npz: absent" in store.notes[0]
    write(tmp_path / "toy-val.npz", (12,), seed=1)
    store = prepare(file, tmp_path / "store", SPEC)
    assert store.val is not None
    assert store.statistics_obs is store.val.obs
    assert store.notes == ()


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in (2, 0, 1):
        write(folder / f"toy-{i:03d}.npz", (10 + i,), seed=i)
        write(folder / f"toy-{i:03d}-val.npz", (5,), seed=10 + i)
    store = prepare(folder, tmp_path / "store", SPEC)
    assert [len(split.obs) for split in store.train] == [10, 11, 12]
    assert store.val is not None
    np.testing.assert_array_equal(store.val.obs, read(folder / "toy-000-val.npz").obs)
    window = make_window(store, identity(), chunk=2, shard=1)
    assert window.obs.shape == (11, 3)


def test_killed_conversion_leaves_nothing_that_is_read(tmp_path: Path, train: Path):
    # What a kill leaves behind: a temporary folder, and no folder under the store's own name.
    half = tmp_path / ".store.new-killed"
    half.mkdir()
    (half / "meta.json").write_text("{")
    assert prepare(train, tmp_path / "store", SPEC).rows == 49
    assert leftovers(tmp_path) == []


def test_concurrent_prepares_convert_once(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch):
    reads = []

    def slow_read(path: Path):
        reads.append(path)
        time.sleep(0.05)
        return read(path)

    monkeypatch.setattr(store_module, "read", slow_read)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: prepare(train, tmp_path / "store", SPEC), range(4)))
    assert [s.rows for s in stores] == [49] * 4
    assert len(reads) == 2  # training and validation


def test_store_of_another_environment_is_refused(tmp_path: Path, train: Path):
    with pytest.raises(UserError, match="has 3 observation and 2 action columns, toy-v0 has 4 and 2"):
        prepare(train, tmp_path / "store", SPEC._replace(obs_dim=4))
    assert not (tmp_path / "store").exists()
    assert leftovers(tmp_path) == []


def test_bad_file_leaves_the_previous_store_in_place(tmp_path: Path, train: Path):
    prepare(train, tmp_path / "store", SPEC)
    train.write_bytes(train.read_bytes()[:100])
    with pytest.raises(UserError, match=r"not a complete \.npz archive"):
        prepare(train, tmp_path / "store", SPEC)
    assert Store.open(tmp_path / "store").rows == 49


def test_damaged_store_is_named(tmp_path: Path, train: Path):
    prepare(train, tmp_path / "store", SPEC)
    file = tmp_path / "store" / "train-000" / "obs.npy"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"store: damaged store .* delete this folder"):
        Store.open(tmp_path / "store")
    # The source is still at hand, so `prepare` repairs it.
    np.testing.assert_array_equal(prepare(train, tmp_path / "store", SPEC).train[0].obs, read(train).obs)


@pytest.mark.parametrize("meta", ['{"format": 1}', '{"format": 1, "train": 3, "val": 0, "env": "x"}'])
def test_damaged_description_of_a_store_is_named(tmp_path: Path, meta: str):
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"damaged store .* delete this folder"):
        Store.open(tmp_path)


def test_store_of_another_format_is_converted_again(tmp_path: Path, train: Path):
    prepare(train, tmp_path / "store", SPEC)
    meta = tmp_path / "store" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="no dataset store of format 1"):
        Store.open(tmp_path / "store")
    assert prepare(train, tmp_path / "store", SPEC).rows == 49


def test_missing_sources_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing\.npz: no such dataset"):
        shard_files(tmp_path / "nothing.npz")
    write(tmp_path / "toy-val.npz", (5,))
    with pytest.raises(UserError, match=r"holds no training \.npz file"):
        shard_files(tmp_path)


def test_full_disk_is_found_before_writing(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"MB are needed .* free some space"):
        prepare(train, tmp_path / "store", SPEC)


def test_unwritable_folder_is_named(tmp_path: Path, train: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the dataset store here"):
        prepare(train, tmp_path / "file" / "store", SPEC)


def test_disk_that_fills_while_writing_is_one_line(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(train, tmp_path / "store", SPEC)
    assert leftovers(tmp_path) == []


# Normaliser.


def test_normaliser_is_minmax_with_a_floor():
    norm = fit_minmax(np.array([[-1.0, 5.0], [1.0, 5.0], [0.5, 5.0]], np.float32))
    # 3 / (1 + 1e-3) = 2.997003; a constant entry is divided by 1e-3 alone.
    out = norm.apply(jnp.array([[3.0, 5.002]], jnp.float32))
    np.testing.assert_allclose(out[0], [2.997003, 2.0], rtol=1e-3)
    # The midpoint and half range of (-1, 3) are 1 and 2: (3 - 1) / 2.001 = 0.9995002498750625.
    norm = fit_minmax(np.array([[-1.0], [3.0]], np.float32))
    np.testing.assert_allclose(norm.apply(jnp.array([3.0])), [0.9995002498750625], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_invert_undoes_apply(seed: int):
    rng = np.random.default_rng(seed)
    obs = (rng.normal(size=(50, 4)) * [1e-3, 1, 10, 0] + [0, 5, -3, 2]).astype(np.float32)
    norm = fit_minmax(obs)
    np.testing.assert_allclose(norm.invert(norm.apply(jnp.asarray(obs))), obs, rtol=1e-6, atol=1e-6)


def test_host_and_device_normalise_alike():
    obs = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    norm = fit_minmax(obs[:30])
    np.testing.assert_allclose(
        norm.apply_host(obs), eqx.filter_jit(norm.apply)(jnp.asarray(obs)), rtol=1e-6, atol=1e-7
    )
    assert norm.apply_host(obs).dtype == np.float32


# Window.


@pytest.mark.parametrize(("chunk", "count"), [(1, 998), (5, 994), (10, 989), (25, 974), (32, 967)])
def test_number_of_starts_per_thousand_transitions(chunk: int, count: int):
    first, length = np.array([0, 1001]), np.array([1001, 1001])
    starts = valid_starts(first, length, chunk)
    np.testing.assert_array_equal(starts, np.concatenate([np.arange(count), 1001 + np.arange(count)]))


@pytest.mark.parametrize("seed", range(20))
def test_starts_are_the_rows_whose_chunk_and_end_meet_no_compact_terminal(seed: int):
    """The reference knows episodes by compact flags, set on the last two rows of each."""
    rng = np.random.default_rng(seed)
    length = rng.integers(2, 30, size=rng.integers(1, 8))
    first = np.cumsum(length) - length
    chunk = int(rng.integers(1, 12))
    rows = int(length.sum())
    flagged = set((first + length - 1).tolist()) | set((first + length - 2).tolist())
    want = [i for i in range(rows - chunk) if flagged.isdisjoint(range(i, i + chunk + 1))]
    np.testing.assert_array_equal(valid_starts(first, length, chunk), want)


def test_window_rows_are_normalised_clipped_and_relabelled(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    norm = fit_minmax(store.statistics_obs)
    raw = store.train[0]

    def relabel(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.testing.assert_array_equal(obs, raw.obs)  # raw, not normalised
        return np.where(obs[:, 1] > 0, 0.0, -1.0), obs[:, 1] <= 0

    window = make_window(store, norm, chunk=3, relabel=relabel)
    np.testing.assert_allclose(window.obs, norm.apply(jnp.asarray(raw.obs)), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(window.action, np.clip(raw.action, -0.99999, 0.99999))
    assert window.reward is not None and window.mask is not None
    np.testing.assert_array_equal(window.reward, np.where(raw.obs[:, 1] > 0, 0, -1))
    np.testing.assert_array_equal(window.mask, np.where(raw.obs[:, 1] > 0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(window)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    # Episodes of 16, 14, 19 rows: 11 + 9 + 14 starts, then padding with a valid start.
    assert int(window.n_starts) == 34
    assert window.starts.shape == (49,)
    np.testing.assert_array_equal(window.starts[34:], 0)


def test_saturated_actions_are_clipped_inside_the_unit_cube(tmp_path: Path):
    split = Split(
        np.zeros((9, 3), np.float32), np.full((9, 2), -1.0, np.float32), np.array([0]), np.array([9])
    )
    window = make_window(Store(tmp_path, "toy-v0", (split,), None, ()), identity(), chunk=2)
    np.testing.assert_array_equal(window.action, np.float32(-0.99999))
    assert window.reward is None and window.mask is None


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_sampled_chunks_stay_in_one_episode_and_reach_every_start(tmp_path: Path, train: Path, chunk: int):
    store = prepare(train, tmp_path / "store", SPEC)
    window = make_window(store, identity(), chunk)
    batch = sample(window, SampleSpec(batch=2000, chunk=chunk), jax.random.key(0))
    row = np.rint(np.asarray(batch.obs[:, 0])).astype(int)  # column 0 is the row number
    last = np.rint(np.asarray(batch.next_obs[:, 0]))
    np.testing.assert_array_equal(last, row + chunk)
    split = store.train[0]
    episode = np.searchsorted(split.first, row, side="right") - 1
    final = (split.first + split.length - 1)[episode]
    assert (last <= final - 2).all()
    assert set(row) == set(valid_starts(split.first, split.length, chunk).tolist())
    np.testing.assert_array_equal(batch.actions[:, -1], np.asarray(window.action)[row + chunk - 1])


def test_chunk_longer_than_every_episode_is_an_error(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    assert int(make_window(store, identity(), chunk=16).n_starts) == 1  # 18 transitions: T - 1 - 16
    with pytest.raises(UserError, match=r"chunk=17: the longest has 18 transitions, 19 are needed"):
        make_window(store, identity(), chunk=17)


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_must_be_positive(tmp_path: Path, train: Path, chunk: int):
    store = prepare(train, tmp_path / "store", SPEC)
    with pytest.raises(UserError, match=f"chunk={chunk}: a chunk has at least 1 action"):
        make_window(store, identity(), chunk)
