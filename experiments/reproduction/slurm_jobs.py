"""Cells as jobs of a SLURM cluster: submission, and how far each is in the queue."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.launch import slurm
from experiments.launch.job_options import JobConfig
from experiments.reproduction.cells import LEFT, Cell, Plan, Progress, progress, record_failure
from experiments.reproduction.processes import fault
from experiments.reproduction.runner import command, is_locked
from mac.atomic_files import locked, misfit, read_json, write_json, writing
from mac.errors import UserError

JOBS = "jobs"
"""Folder of what SLURM and submitit write, and of the job of each cell."""


class CellTask(slurm.RunTask):
    """What a cell's job does."""

    def __init__(self, cell: Cell, plan: Plan):
        """Describes the run of a cell."""
        super().__init__(plan.folder(cell), (), plan.log(cell))
        self.cell, self.plan = cell, plan

    def command(self) -> list[str]:
        """The words of `run.py` that begin or continue the cell."""
        return command(self.cell, self.plan)

    def ended(self, status: int, lines: Sequence[str]) -> None:
        """Keeps the line of a cell that failed."""
        if progress(self.cell, self.plan).status == "done":
            record_failure(self.plan.out, self.cell, None)
        elif status not in slurm.INTERRUPTED and not is_locked(lines):
            record_failure(self.plan.out, self.cell, fault(status, lines))


class Submission(NamedTuple):
    """What was submitted.

    Attributes:
        jobs: ids by cell.
        states: of all cells that were asked for, before the submission.
    """

    jobs: dict[Cell, str]
    states: dict[Cell, Progress]


def submit_cells(cells: Sequence[Cell], plan: Plan, config: JobConfig, name: str) -> Submission:
    """Submits a job for each cell that is missing, was cut or failed, and that no job has yet.

    Args:
        name: of the jobs in the queue.
    Raises:
        UserError: SLURM refuses or is missing, or the folder cannot be written.
    """
    folder = plan.out / JOBS
    with writing(folder):
        (plan.out / "logs").mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    absolute = plan._replace(out=plan.out.absolute(), data_dir=plan.data_dir.absolute())
    with locked(folder / ".lock"):  # two calls at once must not submit a cell twice
        states = with_queue({cell: progress(cell, plan) for cell in cells}, plan)
        wanted = [cell for cell, state in states.items() if state.status in LEFT]
        if not wanted:
            return Submission({}, states)
        numbers = slurm.submit([CellTask(cell, absolute) for cell in wanted], name, config, folder)
        for cell, number in zip(wanted, numbers, strict=True):
            write_json(_record(plan, cell), {"job": number})
    return Submission(dict(zip(wanted, numbers, strict=True)), states)


def with_queue(states: Mapping[Cell, Progress], plan: Plan) -> dict[Cell, Progress]:
    """The states of cells, with what the queue knows of those that have a job.

    Raises:
        UserError: there are jobs, and SLURM does not answer.
    """
    numbers = {cell: number for cell in states if (number := _job(plan, cell))}
    unfinished = {cell for cell in numbers if states[cell].status in (*LEFT, "running")}
    queue = slurm.queue() if unfinished else {}
    found = dict(states)
    for cell in unfinished:
        state, number = states[cell], numbers[cell]
        job = queue.get(number)
        if job is not None:
            where = (
                f"job {number}, {job.state.lower()}: {job.reason}"
                if job.waits
                else f"job {number} on {job.reason}"
            )
            found[cell] = state._replace(status="queued" if job.waits else "running", reason=where)
        elif state.status in ("cut", "missing"):
            found[cell] = state._replace(
                reason=f"job {number} is over before the cell is; see {plan.log(cell)}"
            )
    return found


def _record(plan: Plan, cell: Cell) -> Path:
    return plan.out / JOBS / f"{cell.name}.json"


def _job(plan: Plan, cell: Cell) -> str | None:
    """The newest job of a cell; None if it never had one, or if the record is damaged."""
    with contextlib.suppress(UserError):
        if _record(plan, cell).exists():
            found = read_json(_record(plan, cell))
            return None if misfit(found, job=str) else found["job"]
    return None
