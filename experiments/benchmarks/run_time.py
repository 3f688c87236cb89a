"""Measures the time of a whole run and of acting: `python experiments/benchmark.py times --algo mac`.

One update of one seed is timed as training computes it, in the compiled segment, with the rollouts into a
replay that fall to it, and one decision for one episode. A run's time is that of an update times its number
of updates: compiling and evaluations are left out. Words after `--` are further flags of `run.py`.
"""

import json
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from baselines import get_algorithm
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from envs_mjx.registry import make
from envs_mjx.registry import parse as parse_env
from experiments.benchmarks import timed_loops
from experiments.benchmarks.harness import provenance
from experiments.benchmarks.plans import plan_loop
from experiments.benchmarks.training import EXPECTED_SHARE, peak_bytes
from experiments.cli.arguments import read_flags, start_jax
from experiments.cli.exit_status import exit_status, is_out_of_memory
from experiments.launch.cost_estimate import compile_update, make_plan, mega, memory_of, product_rate
from experiments.launch.settings import Preset, parse_command_line
from mac.algorithm import AbstractAlgorithm
from mac.atomic_files import write_json
from mac.cgroup_limits import cores
from mac.errors import UserError, one_line
from mac.formatting import counted
from mac.free_memory import free_memory
from mac.run.io.run_metadata import cpu_model
from mac.run.mesh import seed_mesh

PROGRAM = "python experiments/benchmark.py times"
DECISIONS = 20  # timed at most


@dataclass(frozen=True)
class Args:
    """Measures an update and a decision of one algorithm, and scales to its whole run; prints JSON."""

    algo: str = "mac"
    """algorithm, by the name that run.py knows"""
    env: str = "cube-single-play-singletask-task2-v0"
    """environment whose shapes and settings are taken"""
    preset: Preset = "paper"
    """settings of the paper or of a laptop, as in run.py"""
    rows: int = 200_000
    """rows of the random dataset"""
    seconds: float = 5.0
    """approximate seconds for which updates are timed, and at most decisions too; large sizes take longer"""
    out: Path | None = None
    """JSON file to write"""
    machine: bool = False
    """print the name of this machine's device, and measure nothing"""

    def __post_init__(self):
        if self.rows < 2 * EPISODE_ROWS:
            raise UserError(f"--rows={self.rows}: must be at least {2 * EPISODE_ROWS}")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds={self.seconds}: must be positive and finite")


@dataclass(frozen=True)
class RunTime:
    """Times of one algorithm on one device; names are those of the JSON file.

    Attributes:
        flags: further flags of `run.py`.
        timed: updates that were timed in all, in a few calls.
        update_s: seconds of an update of one seed, with its share of rollouts into a replay.
        rollout_share: that share.
        steps: updates of the whole run.
        hours: of these updates.
        decision_ms: milliseconds in which a decision for one episode is made, and the result is on the host.
        actions: actions that are executed of each decision.
        need_mb: memory that training takes, estimated; 10^6 bytes.
        skipped: why nothing was measured; empty if it was.
    """

    algo: str
    env: str
    preset: str
    flags: str
    device: str
    batch: int
    steps: int
    need_mb: float
    timed: int = 0
    update_s: float = 0.0
    rollout_share: float = 0.0
    hours: float = 0.0
    decision_ms: float = 0.0
    actions: int = 0
    compile_s: float = 0.0
    peak_mb: float = 0.0
    cores: float = 0.0
    skipped: str = ""


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv), short_of_memory="take a smaller --hp.batch", interrupted="nothing was written"
    )


def run(argv: Sequence[str]) -> int:
    """Measures, prints, writes the file; returns the exit status.

    Raises:
        UserError: a flag out of range, an algorithm without settings, or a file that cannot be written.
    """
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    args = read_flags(Args, words[:at], PROGRAM)
    start_jax(1)
    if args.machine:
        print(machine_name())
        return 0
    found = asdict(measure(args, words[at + 1 :]))
    print(json.dumps(found))
    if args.out is not None:
        write_json(args.out, provenance(["experiments/benchmark.py", "times", *argv]) | found)
    return 0


def machine_name() -> str:
    """The device that JAX computes on, such as `NVIDIA H200` or `AMD EPYC, 2 cores`."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{re.sub(r' +', ' ', cpu_model())}, {counted(cores(), 'core')}"


def measure(args: Args, flags: Sequence[str]) -> RunTime:
    """Measures one algorithm; says why where its training does not fit in memory."""
    words = ["--algo", args.algo, "--env", args.env, "--preset", args.preset, "--seeds", "1", *flags]
    settings, _ = parse_command_line(words)
    spec = make(parse_env(args.env), "c").spec
    algo = get_algorithm(args.algo).algorithm(settings.hp, spec, settings.steps)
    plan = make_plan(algo, spec, args.rows, 1)
    need = memory_of(plan, 0)
    about: dict[str, Any] = {
        "algo": args.algo,
        "env": args.env,
        "preset": settings.preset,
        "flags": shlex.join(flags),
        "device": machine_name(),
        "batch": settings.hp.batch,
        "steps": settings.steps,
    }
    free = free_memory().device
    if free is None or need.peak <= free:  # without scratch, for which an update is compiled
        need = memory_of(plan, compile_update(plan).scratch)
    about["need_mb"] = need.peak / 1e6
    if free is not None and need.peak > free:
        return RunTime(**about, skipped=f"needs {mega(need.peak)} of memory, {mega(free)} are free")
    try:
        training = time_updates(algo, args)
        hours = training["update_s"] * settings.steps / 3600
        return RunTime(**about, **training, hours=hours, **time_decisions(algo, args))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return RunTime(**about, skipped=f"out of memory: {one_line(error)}")


def time_updates(algo: AbstractAlgorithm, args: Args) -> dict[str, Any]:
    """Times updates of one seed, as the compiled segment computes them; one call and at most three."""
    window = timed_loops.random_window(algo.env, args.rows, algo.sample.chunk)
    flop, mesh = timed_loops.update_flops(algo, window), seed_mesh(1)
    expected = flop / (EXPECTED_SHARE * product_rate())
    updates = max(1, min(1000, round(args.seconds / 3 / expected)))
    segment = timed_loops.scan_segment(timed_loops.Work(algo, window, 1, updates, flop), mesh)
    first = timed_loops.time_call(segment)
    calls = 3 if segment.work / first.speed < args.seconds else 1
    timings = [timed_loops.time_call(segment) for _ in range(calls)]
    rate = statistics.median(timing.speed for timing in timings) / flop
    peak = peak_bytes()
    share = timed_loops.rollout_share(algo, window, 1, rate)
    return {
        "timed": calls * updates,
        "update_s": 1 / (rate * (1 - share)),
        "rollout_share": share,
        "compile_s": segment.compile_s,
        "peak_mb": peak / 1e6,
        "cores": statistics.median(timing.cores for timing in timings),
    }


def time_decisions(algo: AbstractAlgorithm, args: Args) -> dict[str, Any]:
    """Times decisions for one episode, with untrained networks."""
    decide, actions, _ = plan_loop(algo, 1)
    each = 1 / timed_loops.time_call(decide).speed
    calls = max(1, min(DECISIONS, round(args.seconds / each)))
    seconds = [1 / timed_loops.time_call(decide).speed for _ in range(calls)]
    return {"decision_ms": 1000 * statistics.median(seconds), "actions": actions}
