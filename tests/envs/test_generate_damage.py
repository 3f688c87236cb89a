"""Tests of unfinished datasets that cannot be continued: damage, other data, full disks."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from envs_mjx.datagen.dataset_spec import LANES
from envs_mjx.datagen.generate import generate
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS as ROWS
from envs_mjx.datagen.simulate_episodes import Simulator
from mac.errors import UserError
from tests.helpers.fake_expert import NAME, REQUEST, begin, content, instant, straight_fixture  # noqa: F401

pytestmark = pytest.mark.usefixtures("instant")


def test_a_journal_line_that_was_cut_short_is_forgotten(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(tmp_path / "cut", monkeypatch) / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 7)
    generate(REQUEST, tmp_path / "cut")
    cut, whole = content(tmp_path / "cut"), content(straight)
    assert {k: v for k, v in cut.items() if k.endswith("npz")} == {
        k: v for k, v in whole.items() if k.endswith("npz")
    }


def test_leftovers_of_a_write_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = begin(tmp_path, monkeypatch) / f"{NAME}-000.npz.part"
    stale.write_bytes(b"half")
    begin(tmp_path, monkeypatch, 1)
    assert not stale.exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"episodes": 26}, {"per_shard": 9}, {"lanes": 8}])
def test_other_settings_are_not_mixed_in(
    change: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "half", monkeypatch)
    generate(REQUEST, tmp_path / "whole")
    (name,) = change
    for folder in ("half", "whole"):
        before = content(tmp_path / folder)
        with pytest.raises(UserError, match=f"{name}=.*choose another folder, or delete"):
            generate(REQUEST._replace(**change), tmp_path / folder)
        assert content(tmp_path / folder) == before


def test_other_settings_are_not_mixed_into_a_partial_dataset(straight: Path) -> None:
    (straight / f"{NAME}-001.npz").unlink()
    with pytest.raises(UserError, match="seed=0, asked is seed=1"):
        generate(REQUEST._replace(seed=1), straight)


def test_files_of_someone_else_do_not_pass_for_ours(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}-001-val.npz"
    path.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists and does not come from this program"):
        generate(REQUEST, tmp_path)
    assert content(tmp_path) == {path.name: b"precious"}


@pytest.mark.parametrize("name", ["settings.json", "journal.jsonl"])
def test_damaged_working_files_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = begin(tmp_path, monkeypatch)
    (work / name).write_bytes(b"\x00" * 40 + b"\n")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        generate(REQUEST, tmp_path)


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    row = 4 * (55 + 5 + 23 + 23) + 8 * 9 + 1
    # All files, and working files of the first shard (10 + 1 episodes), with 2% to spare.
    needed = 1.02 * (28 + 11) * ROWS * row
    monkeypatch.setattr(Simulator, "run", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(needed) - 1))
    with pytest.raises(UserError, match="MB free"):
        generate(REQUEST, tmp_path)


def test_a_disk_that_fills_up_is_one_line_and_can_be_continued(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for call in ("posix_fallocate", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(UserError, match="No space left on device; free some space"):
                generate(REQUEST, tmp_path / "full")
    generate(REQUEST, tmp_path / "full")
    assert content(tmp_path / "full") == content(straight)


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    for change, message in (
        ({"dataset": "puzzle-9x9-play-v0"}, "unknown environment"),
        ({"dataset": "puzzle-3x3-play-singletask-v0"}, "not the name of a dataset"),
        ({"engine": "bullet"}, "unknown physics engine"),
        ({"episodes": 0}, "episodes=0"),
        ({"episodes": 10**9, "per_shard": 1}, "too many files"),
        ({"episodes": 10**12, "per_shard": 10**12}, "too many files"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(UserError, match=message):
            generate(REQUEST._replace(**change), tmp_path)
    assert list(tmp_path.iterdir()) == [] and LANES["c"] == 64
