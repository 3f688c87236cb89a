"""Measures training speed, compared with a Python training loop and the machine's matmul rate.

    python experiments/benchmark.py --out experiments/results/bench_cpu.csv
    python experiments/benchmark.py --seeds 1 4 8 16 --widths 512 --envs 75 300 4096 \\
        --out experiments/results/bench_gpu.csv

Every configuration runs in a process of its own, which has its own peak memory and may divide the CPU into
another number of devices. Within a process the calls of the loops (`timed_loops.py`) are interleaved:
machines are noisy, and compared measurements must see the same noise. All loops train the paper's MAC on
random data of cube-single's shapes. With `--envs`, evaluations are timed too (`benchmarks/evaluation.py`).

`python experiments/benchmark.py envs` measures the physics of all environments (`benchmarks/envs.py`), and
`python experiments/benchmark.py algos` all registered algorithms (`benchmarks/algorithms.py`).
`python experiments/benchmark.py plans` measures planning at every step (`benchmarks/plans.py`).
`python experiments/benchmark.py times` scales an update to a whole run's time (`benchmarks/run_time.py`).
`python experiments/benchmark.py hosts` tells what devices exchange (`benchmarks/hosts.py`).
`python experiments/benchmark.py gpu` measures all of it that a borrowed GPU machine can tell within a budget
of time (`benchmarks/gpu/command.py`).
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments.benchmarks import algorithms, hosts, plans, run_time
from experiments.benchmarks import envs as bench_envs
from experiments.benchmarks.evaluation import EvalRow, measure_evaluation
from experiments.benchmarks.gpu import command as gpu
from experiments.benchmarks.harness import compile_for_real, measure_in_process, write_csv
from experiments.benchmarks.training import TrainRow, measure_training
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from mac.config import Config
from mac.errors import UserError
from mac.run.mesh import use_cpu_devices
from mac.run.report.table import print_tables

PROGRAM = "python experiments/benchmark.py"
ONE = "--one-"  # first flag, with `train` or `eval`: measure one configuration here, and print JSON


@dataclass(frozen=True)
class Args:
    """Measures training speed; prints a table and writes a CSV file."""

    seeds: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of seeds trained together"""
    widths: tuple[int, ...] = (128, 256, 512)
    """widths of the four hidden layers of every network"""
    batch: int = 256
    """chunks per update"""
    rows: int = 200_000
    """rows of the random dataset"""
    seconds: float = 3.0
    """seconds for which each loop is measured, per configuration; large sizes take longer"""
    repeats: int = 5
    """calls into which these seconds are divided; figures are medians over them"""
    envs: tuple[int, ...] = ()
    """numbers of environments in evaluations of the largest width; none by default"""
    engine: Literal["mjx", "c"] = "mjx"
    """physics engine of these evaluations"""
    out: Path | None = None
    """CSV file to write; the evaluations go to a second one in the same folder, NAME_eval.csv"""
    quick: bool = False
    """tiny batches and rollouts, to test that everything runs; the figures mean nothing"""

    def check(self) -> None:
        """Raises UserError for values out of range; not `__post_init__`, whose errors tyro rewords."""
        for name in ("seeds", "widths", "envs"):
            if min(getattr(self, name), default=name == "envs") < 1:
                raise UserError(f"--{name}={getattr(self, name)}: give at least one number, each at least 1")
        for name, least in (("batch", 1), ("repeats", 1), ("rows", 2 * EPISODE_ROWS)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds={self.seconds}: must be positive and finite")

    def config(self, width: int) -> Config:
        """Returns the paper's MAC at this width and batch."""
        if self.quick:
            return Config(batch=8, hidden=(width,) * 4, candidates=2, rollout=2, flow_steps=2)
        return Config(batch=self.batch, hidden=(width,) * 4)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    others = {"envs": bench_envs, "algos": algorithms, "plans": plans, "times": run_time, "gpu": gpu}
    others |= {"hosts": hosts}
    for name, other in others.items():
        if argv[:1] == [name]:
            return other.main(argv[1:])
    return exit_status(
        lambda: run(argv),
        short_of_memory="take fewer --seeds, --envs or --rows",
        interrupted="nothing was written",
    )


def run(argv: Sequence[str]) -> int:
    """Measures, prints the tables, writes the files; returns the exit status."""
    kind = argv[0].removeprefix(ONE) if argv and argv[0].startswith(ONE) else None
    args = read_flags(Args, argv[kind is not None :], PROGRAM)
    args.check()
    if kind is not None:
        print(json.dumps(vars(training(args) if kind == "train" else evaluation(args))))
        return 0
    every(args, argv)
    return 0


def every(args: Args, argv: Sequence[str]) -> None:
    """Measures all configurations, prints the tables and writes the files."""
    pairs = itertools.product(args.widths, args.seeds)
    rows = [TrainRow(**in_process("train", replace(args, widths=(w,), seeds=(s,)))) for w, s in pairs]
    widest = replace(args, widths=(max(args.widths),))
    evals = [EvalRow(**in_process("eval", replace(widest, envs=(n,)))) for n in args.envs]
    print_tables(table(rows), *([eval_table(evals)] if evals else []))
    if args.out is not None:
        write_csv(args.out, rows, ["experiments/benchmark.py", *argv])
        print(args.out)
        if evals:
            path = args.out.with_name(f"{args.out.stem}_eval.csv")
            write_csv(path, evals, ["experiments/benchmark.py", *argv])
            print(path)


def in_process(kind: str, args: Args) -> dict[str, Any]:
    """Measures one configuration in a process of its own, whose messages go to stderr.

    Args:
        kind: `train` or `eval`.
        args: flags with one width, and one number of seeds or environments.
    Raises:
        UserError: the measurement failed.
    """
    sizes = {"width": args.widths, "seeds": args.seeds} if kind == "train" else {"envs": args.envs}
    what = ", ".join(f"{name} {values[0]}" for name, values in sizes.items())
    return measure_in_process(what, [ONE + kind], args)


def training(args: Args) -> TrainRow:
    """Measures training with the first width and number of seeds."""
    use_cpu_devices(args.seeds[0])
    compile_for_real()
    cfg = args.config(args.widths[0])
    return measure_training(cfg, args.seeds[0], rows=args.rows, seconds=args.seconds, repeats=args.repeats)


def evaluation(args: Args) -> EvalRow:
    """Measures evaluations with the first number of environments."""
    compile_for_real()
    return measure_evaluation(args.config(args.widths[0]), args.envs[0], args.engine)


def table(rows: Sequence[TrainRow]) -> Table:
    """Returns a table of the main figures."""
    title = "seed-updates per second: of the segment, of a Python training loop, and share of the matmul rate"
    shown = Table(title=title, title_justify="left")
    rates = "segment", "Python loop", "ratio", "share"
    for head in ("width", "seeds", "devices", *rates, "compile s", "peak MB"):
        shown.add_column(head, justify="right")
    for r in rows:
        figures = (f"{r.rate:.3g}", f"{r.plain_rate:.3g}", f"{r.ratio:.2f}", f"{r.share:.0%}")
        sizes = (f"{r.compile_s:.1f}", f"{r.peak_mb:,.0f}")
        shown.add_row(str(r.width), str(r.seeds), str(r.devices), *figures, *sizes)
    return shown


def eval_table(rows: Sequence[EvalRow]) -> Table:
    """Returns a table of the evaluations."""
    shown = Table(title="seconds of one evaluation, and of its parts timed separately", title_justify="left")
    for head in ("environments", "engine", "total", "policy", "physics", "steps/s", "compile s"):
        shown.add_column(head, justify="right")
    for r in rows:
        figures = (f"{r.total_s:.3g}", f"{r.policy_s:.3g}", f"{r.physics_s:.3g}", f"{r.env_steps:,.0f}")
        shown.add_row(str(r.envs), r.engine, *figures, f"{r.compile_s:.1f}")
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
