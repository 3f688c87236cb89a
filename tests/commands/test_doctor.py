"""The report on a machine: what is broken is named with its remedy, and never stops the report."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import doctor
from experiments.doctor_checks import checks as checkups
from experiments.doctor_checks import datasets
from experiments.doctor_checks.findings import BROKEN, OK, WARNING, Finding
from mac.data.provenance import DownloadRecord, record_download
from tests.helpers.doctor import only, report, versions

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path


@pytest.mark.slow
def test_this_machine_is_fit(capsys: pytest.CaptureFixture[str]):
    """Everything that is needed works here, in one report of a few seconds of work."""
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert BROKEN not in out and out.splitlines()[-1].startswith("0 broken, ")
    for what in ("python", "jax", "mujoco", "device", "engine c", "engine mjx", "renderer", "cache", "data"):
        assert f" {what} " in out


# The status.


def fake(*lines: Finding) -> list[tuple[str, Any]]:
    return [("fake", lambda data: iter(lines))]


@pytest.mark.parametrize(("state", "status"), [(OK, 0), (WARNING, 0), (BROKEN, 1)])
def test_only_what_is_broken_fails(state: str, status: int, capsys: pytest.CaptureFixture[str]):
    assert doctor.main([], fake(Finding(state, "thing", "found so", "do this"))) == status
    assert "-> do this" in capsys.readouterr().out


def test_the_last_line_counts_one_warning_in_the_singular(capsys: pytest.CaptureFixture[str]):
    doctor.main([], fake(Finding(WARNING, "thing", "found so")))
    assert capsys.readouterr().out.splitlines()[-1] == "0 broken, 1 warning, 1 check"


def test_a_check_that_fails_is_a_finding_and_others_go_on(capsys: pytest.CaptureFixture[str]):
    def explodes(data: Path) -> Iterator[Finding]:
        yield Finding(OK, "before", "fine")
        raise ImportError("libfoo.so: cannot open\nshared object")

    checks = [("thing", explodes), *fake(Finding(OK, "after", "fine"))]
    assert doctor.main([], checks) == 1
    out = capsys.readouterr().out.splitlines()
    assert any("ImportError: libfoo.so: cannot open shared object" in line for line in out)
    assert any("after" in line for line in out)


def test_the_report_for_programs_is_json(capsys: pytest.CaptureFixture[str]):
    doctor.main(["--json"], fake(Finding(WARNING, "thing", "found so", "do this")))
    assert json.loads(capsys.readouterr().out) == [
        {"state": "warning", "what": "thing", "found": "found so", "remedy": "do this"}
    ]


def test_a_variable_that_is_ignored_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_THREEFRY_PARTITIONABLE", "True")
    monkeypatch.setenv("JAX_DISABLE_JIT", "0")
    assert report(checkups.check_variables) == []
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    line = only(checkups.check_variables)
    assert (line.state, line.remedy) == (WARNING, "unset JAX_ENABLE_X64")


# Packages.


@pytest.mark.parametrize(
    ("version", "pins", "inside"),
    [
        ("0.10.2", ">=0.10.2,<0.13", True),
        ("0.13.0", ">=0.10.2,<0.13", False),
        ("0.12.0.1", ">=0.10.2,<0.13", True),
        ("0.9", ">=0.10.2", False),
        ("3.17.0", ">=3.17,<3.18", True),
        ("3.18", ">=3.17,<3.18", False),
        ("2.0.0rc1", ">=2.0", True),
        ("1.2.3", "==1.2.3", True),
        ("1.2.3", "!=1.2.3", False),
        ("7", "", True),
    ],
)
def test_bounds_of_versions(version: str, pins: str, inside: bool):
    assert checkups.version_fits(version, pins) == inside


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    versions(monkeypatch, optax=None, tyro="2.0.1")
    lines = report(checkups.check_packages)
    assert [(line.state, line.what) for line in lines] == [(BROKEN, "optax"), (BROKEN, "tyro")]
    assert "not installed" in lines[0].found and lines[0].remedy.startswith("pip install 'optax>=")
    assert "2.0.1" in lines[1].found


def test_packages_of_a_pair_must_fit_each_other(monkeypatch: pytest.MonkeyPatch):
    assert {line.state for line in report(checkups.check_pairs)} == {OK}
    versions(monkeypatch, mujoco="3.17.0", mujoco_mjx="3.16.2")
    wrong = [line for line in report(checkups.check_pairs) if line.state == BROKEN]
    assert [line.what for line in wrong] == ["mujoco"] and "mujoco-mjx==3.17.*" in wrong[0].remedy


def test_an_old_python_is_broken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert only(checkups.check_python).state == BROKEN


def test_an_installed_project_is_described_by_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """After `pip install .` no pyproject.toml is beside the program."""
    here = checkups._project()
    monkeypatch.setattr(checkups, "ROOT", tmp_path)
    assert [only(check).state for check in (checkups.check_python, checkups.check_packages)] == [OK, OK]
    names = [[re.split(r"[<>=;]", line)[0] for line in needed] for _, needed in (here, checkups._project())]
    assert sorted(names[0]) == sorted(names[1])
    versions(monkeypatch, optax=None)
    assert only(checkups.check_packages).what == "optax"


@pytest.mark.parametrize(("name", "state"), [("Linux", OK), ("Windows", WARNING), ("Darwin", WARNING)])
def test_other_systems_than_linux_are_untested(name: str, state: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "system", lambda: name)
    line = only(checkups.check_system)
    assert line.state == state and name in line.found and ("untested" in line.found) == (state == WARNING)


def test_a_project_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch):
    versions(monkeypatch, mac_jax=None)
    assert "pip install -e" in only(checkups.check_install).remedy


# Folders.


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch):
    assert {line.state for line in report(checkups.check_folders)} == {OK}

    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    lines = report(checkups.check_folders)
    assert {line.state for line in lines} == {BROKEN} and "--out" in lines[0].remedy
    assert "--data.dir" in lines[1].remedy and "Permission denied" in lines[1].found


def test_a_file_in_the_place_of_a_folder_is_broken():
    Path("data").write_text("no folder")
    assert [line.state for line in report(checkups.check_folders)] == [OK, BROKEN]


def test_nothing_is_made_by_looking(tmp_path: Path):
    for check in (
        checkups.check_folders,
        checkups.check_cache,
        checkups.check_disk,
        datasets.check_datasets,
    ):
        report(check)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_little_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    real = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=10**9))
    assert {line.state for line in report(checkups.check_disk)} == {WARNING}


def test_the_cache_is_where_programs_keep_it(monkeypatch: pytest.MonkeyPatch, home: Path):
    (home / ".cache/mac-jax/xla").mkdir(parents=True)
    (home / ".cache/mac-jax/xla/a").write_bytes(bytes(3_000_000))
    line = only(checkups.check_cache)
    assert str(home / ".cache/mac-jax/xla") in line.found and "1 files, 3 MB" in line.found
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "elsewhere"))
    assert "elsewhere" in only(checkups.check_cache).found


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch):
    sizes = {"SC_PHYS_PAGES": 2**18, "SC_PAGE_SIZE": 4096}  # 1 GiB
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert only(checkups.check_memory).state == WARNING


# Datasets.


def test_no_data_is_no_fault():
    line = only(datasets.check_datasets)
    assert line.state == OK and "--data.source download" in line.found


def test_datasets_are_listed_with_sizes_and_labels(home: Path):
    made = Path("data/generated-2002-seed3")
    made.mkdir(parents=True)
    (made / "scene-play-v0.npz").write_bytes(bytes(5_000_000))
    (made / "scene-play-v0-val.npz").write_bytes(bytes(1_000_000))
    (made / "scene-play-v0.json").write_text('{"source": "made by mac-jax", "seed": 3}')
    downloaded = Path("data/downloads/d4rl/hopper_medium-v2.hdf5")
    downloaded.parent.mkdir(parents=True)
    downloaded.write_bytes(b"x")
    record_download(downloaded, DownloadRecord("0", 1, "https://rail.eecs.berkeley.edu/a", "D4RL"))
    theirs = home / ".ogbench/data/cube-single-play-v0.npz"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x")
    for beside in (made / "scene-play-v0.npz", theirs):  # as macOS leaves them
        beside.with_name(f"._{beside.name}").write_bytes(bytes(4_000_000))
    found = {Path(line.found.split(":")[0]).name: line.found for line in report(datasets.check_datasets)}
    assert "scene-play-v0, 6 MB; generated (mac-jax, seed 3)" in found["generated-2002-seed3"]
    assert found["d4rl"].endswith("hopper_medium-v2, 0 MB; D4RL")
    assert found["data"].endswith("OGBench (file in ~/.ogbench)")


def test_stores_and_downloads_that_did_not_end_are_listed():
    store = Path("data/stores/a")
    store.mkdir(parents=True)
    store.joinpath("meta.json").write_text('{"train": {"train-000": 49}, "dtype": "float32"}')
    part = Path("data/downloads/ogbench/b.npz.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x")
    unfinished, listed = report(datasets.check_datasets)
    assert unfinished.state == WARNING and "continue it" in unfinished.remedy
    assert listed.found == "data/stores/a: 49 rows as float32; unknown source"
    store.joinpath("meta.json").write_text("{")
    assert report(datasets.check_datasets)[1].state == WARNING


# Without the project's packages.


@pytest.mark.slow
def test_the_report_is_given_where_nothing_is_installed(tmp_path: Path):
    """A Python without any package, started as a user would."""
    command = [sys.executable, "-S", "-E", str(ROOT / "experiments" / "doctor.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not done.stderr
    for package in ("jax", "mujoco", "numpy", "equinox"):
        assert any(line.startswith(BROKEN) and f" {package} " in line for line in done.stdout.splitlines())
    assert "-> pip install 'numpy>=2.0'" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("checks")
