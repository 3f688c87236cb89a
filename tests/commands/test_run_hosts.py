"""`run.py` as two processes of two virtual devices each: numbers, kills, signals, other devices later."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mac.run import hosts
from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.logger import EVAL, METRICS
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.referee import free_port
from tests.helpers.command_line import SIZES, params

ROOT = Path(__file__).parents[2]
SHARED = ["--run.batch-devices", "2"]

pytestmark = pytest.mark.slow


def launch(words: list[str], devices: int, **more: str) -> subprocess.Popen[str]:
    flags = re.sub(r"\S*device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"} | more
    command = [sys.executable, "experiments/run.py", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launch_pair(words: list[str]) -> list[subprocess.Popen[str]]:
    """Processes 0 and 1; the first by flag, the second by variables such as torchrun's."""
    port = free_port()
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [launch([*words, "--hosts", f"127.0.0.1:{port},0,2"], 2), launch(words, 2, **variables)]


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == status, out + err
    return out, err


def alone(words: list[str], devices: int) -> None:
    finish(launch(words, devices))


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with CheckpointStore(folder / CHECKPOINTS) as store:
        header = store._header(None)
        return store._read_arrays(store._path(header["step"]), header)


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_two_processes_train_as_one_with_all_devices(data: list[str], tmp_path: Path):
    """Parameters bit for bit: the same program on the same mesh. One device alone differs by rounding."""
    flags = [*SIZES, *data, "--steps", "20", "--run.checkpoint-every", "10"]
    both = launch_pair([*flags, *SHARED, "--out", str(tmp_path / "two")])
    (out, _), (silent, silent_err) = map(finish, both)
    assert "finished at update 20" in out and silent == silent_err == ""
    alone([*flags, *SHARED, "--out", str(tmp_path / "four")], 4)
    alone([*flags, "--out", str(tmp_path / "one")], 1)
    assert params(tmp_path / "two") == params(tmp_path / "four")
    for name, value in arrays(tmp_path / "one").items():
        np.testing.assert_allclose(arrays(tmp_path / "two")[name], value, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(rows(tmp_path / "two", METRICS), rows(tmp_path / "four", METRICS), strict=True):
        # A process evaluates one seed, which is compiled otherwise than a loop over both.
        assert ours == (theirs if "critic/loss" in ours else pytest.approx(theirs, rel=1e-5, abs=1e-5))
    ours, theirs = rows(tmp_path / "two", EVAL), rows(tmp_path / "four", EVAL)
    assert [row["success"] for row in ours] == [row["success"] for row in theirs] and len(ours) == 2


def wait_for_checkpoint(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    while all(each.poll() is None for each in processes):
        with contextlib.suppress(OSError):
            if any(int(name) >= step for name in os.listdir(folder / CHECKPOINTS) if name.isdecimal()):
                return
        time.sleep(0.05)
    pytest.fail("".join(text for each in processes for text in each.communicate()))


def test_killed_run_continues_on_other_devices(data: list[str], tmp_path: Path):
    flags = [*SIZES, *data, "--run.checkpoint-every", "10", *SHARED]
    both = launch_pair([*flags, "--steps", "1000000", "--out", str(tmp_path / "cut")])
    wait_for_checkpoint(tmp_path / "cut", 20, both)
    both[1].kill()
    (_, err), _ = finish(both[0], hosts.STATUS), finish(both[1], -signal.SIGKILL)
    (line,) = err.splitlines()
    assert line.startswith("error: process 1 of 2 ended before the run did")
    with CheckpointStore(tmp_path / "cut" / CHECKPOINTS) as store:
        reached = store.latest()
    assert reached
    steps = ["--steps", str(reached + 10)]
    alone([*flags, *steps, "--out", str(tmp_path / "straight")], 4)
    for devices, more in ((4, []), (1, ["--run.batch-devices", "1"])):
        again = shutil.copytree(tmp_path / "cut", tmp_path / f"on {devices}")
        alone(["--out", str(again), "--resume", *steps, *more], devices)
    assert params(tmp_path / "on 4") == params(tmp_path / "straight")
    for name, value in arrays(tmp_path / "straight").items():
        np.testing.assert_allclose(arrays(tmp_path / "on 1")[name], value, rtol=1e-4, atol=1e-5)


def test_signal_at_one_process_stops_both(data: list[str], tmp_path: Path):
    """At the same update, with a checkpoint, which two processes continue."""
    words = ["--steps", "1000000", "--run.checkpoint-every", "10", "--out", str(tmp_path / "run")]
    both = launch_pair([*SIZES, *data, *words])
    wait_for_checkpoint(tmp_path / "run", 10, both)
    both[1].send_signal(signal.SIGTERM)
    (out, _), _ = [finish(each, 128 + signal.SIGTERM) for each in both]
    (reached,) = re.findall(r"stopped at update ([\d,]+)", out)
    step = int(reached.replace(",", ""))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["launches"][0]["signal"] == signal.SIGTERM
    again = launch_pair(["--out", str(tmp_path / "run"), "--resume", "--steps", str(step + 5)])
    (out, _), _ = map(finish, again)
    assert f"resumed from the checkpoint of update {step:,}" in out
    assert [row["step"] for row in rows(tmp_path / "run", METRICS)][-1] == step + 5


def test_processes_with_other_settings_end_with_one_line(data: list[str], tmp_path: Path):
    port, words = free_port(), [*SIZES, *data, "--steps", "5", "--out", str(tmp_path / "run")]
    place = f"127.0.0.1:{port}"
    first = launch([*words, "--hosts", f"{place},0,2"], 1)
    second = launch([*words, "--hp.lr", "0.1", "--hosts", f"{place},1,2"], 1)
    (_, err), (_, silent) = finish(first, 2), finish(second, 2)
    (line,) = err.splitlines()
    assert line.startswith(
        "error: process 1 has other settings or data than process 0: hp.lr is 0.1 there and "
    )
    assert not silent and not (tmp_path / "run" / METRICS).exists()
