"""Cores and memory within the limits of control groups, on made-up files of both versions."""

import os
from pathlib import Path

import pytest

from mac import cgroup_limits
from mac.cgroup_limits import cores, group_memory


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores without any limit; the folder is that of its control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(cgroup_limits, "_GROUPS", tmp_path)
    monkeypatch.setattr(cgroup_limits, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_all_cores_count_without_a_quota(groups: Path):
    assert cores() == 64
    write(groups, membership="0::/", cpu__max="max 100000")
    assert cores() == 64


@pytest.mark.parametrize(
    ("quota", "count"),
    [("400000 100000", 4), ("150000 100000", 2), ("10000 100000", 1), ("9900000 100000", 64)],
)
def test_a_quota_of_a_container_counts(quota: str, count: int, groups: Path):
    write(groups, membership="0::/", cpu__max=quota)
    assert cores() == count


def test_the_tightest_quota_of_nested_groups_counts(groups: Path):
    write(groups, membership="0::/outer/inner")
    write(groups / "outer" / "inner", cpu__max="max 100000")
    assert cores() == 64
    write(groups / "outer", cpu__max="300000 100000")
    assert cores() == 3
    write(groups / "outer" / "inner", cpu__max="200000 100000")
    assert cores() == 2


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu,cpuacct/docker/1", "cpu"])
def test_a_quota_of_version_1_counts(folder: str, groups: Path):
    """The container's view may begin at its own group, or at the host's."""
    write(groups, membership="5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/")
    write(groups / folder, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cores() == 64
    write(groups / folder, cpu__cfs_quota_us="400000")
    assert cores() == 4


@pytest.mark.parametrize("text", ["", "many 100000", "100000 0", "100000", "-1 100000"])
def test_a_quota_that_makes_no_sense_leaves_a_core(text: str, groups: Path):
    write(groups, membership="nonsense:\n", cpu__max=text) if text else None
    assert 1 <= cores() <= 64


def test_memory_of_nested_groups_is_what_each_still_leaves(groups: Path):
    assert group_memory() == []
    write(groups, membership="0::/outer/inner")
    stat = "anon 1\ninactive_file 100000"
    write(groups / "outer", memory__max="700000", memory__current="500000", memory__stat=stat)
    write(groups / "outer" / "inner", memory__max="max", memory__current="1", memory__stat=stat)
    assert group_memory() == [300_000]
    write(groups / "outer" / "inner", memory__max="200000", memory__current="100000")
    assert group_memory() == [200_000, 300_000]


def test_memory_of_version_1_counts(groups: Path):
    write(groups, membership="4:memory:/docker/1")
    limits = {"memory__limit_in_bytes": "700000", "memory__usage_in_bytes": "500000"}
    write(groups / "memory", **limits, memory__stat="cache 9\ntotal_inactive_file 100000")
    assert group_memory() == [300_000, 300_000]  # the container's own group, seen twice
