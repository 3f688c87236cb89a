"""Parts of the GPU benchmark that are programs of the project: tests, repeated runs, data, a paper run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments.benchmarks.gpu.evaluation_rates import ENV
from experiments.benchmarks.gpu.training_rates import TINY
from experiments.launch.settings import is_run
from mac.atomic_files import visible
from mac.cgroup_limits import cores
from mac.errors import UserError
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_metadata import launches
from mac.run.io.run_outputs import CHECKPOINTS

ROOT = Path(__file__).parents[3]
FAMILY, DATASET = "cube-single", "cube-single-play-v0"
QUICK_TESTS = "tests/mac/test_formatting.py"
SEEDS = 4
PAPER_UPDATES = 1_000_000
RUN, DATA, REPEATED = "paper_run", "data", "repeated_runs"


class Work(NamedTuple):
    """Where and at what size the programs run.

    Attributes:
        folder: of runs, data and caches, which stay for the next call.
        tiny: sizes for a rehearsal on a CPU.
        rows: of the generated dataset.
    """

    folder: Path
    tiny: bool
    rows: int


def run_program(*words: str, environment: dict[str, str] | None = None) -> bool:
    """Runs a Python program to its end, or ends it in order at Ctrl-C; returns whether it was left alone.

    Raises:
        UserError: it failed.
    """
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | (environment or {}))
    finished = True
    try:
        process.wait()
    except KeyboardInterrupt:
        finished = False
        process.send_signal(signal.SIGINT)
        process.wait()
    stopped = (0, 128 + signal.SIGINT, -signal.SIGINT)
    if process.returncode not in ((0,) if finished else stopped):
        raise UserError(f"{words[0]} ended with status {process.returncode}; see log.txt")
    return finished


# Tests.


def gpu_test_files() -> list[str]:
    """Returns the files of tests that have some for a GPU; none without a checkout."""
    files = visible(ROOT / "tests", "**/test_*.py")
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def tests_unavailable() -> str:
    """Returns why the tests cannot run here; empty if they can."""
    if find_spec("pytest") is None:
        return "pytest is not installed"
    return "" if gpu_test_files() else "there is no checkout with tests"


def run_gpu_tests(work: Work) -> dict[str, Any]:
    """Runs the tests marked `gpu`; returns how many passed, and those that did not with their reason.

    Raises:
        UserError: pytest itself failed.
    """
    # The project's own options need packages that a machine without a network may lack.
    flags = ["-o", "addopts=", "--import-mode=importlib", "-q", *([] if work.tiny else ["-m", "gpu"])]
    if find_spec("beartype") is not None:
        flags.append("--jaxtyping-packages=mac,baselines,envs_mjx,beartype.beartype")
    files = [QUICK_TESTS] if work.tiny else gpu_test_files()
    # Kept as they are by the tests' own set-up, which else makes programs slow to compile them fast.
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *flags, f"--junitxml={report}", *files]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment)
        if done.returncode not in (0, 1, 5) or not report.exists():
            raise UserError(f"pytest ended with status {done.returncode}; see log.txt")
        return read_test_report(report.read_text(encoding="utf-8"))


def read_test_report(text: str) -> dict[str, Any]:
    """Returns counts, and the tests that did not pass with the reason, of pytest's XML report."""
    passed, others = 0, {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        problem = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            passed += 1
        else:
            name = f"{case.get('classname')}.{case.get('name')}"
            others[name] = f"{problem.tag}: {' '.join((problem.get('message') or '').split())[:200]}"
    return {"passed": passed, "not_passed": others}


# Repeated runs.


def compare_runs(work: Work, *, compiled_again: bool) -> dict[str, Any]:
    """Trains twice and compares the bits.

    The programs are those of the paper run, which finds them compiled.

    Args:
        compiled_again: the second run compiles everything anew, where the autotuner may choose otherwise.
            Else it is stopped in the middle and resumed.
    """
    steps = 80 if work.tiny else 1000
    place = work.folder / REPEATED
    shutil.rmtree(place, ignore_errors=True)  # of a call that was killed
    with removed_at_the_end(place):
        folders = [place / name for name in ("straight", "again")]
        common = [*paper_flags(work), "--eval.engine", "c", "--eval.episodes", "1"]
        common += ["--run.eval-every", str(steps // 2)]
        _train(*common, "--out", str(folders[0]), "--steps", str(steps))
        if compiled_again:
            with tempfile.TemporaryDirectory() as cache:
                fresh = {"JAX_COMPILATION_CACHE_DIR": cache}
                _train(*common, "--out", str(folders[1]), "--steps", str(steps), environment=fresh)
        else:
            _train(*common, "--out", str(folders[1]), "--steps", str(steps // 2))
            _train("--out", str(folders[1]), "--resume", "--steps", str(steps))
        differing = [name for name in (METRICS, EVAL) if len({(f / name).read_bytes() for f in folders}) > 1]
        arrays = [_array_checksums(folder) for folder in folders]
        changed = sum(arrays[0].get(name) != arrays[1].get(name) for name in arrays[0] | arrays[1])
        return {
            "updates": steps,
            "same_bits": not changed and not differing,
            "arrays": len(arrays[0]),
            "changed_arrays": changed,
            "changed_files": differing,
        }


@contextlib.contextmanager
def removed_at_the_end(folder: Path) -> Iterator[None]:
    """Deletes a folder, if it exists, when left."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train(*words: str, environment: dict[str, str] | None = None) -> None:
    if not run_program("experiments/run.py", *words, environment=environment):
        raise KeyboardInterrupt


def _array_checksums(run: Path) -> dict[str, Any]:
    """Returns the descriptions of all arrays of the newest checkpoint, with their checksums."""
    newest = max(visible(run / CHECKPOINTS, "*/meta.json"), key=lambda path: int(path.parent.name))
    return json.loads(newest.read_bytes())["arrays"]


# The paper's run.


def make_data(work: Work) -> dict[str, Any]:
    """Generates the dataset of the paper run on half of the cores; what exists is continued."""
    rows = -(-work.rows // EPISODE_ROWS) * EPISODE_ROWS
    out = work.folder / DATA / f"generated-{rows}-seed0"
    threads = max(1, cores() // 2)
    os.nice(10)
    words = ["--env", FAMILY, "--rows", str(rows), "--shard-rows", str(rows), "--engine", "c"]
    finished = run_program(
        "experiments/generate_data.py", *words, "--threads", str(threads), "--out", str(out)
    )
    if not finished:
        return {"status": "partial"}
    made = json.loads((out / f"{DATASET}.json").read_bytes())["collected"]
    return {"rows": made["train_rows"], "threads": threads, "targets": made["targets"], "hits": made["hits"]}


def train_paper(work: Work) -> dict[str, Any]:
    """Trains the paper's MAC until Ctrl-C or its end; a checkpoint stays, which the next call continues."""
    run = work.folder / RUN
    if is_run(run):
        finished = run_program("experiments/run.py", "--out", str(run), "--resume")
    else:
        steps = ["--steps", str(PAPER_UPDATES), "--run.eval-every", "50000"]
        finished = run_program("experiments/run.py", *paper_flags(work), *steps, "--out", str(run))
    found = describe_run(run)
    return found if finished else found | {"status": "partial"}


def paper_flags(work: Work) -> Sequence[str]:
    """Returns the flags of the paper's runs but their folder and length: short segments, many checkpoints."""
    rows = -(-work.rows // EPISODE_ROWS) * EPISODE_ROWS
    flags = ["--env", ENV, "--preset", "paper", "--seeds", str(SEEDS), "--data.source", "generate"]
    flags += ["--data.dir", str(work.folder / DATA), "--data.rows", str(rows)]
    segment, checkpoint = (20, 100) if work.tiny else (250, 5000)
    flags += ["--run.segment", str(segment), "--run.checkpoint-every", str(checkpoint)]
    return [*flags, *(TINY if work.tiny else ())]


def describe_run(run: Path) -> dict[str, Any]:
    """Returns how far a run is, its speed in its last launch, and the success of its evaluations.

    A run whose process was killed tells of its newest checkpoint.

    Raises:
        UserError: it left no record.
    """
    last = launches(run)[-1]
    checkpoints = [int(path.parent.name) for path in visible(run / CHECKPOINTS, "*/meta.json")]
    step, first = last.get("step", max(checkpoints, default=0)), last.get("resumed_from") or 0
    seconds = last.get("seconds", {})
    rows = list(read_rows(run / EVAL)) if (run / EVAL).exists() else []
    curve = {
        step: float(np.mean([row["success"] for row in rows if row["step"] == step]))
        for step in sorted({row["step"] for row in rows})
    }
    found = {"updates": step, "updates_now": step - first, "seeds": SEEDS, "seconds": seconds}
    if seconds.get("train") and step > first:
        found["updates_per_s"] = (step - first) / seconds["train"]
        found["minutes_for_1m"] = 1e6 / found["updates_per_s"] / 60
    return found | {"success": curve}
