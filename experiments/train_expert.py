"""Trains our own experts, and records gym datasets with them.

    python experiments/train_expert.py --task ant --out experts/ant
    python experiments/train_expert.py --task hopper --out experts/hopper --rows 100k

An ant or humanoid learns to walk in a given direction, for maze datasets of `experiments/generate_data.py
--expert`. A hopper, walker2d or halfcheetah learns its own task; datasets in D4RL's schema are recorded from
its training. All such data are our own: results on them are not comparable with published ones.

The same command continues an interrupted training.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from envs_mjx.registry import resolve_engine
from experiments.cli import arguments
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.expert_training.online_training import OnlineConfig
from experiments.expert_training.record_dataset import LEVELS, record_dataset
from experiments.expert_training.sac import SacConfig
from experiments.expert_training.tasks import GYM, TASKS
from experiments.expert_training.trainer import CURVE, POLICY, ExpertConfig, ExpertScore, train_expert
from experiments.launch import dataset
from mac.errors import UserError
from mac.run.io.folder_lock import lock_folder
from mac.run.io.signals import Interrupt
from mac.run.report.progress import open_progress

PROGRAM = "python experiments/train_expert.py"
REQUIRED = tyro.MISSING

SMALL = {
    "ant": (OnlineConfig(lanes=16, iterations=120_000, capacity=30_000), SacConfig(lr=5e-4, discount=0.98)),
    "humanoid": (OnlineConfig(lanes=16, iterations=2_000_000, capacity=60_000), SacConfig()),
} | {
    task: (
        OnlineConfig(lanes=8, iterations=40_000, capacity=25_000),
        SacConfig(hidden=(128, 128), lr=5e-4),
    )
    for task in GYM
}
"""Sizes for two CPU cores: an ant in an hour, a gym walker in minutes."""
LARGE = {
    task: (
        OnlineConfig(
            lanes=1024, iterations=iterations, random=20, critic_updates=32, batch=512, capacity=1000
        ),
        SacConfig(hidden=hidden),
    )
    for task, iterations, hidden in (
        ("ant", 10_000, (256, 256)),
        ("humanoid", 40_000, (1024, 1024, 1024)),
        *((task, 5_000, (256, 256)) for task in GYM),
    )
}
"""For an accelerator."""


@dataclass(frozen=True)
class Args:
    """Trains our own experts, and records gym datasets with them.

    The same command continues an interrupted training.
    """

    task: Annotated[str, tyro.conf.arg(metavar="TASK", help=f"one of {', '.join(TASKS)}")] = REQUIRED
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = REQUIRED
    """folder of the expert"""
    seed: int = 0
    """random seed"""
    rows: int | None = None
    """transitions of each dataset to write after training (gym walkers only), such as 100k; None = none"""
    steps: int | None = None
    """control steps of training, all lanes together; None = the preset's"""
    preset: Literal["auto", "small", "large"] = "auto"
    """sizes: small = for a CPU, large = for an accelerator"""
    engine: Literal["auto", "c", "mjx", "warp"] = "auto"
    """physics engine; auto = c on a CPU, else the best one for the accelerator"""


def config_of(args: Args, engine: str) -> ExpertConfig:
    """Returns the settings that the flags select.

    Raises:
        UserError: an unknown task, or a value out of range.
    """
    if args.task not in TASKS:
        raise UserError(f"--task={args.task}: unknown task; choose {', '.join(TASKS)}")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed={args.seed}: must be in [0, 2**31)")
    preset = args.preset if args.preset != "auto" else "small" if engine == "c" else "large"
    online, sac = (SMALL if preset == "small" else LARGE)[args.task]
    if args.steps is not None:
        if args.steps < 2 * online.lanes * online.random:
            raise UserError(f"--steps={args.steps}: take at least {2 * online.lanes * online.random}")
        online = online._replace(iterations=args.steps // online.lanes)
    return ExpertConfig(args.task, args.seed, engine, online, sac)


def dataset_rows(args: Args) -> int:
    """Returns the number of transitions of the datasets to write, 0 for none.

    Raises:
        UserError: the number is out of range, or the task has no such datasets.
    """
    if args.rows is None:
        return 0
    if args.rows < 1:
        raise UserError(f"--rows={args.rows}: must be at least 1")
    if args.task not in GYM:
        raise UserError(
            f"--rows: datasets of {args.task} are made by experiments/generate_data.py --expert FOLDER"
        )
    return args.rows


def curve_line(point: ExpertScore, task: str) -> str:
    """Formats a line of the learning curve."""
    what = f"return {point.score:,.0f}" if task in GYM else f"{point.score:.2f} m/s along the direction"
    return f"{point.env_steps:>10,} steps  {what}, {point.score_falls:.1f} terminations per 1000 steps"


def work(args: Args, argv: Sequence[str]) -> int:
    """Trains the expert; returns the exit status."""
    ignore_write_errors()
    arguments.start_jax(1)
    config = config_of(args, resolve_engine(args.engine))
    rows = dataset_rows(args)
    dataset.check_writable(args.out, "--out")
    total = config.online.iterations * config.online.lanes
    with (
        lock_folder(args.out),
        Interrupt() as interrupt,
        open_progress(f"training an expert: {args.task}", total, "steps") as progress,
    ):

        def tell(point: ExpertScore | None, done: int) -> None:
            progress.count(done * config.online.lanes, total)
            if point is not None:
                progress.note(curve_line(point, args.task))

        finished = train_expert(
            config, args.out, [*PROGRAM.split()[1:], *argv], tell, lambda: interrupt.asked
        )
    if not finished:
        print("stopped and saved; continue with the same command", file=sys.stderr)
        return 128 + interrupt.signal
    print(f"wrote {args.out / POLICY} and {args.out / CURVE}")
    for level in LEVELS if rows else ():
        made = record_dataset(config, args.out, level, rows)
        print(f"wrote {made.path}: {made.rows:,} rows, mean return {made.mean_return:,.1f}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: work(arguments.read_flags(Args, argv, PROGRAM), argv),
        short_of_memory="take fewer --steps, or --preset small",
        interrupted=f"continue from the last checkpoint with\n  {PROGRAM} {shlex.join(argv)}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
