"""Experiment trackers: their own readers find each row of a run once, in order, whatever was killed."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.launch.loggers import PROJECT, RowReader, RunTrackers, require_installed
from experiments.report import main as report
from experiments.run import main
from mac.errors import UserError
from mac.run.io.eval_rows import Evaluation
from mac.run.io.logger import EVAL, METRICS, RunLog
from mac.types import Episodes
from tests.helpers.command_line import content, error_of
from tests.helpers.random_kills import KINDS, RUN, Launch, when_grown, write_data

ROOT = Path(__file__).parents[2]
Points = dict[tuple[str, str], list[tuple[int, float]]]
"""Points by curve and name, in the order of the tracker's log."""

KILLED = """
import os, signal, sys
from pathlib import Path
from experiments.launch.loggers import RunTrackers
run = RunTrackers(Path(sys.argv[1]), [sys.argv[2]])
if sys.argv[3] != "opened":
    run.catch_up()
if sys.argv[3] == "flushed":
    import time
    time.sleep(1.5)  # the trackers' own threads and processes write
os.kill(os.getpid(), signal.SIGKILL)
"""


def wanted(folder: Path) -> Points:
    """Points of all rows, in the order of training."""
    found: Points = {}
    for record in RowReader(folder).records():
        for curve, values in record.curves.items():
            for name, value in values.items():
                found.setdefault((curve, name), []).append((record.step, value))
    return found


def in_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Points = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[path.name, tag] = [(point.step, point.value) for point in events.Scalars(tag)]
    return found


def in_wandb(folder: Path) -> Points:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process has written all when it ends
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for data in log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in items})
    return by_curve(rows, "updates")


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of W&B's offline file, which its package reads in Go only.

    It is a log of LevelDB: blocks of 32 KiB, of pieces with a header of 7 bytes (checksum, length, and kind:
    whole, first, middle, last). The file's own header takes the first 7 bytes of the first block.
    """
    block, head = 1 << 15, 7
    at, record = head, b""
    while at + head <= len(data):
        if block - at % block < head:
            at += block - at % block
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record = (record if kind in (3, 4) else b"") + data[at + head : at + head + size]
        at += head + size
        if kind in (1, 4):
            yield record


def in_trackio(folder: Path) -> Points:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    mark = (folder / "tracker_id").read_text()
    (run,) = [run for run in Api().runs(PROJECT) if (run.config or {}).get("tracker_id") == mark]
    return by_curve(SQLiteStorage.get_logs(PROJECT, run.name, run_id=run.id), "step")


def by_curve(rows: list[dict[str, Any]], step: str) -> Points:
    """Points of rows whose names have the curve in front."""
    found: Points = {}
    for row in rows:
        for name, value in row.items():
            if not name.startswith("_") and name not in ("updates", "step", "timestamp"):
                first, _, rest = name.partition("/")
                key = (first, rest) if first.startswith("seed") else ("mean", name)
                found.setdefault(key, []).append((int(row[step]), value))
    return found


READERS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "trackio": in_trackio,
}


@pytest.fixture(params=READERS)
def tracker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One whose package is installed; its own settings and data stay in the test's folder."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"needs the extra `{request.param}`")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    use_folder(monkeypatch, tmp_path / "trackio")
    return request.param


def use_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes trackio keep its database in a folder, in this process and in those that it starts."""
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    if importlib.util.find_spec("trackio"):
        import trackio.sqlite_storage
        import trackio.utils

        for module in (trackio.sqlite_storage, trackio.utils):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)


def write_rows(log: RunLog, steps: range, seeds: tuple[int, ...] = (3, 4)) -> None:
    """Rows as training writes them: metrics, and at every second step diagnoses and an evaluation."""
    table = (len(seeds), 2, 3)
    for step in steps:
        log.metrics(step, seeds, {"critic/loss": step + np.arange(2.0), "lr": np.full(2, 0.5)})
        if step % 2 == 0:
            log.metrics(step, seeds, {"diagnostics/error": np.asarray([step, np.nan])})
            success = jnp.arange(12).reshape(table) < step
            ones = jnp.ones(table, jnp.int32)
            result = Episodes(success, -success.astype(jnp.float32), ones, dropped=0 * ones)
            log.evals(Evaluation(step, (1, 2), result, "c"), seeds)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A run of 9 steps with a checkpoint after step 6, whose log positions are in `positions.json`."""
    folder = tmp_path / "run"
    with RunLog(folder) as log:
        write_rows(log, range(1, 7))
        (folder / "positions.json").write_text(json.dumps(log.sync()))
        write_rows(log, range(7, 10))
    yield folder


def same(found: Points, rows: Points) -> None:
    """Compares curves, steps and values; TensorBoard keeps 32 bits."""
    assert found.keys() == rows.keys()
    for key, points in rows.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points], key
        np.testing.assert_allclose([x for _, x in found[key]], [x for _, x in points], rtol=1e-6)


@pytest.mark.parametrize("moment", ["opened", "sent", "flushed"])
def test_kill_and_resume_leave_every_point_once(tracker: str, folder: Path, moment: str):
    script = [sys.executable, "-c", KILLED, str(folder), tracker, moment]
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = subprocess.run(script, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    positions = json.loads((folder / "positions.json").read_text())
    with RunLog(folder, positions) as log, RunTrackers(folder, [tracker]) as run:
        for step in range(7, 13):
            write_rows(log, range(step, step + 1))
            run.catch_up()
    same(READERS[tracker](folder), wanted(folder))
    assert [step for step, _ in wanted(folder)["seed3", "critic/loss"]] == [*range(1, 13)]


def test_records_hold_each_seed_and_the_mean(folder: Path):
    found = wanted(folder)
    assert found["seed3", "critic/loss"][:2] == [(1, 1.0), (2, 2.0)]
    assert found["mean", "critic/loss"][0] == (1, 1.5)
    assert found["seed3", "diagnostics/error"] == [(2, 2.0), (4, 4.0), (6, 6.0), (8, 8.0)]
    assert ("mean", "diagnostics/error") not in found and ("seed4", "diagnostics/error") not in found
    assert found["seed3", "eval/success/task1"][0] == (2, pytest.approx(2 / 3))
    assert found["seed3", "eval/success"][0] == (2, pytest.approx(1 / 3))
    assert found["mean", "eval/success"][0] == (2, pytest.approx(1 / 6))


def test_finished_run_is_sent_by_the_report(tracker: str, copied: Path, capsys: pytest.CaptureFixture[str]):
    before = content(copied)
    assert report([str(copied), "--log", tracker]) == 0
    assert report([str(copied), "--log", tracker]) == 0
    assert "records of" in capsys.readouterr().out
    same(READERS[tracker](copied), wanted(copied))
    assert before.items() <= content(copied).items()


@pytest.mark.slow
def test_each_run_of_a_sweep_is_sent_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trackers = [name for name in READERS if importlib.util.find_spec(name)]
    if not trackers:
        pytest.skip("needs one of the extras tensorboard, wandb, trackio")
    use_folder(monkeypatch, tmp_path / "trackio")
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = ["--out", "a sweep"]
    assert main([*KINDS["sweep"], "--hp.cooldown", "0", "--steps", "40", "--log", *trackers, *out]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split() for line in said if "tensorboard " in line] == [
        ["tensorboard", "tensorboard", "--logdir", "'a", "sweep'"]
    ] * ("tensorboard" in trackers)
    assert sum(line.startswith("wandb ") for line in said) == 2 * ("wandb" in trackers)
    assert main([*out, "--resume", "--steps", "80"]) == 0
    for run in (Path("a sweep/expectile=0.7"), Path("a sweep/expectile=0.9")):
        rows = wanted(run)
        assert [step for step, _ in rows["seed1", "eval/success"]] == [40, 80]
        for name in trackers:
            same(READERS[name](run), rows)


def test_missing_package_is_one_line_before_training(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = error_of(capsys, [*data, "--out", str(tmp_path / "run"), "--log", "wandb"])
    assert "--log wandb: its package cannot be imported" in error and "'.[wandb]'" in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="wandb"):
        require_installed(["wandb"])


def test_tracker_that_fails_ends_no_training(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from experiments.launch import loggers

    class Broken(loggers.AbstractLog):
        def __init__(self, folder: Path, config: Any):
            self.where = "nowhere"

        def write(self, record: Any) -> None:
            raise RuntimeError("no space left")

        def flush(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setitem(loggers._LOGS, "wandb", Broken)
    notes: list[str] = []
    with RunTrackers(folder, ["wandb"], notes.append) as run:
        run.catch_up()
        run.catch_up()
    (note,) = notes
    assert "--log wandb stopped (no space left)" in note and "experiments/report.py" in note


@pytest.mark.slow
def test_killed_training_leaves_every_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trackers = [name for name in READERS if importlib.util.find_spec(name)]
    if not trackers:
        pytest.skip("needs one of the extras tensorboard, wandb, trackio")
    use_folder(monkeypatch, tmp_path / "trackio")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    home = tmp_path / "home"
    write_data(home)
    flags = [*KINDS["single"], "--log", *trackers, "--out", RUN]
    launch = Launch(home, flags, tmp_path / "cache")
    assert launch.kill_when(when_grown(home, (f"{RUN}/{EVAL}",)), 0.0005)
    launch = Launch(home, ["--resume", "--out", RUN], tmp_path / "cache")
    assert launch.kill_when(when_grown(home, (f"{RUN}/{METRICS}",)), 0.0005)
    Launch(home, ["--resume", "--out", RUN], tmp_path / "cache").finish()
    rows = wanted(home / RUN)
    assert [step for step, _ in rows["seed0", "eval/success"]] == [40, 80, 100]
    for name in trackers:
        same(READERS[name](home / RUN), rows)
