"""Runs the paper's tables and figures and compares: `python experiments/reproduce.py table2`."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import tyro

from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.launch.job_options import NO_WISHES, JobConfig, read_jobs
from experiments.launch.settings import RUNS
from experiments.reproduction.absent import why_nothing
from experiments.reproduction.cells import LEFT, LOGS, STATUSES, Cell, Plan, Progress, cells_of, progress
from experiments.reproduction.comparison import Finished, read_finished
from experiments.reproduction.cost import NOTE, Estimator, datasets_to_make
from experiments.reproduction.films import film_jobs
from experiments.reproduction.jobs import Job, JobOutcome, run_jobs
from experiments.reproduction.model_errors import policy_jobs, study_cell, study_file, study_jobs
from experiments.reproduction.reports import write_reports
from experiments.reproduction.runner import Budget, Outcome, Slot, read_budget, run_cells, slots
from experiments.reproduction.slurm_jobs import JOBS, Submission, submit_cells, with_queue
from experiments.reproduction.suites import Entry, Suite, load_suite, load_suites, select, suite_names
from experiments.reproduction.times import measured, this_device, time_cells, time_jobs
from mac.errors import UserError
from mac.formatting import counted
from mac.run.report.timing import duration

PROGRAM = "python experiments/reproduce.py"
Chosen = Sequence[tuple[Suite, list[Entry]]]


@dataclass(frozen=True)
class Args:
    """Runs the cells of published tables, each a run of run.py, and compares them with the publication.

    Words after `--` go to every run, such as `-- --eval.episodes 50`; such runs have folders of their own.
    """

    suites: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SUITE")]
    """tables and figures such as table2 and figure3, or TOML files of one's own; `--list` names them"""
    list: bool = False
    """print what there is, how far it is, and what the rest would cost; run nothing"""
    report: bool = False
    """compare finished cells with the publication; write HTML, CSV, Markdown and LaTeX; run nothing"""
    films: bool = False
    """render a film of each environment that has none yet, before --report or after the runs"""
    preset: Literal["laptop", "paper"] | None = None
    """sizes of every run: those for two CPU cores, or the paper's; None = laptop, but tables 4 and 5 measure
    the paper's"""
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
        if in_the_way := next((path for path in (self.out, *self.out.parents) if path.is_file()), None):
            raise UserError(f"--out={self.out}: {in_the_way} is a file; choose a folder")
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
    flags = tuple(words[at + 1 :])
    plan = Plan(
        args.out, args.preset or "laptop", args.seeds, args.data_dir, flags, args.preset or "paper",
        args.env, args.algo,
    )  # fmt: skip
    if not args.suites and not args.list:
        known = [name for name in suite_names() if load_suite(name).kind != "unrecorded"]
        raise UserError(f"SUITE is missing; name one or more of {', '.join(known)}")
    if args.list and not args.suites:
        return list_suites(plan)
    chosen = select(load_suites(args.suites), args.env, args.algo)
    if args.list:
        return list_cells(chosen, plan)
    jobs = None if args.jobs is None else read_jobs(args.jobs)
    if jobs and jobs.where == "slurm" and not args.report:
        names = "+".join(suite.name for suite, _ in chosen)
        cells = cells_of(entries_of_runs(chosen), plan)
        if here := [suite.name for suite, _ in chosen if suite.kind in ("time", "model error")]:
            print(f"not submitted: the measurements of {', '.join(here)}; leave out --jobs for those")
        return submitted(submit_cells(cells, plan, args.job, names), plan, args.job, argv)
    budget = Budget(None if args.budget is None else read_budget(args.budget))
    if args.report:
        return report(chosen, plan, budget if args.films else None, argv)
    rooms = slots(jobs.processes) if jobs else (Slot(),)
    outcome, others = run(chosen, plan, budget, args.films, rooms)
    return finish(outcome, others, argv)


def run(
    chosen: Chosen, plan: Plan, budget: Budget, films: bool, rooms: Sequence[Slot]
) -> tuple[Outcome, list[JobOutcome]]:
    """Runs what is missing: times and studies of models, then runs, then what needs finished runs.

    Args:
        rooms: one for each cell that runs at a time.
    """
    first = list[Job]()
    if times := [
        cell for suite, entries in chosen if suite.kind == "time" for cell in time_cells(entries, plan)
    ]:
        device = this_device()
        print(f"times are measured on {device}")
        first += time_jobs(list(dict.fromkeys(times)), plan, device)
    for suite, entries in chosen:
        if suite.kind == "model error":
            first += study_jobs(suite, entries, plan)
    jobs = [run_jobs(first, plan.out, budget)] if first else []
    cells = cells_of(entries_of_runs(chosen), plan)
    states = with_queue({cell: progress(cell, plan) for cell in cells}, plan)
    queued = {cell: state for cell, state in states.items() if state.status == "queued"}
    outcome = run_cells(cells, plan, budget, rooms=rooms, queued=queued)
    done = [cell for cell in cells if cell in outcome.done]
    later = list[Job]()
    for suite, entries in chosen:
        later += policy_jobs(suite, [cell for cell in cells_of(entries, plan) if cell in done], plan)
    if films:
        later += film_jobs(finished(chosen, plan), plan)
    return outcome, jobs + ([run_jobs(later, plan.out, budget)] if later else [])


def entries_of_runs(chosen: Chosen) -> list[Entry]:
    """The entries whose numbers are those of `run.py`."""
    return [entry for suite, entries in chosen if suite.of_runs for entry in entries]


def submitted(submission: Submission, plan: Plan, job: JobConfig, argv: Sequence[str]) -> int:
    """Says what was submitted and how to look after it; returns the exit status."""
    states = [state for cell, state in submission.states.items() if cell not in submission.jobs]
    print("cells: " + ", ".join(filter(None, [f"{len(submission.jobs)} submitted", tally(states)])))
    for cell, state in submission.states.items():
        if state.status in ("not available", "unusable"):
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


def finished(chosen: Chosen, plan: Plan) -> list[Finished]:
    """The finished cells of suites."""
    cells = cells_of(entries_of_runs(chosen), plan)
    return [run for cell in cells if (run := read_finished(cell, plan)) is not None]


def finish(outcome: Outcome, jobs: Sequence[JobOutcome], argv: Sequence[str]) -> int:
    """Says what became of the cells and of other programs; returns the exit status."""
    counts = {"done": outcome.done, "stopped by the budget": outcome.cut, "not begun": outcome.left}
    counts |= {"failed": outcome.failed, "in another process": outcome.elsewhere}
    counts |= {"not available": outcome.unavailable}
    if any(counts.values()) or not jobs:
        print("cells: " + ", ".join(f"{len(found)} {name}" for name, found in counts.items() if found))
    for cell, reason in (outcome.unavailable | outcome.failed).items():
        print(f"  {cell.title}: {reason}")
    for each in jobs:
        counts = {"done": each.done, "ended by the budget": each.cut, "not begun": each.left}
        counts |= {"failed": each.failed}
        print("other programs: " + ", ".join(f"{len(jobs)} {name}" for name, jobs in counts.items() if jobs))
        for job, reason in each.failed.items():
            print(f"  {job.title}: {reason}")
    failed = bool(outcome.failed) or any(each.failed for each in jobs)
    if failed or outcome.cut or outcome.left or any(each.cut or each.left for each in jobs):
        print(f"continue with: {again(argv)}")
    return 1 if failed else 0


# Lists.


def list_suites(plan: Plan) -> int:
    """Prints one line for each suite."""
    print(
        f"preset {plan.preset}, in {plan.out}: cells that are done, cut, missing ..., and what the rest takes"
    )
    estimator, left = Estimator(plan), dict[Cell, float]()
    if not estimator.has_counts:
        print(
            "counting the operations of each algorithm's update, which takes a minute, this time only",
            flush=True,
        )
    for name in suite_names():
        suite = load_suite(name)
        if suite.kind == "unrecorded":
            print(f"{name:<16}{'-':>5}  {suite.title}")
            continue
        found = describe_all(suite, suite.entries, plan, estimator)
        costs = {each.cell: each.seconds for each in found if each.seconds}
        cost = f", about {duration(sum(costs.values()))}" if costs else ""
        print(f"{name:<16}{len(found):>5}  {tally(found)}{cost}: {suite.title}", flush=True)
        left |= costs
    if left:
        print(f"all, without what they share: about {duration(sum(left.values()))}; {PROGRAM} SUITE --list")
        print(NOTE)
    return 0


class Listed(NamedTuple):
    """A line of a list: a cell, its state in words, and the seconds that are left of it."""

    cell: Cell
    status: str
    said: str
    seconds: float


def describe_all(suite: Suite, entries: Sequence[Entry], plan: Plan, estimator: Estimator) -> list[Listed]:
    """What there is of a suite's cells, and what is left."""
    if suite.kind == "time":
        return [describe_time(cell, plan, estimator) for cell in time_cells(entries, plan)]
    if suite.kind == "model error":
        return [describe_study(study_cell(suite, entry, plan), plan, estimator) for entry in entries]
    states = with_queue({cell: progress(cell, plan) for cell in cells_of(entries, plan)}, plan)
    for cell, state in states.items():
        estimator.learn(cell, state)
    return [describe(cell, state, estimator) for cell, state in states.items()]


def describe_time(cell: Cell, plan: Plan, estimator: Estimator) -> Listed:
    """A measurement of times, on all devices."""
    if found := measured(cell, plan):
        devices = "; ".join(each.values["device"] for each in found)
        return Listed(cell, "done", f"done on {devices}", 0.0)
    try:
        seconds = estimator.seconds_to_measure(cell)
    except UserError as error:
        return Listed(cell, "not available", f"not available: {error}", 0.0)
    return Listed(cell, "missing", "missing" + about(seconds), seconds)


def about(seconds: float) -> str:
    """An estimate as text to append."""
    return f", about {duration(seconds)}"


def describe_study(cell: Cell, plan: Plan, estimator: Estimator) -> Listed:
    """Dynamics models of one chunk length."""
    if study_file(cell, plan).exists():
        return Listed(cell, "done", "done", 0.0)
    seconds = estimator.seconds_of_study(cell)
    return Listed(cell, "missing", "missing" + about(seconds), seconds)


def tally(found: Sequence[Listed | Progress]) -> str:
    """How many cells are in which state, in words."""
    counts = {name: sum(each.status == name for each in found) for name in STATUSES}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def list_cells(chosen: Chosen, plan: Plan) -> int:
    """Prints one line for each cell of some suites, and what is left to do."""
    estimator, left = Estimator(plan), dict[Cell, float]()
    for suite, entries in chosen:
        found = describe_all(suite, entries, plan, estimator)
        print(f"{suite.name}: {suite.title} ({suite.source})")
        if suite.protocol:
            print(f"  protocol: {suite.protocol}")
        for cell, _, said, _ in found:
            print(f"  {cell.env:<44} {cell.algo:<14} {said}{cell.told and f'   {cell.told}'}")
        print(f"  {counted(len(found), 'cell')}: {tally(found)}")
        left |= {each.cell: each.seconds for each in found if each.seconds}
    if left:
        cells = [cell for cell in cells_of(entries_of_runs(chosen), plan) if cell in left]
        for name, how in datasets_to_make(cells, plan).items():
            print(f"dataset {name}: {how}")
        print(f"left: {counted(len(left), 'cell')}, about {duration(sum(left.values()))}\n{NOTE}")
    return 0


def describe(cell: Cell, state: Progress, estimator: Estimator) -> Listed:
    """How far a cell is and what it would cost."""
    said, seconds = state.status, 0.0
    if state.reached and state.status != "done":
        said += f" at update {state.reached:,} of {state.steps:,}"
    if state.status in LEFT and state.steps:
        cost = estimator.cost(cell, state)
        seconds = cost.seconds
        said += about(seconds) + ("*" if cost.measured else "")
    return Listed(cell, state.status, said + (f": {state.reason}" if state.reason else ""), seconds)


# Reports.


def report(chosen: Chosen, plan: Plan, films: Budget | None, argv: Sequence[str]) -> int:
    """Compares finished cells with the publication, in the terminal and in files.

    Args:
        films: the time for films that are missing; None for none.
    Raises:
        UserError: no number is complete, or a file cannot be written.
    """
    if films is not None and (jobs := film_jobs(finished(chosen, plan), plan)):
        for job, reason in run_jobs(jobs, plan.out, films).failed.items():
            print(f"no film: {job.title}: {reason}")
    paths = write_reports(chosen, plan, ["experiments/reproduce.py", *argv])
    if not paths:
        raise UserError(why_nothing(chosen, plan))
    print("".join(f"  {path}\n" for path in paths), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
