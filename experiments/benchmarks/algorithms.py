"""Measures the training speed of every algorithm: `python experiments/benchmark.py algos`.

Each algorithm has the hyperparameters that `run.py` would give it, on random data of the shapes of the first
environment that it has settings for. As in `benchmark.py`, every algorithm and number of seeds is measured in
a process of its own, where the segment and the Python training loop (`timed_loops.py`) are interleaved.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from baselines import REGISTRY
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from envs_mjx.registry import make
from envs_mjx.registry import parse as parse_env
from experiments.benchmarks import timed_loops
from experiments.benchmarks.harness import compile_for_real, measure_in_process, write_csv
from experiments.benchmarks.training import compare_with_python_loop, machine_matmuls
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.launch.settings import Preset, parse_command_line
from mac.algorithm import AbstractAlgorithm
from mac.errors import UserError, unknown_name
from mac.run.report.table import print_tables
from mac.types import EnvSpec

PROGRAM = "python experiments/benchmark.py algos"
ONE = "--one"  # first flag: measure one algorithm and number of seeds here, and print JSON
QUICK = {"batch": 8, "hidden": (16, 16)}


@dataclass(frozen=True)
class Args:
    """Measures updates per second of every algorithm; prints tables and writes a CSV file."""

    algos: tuple[str, ...] = tuple(REGISTRY)
    """algorithms, names in `baselines.REGISTRY`"""
    seeds: tuple[int, ...] = (1, 4)
    """numbers of seeds trained together"""
    envs: tuple[str, ...] = ("cube-single-play-singletask-task2-v0", "cube-single-play-oraclerep-v0")
    """environments whose shapes are used; each algorithm takes the first that it has settings for"""
    preset: Preset = "auto"
    """settings of the paper or of a laptop, as in run.py; auto = paper on an accelerator, else laptop"""
    rows: int = 200_000
    """rows of the random dataset"""
    seconds: float = 3.0
    """approximate seconds for which each loop is measured; large sizes take longer"""
    repeats: int = 5
    """calls into which these seconds are divided; figures are medians over them"""
    out: Path | None = None
    """CSV file to write"""
    quick: bool = False
    """tiny batches and widths, to test that everything runs; the figures mean nothing"""

    def __post_init__(self):
        for name in self.algos:
            if name not in REGISTRY:
                raise unknown_name("--algos", name, REGISTRY)
        for name in self.envs:
            parse_env(name)
        for flag in ("algos", "envs", "seeds"):
            if not getattr(self, flag):
                raise UserError(f"--{flag}: give at least one")
        if min(self.seeds) < 1:
            raise UserError(f"--seeds={self.seeds}: each must be at least 1")
        for flag, least in (("repeats", 1), ("rows", 2 * EPISODE_ROWS)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag}={getattr(self, flag)}: must be at least {least}")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds={self.seconds}: must be positive and finite")


@dataclass(frozen=True)
class AlgoRow:
    """Figures of one algorithm and number of seeds, medians over repeats; names are the CSV's columns.

    `training.TrainRow` describes the columns that are not listed here.

    Attributes:
        env: environment of the shapes and settings.
        preset: preset of the settings, never auto.
        batch: chunks or transitions per update and seed.
        gflop: operations of the matmuls in one update of one seed, in 10^9.
        rollout_share: share of training time in rollouts into a replay, which `rate` leaves out.
    """

    algo: str
    env: str
    preset: str
    seeds: int
    devices: int
    batch: int
    updates: int
    rate: float
    plain_rate: float
    ratio: float
    gflop: float
    rollout_share: float
    compile_s: float
    plain_compile_s: float
    peak_mb: float
    cores: float
    plain_cores: float


class BenchmarkCase(NamedTuple):
    """Measured case: an algorithm at the settings of an environment and a preset."""

    algo: AbstractAlgorithm
    env: EnvSpec
    preset: str
    hp: Any


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv),
        short_of_memory="take fewer --seeds or --rows",
        interrupted="nothing was written",
    )


def run(argv: Sequence[str]) -> int:
    """Measures, prints the tables, writes the file; returns the exit status.

    Raises:
        UserError: a flag out of range, no algorithm that fits, or a file that cannot be written.
    """
    if argv[:1] == [ONE]:
        print(json.dumps([vars(row) for row in measure(read_flags(Args, argv[1:], PROGRAM))]))
        return 0
    args = read_flags(Args, argv, PROGRAM)
    rows = [row for algo in args.algos for row in in_processes(args, algo)]
    if not rows:
        raise UserError(
            "nothing was measured, for the reasons above; choose other --algos, --envs or --preset"
        )
    print_tables(*tables(rows))
    if args.out is not None:
        write_csv(args.out, rows, ["experiments/benchmark.py", "algos", *argv])
        print(args.out)
    return 0


def in_processes(args: Args, algo: str) -> list[AlgoRow]:
    """Measures an algorithm for all numbers of seeds, each in a process of its own.

    Returns no rows if the algorithm has no settings.

    Raises:
        UserError: a measurement failed.
    """
    rows: list[AlgoRow] = []
    for seeds in args.seeds:
        found = measure_in_process(
            f"{algo}, seeds {seeds}", ["algos", ONE], replace(args, algos=(algo,), seeds=(seeds,))
        )
        if not found:
            break
        rows += [AlgoRow(**row) for row in found]
    return rows


def measure(args: Args) -> list[AlgoRow]:
    """Measures the first algorithm and number of seeds; prints notes if the algorithm has no settings."""
    name, seeds = args.algos[0], args.seeds[0]
    compile_for_real()
    subject = find_case(args)
    if subject is None:
        return []
    algo, width = subject.algo, subject.hp.hidden[0]
    window = timed_loops.random_window(subject.env, args.rows, algo.sample.chunk)
    _, speed = machine_matmuls(width, algo.sample.batch, seeds)
    compared = compare_with_python_loop(
        algo, window, seeds, speed * args.seconds / args.repeats, args.repeats
    )
    share = timed_loops.rollout_share(algo, window, seeds, compared.figures["rate"])
    figures = compared.figures | {"seeds": seeds, "batch": subject.hp.batch, "rollout_share": share}
    return [AlgoRow(algo=name, env=subject.env.name, preset=subject.preset, **figures)]


def find_case(args: Args) -> BenchmarkCase | None:
    """Returns the first algorithm at its first environment with settings; None, with notes, without any."""
    reasons = []
    for env in args.envs:
        try:
            return subject_of(args, env)
        except UserError as error:
            reasons.append(f"note: {args.algos[0]} is not measured: {error}")
    print("\n".join(reasons), file=sys.stderr)
    return None


def subject_of(args: Args, env: str) -> BenchmarkCase:
    """Returns the first algorithm for an environment, as `run.py` would train it.

    Raises:
        UserError: it has no settings, or is not for such an environment.
    """
    name, seeds = args.algos[0], args.seeds[0]
    flags = {"algo": name, "env": env, "preset": args.preset, "seeds": str(seeds)}
    settings, _ = parse_command_line([word for flag, value in flags.items() for word in (f"--{flag}", value)])
    hp = replace(settings.hp, **QUICK) if args.quick else settings.hp
    spec = make(env, "c").spec
    return BenchmarkCase(REGISTRY[name].algorithm(hp, spec, settings.steps), spec, settings.preset, hp)


def tables(rows: Sequence[AlgoRow]) -> list[Table]:
    """Returns tables of the main figures, one for each environment and preset."""
    shown: dict[tuple[str, str], Table] = {}
    for r in rows:
        table = shown.get((r.env, r.preset)) or _empty_table(r.env, r.preset)
        shown[r.env, r.preset] = table
        figures = f"{r.rate:.3g}", f"{r.plain_rate:.3g}", f"{r.ratio:.2f}", f"{r.gflop:.3g}"
        figures = *figures, f"{r.rollout_share:.0%}" if r.rollout_share else "–"
        sizes = f"{r.compile_s:.1f}", f"{r.peak_mb:,.0f}"
        table.add_row(r.algo, str(r.seeds), str(r.devices), str(r.batch), *figures, *sizes)
    return list(shown.values())


def _empty_table(env: str, preset: str) -> Table:
    title = f"{env}, preset {preset}: seed-updates per second"
    table = Table("algorithm", title=title, title_justify="left")
    rates = "segment", "Python loop", "ratio", "Gflop", "rollouts"
    for head in ("seeds", "devices", "batch", *rates, "compile s", "peak MB"):
        table.add_column(head, justify="right")
    return table
