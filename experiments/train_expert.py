"""Trains our own experts, and records gym datasets with them.

    python experiments/train_expert.py --task ant --out experts/ant
    python experiments/train_expert.py --task hopper --out experts/hopper --rows 100k

An ant or humanoid learns to walk in a given direction, for `experiments/generate_data.py --expert`, which
makes navigate data for mazes; a hopper, walker2d or halfcheetah learns its own task, and leaves datasets in
D4RL's schema. All such data are our own: results on them are not comparable with published ones.

Run the same command again after an interruption, and it continues.
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
from experiments.cli.output import outlive_output
from experiments.experts.online_training import OnlineConfig
from experiments.experts.record_dataset import LEVELS, record
from experiments.experts.sac import SacConfig
from experiments.experts.tasks import ERRANDS, GYM
from experiments.experts.trainer import CURVE, POLICY, ExpertConfig, ExpertScore, train
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

    Run the same command again after an interruption, and it continues.
    """

    task: Annotated[str, tyro.conf.arg(metavar="TASK", help=f"one of {', '.join(ERRANDS)}")] = REQUIRED
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = REQUIRED
    """folder of the expert"""
    seed: int = 0
    """same seed, same expert"""
    rows: int | None = None
    """rows of each dataset of a gym walker to write after training, such as 100k; None = none"""
    steps: int | None = None
    """control steps to train for, all lanes together; None = that of the preset"""
    preset: Literal["auto", "small", "large"] = "auto"
    """small = for a CPU, large = for an accelerator"""
    engine: Literal["auto", "c", "mjx", "warp"] = "auto"
    """physics; auto = c, unless on an accelerator"""


def plan_of(ask: Args, engine: str) -> ExpertConfig:
    """Settings that the flags give.

    Raises:
        UserError: there is no such task, or a value is out of range.
    """
    if ask.task not in ERRANDS:
        raise UserError(f"--task={ask.task}: choose {', '.join(ERRANDS)}")
    if not 0 <= ask.seed < 2**31:
        raise UserError(f"--seed={ask.seed}: must be in [0, 2**31)")
    preset = ask.preset if ask.preset != "auto" else "small" if engine == "c" else "large"
    online, sac = (SMALL if preset == "small" else LARGE)[ask.task]
    if ask.steps is not None:
        if ask.steps < 2 * online.lanes * online.random:
            raise UserError(f"--steps={ask.steps}: take at least {2 * online.lanes * online.random}")
        online = online._replace(iterations=ask.steps // online.lanes)
    return ExpertConfig(ask.task, ask.seed, engine, online, sac)


def rows_of(ask: Args) -> int:
    """Rows of the datasets to write, 0 for none.

    Raises:
        UserError: the number is out of range, or the task has no such datasets.
    """
    if ask.rows is None:
        return 0
    if ask.rows < 1:
        raise UserError(f"--rows={ask.rows}: must be at least 1")
    if ask.task not in GYM:
        raise UserError(
            f"--rows: datasets of {ask.task} are made by experiments/generate_data.py --expert FOLDER"
        )
    return ask.rows


def show(point: ExpertScore, task: str) -> str:
    """A line of the curve in words."""
    what = f"return {point.score:,.0f}" if task in GYM else f"{point.score:.2f} m/s along the direction"
    return f"{point.env_steps:>10,} steps  {what}, {point.score_falls:.1f} falls in 1000 steps"


def work(ask: Args, argv: Sequence[str]) -> int:
    """Trains the expert; returns the exit status."""
    outlive_output()
    arguments.start_jax(1)
    plan = plan_of(ask, resolve_engine(ask.engine))
    rows = rows_of(ask)
    dataset.check_writable(ask.out, "--out")
    total = plan.online.iterations * plan.online.lanes
    with (
        lock_folder(ask.out),
        Interrupt() as interrupt,
        open_progress(f"training an expert: {ask.task}", total, "steps") as progress,
    ):

        def tell(point: ExpertScore | None, done: int) -> None:
            progress.count(done * plan.online.lanes, total)
            if point is not None:
                progress.note(show(point, ask.task))

        finished = train(plan, ask.out, [*PROGRAM.split()[1:], *argv], tell, lambda: interrupt.asked)
    if not finished:
        print("stopped; it is saved, continue with the same command", file=sys.stderr)
        return 128 + interrupt.signal
    print(f"wrote {ask.out / POLICY} and {ask.out / CURVE}")
    for level in LEVELS if rows else ():
        made = record(plan, ask.out, level, rows)
        print(f"wrote {made.path}: {made.rows:,} rows, mean return {made.mean_return:,.1f}")
    return 0


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: work(arguments.read_flags(Args, argv, PROGRAM), argv),
        short_of_memory="take fewer --steps, or --preset small",
        interrupted=f"continue from the last checkpoint with\n  {PROGRAM} {shlex.join(argv)}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
