"""Runs the paper's tables and compares: `python experiments/reproduce.py table2 --env cube-single`."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from experiments.benchmarks.harness import write_csv
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.launch.job_options import NO_WISHES, JobConfig, read_jobs
from experiments.launch.settings import RUNS
from experiments.reproduction.across import across, across_table
from experiments.reproduction.cells import LEFT, LOGS, STATUSES, Cell, Plan, Progress, cells_of, progress
from experiments.reproduction.comparison import compare
from experiments.reproduction.cost import NOTE, Estimator, datasets_to_make
from experiments.reproduction.html_report import Section, page
from experiments.reproduction.jobs import JOBS, Submission, submit_cells, with_queue
from experiments.reproduction.render import latex, markdown, terminal_table
from experiments.reproduction.runner import Budget, Outcome, Slot, read_budget, run_cells, slots
from experiments.reproduction.suites import Entry, Suite, load_suite, select, suite_names
from mac.atomic_files import replace_file
from mac.errors import UserError
from mac.formatting import counted
from mac.run.report.table import print_tables
from mac.run.report.timing import duration

PROGRAM = "python experiments/reproduce.py"
REPORTS = "report"


@dataclass(frozen=True)
class Args:
    """Runs the cells of published tables, each a run of run.py, and compares them with the publication.

    Words after `--` go to every run, such as `-- --eval.episodes 50`; such runs have folders of their own.
    """

    suites: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")]
    """tables such as table2, or TOML files of one's own; `--list` names them"""
    list: bool = False
    """print what there is, how far it is, and what the rest would cost; run nothing"""
    report: bool = False
    """compare finished cells with the publication; write HTML, CSV, Markdown and LaTeX; run nothing"""
    preset: Literal["laptop", "paper"] = "laptop"
    """sizes of every run: those for two CPU cores, or the paper's"""
    env: tuple[str, ...] = ()
    """only these environments: names in the table, of runs, or families such as cube-single"""
    algo: tuple[str, ...] = ()
    """only these algorithms, by the names that run.py knows"""
    seeds: int = 4
    """seeds of each cell, trained together"""
    budget: str | None = None
    """time that this call may take, such as 90s, 9m or 1.5h; then the running cell stops with a checkpoint"""
    jobs: str | None = None
    """`local:N` runs N cells at a time on this machine (local = one for each GPU, or for two cores); `slurm`
    submits the cells to a cluster and returns; None = one after the other, here"""
    job: JobConfig = NO_WISHES
    """with --jobs slurm: what each job asks for"""
    out: Path = RUNS / "reproduce"
    """folder of all runs; the same command continues there, on another machine too"""
    data_dir: Path = Path("data")
    """folder of datasets, run.py's --data.dir"""

    def __post_init__(self):
        if self.seeds < 1:
            raise UserError(f"--seeds={self.seeds}: must be at least 1")
        if self.budget is not None:
            read_budget(self.budget)
        if self.list and self.report:
            raise UserError("--list and --report: give one of them")
        if self.jobs is not None and read_jobs(self.jobs).where == "slurm" and self.budget is not None:
            raise UserError("--budget is for runs on this machine; limit the time of jobs with --job.time")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns 0, 1 if a cell failed, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: reproduce(argv),
        short_of_memory="take fewer --seeds",
        interrupted=f"what was trained is kept; continue with: {again(argv)}",
    )


def again(argv: Sequence[str]) -> str:
    """The command that continues."""
    return shlex.join([*PROGRAM.split(), *argv])


def reproduce(argv: Sequence[str]) -> int:
    """Does what a command line says; returns the exit status."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    args = read_flags(Args, words[:at], PROGRAM)
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the runs
    plan = Plan(args.out, args.preset, args.seeds, args.data_dir, tuple(words[at + 1 :]))
    if not args.suites and not args.list:
        raise UserError(f"SUITE is missing; name one or more of {', '.join(suite_names())}")
    if args.list and not args.suites:
        return list_suites(plan)
    chosen = select([load_suite(name) for name in dict.fromkeys(args.suites)], args.env, args.algo)
    if args.list:
        return list_cells(chosen, plan)
    if args.report:
        return report(chosen, plan, argv)
    cells = cells_of((entry for _, entries in chosen for entry in entries), plan)
    jobs = None if args.jobs is None else read_jobs(args.jobs)
    if jobs and jobs.where == "slurm":
        names = "+".join(suite.name for suite, _ in chosen)
        return submitted(submit_cells(cells, plan, args.job, names), plan, args.job, argv)
    budget = Budget(None if args.budget is None else read_budget(args.budget))
    rooms = slots(jobs.processes) if jobs else (Slot(),)
    states = with_queue({cell: progress(cell, plan) for cell in cells}, plan)
    queued = {cell: state for cell, state in states.items() if state.status == "queued"}
    return finish(run_cells(cells, plan, budget, rooms=rooms, queued=queued), argv)


def submitted(submission: Submission, plan: Plan, job: JobConfig, argv: Sequence[str]) -> int:
    """Says what was submitted and how to look after it; returns the exit status."""
    states = [state for cell, state in submission.states.items() if cell not in submission.jobs]
    print("cells: " + ", ".join(filter(None, [f"{len(submission.jobs)} submitted", tally(states)])))
    for cell, state in submission.states.items():
        if state.status == "not available":
            print(f"  {cell.title}: {state.reason}")
    if submission.jobs:
        arrays = " ".join(dict.fromkeys(number.split("_")[0] for number in submission.jobs.values()))
        limit = duration(60.0 * job.minutes)
        print(f"jobs {arrays}, {limit} each; a cell that needs longer queues again, and continues")
        print(f"logs      {plan.out / LOGS}/, one for each cell; SLURM's own in {plan.out / JOBS}/")
        print(f"states    {again(_instead(argv, '--list'))}")
        print(f"results   {again(_instead(argv, '--report'))}")
        print(f"cancel    scancel {arrays}")
    return 0


def _instead(argv: Sequence[str], flag: str) -> list[str]:
    """A command line with another flag in place of `--jobs` and what belongs to it."""
    at = argv.index("--") if "--" in argv else len(argv)
    kept, skip = list[str](), 0
    for word in argv[:at]:
        if word.startswith("--"):
            skip = 0
            if word.startswith(("--jobs", "--job.")):
                many = word in ("--job.extra", "--job.setup")
                skip = 0 if "=" in word else len(argv) if many else 1
                continue
        if skip:
            skip -= 1
        else:
            kept.append(word)
    return [*kept, flag, *argv[at:]]


def finish(outcome: Outcome, argv: Sequence[str]) -> int:
    """Says what became of the cells; returns the exit status."""
    counts = {"done": outcome.done, "stopped by the budget": outcome.cut, "not begun": outcome.left}
    counts |= {"failed": outcome.failed, "in another process": outcome.elsewhere}
    counts |= {"not available": outcome.unavailable}
    print("cells: " + ", ".join(f"{len(found)} {name}" for name, found in counts.items() if found))
    for cell, reason in (outcome.unavailable | outcome.failed).items():
        print(f"  {cell.title}: {reason}")
    if outcome.cut or outcome.left or outcome.failed:
        print(f"continue with: {again(argv)}")
    return 1 if outcome.failed else 0


# Lists.


def list_suites(plan: Plan) -> int:
    """Prints one line for each suite."""
    print(f"{'suite':<16}{'cells':>6}  cells that are done, cut, missing ... of {plan.preset} in {plan.out}")
    for name in suite_names():
        suite = load_suite(name)
        known = {cell: progress(cell, plan) for cell in cells_of(suite.entries, plan)}
        states = list(with_queue(known, plan).values())
        print(f"{name:<16}{len(states):>6}  {suite.title}: {tally(states)}")
    print(f"what each cell would cost: {PROGRAM} SUITE --list")
    return 0


def tally(states: Sequence[Progress]) -> str:
    """How many cells are in which state, in words."""
    counts = {name: sum(state.status == name for state in states) for name in STATUSES}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def list_cells(chosen: Sequence[tuple[Suite, list[Entry]]], plan: Plan) -> int:
    """Prints one line for each cell of some suites, and what is left to do."""
    estimator, left = Estimator(plan), dict[Cell, float]()
    for suite, entries in chosen:
        states = with_queue({cell: progress(cell, plan) for cell in cells_of(entries, plan)}, plan)
        for cell, state in states.items():
            estimator.learn(cell, state)
        print(f"{suite.name}: {suite.title} ({suite.source})\n  protocol: {suite.protocol}")
        for cell, state in states.items():
            print(f"  {cell.env:<44} {cell.algo:<14} {describe(cell, state, estimator, left)}")
        print(f"  {counted(len(states), 'cell')}: {tally(list(states.values()))}")
    if left:
        for name, how in datasets_to_make(list(left), plan).items():
            print(f"dataset {name}: {how}")
        print(f"left: {counted(len(left), 'cell')}, about {duration(sum(left.values()))}\n{NOTE}")
    return 0


def describe(cell: Cell, state: Progress, estimator: Estimator, left: dict[Cell, float]) -> str:
    """How far a cell is and what it would cost, which is added to `left`."""
    said = state.status
    if state.reached and state.status != "done":
        said += f" at update {state.reached:,} of {state.steps:,}"
    if state.status in LEFT and state.steps:
        cost = estimator.cost(cell, state)
        left[cell] = cost.seconds
        said += f", about {duration(cost.seconds)}{'*' if cost.measured else ''}"
    return said + (f": {state.reason}" if state.reason else "")


# Reports.


def report(chosen: Sequence[tuple[Suite, list[Entry]]], plan: Plan, argv: Sequence[str]) -> int:
    """Compares finished cells with the publication, in the terminal and in files.

    Raises:
        UserError: no number is complete, or a file cannot be written.
    """
    found = [(suite, compare(suite, entries, plan)) for suite, entries in chosen]
    if not any(comparison.rows for _, comparison in found):
        raise UserError(
            f"{plan.out} has not all cells of any number in these tables ({plan.preset}, "
            f"{counted(plan.seeds, 'seed')}); run them first, without --report"
        )
    command, ending = ["experiments/reproduce.py", *argv], f"{plan.preset}_s{plan.seeds}"
    sections, paths = list[Section](), list[Path]()
    for suite, (rows, missing, finished) in found:
        if not rows:
            print(f"{suite.name}: no number is complete yet")
            continue
        print_tables(terminal_table(suite, rows, len(missing)))
        files = [plan.out / REPORTS / f"{suite.name}_{ending}{suffix}" for suffix in (".csv", ".md", ".tex")]
        write_csv(files[0], rows, command)
        for path, text in zip(files[1:], (markdown, latex), strict=True):
            write_text(path, text(suite, rows, len(missing)))
        if statistics := across(suite, finished):
            print_tables(across_table(suite, statistics))
            files.append(plan.out / REPORTS / f"{suite.name}_{ending}_across.csv")
            write_csv(files[-1], statistics, command)
        paths += files
        table = files[0].read_text(encoding="utf-8")
        sections.append(Section(suite, rows, len(missing), list(finished.values()), table, statistics))
    names = ", ".join(section.suite.name for section in sections)
    paths.append(plan.out / REPORTS / f"{names.replace(', ', '_')}_{ending}.html")
    write_text(paths[-1], page(sections, f"{names}: this project and the paper ({plan.preset})"))
    print("".join(f"  {path}\n" for path in paths), end="")
    return 0


def write_text(path: Path, text: str) -> None:
    """Writes a file in one go.

    Raises:
        UserError: it cannot be written.
    """
    replace_file(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
