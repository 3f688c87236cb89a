"""Measures all that a GPU machine can tell within a budget of time: `python experiments/benchmark.py gpu`.

Call it again with the same folder, and it measures what is missing and continues the training run.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments.benchmarks.gpu.parts import MACHINE, all_parts
from experiments.benchmarks.gpu.processes import Processes
from experiments.benchmarks.gpu.programs import Work
from experiments.benchmarks.gpu.records import Records
from experiments.benchmarks.gpu.schedule import Budget, Outcome, read_budget, run_parts
from experiments.benchmarks.gpu.summary import summary
from experiments.benchmarks.gpu.worker import LAST_SECONDS, serve
from experiments.benchmarks.harness import BENCH
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.launch.dataset import check_writable
from mac.atomic_files import replace_file
from mac.errors import UserError
from mac.run.io.folder_lock import lock

PROGRAM = "python experiments/benchmark.py gpu"
WORKER = "--worker"  # first flag: measure parts as the parent asks
ROWS, LEAST_ROWS = 1000 * EPISODE_ROWS, 2 * EPISODE_ROWS
RECORDS, SUMMARY, WORK, LOG = "results.jsonl", "summary.md", "work", "log.txt"


@dataclass(frozen=True)
class Args:
    """Measures all that a GPU machine can tell within a budget of time; call it again to continue."""

    out: Path = tyro.MISSING
    """folder of the results, results.jsonl and summary.md; runs, data and caches are in its folder work/"""
    budget: str = "9m"
    """time that this call may take: 540, 9m or 1.5h"""
    only: tuple[str, ...] = ()
    """parts to measure, by the beginnings of their names, such as `rate "segment goals"`; none = all"""
    rows: int | None = None
    """rows of the dataset that is generated for the training run; None = 1,001,000, or 2,002 with --tiny"""
    commit: str | None = None
    """commit that is measured, for the results of a copy without its git folder"""
    tiny: bool = False
    """tiny sizes, to rehearse the command on a CPU; the figures mean nothing"""

    def check(self) -> None:
        """Raises UserError for values out of range."""
        read_budget(self.budget)
        if self.rows is not None and self.rows < LEAST_ROWS:
            raise UserError(f"--rows={self.rows}: must be at least {LEAST_ROWS}")
        parts = all_parts(self.tiny)
        for name in self.only:
            if not any(part.name.startswith(name) for part in parts):
                kinds = dict.fromkeys(part.name.split()[0] for part in parts)
                raise UserError(f"--only {name!r}: no such part; their names begin with {', '.join(kinds)}")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv),
        short_of_memory="end other programs on this machine",
        interrupted="what was measured is kept; the same command continues",
    )


def run(argv: Sequence[str]) -> int:
    """Measures what the budget allows and writes the results; returns the exit status.

    Raises:
        UserError: a flag out of range, no GPU, or a folder that cannot be written.
    """
    worker = argv[:1] == [WORKER]
    args = read_flags(Args, argv[worker:], PROGRAM)
    args.check()
    if worker:
        return serve(Work(args.out / WORK, args.tiny, args.rows or LEAST_ROWS))
    budget = Budget(read_budget(args.budget), spent=seconds_since_start())
    if not args.tiny and not accelerator_in_sight():
        raise UserError("no GPU found on this machine; --tiny rehearses the command on a CPU")
    ignore_write_errors()
    args = replace(args, out=args.out.resolve())
    check_writable(args.out, "--out")
    (args.out / WORK).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(args.out, os.O_RDONLY)
    try:
        # Workers of a call that was killed take a while to end.
        lock(descriptor, args.out, patience=min(LAST_SECONDS + 20, budget.left()))
        measure_all(args, budget, argv, descriptor)
    finally:
        os.close(descriptor)
    return 0


def seconds_since_start() -> float:
    """Returns the seconds since this process began, most of which it has spent on imports."""
    try:
        # The time of the start is the 22nd field; the name in the second one may have spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):  # another system than Linux
        return time.process_time()


def accelerator_in_sight() -> bool:
    """Returns whether this machine seems to have a GPU, without starting JAX."""
    devices = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
    return shutil.which("nvidia-smi") is not None or any(Path(name).exists() for name in devices)


def measure_all(args: Args, budget: Budget, argv: Sequence[str], descriptor: int) -> None:
    """Measures what is missing, and writes each result at once.

    Args:
        descriptor: of the folder of results, which is locked.
    Raises:
        UserError: there is no GPU, or the results cannot be written.
    """
    work = args.out / WORK
    rows = args.rows or (LEAST_ROWS if args.tiny else ROWS)
    command = [sys.executable, str(BENCH), "gpu", WORKER, "--out", str(args.out), "--rows", str(rows)]
    command += ["--tiny"] if args.tiny else []
    parts = [part for part in all_parts(args.tiny) if part.name.startswith(args.only or ("",))]
    environment = environment_of(work, args.tiny)
    with contextlib.closing(Processes(command, work / LOG, environment, descriptor)) as processes:
        say(f"running  {MACHINE.name}, {budget.left():.0f} s left")
        machine = processes.run(MACHINE, min(MACHINE.most, budget.left()))
        check_machine(machine, args.tiny, work / LOG)
        records = Records(args.out / RECORDS, origin_of(machine, args, argv))
        records.add(MACHINE.name, machine)
        try:
            run_parts(parts, records, budget, processes, say)
        finally:
            text = summary(records, parts)
            replace_file(args.out / SUMMARY, lambda file: file.write(text.encode()))
    print(text)
    for name in (RECORDS, SUMMARY):
        print(args.out / name)


def environment_of(work: Path, tiny: bool) -> dict[str, str]:
    """Returns the variables of all workers, except those that the user has set."""
    chosen = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"} if tiny else {}  # compiles five times as fast
    chosen |= {
        # A worker takes memory as it needs it, since training and tests use the card too.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache" / "xla"),
        "WARP_CACHE_PATH": str(work / "cache" / "warp"),
        "PYTHONUNBUFFERED": "1",
    }
    return {name: value for name, value in chosen.items() if name not in os.environ}


def check_machine(machine: Outcome, tiny: bool, log: Path) -> None:
    """Checks that JAX starts, and that it computes on a GPU unless sizes are tiny.

    Raises:
        UserError: it does not.
    """
    if machine.status != "done":
        raise UserError(f"JAX does not start here ({machine.reason}); {log} has the rest")
    if machine.result["backend"] == "cpu" and not tiny:
        raise UserError(
            "no GPU found: JAX computes on the CPU; `python experiments/doctor.py` tells why, and --tiny "
            "rehearses the command on a CPU"
        )


def origin_of(machine: Outcome, args: Args, argv: Sequence[str]) -> dict[str, Any]:
    """Returns what every line of the results says of its origin."""
    facts = machine.result
    git = facts["git"] or {"commit": args.commit or "unknown", "changed": False}
    return {
        "card": facts["card"] + (" (tiny sizes)" if args.tiny else ""),
        "commit": git["commit"] + (" with changes" if git["changed"] else ""),
        "jax": facts["versions"]["jax"],
        "command": shlex.join([*PROGRAM.split(), *argv]),
    }


def say(line: str) -> None:
    """Prints a line of progress."""
    print(line, flush=True)
