"""Runs that end hard: what is left, the exit status, and that continuing gives the bits of an unbroken run.

Each is a process of the real command line, as in `tests/helpers/random_kills.py`.
"""

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mac.run.io.checkpoint import CheckpointStore
from tests.helpers.random_kills import (
    DATA,
    KINDS,
    MOMENTS,
    RUN,
    Kills,
    Launch,
    differences,
    result,
    tail,
    when_seen,
    write_data,
)

pytestmark = pytest.mark.slow
GOES_ON, STOPS = 0, 128 + signal.SIGTERM  # what a run may do whose output cannot be written


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Kills:
    """Folders of runs, their compile cache, and the unbroken run of each kind."""
    return Kills(tmp_path_factory.mktemp("hard") / "stops", 0)


def ends_alike(series: Kills, folder: Path, kind: str = "single") -> None:
    """Continues the run in `folder` to its end, which must be that of the unbroken run."""
    series.launch(folder, kind).finish()
    assert not differences(result(folder), series.unbroken(kind)[1])


def ended(launch: Launch) -> int:
    """The exit status of a launch, which must not show a traceback."""
    status = launch.process.wait(900)
    assert "Traceback" not in launch.log.read_text(errors="replace"), tail(launch.log)
    return status


def wait_for(launch: Launch, *patterns: str) -> None:
    """Returns when a file of the run is there."""
    seen = when_seen(launch.folder, patterns)
    while not seen():
        assert launch.process.poll() is None, tail(launch.log)
        time.sleep(0.001)


def steps(folder: Path) -> list[int]:
    with CheckpointStore(folder / RUN / "checkpoints") as store:
        return store.steps()


def copy_data(source: Path, folder: Path) -> None:
    """The dataset of `source` takes the place of that in `folder`."""
    for file in (source / DATA).parent.glob("*.npz"):
        shutil.copy2(file, (folder / DATA).parent / file.name)


def test_a_pipe_that_closes_after_a_line_loses_nothing(series: Kills):
    folder = series.place("head")
    log = open(series.folder / "head.log", "wb")  # noqa: SIM115 - the process has it
    launch = series.launch(folder, "single", stdout=subprocess.PIPE, stderr=log)
    assert launch.process.stdout
    assert launch.process.stdout.readline()
    launch.process.stdout.close()
    assert ended(launch) in (GOES_ON, STOPS)
    assert steps(folder)
    ends_alike(series, folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_under_the_log_loses_nothing(series: Kills):
    folder = series.place("full-log")
    with open("/dev/full", "wb") as full:
        launch = series.launch(folder, "single", stdout=full, stderr=full)
        assert ended(launch) in (GOES_ON, STOPS)
    assert steps(folder)
    ends_alike(series, folder)


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[None]:
    """A file system of a few MB, mounted there; the test is skipped where that is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        place.rmdir()
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_while_training_is_one_line(series: Kills):
    folder = series.place("full-run")
    with small_disk(folder / RUN, 4):
        launch, ballast = series.launch(folder, "single"), folder / RUN / "ballast"
        wait_for(launch, f"{RUN}/checkpoints/0*/meta.json")
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert ended(launch) == 2
        (line,) = [line for line in launch.log.read_text().splitlines() if line.startswith("error: ")]
        assert "No space left" in line or "no space left" in line.lower()
        assert steps(folder)
        ballast.unlink()
        ends_alike(series, folder)


def test_ctrl_c_inside_a_checkpoint_leaves_a_whole_one(series: Kills):
    folder = series.place("ctrl-c")
    launch = series.launch(folder, "single")
    wait_for(launch, *MOMENTS["checkpoint"])
    launch.process.send_signal(signal.SIGINT)
    assert ended(launch) == 128 + signal.SIGINT
    assert steps(folder)
    assert not list(folder.glob(f"{RUN}/checkpoints/.incomplete-*"))
    ends_alike(series, folder)


def test_sigkill_during_conversion_is_made_good(series: Kills):
    series.unbroken("single")
    folder = series.place("conversion")
    launch = series.launch(folder, "single")
    assert launch.kill_when(when_seen(folder, MOMENTS["conversion"]), 0.0001)
    assert not (folder / RUN / "config.json").exists()
    ends_alike(series, folder)


@pytest.mark.parametrize("kind", ["single", "windows"])
def test_data_that_are_replaced_while_training_change_nothing(series: Kills, kind: str):
    """Another run converts other data of the same name meanwhile."""
    write_data(series.folder / f"other-{kind}", seed=9)
    folder = series.place(f"replaced-{kind}")
    launch = series.launch(folder, kind)
    wait_for(launch, f"{RUN}/checkpoints/0*")
    copy_data(series.folder / f"other-{kind}", folder)
    other = Launch(folder, [*KINDS[kind], "--steps", "20", "--out", "second"], series.folder / "cache")
    other.finish()
    launch.finish()
    names = ("metrics.jsonl", "eval.jsonl", "normalizer.json")
    found, wanted = result(folder), series.unbroken(kind)[1]
    assert {name: found[f"{RUN}/{name}"] == wanted[f"{RUN}/{name}"] for name in names} == dict.fromkeys(
        names, True
    )
    assert (folder / "second/normalizer.json").read_bytes() != found[f"{RUN}/normalizer.json"]


def test_data_that_were_replaced_are_refused_until_they_are_back(series: Kills):
    write_data(series.folder / "other", seed=9)
    folder = series.place("resumed")
    launch = series.launch(folder, "single")
    wait_for(launch, f"{RUN}/checkpoints/0*/meta.json")
    launch.process.kill()
    launch.process.wait()
    normalizer = (folder / RUN / "normalizer.json").read_bytes()
    copy_data(series.folder / "other", folder)
    again = series.launch(folder, "single")
    assert ended(again) == 2, "training went on with other data"
    (line,) = [line for line in again.log.read_text().splitlines() if line.startswith("error: ")]
    assert "small.npz" in line
    assert (folder / RUN / "normalizer.json").read_bytes() == normalizer
    copy_data(series.folder / "new", folder)
    series.launch(folder, "single").finish()
    found, wanted = result(folder), series.unbroken("single")[1]
    assert all(found[name] == wanted[name] for name in wanted if name.startswith(RUN))


@pytest.mark.parametrize("kind", ["single", "sweep"])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(series: Kills, kind: str):
    series.repeat(kind, [0.8, "checkpoint", 0.35])
    series.repeat(kind, ["evaluation and checkpoint", "picture"])
    assert not series.failures
