"""Solves OGBench's button puzzles exactly, and tells which of their tasks a discount makes worth solving.

    python experiments/puzzle_optimum.py --env puzzle-3x3 --discounts 0.99 0.995 0.999
    python experiments/puzzle_optimum.py --run runs/NAME

A press toggles a button and its neighbours, so the way to the goal may lead over boards with more wrong
buttons. The single-task reward is minus the number of wrong buttons in every control step. A small discount
then prefers to stay at a nearly solved board. No data, network or physics is involved. With `--run` the
buttons that a trained policy presses are compared with this solution.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from envs_mjx.manipulation.scenes import FAMILIES
from envs_mjx.manipulation.tasks import MAX_STEPS, task_table
from experiments.benchmarks.harness import write_csv
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.puzzle_study.boards import Puzzle, as_bits, is_solvable
from experiments.puzzle_study.presses import PressRow, follow
from mac.errors import UserError
from mac.run.report.table import print_tables

PROGRAM = "python experiments/puzzle_optimum.py"


@dataclass(frozen=True)
class Args:
    """Solves a puzzle of OGBench exactly; prints a table, and writes a CSV file if asked."""

    env: str = "puzzle-3x3"
    """puzzle-3x3 or puzzle-4x4"""
    discounts: tuple[float, ...] = (0.99, 0.995, 0.999)
    """discounts of one control step"""
    press_steps: int = 32
    """control steps from one press to the next: 32 in play data of puzzle-3x3"""
    candidates: int = 8
    """presses drawn uniformly for each decision, of which the best by Q is taken, while values are learned"""
    candidates_test: int = 32
    """the same while acting"""
    run: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN")] = ()
    """play these runs instead, and compare what they press with the exact solution at their own discount"""
    episodes: int = 10
    """episodes of each seed and task of a run"""
    out: Path | None = None
    """CSV file to write"""

    def check(self) -> None:
        """Raises UserError for values out of range."""
        known = [name for name, scene in FAMILIES.items() if is_solvable(scene.grid)]
        if self.env not in known:
            raise UserError(f"--env {self.env}: has no exact solution here; take {' or '.join(known)}")
        if not self.discounts or not all(0 < discount < 1 for discount in self.discounts):
            raise UserError(f"--discounts {self.discounts}: give at least one, each between 0 and 1")
        for name in ("press_steps", "candidates", "candidates_test", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class OptimumRow:
    """Exact figures of one task at one discount.

    Attributes:
        wrong: wrong buttons at the start.
        presses: fewest presses that solve the task.
        discount: of a control step.
        still: return of never pressing.
        best: optimal return, where every press and waiting can be chosen.
        left: wrong buttons where the optimal policy stays; 0 where it solves the task.
        success_press: probability that best of N solves the task within the episode, if it must press.
        success_wait: the same if waiting is one more choice that may be drawn.
    """

    task: int
    wrong: int
    presses: int
    discount: float
    still: float
    best: float
    left: int
    success_press: float
    success_wait: float


def measure(args: Args) -> list[OptimumRow]:
    """Returns a row for each task and discount."""
    puzzle = Puzzle.of(FAMILIES[args.env].grid)
    pressing = puzzle.without_waiting()
    start, goal = task_table(args.env)
    boards = as_bits(start.buttons ^ goal.buttons)
    decisions = MAX_STEPS[args.env] // args.press_steps
    presses = puzzle.presses()
    rows = []
    for discount in args.discounts:
        value, best_q = puzzle.values(discount, args.press_steps, None)
        _, press_q = pressing.values(discount, args.press_steps, args.candidates)
        _, wait_q = puzzle.values(discount, args.press_steps, args.candidates)
        rows += [
            OptimumRow(
                task,
                wrong=int(puzzle.wrong[board]),
                presses=int(presses[board]),
                discount=discount,
                still=float(-puzzle.wrong[board] / (1 - discount)),
                best=float(value[board]),
                left=puzzle.left(best_q, board),
                success_press=pressing.success(press_q, board, decisions, args.candidates_test),
                success_wait=puzzle.success(wait_q, board, decisions, args.candidates_test),
            )
            for task, board in enumerate(boards, 1)
        ]
    return rows


def table(rows: Sequence[OptimumRow], title: str) -> Table:
    """Returns the printed table."""
    out = Table(title=title, caption="return: discounted sum of minus the wrong buttons, over control steps")
    for head in (
        "task",
        "wrong",
        "presses",
        "discount",
        "never pressing",
        "optimum",
        "it",
        "best of N",
        "or waits",
    ):
        out.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        ends = f"stays at {row.left} wrong" if row.left else "solves"
        out.add_row(
            *(str(x) for x in (row.task, row.wrong, row.presses, row.discount)),
            *(f"{x:.0f}" for x in (row.still, row.best)),
            ends,
            *(f"{100 * x:.0f}%" for x in (row.success_press, row.success_wait)),
        )
    return out


def press_table(rows: Sequence[PressRow]) -> Table:
    """Returns the printed table of trained runs."""
    out = Table(title="what trained policies press", caption="best: by the exact Q at the run's discount")
    out.add_column("run")
    for head in ("seed", "task", "discount", "success", "presses", "nearer", "best", "wrong at the end"):
        out.add_column(head, justify="right")
    for row in rows:
        shares = (row.nearer, row.best)
        out.add_row(
            row.run,
            *(str(x) for x in (row.seed, row.task, row.discount)),
            f"{row.success:.0%}",
            f"{row.presses:.1f}",
            *("-" if math.isnan(x) else f"{x:.0%}" for x in shares),
            f"{row.left:.1f}",
        )
    return out


def run(argv: Sequence[str]) -> int:
    """Solves, prints the table, writes the file; returns the exit status."""
    args = read_flags(Args, argv, PROGRAM)
    args.check()
    rows: list[PressRow] | list[OptimumRow]
    if args.run:
        rows = [row for run in args.run for row in follow(run, args.episodes, args.press_steps)]
        print_tables(press_table(rows))
    else:
        rows = measure(args)
        print_tables(table(rows, f"{args.env}, a press every {args.press_steps} control steps"))
    if args.out is not None:
        write_csv(args.out, rows, ["experiments/puzzle_optimum.py", *argv])
        print(args.out)
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv),
        short_of_memory="take puzzle-3x3",
        interrupted="nothing was written",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
