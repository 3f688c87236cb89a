"""The flat store: equal to its source, converted once, and never half there."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mac.data import convert as convert_module
from mac.data.convert import prepare
from mac.data.npz import read_npz
from mac.data.shards import shard_files
from mac.data.store import Rows, Store, read_meta
from mac.data.window import make_window
from mac.errors import UserError
from mac.types import EnvSpec, SampleSpec
from tests.helpers.small_datasets import SPEC, identity, write, write_pair


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_pair(tmp_path)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith((".part", ".old"))]


def test_store_holds_what_the_file_holds(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    want = read_npz(train)
    for name in ("obs", "action", "first", "length"):
        np.testing.assert_array_equal(getattr(store.train[0], name), getattr(want, name))
    assert store.val is not None
    np.testing.assert_array_equal(store.val.obs, read_npz(tmp_path / "toy-val.npz").obs)
    assert (store.rows, store.episodes, store.env, store.notes) == (49, 3, "toy-v0", ())
    assert isinstance(store.train[0].obs, Rows)
    assert leftovers(tmp_path) == []


def test_second_prepare_converts_nothing(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(train, tmp_path / "store", SPEC)
    monkeypatch.setattr(convert_module, "read_file", lambda path, spec: pytest.fail("read again"))
    assert prepare(train, tmp_path / "store", SPEC).rows == 49


def test_changed_file_is_converted_while_old_rows_stay_readable(tmp_path: Path, train: Path):
    old = prepare(train, tmp_path / "store", SPEC)
    before = np.array(old.train[0].obs)
    write(train, (16, 14, 19), seed=7)
    os.utime(train, ns=(1, 1))  # a copy may carry any time, not only a later one
    new = prepare(train, tmp_path / "store", SPEC)
    np.testing.assert_array_equal(new.train[0].obs, read_npz(train).obs)
    np.testing.assert_array_equal(old.train[0].obs, before)
    assert not np.array_equal(new.train[0].obs, before)
    assert leftovers(tmp_path) == []


def test_added_validation_file_is_noticed(tmp_path: Path):
    file = write(tmp_path / "toy.npz", (16,))
    store = prepare(file, tmp_path / "store", SPEC)
    assert store.val is None
    assert store.statistics.val is None and store.statistics.train.rows == 16
    assert "toy-val.npz: absent" in store.notes[0]
    write(tmp_path / "toy-val.npz", (12,), seed=1)
    store = prepare(file, tmp_path / "store", SPEC)
    assert store.val is not None
    assert store.statistics.val is not None and store.statistics.val.rows == 12
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
    np.testing.assert_array_equal(store.val.obs, read_npz(folder / "toy-000-val.npz").obs)
    # One window holds the rows of all shards, end to end.
    window = make_window(store, identity(), SampleSpec(1, 2))
    np.testing.assert_array_equal(window.obs[:], np.concatenate([split.obs for split in store.train]))
    np.testing.assert_array_equal(window.action[:], np.concatenate([split.action for split in store.train]))
    np.testing.assert_array_equal(window.episodes.first, [0, 10, 21])


def test_killed_conversion_leaves_nothing_that_is_read(tmp_path: Path, train: Path):
    # What a kill leaves behind: a temporary folder, and no folder under the store's own name.
    half = tmp_path / ".store.part" / "train-000.new"
    half.mkdir(parents=True)
    (half / "obs.npy").write_bytes(b"half")
    assert prepare(train, tmp_path / "store", SPEC).rows == 49
    assert leftovers(tmp_path) == []


def test_concurrent_prepares_convert_once(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch):
    reads = []

    def slow_read(path: Path, spec: EnvSpec):
        reads.append(path)
        time.sleep(0.05)
        return read_npz(path)

    monkeypatch.setattr(convert_module, "read_file", slow_read)
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
    np.testing.assert_array_equal(prepare(train, tmp_path / "store", SPEC).train[0].obs, read_npz(train).obs)


@pytest.mark.parametrize("meta", ['{"format": 3}', '{"format": 3, "train": 3, "val": 0, "env": "x"}', "[]"])
def test_damaged_description_of_a_store_is_named(tmp_path: Path, meta: str):
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"damaged store .* delete this folder"):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", ["train-000/obs.npy", "val/episodes.npy", "meta.json"])
def test_a_pipe_in_a_store_is_damage(tmp_path: Path, train: Path, name: str):
    prepare(train, tmp_path / "store", SPEC)
    (tmp_path / "store" / name).unlink()
    os.mkfifo(tmp_path / "store" / name)
    with pytest.raises(UserError):
        Store.open(tmp_path / "store")


def test_a_device_in_the_place_of_a_store_is_named(tmp_path: Path, train: Path):
    (tmp_path / "store").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="something else than a dataset store"):
        prepare(train, tmp_path / "store", SPEC)


def test_edited_description_of_a_store_is_none(tmp_path: Path, train: Path):
    prepare(train, tmp_path / "store", SPEC)
    meta = json.loads((tmp_path / "store" / "meta.json").read_text())
    assert read_meta(tmp_path / "store") == meta
    del meta["val"]
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta))
    assert read_meta(tmp_path / "store") is None


def test_store_of_another_format_is_converted_again(tmp_path: Path, train: Path):
    prepare(train, tmp_path / "store", SPEC)
    meta = tmp_path / "store" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match="no dataset store of format 3"):
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
    with pytest.raises(UserError, match=r"cannot write .*store: .* choose another folder"):
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


def test_a_pipe_is_refused_before_anything_waits_for_it(tmp_path: Path):
    os.mkfifo(tmp_path / "toy.npz")
    with pytest.raises(UserError, match=r"toy\.npz: is a pipe or a device"):
        prepare(tmp_path / "toy.npz", tmp_path / "store", SPEC)
    (tmp_path / "x").mkdir()
    path = write_pair(tmp_path / "x")
    (tmp_path / "x" / "toy-val.npz").unlink()
    os.mkfifo(tmp_path / "x" / "toy-val.npz")
    with pytest.raises(UserError, match=r"toy-val\.npz: is a pipe or a device"):
        prepare(path, tmp_path / "store", SPEC)
