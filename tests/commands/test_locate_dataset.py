"""Tests of locating a dataset: search, choice, download, and error messages."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs_mjx.registry import parse
from experiments.launch import dataset
from experiments.launch.settings import DataConfig
from mac.data.provenance import LEDGER, download_records
from mac.data.shards import shard_files
from mac.data.sources.catalogue import find_public_dataset
from mac.data.sources.download import fetch
from mac.errors import UserError
from tests.helpers.faulty_server import CONTENT, FAST, Server, closed_port, drops, says, sends, serving

CUBE = "cube-single-play-v0"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and an empty working folder beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONTENT) as running:
        yield running


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def urls(name: str, **more: Any) -> list[str]:
    found = find_public_dataset(name, **more)
    assert found is not None
    return [url for remote in found.files for url in remote.urls]


# The catalogue.


def test_addresses_are_those_that_the_collections_publish():
    rail = "https://rail.eecs.berkeley.edu/datasets"
    assert urls(CUBE) == [f"{rail}/ogbench/{CUBE}.npz", f"{rail}/ogbench/cube-single-play-v0-val.npz"]
    assert urls("hopper-medium-replay-v2") == [
        f"{rail}/offline_rl/gym_mujoco_v2/hopper_medium_replay-v2.hdf5",
        "https://huggingface.co/datasets/imone/D4RL/resolve/main/hopper_medium_replay-v2.hdf5",
    ]
    minari = "https://huggingface.co/datasets/farama-minari/mujoco/resolve/main"
    assert urls("mujoco/hopper/medium-v0") == [f"{minari}/hopper/medium-v0/data/main_data.hdf5"]


def test_large_sets_are_numbered_files_in_a_folder():
    found = find_public_dataset("puzzle-4x5-play-v0", shards=2)
    assert found and found.main == "puzzle-4x5-play-100m-v0" and found.rows == 2 * 1_001_000
    assert [remote.name for remote in found.files] == [
        "puzzle-4x5-play-100m-v0/puzzle-4x5-play-v0-000.npz",
        "puzzle-4x5-play-100m-v0/puzzle-4x5-play-v0-000-val.npz",
        "puzzle-4x5-play-100m-v0/puzzle-4x5-play-v0-001.npz",
        "puzzle-4x5-play-100m-v0/puzzle-4x5-play-v0-001-val.npz",
    ]
    giant = "humanoidmaze-giant-navigate-v0"
    assert find_public_dataset(giant, shards=25) is not None and find_public_dataset(giant, shards=26) is None
    assert find_public_dataset("cube-single-play-v0", shards=1) is None  # OGBench has no such set
    assert find_public_dataset("cube-octuple-play-v0") is None  # and of this one no ordinary file


def test_a_mirror_stands_in_for_every_host():
    mirror = "http://mirror.example/pub/"
    assert urls(CUBE, mirror=mirror)[0] == f"http://mirror.example/pub/{CUBE}.npz"
    assert urls("hopper-medium-v2", mirror=mirror) == ["http://mirror.example/pub/hopper_medium-v2.hdf5"]
    at = "http://mirror.example/pub/mujoco/hopper/medium-v0/data/main_data.hdf5"
    assert urls("mujoco/hopper/medium-v0", mirror=mirror) == [at]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("cube-single-play-v0", 1_001_000),
        ("cube-triple-noisy-v0", 3_003_000),
        ("puzzle-4x6-play-v0", 5_005_000),
        ("pointmaze-giant-navigate-v0", 1_000_500),
        ("antmaze-large-stitch-v0", 1_005_000),
        ("antmaze-medium-explore-v0", 5_010_000),
        ("humanoidmaze-giant-navigate-v0", 4_001_000),
        ("humanoidmaze-giant-stitch-v0", 4_010_000),
        ("humanoidmaze-large-navigate-v0", 2_001_000),
    ],
)
def test_rows_are_episodes_times_their_length(name: str, rows: int):
    """Episodes times rows of each, as in the flags of OGBench's generators (Park et al. 2025)."""
    found = find_public_dataset(name)
    assert found and found.rows == rows


# The choice.


@pytest.mark.parametrize(
    ("name", "place"),
    [
        (CUBE, f"here/data/{CUBE}.npz"),
        (CUBE, f"home/.ogbench/data/{CUBE}.npz"),
        (CUBE, f"here/data/generated-1001000-seed0/{CUBE}.npz"),
        ("hopper-medium-v2", "here/data/hopper_medium-v2.hdf5"),
        ("hopper-medium-v2", "here/data/hopper-medium-v2.hdf5"),
        ("hopper-medium-v2", "home/.d4rl/datasets/hopper_medium-v2.hdf5"),
        ("hopper-medium-v2", "here/data/downloads/d4rl/hopper_medium-v2.hdf5"),
        ("mujoco/hopper/medium-v0", "home/.minari/datasets/mujoco/hopper/medium-v0/data/main_data.hdf5"),
        ("mujoco/hopper/medium-v0", "here/data/mujoco/hopper/medium-v0/data/main_data.hdf5"),
    ],
)
def test_files_are_found_where_this_and_other_programs_put_them(name: str, place: str, tmp_path: Path):
    for source in ("auto", "local"):
        assert dataset.search(DataConfig(source=source), parse(name)) is None
    path = touch(tmp_path / place)
    for source in ("auto", "local"):
        choice = dataset.choose_source(DataConfig(source=source), parse(name))
        assert choice.found and choice.path.absolute() == path


def test_auto_prefers_existing_then_generated_then_downloaded():
    assert dataset.choose_source(DataConfig(), parse(CUBE)).how == "generate"
    assert dataset.choose_source(DataConfig(), parse("hopper-medium-v2")).how == "download"
    assert dataset.choose_source(DataConfig(mirror="http://mirror.example"), parse(CUBE)).how == "download"
    assert dataset.choose_source(DataConfig(shards=1), parse("puzzle-4x5-play-v0")).how == "download"
    touch(Path("data") / f"{CUBE}.npz")
    assert dataset.choose_source(DataConfig(), parse(CUBE)).how == "local"


def test_generated_and_public_data_are_not_confused():
    generated = touch(Path("data/generated-1001000-seed0") / f"{CUBE}.npz")
    assert dataset.choose_source(DataConfig(source="download"), parse(CUBE)).how == "download"
    public = touch(Path("data") / f"{CUBE}.npz")
    assert dataset.choose_source(DataConfig(source="generate"), parse(CUBE)) == (
        generated,
        "local",
        None,
        None,
    )
    assert dataset.choose_source(DataConfig(source="download"), parse(CUBE)).path == public


def test_a_large_set_counts_as_there_with_all_its_files():
    for i in range(2):
        touch(Path("data/puzzle-4x5-play-100m-v0") / f"puzzle-4x5-play-v0-{i:03d}.npz")
    assert dataset.choose_source(DataConfig(shards=2), parse("puzzle-4x5-play-v0")).found
    assert not dataset.choose_source(DataConfig(shards=3), parse("puzzle-4x5-play-v0")).found


def test_hidden_files_are_no_shards_and_no_generated_data(tmp_path: Path):
    env, place = "cube-double-play-v0", Path("data") / "cube-double-play-100m-v0"
    touch(place / "cube-double-play-v0-000.npz")
    touch(place / "._cube-double-play-v0-000.npz")
    assert dataset.search(DataConfig(source="local", shards=2), parse(env)) is None
    assert [p.name for p in shard_files(place)] == ["cube-double-play-v0-000.npz"]
    touch(Path("data") / "._generated-9009-seed7" / f"{env}.npz")
    assert "there is one with" not in refused(env, source="local")


def refused(env: str, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        dataset.choose_source(DataConfig(**data), parse(env))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_made_says_what_can():
    for env in ("hopper-medium-v2", "antmaze-medium-navigate-v0"):
        line = refused(env, source="generate")
        assert env in line and "cube-single" in line and "--data.source download" in line


def test_a_missing_dataset_names_places_and_alternatives():
    touch(Path("data/generated-5005-seed3") / f"{CUBE}.npz")
    line = refused(CUBE, source="local")
    assert f"data/{CUBE}.npz" in line and ".ogbench" in line and "downloads" in line
    assert "--data.rows 5005 --data.seed 3" in line
    assert "--data.path" in line and "--data.source generate or download" in line


def test_what_no_host_has_says_so():
    assert "--data.shards 1 to 100" in refused("cube-octuple-play-v0", source="download")
    assert "no 100M dataset" in refused(CUBE, shards=1)
    assert "fewer files" in refused("humanoidmaze-giant-navigate-v0", shards=26)
    assert "--data.rows" in refused("puzzle-4x5-play-v0", shards=1, source="generate")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mirror": "mirror.example"}, "must begin with http"),
        ({"shards": 101}, "--data.shards=101"),
        ({"path": Path("x.npz"), "source": "download"}, "--data.path"),
    ],
)
def test_settings_that_contradict_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        DataConfig(**wrong)


# The download of a dataset.


def get(server: Server, data: DataConfig | None = None) -> Path:
    data = data or DataConfig(source="download", mirror=server.url("")[:-1])
    return dataset.obtain(dataset.choose_source(data, parse(CUBE)), data, parse(CUBE))


def test_both_files_come_and_are_recorded_and_then_found(server: Server, capsys: Any):
    path = get(server)
    assert path == Path("data/downloads/ogbench") / f"{CUBE}.npz"
    assert [where for where, *_ in server.asked] == [f"/{CUBE}.npz", "/cube-single-play-v0-val.npz"]
    entries = download_records(path.parent)
    assert set(entries) == {f"{CUBE}.npz", "cube-single-play-v0-val.npz"}
    assert entries[f"{CUBE}.npz"].url == server.url(f"{CUBE}.npz") and entries[f"{CUBE}.npz"].time
    assert f"downloading {CUBE}.npz" in capsys.readouterr().out
    assert dataset.search(DataConfig(), parse(CUBE)) == path and len(server.asked) == 2


def test_a_missing_validation_file_is_fetched_alone(server: Server):
    path = get(server)
    path.with_name("cube-single-play-v0-val.npz").unlink()
    assert dataset.search(DataConfig(), parse(CUBE)) is None
    get(server)
    assert [where for where, *_ in server.asked[2:]] == ["/cube-single-play-v0-val.npz"]


def test_a_file_that_comes_again_must_be_the_one_recorded(server: Server):
    path = get(server)
    path.unlink()
    server.content = CONTENT[:-22] + b"PK\x05\x06" + bytes(18)  # another archive, as far as one can see
    with pytest.raises(UserError, match=f"was changed or damaged at its source.*{LEDGER}") as caught:
        get(server)
    assert "\n" not in str(caught.value) and not path.exists()
    (path.parent / LEDGER).unlink()
    assert get(server).read_bytes() == server.content


def test_offline_names_every_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mac.data.sources.http_download.time.sleep", lambda seconds: None)
    data = DataConfig(source="download", mirror=f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(UserError) as caught:
        dataset.obtain(dataset.choose_source(data, parse(CUBE)), data, parse(CUBE))
    line = str(caught.value)
    assert "seems to be offline" in line and "connection refused" in line and "\n" not in line
    assert "--data.source generate" in line and "--data.mirror" in line
    assert f"put {CUBE}.npz and cube-single-play-v0-val.npz into data" in line


def test_a_failed_download_offers_generation_only_if_possible(server: Server):
    data = DataConfig(source="download", mirror=server.url("")[:-1])
    server.plan(says(404))
    with pytest.raises(UserError, match=r"HTTP 404.*put hopper_medium-v2\.hdf5 into data") as caught:
        dataset.obtain(
            dataset.choose_source(data, parse("hopper-medium-v2")), data, parse("hopper-medium-v2")
        )
    assert "generate" not in str(caught.value) and "offline" not in str(caught.value)


def test_two_processes_that_want_one_file_download_it_once(server: Server):
    """Two threads here: the lock is of the open file, so it holds between them too."""
    public = find_public_dataset(CUBE, mirror=server.url("")[:-1])
    assert public is not None
    said: list[str] = []
    server.plan(drops(1000))
    jobs = [
        threading.Thread(
            target=fetch, args=(public, Path("d")), kwargs={"say": said.append, "patience": FAST}
        )
        for _ in range(2)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(server.asked) == 3  # the first file in two parts, and the second
    assert (Path("d/ogbench") / f"{CUBE}.npz").read_bytes() == CONTENT


def test_minari_files_of_one_name_have_stores_of_their_own():
    paths = [Path(f"mujoco/{robot}/medium-v0/data/main_data.hdf5") for robot in ("hopper", "walker2d")]
    names = [dataset.store_name(path) for path in paths]
    assert names == ["hopper-medium-v0-main_data", "walker2d-medium-v0-main_data"]


def test_a_large_set_stops_before_it_fills_the_disk(server: Server, monkeypatch: pytest.MonkeyPatch):
    import shutil

    real = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=len(CONTENT) * 3))
    data = DataConfig(shards=5, mirror=server.url("")[:-1])
    server.plan(sends(CONTENT))
    with pytest.raises(UserError, match=r"missing files.*--data\.shards"):
        dataset.obtain(dataset.choose_source(data, parse("scene-play-v0")), data, parse("scene-play-v0"))
