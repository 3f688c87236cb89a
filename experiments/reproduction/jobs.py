"""Jobs: programs other than `run.py` that a suite needs, each of which leaves one file when it is done."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.reproduction.cells import LOGS
from experiments.reproduction.processes import Budget, LoggedProcess, fault, guarded, stop
from mac.errors import UserError, one_line
from mac.run.report.timing import duration

EXPERIMENTS = Path(__file__).parents[1]


class Job(NamedTuple):
    """A program to run.

    Attributes:
        name: of its log.
        title: for messages.
        words: the command line, first the script's name in `experiments/`.
        done: the file that it leaves.
        after: what must be there before it can run; else it is left out.
    """

    name: str
    title: str
    words: tuple[str, ...]
    done: Path
    after: tuple[Path, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether its file is there."""
        return self.done.exists()


class JobOutcome(NamedTuple):
    """What became of the jobs of one call.

    Attributes:
        cut: ended by the budget; they begin anew.
        failed: with their lines.
        left: not begun for want of time, or because something before them is missing.
    """

    done: list[Job]
    cut: list[Job]
    failed: dict[Job, str]
    left: list[Job]


def program(job: Job) -> list[str]:
    """The command of a job."""
    script, *words = job.words
    return [*guarded(EXPERIMENTS / script), *words]


def run_jobs(
    jobs: Sequence[Job], out: Path, budget: Budget, say: Callable[[str], None] = print
) -> JobOutcome:
    """Runs jobs whose file is missing, one after the other; one that fails does not stop the others.

    Raises:
        UserError: a log cannot be written.
        KeyboardInterrupt: after the running job has stopped.
    """
    outcome = JobOutcome([job for job in jobs if job.is_done], [], {}, [])
    wanted = [job for job in jobs if not job.is_done]
    for number, job in enumerate(wanted, start=1):
        if not budget.may_start or not all(path.exists() for path in job.after):
            outcome.left.append(job)
            continue
        say(f"[{number}/{len(wanted)}] {job.title}")
        began, (status, lines) = time.monotonic(), _run(job, out, budget)
        if job.is_done:
            outcome.done.append(job)
            say(f"  done after {duration(time.monotonic() - began)}")
        elif budget.must_stop:
            outcome.cut.append(job)
            say("  ended: the budget is used up; it begins anew next time")
        else:
            outcome.failed[job] = fault(status, lines)
            say(f"  failed: {outcome.failed[job]}")
    return outcome


def _run(job: Job, out: Path, budget: Budget) -> tuple[int, list[str]]:
    """Runs a job to its end or the budget's; returns its status and the lines of its log."""
    try:
        job.done.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {job.done} ({one_line(error)}); choose another --out") from error
    shown = ["python", *job.words]
    process = LoggedProcess(program(job), shown, out / LOGS / f"{job.name}.log")
    try:
        while not process.has_ended:
            process.keep_to(budget)
            process.wait_a_little()
    except BaseException:
        stop([process])
        raise
    return process.status, process.lines()
