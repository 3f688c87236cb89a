"""Stores belong to the content of their files, hold what was opened, and notice every flipped bit."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.convert_data import main as prepare_main
from experiments.launch import dataset
from experiments.launch.settings import DataConfig
from mac.data import checksums, convert
from mac.data import store as store_module
from mac.data.checksums import Checksums
from mac.data.convert import Sources, prepare
from mac.data.npz import read_npz
from mac.data.store import META, Rows, Store
from mac.data.window import make_window
from mac.data.window_feed import plan_rotation
from mac.errors import UserError
from mac.types import EnvSpec, SampleSpec
from tests.helpers.hdf5_files import d4rl_arrays, write_d4rl
from tests.helpers.pytest_params import slow_except
from tests.helpers.small_datasets import SPEC, identity, write, write_pair
from tests.helpers.toy_algorithm import make_job, result, run


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_pair(tmp_path)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and whatever reads a dataset file from then on fails."""

    def forbid() -> None:
        monkeypatch.setattr(convert, "read_file", lambda path, spec: pytest.fail(f"{path} was converted"))
        monkeypatch.setattr(checksums, "sha256", lambda path: pytest.fail(f"{path} was read"))

    return forbid


def opened(data: DataConfig, source: Path) -> Store:
    return dataset.open_store(data, source, SPEC)


def other(folder: Path) -> Path:
    """Another dataset, whose file and folder have the same names."""
    folder.mkdir(parents=True)
    write(folder / "toy-val.npz", (20,), seed=8)
    return write(folder / "toy.npz", (16, 14, 19), seed=9)


# Reading what was opened.


@pytest.mark.parametrize("what", ["uint16", "other", "deleted"])
def test_an_open_store_reads_what_was_opened(tmp_path: Path, train: Path, what: str):
    store = prepare(train, tmp_path / "store", SPEC)
    want, window = read_npz(train), make_window(store, identity(), SampleSpec(1, 2))
    if what == "deleted":
        shutil.rmtree(store.path)
    elif what == "uint16":
        assert prepare(train, store.path, SPEC, "uint16").dtype == "uint16"
    else:
        prepare(other(tmp_path / "other"), store.path, SPEC, "float32")
    np.testing.assert_array_equal(store.train[0].obs, want.obs)
    np.testing.assert_array_equal(store.train[0].action[3:9], want.action[3:9])
    again = make_window(store, identity(), SampleSpec(1, 2))
    np.testing.assert_array_equal(again.obs[:], window.obs[:])
    store.check()


def test_a_store_replaced_while_opened_is_one_of_the_two(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
):
    old = prepare(train, tmp_path / "store", SPEC)
    new = prepare(other(tmp_path / "other"), tmp_path / "new", SPEC)
    open_split, calls = store_module._open_split, []

    def swapped(*args):
        calls.append(args[1])
        if len(calls) == 2:  # the training split is open, that of validation not yet
            shutil.rmtree(old.path)
            shutil.copytree(new.path, old.path)
        return open_split(*args)

    monkeypatch.setattr(store_module, "_open_split", swapped)
    found = Store.open(old.path)
    assert found.content == new.content and calls == ["train-000", "val"] * 2
    np.testing.assert_array_equal(found.train[0].obs, new.train[0].obs)


def test_files_of_a_store_are_closed_with_it(tmp_path: Path, train: Path):
    before = len(os.listdir("/proc/self/fd"))
    store = prepare(train, tmp_path / "store", SPEC)
    assert len(os.listdir("/proc/self/fd")) == before + 4  # observations and actions of two splits
    del store
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_shards_than_open_files_are_allowed_can_be_opened(tmp_path: Path, train: Path):
    import resource

    store = prepare(train, tmp_path / "store", SPEC)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with store_module._Folder(store.path) as folder:
            resource.setrlimit(resource.RLIMIT_NOFILE, (300, limits[1]))
            folder.make_room(3 * 100)
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300 + 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
@pytest.mark.parametrize("resident", slow_except([True], [True, False]))
def test_data_replaced_while_training_change_nothing(tmp_path: Path, train: Path, resident: bool):
    """Source and store are replaced after the first update; windows serve two updates each."""
    store = prepare(train, tmp_path / "store", SPEC)

    def job():
        now = prepare(tmp_path / "toy.npz", tmp_path / "store", SPEC)
        plan = plan_rotation(now, identity(), SampleSpec(1, 2), rows=30, updates=2, seed=0)
        return make_job(window=make_window(now, identity(), SampleSpec(1, 2)) if resident else plan)

    run(job(), tmp_path / "straight")
    replaced = []

    def replace(what: str, step: int) -> None:
        if step >= 2 and not replaced:
            replaced.append(step)
            shutil.copy(other(tmp_path / "other"), tmp_path / "toy.npz")
            assert prepare(tmp_path / "toy.npz", store.path, SPEC).content != store.content

    run(job(), tmp_path / "replaced", hook=replace)
    assert replaced and result(tmp_path / "replaced") == result(tmp_path / "straight")


# Content.


def test_no_two_contents_or_types_share_a_folder(tmp_path: Path, unread: Callable[[], None]):
    (tmp_path / "a" / "toys").mkdir(parents=True)
    files = [write_pair(tmp_path / "a" / "toys"), other(tmp_path / "b" / "toys")]
    kinds = [DataConfig(dir=tmp_path, dtype=dtype) for dtype in ("float32", "uint16")]
    stores = {opened(data, file).path: (file, data) for file in files for data in kinds}
    assert len(stores) == 4
    assert all(path.name.startswith("toys-toy-") for path in stores)
    unread()  # none is converted to and fro
    for path, (file, data) in stores.items():
        assert opened(data, file).path == path


@pytest.mark.parametrize("what", ["moved", "renamed", "touched"])
def test_a_file_that_only_moved_keeps_its_store(
    tmp_path: Path, train: Path, what: str, monkeypatch: pytest.MonkeyPatch
):
    data = DataConfig(dir=tmp_path / "data")
    before = opened(data, train)
    if what == "touched":
        os.utime(train, ns=(1, 1))
    else:
        (tmp_path / "elsewhere").mkdir()
        name = "toy" if what == "moved" else "doll"
        for end in ("", "-val"):
            os.rename(tmp_path / f"toy{end}.npz", tmp_path / "elsewhere" / f"{name}{end}.npz")
        train = tmp_path / "elsewhere" / f"{name}.npz"
    monkeypatch.setattr(convert, "read_file", lambda path, spec: pytest.fail("converted"))
    found = opened(data, train)
    assert (found.path, found.content) == (before.path, before.content)
    assert found.provenance.label == f"local file {train.name}"


def test_the_same_rows_in_another_format_are_the_same_content(tmp_path: Path, train: Path):
    before = prepare(train, tmp_path / "store", SPEC)
    for file in (train, tmp_path / "toy-val.npz"):
        np.savez(file, **dict(np.load(file)))
    now = prepare(train, tmp_path / "again", SPEC)
    assert now.content == before.content
    write(tmp_path / "toy-val.npz", (20,), seed=3)
    assert prepare(train, tmp_path / "third", SPEC).content == before.content._replace(val=ANY)  # pyright: ignore


class _Any:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # pyright: ignore[reportAssignmentType]


ANY = _Any()


def test_every_shards_validation_file_counts(tmp_path: Path):
    for i in range(2):
        write(tmp_path / f"toy-{i}.npz", (12, 9), seed=i)
        write(tmp_path / f"toy-{i}-val.npz", (7 + i,), seed=5 + i)
    store = prepare(tmp_path, tmp_path / "store", SPEC)
    rows = np.concatenate([read_npz(tmp_path / f"toy-{i}-val.npz").obs for i in range(2)])
    assert store.statistics.val is not None and store.statistics.val.rows == 15
    np.testing.assert_array_equal(store.statistics.val.high, rows.max(axis=0))
    assert store.val is not None and len(store.val.obs) == 7
    (tmp_path / "toy-1-val.npz").unlink()
    without = prepare(tmp_path, tmp_path / "store", SPEC)
    assert without.content is not None and store.content is not None
    assert without.content.train == store.content.train and without.content.val != store.content.val


def test_files_that_did_not_change_are_read_once(tmp_path: Path, train: Path, unread: Callable[[], None]):
    data = DataConfig(dir=tmp_path / "data")
    opened(data, train)
    unread()
    opened(data, train)


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path):
    path, kept = tmp_path / "x", Checksums(tmp_path / "kept.json")
    path.write_bytes(b"abc")
    (before,), stat = kept.of([path]), path.stat()
    with open(path, "r+b") as file:
        file.write(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Checksums(tmp_path / "kept.json").of([path]) != [before]


@pytest.mark.parametrize("text", ["", "[1", '{"x": 3}', "[]", "[[1]]", "3"])
def test_damaged_record_of_checksums_is_made_again(tmp_path: Path, train: Path, text: str):
    want = Checksums().of([train])
    (tmp_path / "kept.json").write_text(text.replace("x", str(train)))
    assert Checksums(tmp_path / "kept.json").of([train]) == want
    assert str(train) in json.loads((tmp_path / "kept.json").read_text())


def test_a_file_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
):
    def changing(path: Path, spec: EnvSpec):
        found = read_npz(path)
        write(train, (16, 14, 19), seed=4)
        return found

    monkeypatch.setattr(convert, "read_file", changing)
    with pytest.raises(UserError, match=r"toy\.npz: changed while it was converted"):
        prepare(train, tmp_path / "store", SPEC)
    monkeypatch.undo()
    np.testing.assert_array_equal(prepare(train, tmp_path / "store", SPEC).train[0].obs, read_npz(train).obs)


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path, train: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds something else than a dataset store"):
        prepare(train, tmp_path / "mine", SPEC)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    with pytest.raises(UserError, match="holds something else"):
        prepare(train, train, SPEC)


def test_prepared_type_is_found_again_wherever_the_files_went(tmp_path: Path, train: Path):
    data = DataConfig(dir=tmp_path / "data")
    assert dataset.dataset_facts(data, train).dtype == "float32"
    files = Sources.of(train, SPEC, dataset.file_checksums(data))
    (tmp_path / "data" / "stores").mkdir(parents=True)
    convert.convert(files, dataset.store_folder(data, train, files, "uint16"), SPEC, "uint16")
    assert dataset.dataset_facts(data, train).dtype == "uint16" and opened(data, train).dtype == "uint16"
    write(train, (16, 14, 19), seed=3)  # other content of the same size is not prepared
    assert dataset.dataset_facts(data, train).dtype == "float32"


# Damage.


def flips(store: Path, every: int) -> list[tuple[Path, int, int]]:
    """A bit of each byte of a store's files: file, byte, bit; but of the note that is only for conversion."""
    rng, found = random.Random(0), []
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.name != "shard.json"):
        places = range(rng.randrange(every), path.stat().st_size, every)
        found += [(path, place, rng.randrange(8)) for place in places]
    return found


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["float32", "uint16", "recorded"])
def test_a_flipped_bit_of_a_store_is_refused_in_one_line(tmp_path: Path, kind: str, every: int):
    spec, train = SPEC, write_pair(tmp_path)
    if kind == "recorded":
        spec, train = SPEC._replace(recorded=True), write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays())
    store = prepare(train, tmp_path / "store", spec, "uint16" if kind == "uint16" else "float32")
    good = json.loads((store.path / META).read_text())
    for path, at, bit in flips(store.path, every):
        content = path.read_bytes()
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            again = Store.open(store.path)
            again.check()
            # White space in a description or in an array's header: nothing that is read differs.
            assert again.content == store.content and again.meta == good
            assert path.name == META or at < 128
        except UserError as error:
            assert "\n" not in str(error) and str(store.path) in str(error), error
        path.write_bytes(content)
    Store.open(store.path).check()


def test_damaged_rows_are_found_where_they_are_loaded(tmp_path: Path, train: Path):
    store = prepare(train, tmp_path / "store", SPEC)
    obs = tmp_path / "store" / "train-000" / "obs.npy"
    content = bytearray(obs.read_bytes())
    content[-4] ^= 1  # of the last episode
    obs.write_bytes(content)
    plan = plan_rotation(Store.open(store.path), identity(), SampleSpec(1, 2), rows=20, updates=1, seed=0)
    seen = []
    for number in range(3):  # each window holds one episode
        try:
            plan.window(number, lambda tree: tree)
        except UserError as error:
            assert "obs in train-000 changed" in str(error) and "delete this folder" in str(error)
            seen.append(number)
    assert len(seen) == 1
    with pytest.raises(UserError, match="damaged store"):
        make_window(store, identity(), SampleSpec(1, 2))


@pytest.mark.parametrize("lengths", [(0, 16, 14, 19), (16, 33), (17, 13, 19), (-1, 50)])
def test_episodes_that_do_not_lie_end_to_end_are_refused(
    tmp_path: Path, train: Path, lengths: tuple[int, ...]
):
    store = prepare(train, tmp_path / "store", SPEC)
    length = np.asarray(lengths)
    np.save(store.path / "train-000" / "episodes.npy", np.stack([np.cumsum(length) - length, length], 1))
    with pytest.raises(UserError, match="damaged store"):
        Store.open(store.path)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch):
    store = prepare(train, tmp_path / "store", SPEC)

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(UserError, match=r"Input/output error\); check the disk"):
        Rows.read(store.train[0].obs, 0, np.empty((2, 3), np.float32))


def test_a_store_that_is_damaged_is_made_again_from_its_files(tmp_path: Path, train: Path):
    data = DataConfig(dir=tmp_path / "data")
    store = opened(data, train)
    episodes = store.path / "train-000" / "episodes.npy"
    episodes.write_bytes(episodes.read_bytes()[:-3] + b"\x01\x00\x00")
    again = opened(data, train)
    assert again.path == store.path and again.content == store.content


# The command line.


def as_format_2(store: Path) -> None:
    """What the version before wrote."""
    for path in store.rglob("checks.npy"):
        path.unlink()
    meta = json.loads((store / META).read_text())
    for key in ("seal", "content", "statistics", "made_from"):
        del meta[key]
    meta["sources"] = [[name, size, 1] for name, size in meta["sources"]]
    (store / META).write_text(json.dumps(meta | {"format": 2}))


def test_a_store_of_the_version_before_gets_checksums(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
):
    store = prepare(train, tmp_path / "store", SPEC, "uint16")
    as_format_2(store.path)
    with pytest.raises(
        UserError, match=r"format 2, without checksums; `python experiments/convert_data\.py .*store`"
    ):
        Store.open(store.path)
    assert prepare_main([str(store.path)]) == 0 and "have checksums now" in capsys.readouterr().out
    now = Store.open(store.path)
    assert now.content == store.content and now.summaries is not None
    now.check()


def test_prepare_checks_a_store(tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]):
    store = prepare(train, tmp_path / "store", SPEC)
    assert prepare_main([str(store.path), "--check"]) == 0
    assert "49 training rows are as they were written" in capsys.readouterr().out
    val = store.path / "val" / "action.npy"
    val.write_bytes(val.read_bytes()[:-1] + b"?")
    assert prepare_main([str(store.path), "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "action in val changed" in line and "delete this folder" in line


def test_the_store_of_the_version_before_is_left_and_named(tmp_path: Path, train: Path):
    data = DataConfig(dir=tmp_path / "data")
    old = tmp_path / "data" / "stores" / dataset.store_name(train)
    prepare(train, old, SPEC)
    as_format_2(old)
    store = opened(data, train)
    assert any(str(old) in note and "may be deleted" in note for note in store.notes)
    assert (old / META).exists() and store.path != old
    assert not any(str(old) in note for note in opened(data, train).notes)
