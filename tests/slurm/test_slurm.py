"""A real SLURM on this machine: arrays, preemption, requeueing, failures, a drained node, time limits."""

import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments import reproduce, run
from experiments.launch import slurm
from experiments.reproduction.cells import Cell, Plan, cells_of, progress
from experiments.reproduction.suites import load_suite
from mac.run.io.logger import METRICS
from mac.run.io.run_metadata import launches
from tests.helpers.command_line import arrays

SCRIPT = Path(__file__).with_name("cluster.sh")
PATIENCE = 2400.0
"""Seconds for all jobs of a test on a busy machine."""
TASK = "cube-single-play-singletask-task{}-v0"
DAMAGED = "cube-single-noisy-singletask-task1-v0"
SIZES = ["--hp.hidden", "8", "--hp.batch", "8", "--hp.cooldown", "0", "--eval.episodes", "1"]
FLAGS = [*SIZES, "--steps", "6000", "--run.segment", "10", "--run.checkpoint-every", "500"]
FLAGS += ["--run.eval-every", "6000"]
FEW = ["--hp.flow-steps-test", "1"]
ROW = """
[[row]]
env = "{}"
published = {{ {} }}
"""
SUITE = """
title = "twelve tiny cells"
source = "nowhere"
measure = "success"
[methods]
flow_bc = "BC"
iql = "IQL"
[deviation]
flow_bc = "seeds"
iql = "seeds"
"""


def missing() -> str:
    """The reason why no cluster can be started here; empty if one can."""
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if programs:
        return f"{', '.join(programs)} missing: tests/slurm/cluster.sh install"
    if importlib.util.find_spec("submitit") is None:
        return "submitit missing: the extra `slurm`"
    return "" if os.geteuid() == 0 else "the daemons need root"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """The folder of a cluster of one node, to which SLURM's commands of this process talk."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, since sockets have short names
    done = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv(
            "JAX_DISABLE_MOST_OPTIMIZATIONS", "true"
        )  # of the jobs, which compile more than they run
        try:
            if done.returncode:
                pytest.skip(f"the cluster does not start here: {done.stderr.strip()}")
            yield folder
        finally:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                control("scancel", "--me")
            subprocess.run([SCRIPT, "stop", folder], check=True)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which commands are called."""
    del cluster
    monkeypatch.chdir(tmp_path)
    return tmp_path


def control(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


def wait_until(done: Callable[[], bool], what: str) -> None:
    """Waits; requeued jobs, which SLURM holds back for two minutes, begin after some seconds.

    Not at once: a job that starts in the second in which it ended is killed, its credential revoked.
    """
    now = time.monotonic()
    end, seen, busy = now + PATIENCE, dict[str, float](), now
    while not done():
        now, jobs = time.monotonic(), slurm.queue()
        busy = now if jobs else busy
        assert now < end and now < busy + 60, f"{what}: {control('squeue')}"
        for number, job in jobs.items():
            if job.reason != "BeginTime":
                seen.pop(number, None)
            elif now > seen.setdefault(number, now) + 5:
                control("scontrol", "update", f"JobId={number}", "StartTime=now")
        time.sleep(0.2)


def write(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    for ending, episodes in (("", 3), ("-val", 1)):
        np.savez(folder / f"{name}{ending}.npz", **arrays(episodes))  # pyright: ignore[reportArgumentType]


def updates(folder: Path) -> int:
    """Updates that a run has logged."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((folder / METRICS).read_bytes().splitlines()[-2])["step"]
    return 0


class Grid:
    """Twelve cells of which one fails, for its data are damaged."""

    def __init__(self, folder: Path):
        both, one = "flow_bc = [50, 10], iql = [1, 1]", "flow_bc = [50, 10]"
        rows = [ROW.format(TASK.format(task), both) for task in range(1, 6)]
        rows += [ROW.format(env, one) for env in ("cube-single-play-singletask-v0", DAMAGED)]
        (folder / "tiny.toml").write_text(SUITE + "".join(rows))
        write(folder / "data", "cube-single-play-v0")
        (folder / "data" / "cube-single-noisy-v0.npz").write_text("no archive")
        self.plan = Plan(folder / "out", "laptop", 1, folder / "data", tuple(FLAGS))

    @property
    def cells(self) -> list[Cell]:
        return cells_of(load_suite("tiny.toml").entries, self.plan)

    def call(self, *words: str) -> int:
        first = ["tiny.toml", "--seeds", "1", "--out", "out", "--data-dir", "data"]
        return reproduce.main([*first, *words, "--", *FLAGS])

    def halfway(self) -> dict[Cell, str]:
        """Jobs of cells that have trained for a while and will for a while."""
        found = {}
        for cell in self.cells:
            if 600 <= updates(self.plan.folder(cell)) < 2000:
                found[cell] = json.loads((self.plan.out / "jobs" / f"{cell.name}.json").read_text())["job"]
        return found

    def states(self) -> dict[Cell, str]:
        return {cell: progress(cell, self.plan).status for cell in self.cells}


def test_cells_survive_preemption_failure_and_a_drained_node(place: Path, capsys: pytest.CaptureFixture[str]):
    grid = Grid(place)
    assert len(grid.cells) == 12
    assert grid.call("--jobs", "slurm", "--job.time", "30m", "--job.partition", "main") == 0
    said = capsys.readouterr().out
    assert "cells: 12 submitted" in said and "scancel" in said and "out/logs" in said
    assert grid.call("--list") == 0
    said = capsys.readouterr().out
    assert "queued: job " in said and ("running: job " in said or "running at update" in said)
    assert grid.call("--jobs", "slurm") == 0  # all have a job
    assert "cells: 0 submitted" in capsys.readouterr().out

    wait_until(lambda: bool(grid.halfway()), "no cell trains")
    (requeued, number), *_ = grid.halfway().items()
    control("scontrol", "requeue", number)
    node = control("sinfo", "--noheader", "--format=%n", "--partition=main").strip()
    wait_until(lambda: bool(set(grid.halfway()) - {requeued}), "no other cell trains")
    (preempted, _), *_ = ((cell, job) for cell, job in grid.halfway().items() if cell != requeued)
    control("sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: "signal" in launches(grid.plan.folder(preempted))[0], "it is not preempted")
    control("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    wait_until(lambda: not any(job.state == "RUNNING" for job in slurm.queue().values()), "still running")
    assert "missing" in grid.states().values()
    control("scontrol", "update", f"NodeName={node}", "State=RESUME")
    wait_until(lambda: not slurm.queue(), "jobs do not end")

    states = grid.states()
    assert [cell.env for cell, state in states.items() if state != "done"] == [DAMAGED]
    for cell in (requeued, preempted):
        first, second, *_ = launches(grid.plan.folder(cell))
        assert first["signal"] in (10, 12, 15) and second["resumed_from"] >= 500
        assert "--resume" in grid.plan.log(cell).read_text()
    capsys.readouterr()
    assert grid.call("--list") == 0
    said = capsys.readouterr().out
    assert "12 cells: 11 done, 1 failed" in said and "not a complete .npz archive" in said
    assert grid.call("--report") == 0
    (table,) = (path for path in (place / "out" / "report").glob("tiny*.csv") if "across" not in path.name)
    rows = list(csv.DictReader(line for line in table.read_text().splitlines() if not line.startswith("#")))
    assert len(rows) == 11

    write(place / "data", "cube-single-noisy-v0")
    assert grid.call("--jobs", "slurm", "--job.time", "30m") == 0
    assert "cells: 1 submitted, 11 done" in capsys.readouterr().out
    wait_until(lambda: not slurm.queue(), "the repaired cell does not end")
    assert set(grid.states().values()) == {"done"}


def test_run_at_its_time_limit_queues_again_and_continues(place: Path, capsys: pytest.CaptureFixture[str]):
    write(place / "data", "cube-single-play-v0")
    words = ["--algo", "flow_bc", "--env", TASK.format(1), "--seeds", "1", "--out", "long"]
    words += ["--data.dir", "data", *SIZES, "--steps", "10M", "--run.segment", "10"]
    words += ["--run.checkpoint-every", "1M", "--run.eval-every", "10M"]
    assert run.main([*words, "--jobs", "slurm", "--job.time", "3m", "--job.grace", "30s"]) == 0
    said = capsys.readouterr().out
    assert "preset laptop (without --job.gpus" in said and "scancel" in said
    wait_until(lambda: len(launches(place / "long")) > 1, "the run does not go on")
    first, second, *_ = launches(place / "long")
    assert first["signal"] == 12 and second["resumed_from"] == first["step"] > 0
    control("scancel", "--me")
    wait_until(lambda: not slurm.queue(), "the job does not end")


def test_what_the_cluster_refuses_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]):
    Grid(place)
    words = ["tiny.toml", "--out", "out", "--data-dir", "data", "--jobs", "slurm", "--job.partition", "no"]
    assert reproduce.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --jobs slurm: sbatch refuses: ") and "partition" in line
    assert not list((place / "out" / "jobs").glob("*.json"))


def test_step_of_two_tasks_is_one_run(place: Path):
    """A signal that SLURM sends to all of its processes stops both with a checkpoint, and both continue."""
    write(place / "data", "cube-single-play-v0")
    out, log = place / "both", place / "step.log"
    srun = ["srun", "-n", "2", sys.executable, str(Path(run.__file__)), "--auto-resume", "--out", str(out)]
    words = [*FLAGS, "--algo", "flow_bc", "--env", TASK.format(1), "--preset", "laptop", "--seeds", "2"]
    words += ["--data.dir", str(place / "data"), "--steps", "1000000", "--run.eval-every", "1000000"]
    with log.open("wb") as file:
        step = subprocess.Popen([*srun, *words], stdout=file, stderr=file)
    wait_until(lambda: step.poll() is not None or updates(out) >= 600, "no checkpoint")
    assert step.poll() is None, log.read_text()
    control("scancel", "--signal=TERM", control("squeue", "--steps", "--noheader", "--format=%i").split()[0])
    assert step.wait(PATIENCE) == 143, log.read_text()
    (update,) = re.findall(r"stopped at update ([\d,]+); a checkpoint is written", log.read_text())
    said = control(*srun, "--steps", str(int(update.replace(",", "")) + 10))
    assert f"resumed from the checkpoint of update {update}" in said and "processes    2 with" in said
