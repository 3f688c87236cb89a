"""Cells: the runs that tables need, each in a folder of its own, and how far each of them is."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import shlex
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from baselines import algorithms, get_algorithm
from envs_mjx.registry import parse
from experiments.cli.arguments import read_flags
from experiments.launch.hparams import HPARAMS, merge_rows, require_steps, rows_for
from experiments.launch.job import progress_of
from experiments.launch.settings import (
    PROGRAM,
    Settings,
    check_owner,
    is_run,
    read_settings,
    settings_from_dict,
)
from experiments.reproduction.suites import Entry
from mac.atomic_files import replace_file, writing
from mac.errors import UserError, refusal
from mac.run.io.folder_lock import lock
from mac.run.io.logger import EVAL, read_rows
from mac.run.io.run_metadata import launches
from mac.run.io.run_outputs import check_evaluations
from mac.run.report.stats import learning_curve

Status = Literal["done", "cut", "missing", "queued", "running", "failed", "unusable", "not available"]
STATUSES: tuple[Status, ...] = typing.get_args(Status)
LEFT: tuple[Status, ...] = ("cut", "missing", "failed")
"""What there is to run. A cell whose files are damaged is `unusable`: to run it again would mend nothing."""
FAILURES, LOGS = "failures", "logs"
LONGEST = 60
"""Characters of a selection in the name of a file."""


class Cell(NamedTuple):
    """One call of `run.py`: an algorithm in an environment, all seeds at once.

    Attributes:
        env: as `--env` takes it.
        flags: further flags of `run.py`; other flags make another cell.
    """

    env: str
    algo: str
    preset: str
    seeds: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder; Minari's names have slashes."""
        name = f"{self.algo}_{self.env.replace('/', '-')}_{self.preset}_s{self.seeds}"
        if not self.flags:
            return name
        return f"{name}_{hashlib.sha256(chr(0).join(self.flags).encode()).hexdigest()[:8]}"

    @property
    def title(self) -> str:
        """Title for messages."""
        return f"{self.algo} on {self.env}{self.told}"

    @property
    def told(self) -> str:
        """The flags, as text to append."""
        return f" {shlex.join(self.flags)}" if self.flags else ""


class Plan(NamedTuple):
    """The choice that a command line makes for all cells.

    Attributes:
        out: the folder of all runs.
        data_dir: `--data.dir` of every run.
        flags: further flags of every run.
        time_preset: the preset of times that are measured.
        envs, algos: the only environments and algorithms, as the command line names them; empty for all.
    """

    out: Path
    preset: str
    seeds: int
    data_dir: Path
    flags: tuple[str, ...] = ()
    time_preset: str = "paper"
    envs: tuple[str, ...] = ()
    algos: tuple[str, ...] = ()

    def cell(self, env: str, algo: str, flags: tuple[str, ...] = ()) -> Cell:
        """The cell of an environment and an algorithm, with flags before those of all runs."""
        return Cell(env, algo, self.preset, self.seeds, flags + self.flags)

    def cells(self, entry: Entry) -> list[Cell]:
        """The cells that a number needs."""
        return [self.cell(run, entry.algo, entry.flags) for run in entry.runs]

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's run."""
        return self.out / cell.name

    @property
    def selection(self) -> str:
        """Selection and flags as a part of the names of files; equal ones give equal parts, others do not."""
        flags = re.sub(r" (?!--)", "=", shlex.join(self.flags)).replace("--", "").replace(" ", "+")
        chosen = ("+".join(sorted(set(names))) for names in (self.algos, self.envs))
        text = "_".join(filter(None, [*chosen, flags]))
        plain = re.sub(r"[^A-Za-z0-9.+=_-]+", "-", text)
        if plain != text or len(plain) > LONGEST:
            plain = f"{plain[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return plain

    @property
    def told(self) -> str:
        """The same in words, to be appended to a title."""
        chosen = ", ".join(dict.fromkeys((*self.algos, *self.envs)))
        words = [f"only {chosen}" if chosen else "", f"with {shlex.join(self.flags)}" if self.flags else ""]
        text = "; ".join(filter(None, words))
        return f" ({text})" if text else ""

    def log(self, cell: Cell) -> Path:
        """The log of a cell's run."""
        return self.out / LOGS / f"{cell.name}.log"


class Progress(NamedTuple):
    """How far a cell is.

    Attributes:
        reached: updates that its newest checkpoint has seen.
        steps: updates that it will have at its end; 0 where that is not known.
        reason: why it failed, is unusable or not available; one line.
    """

    status: Status
    reached: int = 0
    steps: int = 0
    reason: str = ""


def cells_of(entries: Iterable[Entry], plan: Plan) -> list[Cell]:
    """The cells that entries need, without repeats; those of one dataset follow each other."""
    found = dict.fromkeys(cell for entry in entries for cell in plan.cells(entry))
    order: dict[str, int] = {}
    for cell in found:
        order.setdefault(parse(cell.env).dataset, len(order))
    return sorted(found, key=lambda cell: order[parse(cell.env).dataset])


def cell_settings(cell: Cell, data_dir: Path) -> Settings[Any]:
    """The settings that `run.py` trains a cell with.

    Raises:
        UserError: the algorithm does not exist, or has no hyperparameters for the environment and preset.
    """
    entry, task_id, rows = get_algorithm(cell.algo), parse(cell.env), _rows(cell.algo)
    values = merge_rows(rows, cell.algo, task_id, cell.preset)
    require_steps(values, rows, cell.algo, task_id, cell.preset)
    top = {"algo": cell.algo, "env": cell.env, "preset": cell.preset, "seeds": cell.seeds}
    settings = settings_from_dict(values | top, entry.config, str(HPARAMS))
    if cell.flags:
        check_owner(cell.flags, cell.algo)
        settings = read_flags(Settings[entry.config], cell.flags, PROGRAM, settings)
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, dir=data_dir))


@functools.cache
def _rows(algo: str) -> list[dict[str, Any]]:
    return rows_for(get_algorithm(algo))


def progress(cell: Cell, plan: Plan) -> Progress:
    """How far a cell is; starts nothing, and writes nothing."""
    folder = plan.folder(cell)
    said = failure(plan.out, cell)
    if cell.algo not in algorithms():
        return Progress("not available", reason="this version does not have the algorithm")
    if not is_run(folder):
        try:
            steps = cell_settings(cell, plan.data_dir).steps
        except UserError as error:
            return Progress("not available", reason=str(error))
        return Progress("failed" if said else "missing", 0, steps, said)
    try:
        settings = dataclasses.replace(read_settings(folder), resume=True)
        _check_identity(cell, settings, folder)
        with unlocked(folder) as free:
            if not free:
                return Progress("running", 0, settings.steps)
        reached, finished = progress_of(settings, folder)
        if finished:
            _check_evaluations(cell, folder, reached or 0)
            launches(folder)
    except UserError as error:
        return Progress("unusable", reason=_with_remedy(str(error), folder))
    if finished:
        return Progress("done", reached or 0, settings.steps)
    return Progress("failed" if said else "cut", reached or 0, settings.steps, said)


def _with_remedy(line: str, folder: Path) -> str:
    """The line of an error with a remedy that works for a cell: no file of it can be mended or deleted."""
    fault, _, then = line.rpartition("; ")
    if then.startswith("delete this folder"):  # of a checkpoint, before which there may be another one
        return f"{line}, or move {folder} away and run the cell anew"
    return f"{fault or line}; restore it, or move {folder} away and run the cell anew"


def _check_evaluations(cell: Cell, folder: Path, reached: int) -> None:
    """Checks the rows of a cell whose last checkpoint is that of update `reached`.

    Raises:
        UserError: a row is damaged, rows are not those that the checkpoint records, or the last complete
            evaluation is not that of the last update.
    """
    check_evaluations(folder, reached)
    path = folder / EVAL
    curve = learning_curve(read_rows(path), str(path))
    if (last := curve.steps[-1]) != reached:
        raise UserError(
            f"{path}: the last complete evaluation is of update {last:,}, not {reached:,}; restore it"
        )
    if (found := len(curve.seeds)) != cell.seeds:
        raise UserError(f"{path}: it has evaluations of {found} of {cell.seeds} seeds; restore it")


def _check_identity(cell: Cell, settings: Settings[Any], folder: Path) -> None:
    wanted = (cell.algo, cell.env, cell.preset, cell.seeds)
    if (found := (settings.algo, settings.env, settings.preset, settings.seeds)) != wanted:
        which = ", ".join(map(str, found))
        raise UserError(f"{folder} holds another run ({which}); restore it")


@contextlib.contextmanager
def unlocked(folder: Path, patience: float = 0.0) -> Iterator[bool]:
    """Yields whether no process writes in an existing folder, after waiting up to `patience` seconds."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that does not open folders
        yield True
        return
    try:
        lock(descriptor, folder, patience)
        free = True
    except UserError:
        free = False
    finally:
        os.close(descriptor)
    yield free


def failure(out: Path, cell: Cell) -> str:
    """The line of a cell that failed when it was last run; empty if it did not.

    Raises:
        UserError: the record cannot be read.
    """
    path = out / FAILURES / cell.name
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}; delete it") from error


def record_failure(out: Path, cell: Cell, line: str | None) -> None:
    """Keeps the line of a cell that failed; None of one that did not.

    A file for each cell, since processes on many machines write here, whose file system may have no locks.
    """
    path = out / FAILURES / cell.name
    if line is None:
        with writing(path):
            path.unlink(missing_ok=True)
    else:
        replace_file(path, lambda file: file.write(f"{line}\n".encode()))
