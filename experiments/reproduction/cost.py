"""Estimates of the time that cells take here: from cells that have run, else from counted operations."""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from envs_mjx.registry import make, parse
from experiments.cli.arguments import cache_folder, read_flags
from experiments.launch import dataset
from experiments.launch.cost_estimate import (
    TRAIN_SHARE,
    make_plan,
    product_rate,
    seconds_to_collect,
    seconds_to_evaluate,
)
from experiments.launch.saved_run import build_algorithm
from experiments.model_error import Args as StudyArgs
from experiments.reproduction.cells import Cell, Plan, Progress, cell_settings
from mac.algorithm import AbstractAlgorithm
from mac.atomic_files import load_json, write_json
from mac.errors import UserError
from mac.run.cost.flops import sum_operations
from mac.run.io.run_metadata import launches
from mac.types import EnvSpec

COMPILING = 60.0
"""Seconds to start a program and compile an update of the paper's size on a CPU."""
MEASURING = 5.0
"""Seconds for which `benchmark.py times` times updates, if they are short."""


class Cost(NamedTuple):
    """Seconds that a cell takes to its end, compiling left out.

    Attributes:
        measured: scaled from a finished or cut cell of the same algorithm, family of environments and preset.
    """

    seconds: float
    measured: bool


NOTE = (
    "estimates: operations of an update, counted once for each algorithm, by the rate of matmuls measured on "
    "this machine's processor; evaluations to the time limit; compiling left out. *: from the time of a cell "
    "that has run"
)


class Estimator:
    """Estimates cells of one command line. What it traces or measures it keeps.

    Args:
    """

    def __init__(self, plan: Plan):
        """Measures nothing yet."""
        self._plan, self._counts = plan, OperationCounts()
        self._measured: dict[tuple[str, str], float] = {}
        self._rate = functools.cache(product_rate)

    @property
    def has_counts(self) -> bool:
        """Whether operations were counted before."""
        return self._counts.kept

    def learn(self, cell: Cell, progress: Progress) -> None:
        """Takes the seconds per update of a finished cell, or of one that was cut; evaluations included."""
        if progress.status not in ("done", "cut") or not progress.reached:
            return
        spent = 0.0
        with contextlib.suppress(UserError):  # a record that is damaged tells no time
            spent = seconds_spent(self._plan.folder(cell))
        if spent:
            each = spent / progress.reached
            if progress.status == "done":
                self._measured[_kind(cell)] = each
            else:
                self._measured.setdefault(_kind(cell), each)

    def cost(self, cell: Cell, progress: Progress) -> Cost:
        """Estimates what is left of a cell that can be run."""
        left = max(progress.steps - progress.reached, 0)
        if (each := self._measured.get(_kind(cell))) is not None:
            return Cost(left * each, True)
        settings = cell_settings(cell, self._plan.data_dir)
        spec = make(settings.task_id).spec
        train = left * cell.seeds * self.seconds_of_update(cell)
        episodes = cell.seeds * settings.eval.episodes * len(spec.tasks)
        evaluations = -(-left // settings.run.eval_every)
        return Cost(train + seconds_to_evaluate(evaluations, episodes, spec), False)

    def seconds_of_update(self, cell: Cell) -> float:
        """Estimates one update of one seed."""
        settings = cell_settings(cell, self._plan.data_dir)
        name = f"{cell.algo} {cell.preset} {settings.task_id.goals} {' '.join(cell.flags)}"

        def count() -> float:
            spec = make(settings.task_id).spec
            return matmuls_of_update(build_algorithm(settings, spec), spec, settings.data.rows)

        return self._counts.get(name, count) / (TRAIN_SHARE * self._rate())

    def seconds_to_measure(self, cell: Cell) -> float:
        """Estimates a measurement of times: compiling, and a few calls of at least one update each."""
        return COMPILING + 4 * max(MEASURING / 3, self.seconds_of_update(cell))

    def seconds_of_study(self, cell: Cell) -> float:
        """Estimates the training of dynamics models of one chunk length."""
        args = read_flags(StudyArgs, ["--env", parse(cell.env).dataset, *cell.flags], "", StudyArgs())
        spec = make(cell.env).spec

        def count() -> float:
            return matmuls_of_update(args.algorithm(spec, args.chunks[0]), spec, args.data.rows)

        each = self._counts.get(f"model_error {cell.env} {' '.join(cell.flags)}", count)
        return COMPILING + args.steps * cell.seeds * each / (TRAIN_SHARE * self._rate())


def matmuls_of_update(algo: AbstractAlgorithm, spec: EnvSpec, rows: int) -> float:
    """Operations in the matmuls of an update of one seed."""
    return sum_operations(make_plan(algo, spec, rows, 1).parts).matmuls


class OperationCounts:
    """Counts of operations, kept from one program to the next until the source changes.

    Counting traces a whole update, which takes seconds. The file may be deleted at any time.
    """

    def __init__(self):
        """Reads what earlier programs counted with the same source and version of JAX."""
        self._file, self._found = cache_folder() / "operations.json", dict[str, float]()
        self._version = f"{source_digest()} jax {jax.__version__}"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = load_json(self._file)
            if kept["version"] == self._version:
                self._found = {str(name): float(count) for name, count in kept["counts"].items()}

    @property
    def kept(self) -> bool:
        """Whether there are any."""
        return bool(self._found)

    def get(self, name: str, count: Callable[[], float]) -> float:
        """The count of that name, which `count` finds where it is not kept."""
        if name not in self._found:
            self._found[name] = count()
            with contextlib.suppress(OSError, UserError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._file, {"version": self._version, "counts": self._found})
        return self._found[name]


@functools.cache
def source_digest() -> str:
    """A digest of the project's source and hyperparameters."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for folder in ("mac", "baselines", "envs_mjx", "experiments"):
        for path in sorted([*(root / folder).rglob("*.py"), *(root / folder).glob("*.toml")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _kind(cell: Cell) -> tuple[str, str]:
    """What cells have in common that take about as long as each other."""
    return f"{cell.algo} {cell.preset} {cell.seeds} {cell.flags}", parse(cell.env).family


def seconds_spent(folder: Path) -> float:
    """Seconds of training and evaluation of all launches of a run that ended in order."""
    spent = 0.0
    for launch in launches(folder):
        parts = launch.get("seconds")
        known = parts.values() if isinstance(parts, dict) else ()
        spent += sum(part for part in known if isinstance(part, int | float))
    return spent


def datasets_to_make(cells: list[Cell], plan: Plan) -> dict[str, str]:
    """How each dataset will come to be that is not found here, in a few words."""
    found: dict[str, str] = {}
    for cell in cells:
        settings = cell_settings(cell, plan.data_dir)
        name = settings.task_id.dataset
        if name in found:
            continue
        try:
            choice = dataset.choose_source(settings.data, settings.task_id)
        except UserError as error:
            found[name] = str(error)
            continue
        if choice.how == "generate":
            minutes = seconds_to_collect(round(1.1 * (choice.rows or 0))) / 60
            found[name] = f"generated in about {minutes:.0f} min"
        elif not choice.found:
            found[name] = choice.describe().removeprefix("; ")
    return found
