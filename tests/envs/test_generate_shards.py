"""Tests of sharded datasets: names, contents, resuming; without physics."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs_mjx.datagen import generate as generation
from envs_mjx.datagen import npz_shards as files
from envs_mjx.datagen.dataset_parts import WHOLE, Part, read_part
from envs_mjx.datagen.generate import DatasetSummary, generate, metadata_path
from envs_mjx.datagen.npz_shards import TRAIN, VAL, make_shards
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS as ROWS
from envs_mjx.datagen.simulate_episodes import EpisodeJob, Simulator
from mac.errors import UserError
from tests.helpers import fake_expert
from tests.helpers.fake_expert import NAME, REQUEST, Killed, calls_until, content, instant, straight_fixture  # noqa: F401

pytestmark = pytest.mark.usefixtures("instant")
Arrays = dict[str, np.ndarray]


def read(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def episodes_in(path: Path) -> list[float]:
    """Returns the number in the rows of each episode of a file, see `fake_expert.number`."""
    observations = read(path)["observations"].reshape(-1, ROWS * 55)
    assert (observations == observations[:, :1]).all()
    return observations[:, 0].tolist()


def test_shards_are_named_and_filled_as_ogbenchs(tmp_path: Path) -> None:
    made = generate(REQUEST, tmp_path)
    stems = [f"{NAME}-{i:03}{val}.npz" for i in range(3) for val in ("", "-val")]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*stems, f"{NAME}.json"])
    assert made.train_rows == 25 * ROWS and made.val_rows == 3 * ROWS  # tenths of 10, 10 and 5, at least 1
    # Episode 3 of each ten is made at the third attempt, episode 8 at the second.
    attempts = {3: 2, 8: 1}
    for shard in range(3):
        first = 10 * shard
        train = [
            fake_expert.number(TRAIN, i, attempts.get(i % 10, 0)) for i in range(first, min(first + 10, 25))
        ]
        assert episodes_in(tmp_path / f"{NAME}-{shard:03}.npz") == train
        assert episodes_in(tmp_path / f"{NAME}-{shard:03}-val.npz") == [fake_expert.number(VAL, shard, 0)]
    # Failed: twice 3, 13, 23 and once 8, 18. Each kept episode has 4 targets and 3 hits.
    assert (made.thrown, made.targets, made.hits) == (8, 4 * 28, 3 * 28)


def test_small_datasets_are_one_pair_without_a_number(tmp_path: Path) -> None:
    generate(REQUEST._replace(episodes=10), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == [f"{NAME}-val.npz", f"{NAME}.npz"]


def test_every_episode_is_in_exactly_one_file() -> None:
    for episodes, per_shard in itertools.product((1, 9, 10, 11, 19, 40, 99), (1, 7, 10, 40, 100)):
        shards = make_shards("x", episodes, per_shard)
        keys = [key for shard in shards for key in shard.keys]
        val = len(keys) - episodes
        assert sorted(keys) == [(TRAIN, i) for i in range(episodes)] + [(VAL, i) for i in range(val)]
        assert all(part.val.episodes == max(part.train.episodes // 10, 1) for part in shards)


def test_arrays_are_ogbenchs(tmp_path: Path) -> None:
    generate(REQUEST._replace(episodes=2), tmp_path)
    arrays = read(tmp_path / f"{NAME}.npz")
    widths = {"observations": 55, "actions": 5, "qpos": 23, "qvel": 23, "button_states": 9}
    assert list(arrays) == [*widths, "terminals"]
    for name, width in widths.items():
        assert arrays[name].shape == (2 * ROWS, width)
        assert arrays[name].dtype == (np.int64 if name == "button_states" else np.float32)
    assert arrays["terminals"].dtype == bool
    np.testing.assert_array_equal(np.flatnonzero(arrays["terminals"]), [ROWS - 1, 2 * ROWS - 1])


def test_metadata_says_where_the_data_come_from(tmp_path: Path) -> None:
    made = generate(REQUEST, tmp_path)
    meta = json.loads(metadata_path(tmp_path, NAME).read_bytes())
    assert DatasetSummary(**meta["collected"]) == made and meta["hit_rate"] == 0.75
    assert {name: meta[name] for name in REQUEST.settings} == REQUEST.settings
    assert set(meta["versions"]) == {"jax", "jaxlib", "mujoco"} and "not the files" in meta["source"]


@pytest.mark.parametrize("call", ["simulate", "write", "rename", "sync"])
def test_work_is_continued_wherever_it_was_killed(
    call: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {
        "simulate": (Simulator, "run"),
        "write": (files.NpzShardWriter, "put"),
        "rename": (os, "replace"),
        "sync": (os, "fsync"),
    }[call]
    for count in (0, 5, 13):
        folder = tmp_path / f"{call}{count}"
        with monkeypatch.context() as patch:
            calls_until(patch, owner, name, count)
            try:
                generate(REQUEST, folder)
            except Killed:
                pass
            else:
                assert call == "simulate", "the function is called that often"
        for path in folder.glob("*.npz"):
            assert path.read_bytes() == (straight / path.name).read_bytes(), "half-written"
        generate(REQUEST, folder)
        assert content(folder) == content(straight)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_make_the_dataset_that_one_process_makes(count: int, straight: Path, tmp_path: Path) -> None:
    """In any order; 3 pairs of files have at most 3 parts that have anything to do."""
    folder = tmp_path / "parts"
    whole = DatasetSummary(**json.loads(metadata_path(straight, NAME).read_bytes())["collected"])
    order = [Part(number, count) for number in reversed(range(count))]
    for done, part in enumerate(order, start=1):
        made = generate(REQUEST, folder, part=part)
        assert metadata_path(folder, NAME).exists() == (done == count)
        assert (made == whole) == (done == count)
        assert generate(REQUEST, folder, part=part) == made  # once more: nothing is left to do
    assert content(folder) == content(straight)
    assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in straight.iterdir())


@pytest.mark.parametrize("call", ["simulate", "write"])
def test_part_is_continued_where_it_was_killed(
    call: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {"simulate": (Simulator, "run"), "write": (files.NpzShardWriter, "put")}[call]
    folder = tmp_path / "parts"
    generate(REQUEST, folder, part=Part(1, 2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        calls_until(patch, owner, name, 1)
        generate(REQUEST, folder, part=Part(0, 2))
    generate(REQUEST, folder, part=Part(0, 2))
    assert content(folder) == content(straight)


def test_files_that_a_finished_part_lost_are_made_again(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    made = generate(REQUEST, folder, part=Part(0, 2))
    (folder / f"{NAME}-002.npz").unlink()
    assert generate(REQUEST, folder, part=Part(0, 2)) == made
    generate(REQUEST, folder, part=Part(1, 2))
    assert content(folder) == content(straight)


def test_dataset_waits_for_all_files_of_other_parts(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    generate(REQUEST, folder, part=Part(0, 2))
    (folder / f"{NAME}-002-val.npz").unlink()
    generate(REQUEST, folder, part=Part(1, 2))
    assert not metadata_path(folder, NAME).exists()
    generate(REQUEST, folder, part=Part(0, 2))
    assert content(folder) == content(straight)


def test_damaged_record_of_a_part_is_named(tmp_path: Path) -> None:
    generate(REQUEST, tmp_path, part=Part(0, 2))
    (tmp_path / f".{NAME}.parts" / "1of2.json").write_text('{"train_rows": 3}')
    with pytest.raises(UserError, match=r"1of2.json is damaged \(val_rows is missing\); delete it, and make"):
        generate(REQUEST, tmp_path, part=Part(1, 2))


def test_parts_of_different_datasets_do_not_mix(tmp_path: Path) -> None:
    generate(REQUEST, tmp_path, part=Part(0, 2))
    for request, part, said in (
        (REQUEST, Part(2, 3), "holds data with parts=2, asked is parts=3"),
        (REQUEST._replace(seed=1), Part(1, 2), "holds data with seed=0, asked is seed=1"),
        (REQUEST, WHOLE, "holds parts of this dataset: go on with --part"),
    ):
        before = content(tmp_path)
        with pytest.raises(UserError, match=said):
            generate(request, tmp_path, part=part)
        assert content(tmp_path) == before
    alone = tmp_path / "alone"
    (alone / f".{NAME}.collect").mkdir(parents=True)
    with pytest.raises(UserError, match="begun without --part"):
        generate(REQUEST, alone, part=Part(0, 2))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / f"{NAME}-001.npz").touch()
    with pytest.raises(UserError, match="does not come from this program"):
        generate(REQUEST, foreign, part=Part(1, 2))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/2", "1/2/3", "-1/2", "١/2"])
def test_what_is_no_part_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="write K/N"):
        read_part(text)
    assert str(read_part("2/3")) == "2/3" and read_part("2/3") == Part(1, 3)


def test_waves_may_run_at_once(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_CORES_PER_BATCH", 1)
    generate(REQUEST, tmp_path / "at once", threads=3)
    assert content(tmp_path / "at once") == content(straight)


def test_no_episode_is_simulated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EpisodeJob] = []
    original = Simulator.run

    def counting(self: Simulator, jobs: Any, *rest: Any) -> Any:
        seen.extend(jobs)
        return original(self, jobs, *rest)

    for count in (3, 2, 1, 100):  # batches of four episodes until each kill
        with monkeypatch.context() as patch:
            patch.setattr(Simulator, "run", counting)
            calls_until(patch, Simulator, "run", count)
            try:
                generate(REQUEST, tmp_path)
            except Killed:
                continue
    assert len(seen) == len(set(seen)) == 28 + 8


def test_finished_data_are_left_alone(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = DatasetSummary(**json.loads(metadata_path(straight, NAME).read_bytes())["collected"])
    monkeypatch.setattr(Simulator, "run", None)
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert generate(REQUEST, straight) == made
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_shard_that_was_removed_is_made_again(straight: Path) -> None:
    before = content(straight)
    (straight / f"{NAME}-001.npz").unlink()
    generate(REQUEST, straight)
    assert content(straight) == before


KILLED = """
import sys, time
from pathlib import Path
from envs_mjx.datagen.generate import generate
from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.simulate_episodes import Simulator
from mac.errors import UserError
from tests.helpers import fake_expert

def slow(*args):
    time.sleep(0.02)
    return fake_expert.run(*args)

Simulator.run = slow
generate(DatasetSpec("puzzle-3x3-play-v0", episodes=25, per_shard=10, lanes=4), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_work_killed_again_and_again_ends_as_if_never_killed(straight: Path, tmp_path: Path) -> None:
    folder, rng = tmp_path / "killed", np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parents[2])
        while not folder.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
    generate(REQUEST, folder)
    assert content(folder) == content(straight)
