"""Stand-ins for runs in tests of the command that runs tables: a program, finished cells, and a table."""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments.reproduce import main
from experiments.reproduction import runner
from experiments.reproduction.cells import Cell, Plan, cell_settings, cells_of, progress
from experiments.reproduction.suites import load_suite
from mac.run.io.checkpoint import FORMAT
from mac.run.io.logger import EVAL

SUITE = """
title = "three tasks"
source = "nowhere"
measure = "success"
[methods]
mac = "MAC"
not_here = "Not here"
[deviation]
mac = "seeds"
not_here = "seeds"
[[row]]
env = "cube-single-play-singletask-task1-v0"
published = { mac = [50, 10] }
[[row]]
env = "cube-single-play-singletask-task2-v0"
published = { mac = [100, 0], not_here = [1, 1] }
[[row]]
env = "cube-single-play-singletask-task3-v0"
published = { mac = [0, 3] }
[[row]]
env = "cube-single-play-singletask-v0"
runs = [
  "cube-single-play-singletask-task1-v0",
  "cube-single-play-singletask-task2-v0",
  "cube-single-play-singletask-task3-v0",
]
published = { mac = [50, 4] }
"""
FAKE = """
import json, os, pathlib, shutil, signal, sys, time

def value(flag, words=sys.argv):
    return words[words.index(flag) + 1] if flag in words else None

out = pathlib.Path(value("--out"))
task = int(out.name.split("singletask-task")[1][0])
with open(os.environ["FAKE_CALLS"], "a") as file:
    file.write(json.dumps([task, "--resume" in sys.argv]) + chr(10))
what = json.loads(os.environ["FAKE_DOES"]).get(str(task), "finish")
if what == "fail":
    print("words before")
    print("error: --hp.lr=0: must be positive", file=sys.stderr)
    sys.exit(2)
shutil.copytree(os.environ["FAKE_RUN"], out, dirs_exist_ok=True)
config = json.loads((out / "config.json").read_text())
config["env"] = f"cube-single-play-singletask-task{task}-v0"
if what.startswith("hang"):
    if what == "hang":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shutil.rmtree(out / "checkpoints")
    (out / "config.json").write_text(json.dumps(config))
    time.sleep(60)
(out / "config.json").write_text(json.dumps(config))
"""
TASKS = [f"cube-single-play-singletask-task{task}-v0" for task in (1, 2, 3)]


class Fake:
    """A program in place of run.py, which copies a finished run, fails, or waits to be stopped."""

    def __init__(self, folder: Path, finished: Path, monkeypatch: pytest.MonkeyPatch):
        self.suite, self.out, self.calls_file = folder / "mine.toml", folder / "out", folder / "calls"
        self.suite.write_text(SUITE)
        (folder / "fake.py").write_text(FAKE)
        self._set = monkeypatch.setenv
        self._set("FAKE_RUN", str(finished))
        self._set("FAKE_CALLS", str(self.calls_file))
        self.does()
        monkeypatch.setattr(runner, "program", lambda: [sys.executable, str(folder / "fake.py")])

    def does(self, **by_task: str) -> None:
        self._set(
            "FAKE_DOES", json.dumps({name.removeprefix("task"): what for name, what in by_task.items()})
        )

    @property
    def calls(self) -> list[list[object]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [json.loads(line) for line in lines]

    def run(self, *words: str) -> int:
        return main([str(self.suite), "--out", str(self.out), "--seeds", "2", *words])

    @property
    def plan(self) -> Plan:
        return Plan(self.out, "laptop", 2, Path("data"))

    def states(self) -> list[str]:
        suite = load_suite(str(self.suite))
        found = cells_of(suite.entries, self.plan)
        return [progress(cell, self.plan).status for cell in found if cell.algo == "mac"]


def write_finished(plan: Plan, cell: Cell, *scores: float, **columns: Any) -> Path:
    """Writes the files of a finished cell that nobody trained; returns its folder.

    Args:
        scores: success of all seeds at each evaluation, the last at the last update.
        columns: further columns of all rows, such as `measure`.
    """
    folder, settings = plan.folder(cell), cell_settings(cell, plan.data_dir)
    steps, known = settings.steps, settings.task_id
    tasks = known.tasks if known.task is None else (known.task,)
    rows = [
        {"step": steps * i // len(scores), "seed": seed, "task": task, "success": score, "return": 0.0}
        | {"episodes": 15, "engine": "c", **columns}
        for i, score in enumerate(scores, start=1)
        for seed in range(cell.seeds)
        for task in tasks
    ]
    written = "".join(json.dumps(row) + "\n" for row in rows).encode()
    config = settings.to_dict()
    meta = {"config": config, "evaluated": steps, "log": {EVAL: len(written)}}
    meta |= {"checksums": {EVAL: zlib.crc32(written)}}
    checkpoint = folder / "checkpoints" / f"{steps:09d}"
    checkpoint.mkdir(parents=True)
    (folder / EVAL).write_bytes(written)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    launch = {"data": {"kind": "generated"}, "hardware": {"cpu": "a cpu", "cores": 2}, "git": None}
    (folder / "run.json").write_text(json.dumps({"launches": [launch]}))
    write_meta(checkpoint, meta)
    return folder


def write_meta(checkpoint: Path, meta: Mapping[str, Any]) -> None:
    """Writes the description of a checkpoint without arrays."""
    header = {"format": FORMAT, "step": int(checkpoint.name), "meta": meta, "arrays": {}}
    (checkpoint / "meta.json").write_text(json.dumps(header, default=str))
