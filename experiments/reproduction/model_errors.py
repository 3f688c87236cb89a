"""Errors of dynamics models: those of a figure by chunk length, and those of finished runs by success."""

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from envs_mjx.registry import parse
from experiments.launch import dataset
from experiments.launch.settings import DataConfig
from experiments.model_error_study.rows import ChunkRow, PolicyRow
from experiments.reproduction.cells import Cell, Plan
from experiments.reproduction.jobs import Job
from experiments.reproduction.suites import Entry, Suite
from mac.errors import UserError

FOLDER = "model_error"
ROWS = {"laptop": 200_200, "paper": 1_001_000}
"""Rows of the dataset by preset, as in the runs."""
TRAJECTORIES = 512
RowT = TypeVar("RowT", ChunkRow, PolicyRow)


class Read(NamedTuple):
    """A CSV file of errors.

    Attributes:
        head: the lines of its provenance, by name.
    """

    rows: list[Any]
    head: dict[str, str]


def study_cell(suite: Suite, entry: Entry, plan: Plan) -> Cell:
    """What is trained for one line of a figure: models of one chunk length."""
    flags = (*suite.sizes.get(plan.preset, ()), *entry.flags)
    return plan.cell(entry.runs[0], entry.algo, flags)


def study_file(cell: Cell, plan: Plan) -> Path:
    """The file that a study leaves."""
    return plan.out / FOLDER / cell.name / "model_error.csv"


def study_jobs(suite: Suite, entries: Iterable[Entry], plan: Plan) -> list[Job]:
    """A job for each line of a figure of model errors, and before them one for a dataset that is not here.

    Raises:
        UserError: a dataset can neither be found nor made.
    """
    jobs: dict[Path, Job] = {}
    for entry in entries:
        cell = study_cell(suite, entry, plan)
        data = DataConfig(dir=plan.data_dir, rows=ROWS[plan.preset])
        done, task = study_file(cell, plan), parse(cell.env)
        after = ()
        if not done.exists() and dataset.search(data, task) is None:
            made = dataset.generated_file(data, task.dataset)
            if reason := dataset.cannot_generate(task.dataset):
                raise UserError(f"{cell.title}: {reason}")
            words = ("generate_data.py", "--env", task.dataset, "--rows", str(data.rows))
            out = ("--out", str(made.parent), "--shard-rows", str(data.rows))
            jobs[made] = Job(f"data_{task.dataset}", f"data of {task.dataset}", (*words, *out), made)
            after = (made,)
        words = ["model_error.py", "--env", task.dataset, "--seeds", str(cell.seeds), *cell.flags]
        place = ["--out", str(done.parent), "--data.dir", str(data.dir), "--data.rows", str(data.rows)]
        jobs[done] = Job(f"model_error_{cell.name}", f"models: {cell.title}", (*words, *place), done, after)
    return list(jobs.values())


def policy_file(cell: Cell, plan: Plan, horizon: int) -> Path:
    """The file with the errors of a run's models after `horizon` steps."""
    return plan.out / FOLDER / f"{cell.name}_after{horizon}" / "success.csv"


def policy_jobs(suite: Suite, cells: Iterable[Cell], plan: Plan) -> list[Job]:
    """A job for each finished run whose models' errors a figure shows; none for other suites."""
    jobs = []
    for cell in cells if suite.errors_at else ():
        done = policy_file(cell, plan, suite.errors_at)
        words = ["model_error.py", "--steps", "0", "--policy", str(plan.folder(cell))]
        words += ["--horizon", str(suite.errors_at), "--trajectories", str(TRAJECTORIES)]
        words += ["--out", str(done.parent)]
        jobs.append(Job(f"{done.parent.name}", f"model error of {cell.title}", tuple(words), done))
    return jobs


def read_errors(path: Path, kind: type[RowT]) -> Read:
    """Reads a file of `model_error.py`.

    Raises:
        UserError: it is damaged.
    """
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        table = csv.DictReader(line for line in lines if not line.startswith("#"))
        rows = [kind(**{name: _value(row[name], fields[name]) for name in fields}) for row in table]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); delete its folder, and it is made again") from error
    return Read(rows, head)


def _value(text: str, kind: Any) -> Any:
    return {int: int, float: float, "int": int, "float": float}.get(kind, str)(text)


@dataclasses.dataclass(frozen=True)
class ErrorRow:
    """Error of the models of one chunk length, after the last step of a figure; `data_*` over episodes."""

    suite: str
    env: str
    setting: str
    preset: str
    horizon: int
    error: float
    low: float
    high: float
    data_low: float
    data_high: float
    still: float
    seeds: int
    updates: int
    data: str
    hardware: str
    commit: str
    date: str


def error_rows(suite: Suite, pairs: Sequence[tuple[Entry, Read]], preset: str) -> list[ErrorRow]:
    """The last row of each line of a figure."""
    found = []
    for entry, (rows, head) in pairs:
        last: ChunkRow = rows[-1]
        kept = {name: head.get(name, "unknown") for name in ("data", "hardware", "commit", "date")}
        row = ErrorRow(
            suite.name, entry.env, f"{suite.axis}: {last.chunk}", preset, last.horizon, last.error,
            last.seed_low, last.seed_high, last.data_low, last.data_high, last.still, last.seeds,
            last.updates,
            **kept,
        )  # fmt: skip
        found.append(row)
    return found


def error_columns(rows: Sequence[ErrorRow]) -> dict[str, list[str]]:
    """The cells of each column of a table of errors."""
    return {
        "environment": [row.env for row in rows],
        "setting": [row.setting for row in rows],
        "steps": [str(row.horizon) for row in rows],
        "error": [f"{row.error:.3g}" for row in rows],
        "95% over seeds": [f"{row.low:.3g} to {row.high:.3g}" for row in rows],
        "95% over episodes": [f"{row.data_low:.3g} to {row.data_high:.3g}" for row in rows],
        "constant state": [f"{row.still:.3g}" for row in rows],
        "seeds": [str(row.seeds) for row in rows],
        "updates": [str(row.updates) for row in rows],
        "preset": [row.preset for row in rows],
        "data": [row.data for row in rows],
        "commit": [row.commit[:9] for row in rows],
    }
