"""Compares runs: `python experiments/report.py RUN RUN ...` prints a table; may also write and plot it."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from experiments.benchmarks.harness import write_csv
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.launch.loggers import RunTrackers, Tracker, require_installed
from experiments.launch.saved_run import EVALUATIONS, RANDOM
from experiments.launch.settings import Settings, is_run, read_settings, runs_within
from mac.atomic_files import misfit
from mac.errors import UserError
from mac.formatting import counted
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_metadata import launches
from mac.run.report.plot import plot_comparison
from mac.run.report.stats import Curve, check_rows, learning_curve, summarise
from mac.run.report.table import (
    DIAGNOSTICS,
    NOT_EVALUATED,
    comparison_table,
    diagnostics_tables,
    last_diagnostics,
    print_tables,
)

PROGRAM = "python experiments/report.py"


@dataclass(frozen=True)
class Args:
    """Compares runs: a table of their last evaluations, with 95% intervals over seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folders of runs; a sweep or a folder such as runs/ stands for all runs in it"""
    out: Path | None = None
    """CSV file to write: a row per run, and a row per task if there are several"""
    picture: Path | None = None
    """PNG file to write, with the learning curves"""
    pool: bool = False
    """runs of the same data and settings, with other seeds, are one run with all their seeds"""
    diagnostics: bool = False
    """also the last diagnostics of each run: as a table, and as rows of --out"""
    log: tuple[Tracker, ...] = ()
    """experiment trackers to send all rows of each run to, as `run.py --log` does while it trains"""


@dataclass(frozen=True)
class Row:
    """Row of the CSV file; `task` is `all` for the mean over tasks, `low` to `high` the 95% interval.

    `measure` is that of the evaluations, or the name of a metric, `diagnostics/...`.
    """

    algo: str
    env: str
    preset: str
    task: str
    measure: str
    value: float
    low: float
    high: float
    seeds: int
    episodes: int
    updates: int
    hp: str
    data: str


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: report(read_flags(Args, argv, PROGRAM), argv),
        short_of_memory="name fewer runs",
        interrupted="nothing was written",
    )


def report(args: Args, argv: Sequence[str]) -> int:
    """Compares the runs that the flags name; returns the exit status."""
    if not args.runs:
        raise UserError("RUN is missing; name folders of runs, or one that holds runs")
    trackers = tuple(name for name in args.log if name != "none")
    require_installed(trackers)
    if alone := [run for run in args.runs if is_run(run) and not read_settings(run).has_environment]:
        files = {run.name: run / METRICS for run in alone if (run / METRICS).exists()}
        metrics = {name: last_diagnostics(read_rows(path)) for name, path in files.items()}
        print_tables(*diagnostics_tables(metrics, title="runs on data alone", caption=NOT_EVALUATED))
    evaluated = [run for run in args.runs if run not in alone]
    if evaluated:
        alone += compare_evaluated(evaluated, args, argv)
    elif args.out or args.picture:
        name = "--out" if args.out else "--picture"
        raise UserError(f"{name}: runs on data alone have no evaluations to write; leave it out")
    for run in alone if trackers else ():
        send(run, trackers)
    return 0


def compare_evaluated(folders: Sequence[Path], args: Args, argv: Sequence[str]) -> list[Path]:
    """Compares runs with evaluations, and writes what the flags ask for; returns the runs' folders."""
    by_path = {run.resolve(): run for folder in folders for run in runs_in(folder)}  # without repeats
    compared = compare_runs(list(by_path.values()), args.picture, pool=args.pool)
    found = compared.diagnostics() if args.diagnostics else {}
    if found:
        print_tables(*diagnostics_tables(found, title="diagnostics at the end, mean and range over seeds"))
    for note in compared.notes(found):
        print(note)
    if args.out:
        rows: list[Row] = []
        for name, run, curve in zip(compared.names, compared.settings, compared.curves, strict=True):
            described = run.algo, run.env, run.preset, hyperparameters(run)
            rows += table_rows(curve, *described)
            rows += diagnostics_rows(found.get(name, {}), curve, *described)
        for env, curve in compared.random.items():
            rows += table_rows(curve, RANDOM, env)
        write_csv(args.out, rows, ["experiments/report.py", *argv])
        print(f"  {args.out}")
    if args.picture:
        print(f"  {args.picture}")
    return list(by_path.values())


def send(folder: Path, trackers: Sequence[str]) -> None:
    """Sends all rows of a run to experiment trackers, in place of what they have of it.

    Raises:
        UserError: it is being trained, its rows are damaged, or a tracker cannot be opened.
    """
    with lock_folder(folder), RunTrackers(folder, trackers) as run:
        run.catch_up()
        for tracker, place in run.places.items():
            print(f"{tracker:12s} {counted(run.sent, 'record')} of {folder}; {place}")


class ComparedRuns(NamedTuple):
    """Runs that are compared.

    Attributes:
        names: distinct, one for each run, as are the next three.
        folders: of each run, or of all the runs that it is pooled from.
        settings: of each run; of a pooled one those of its first part.
        curves: learning curves.
        random: random actions by environment (`random_curves`).
    """

    names: list[str]
    folders: list[list[Path]]
    settings: list[Settings[Any]]
    curves: list[Curve]
    random: dict[str, Curve]

    def diagnostics(self) -> dict[str, dict[str, np.ndarray]]:
        """The diagnostics of each run's last evaluation, by its name; of each seed, [S]."""
        found = {}
        for name, group, curve in zip(self.names, self.folders, self.curves, strict=True):
            files = (run / METRICS for run in group if (run / METRICS).exists())
            rows = (row for path in files for row in read_rows(path))
            found[name] = last_diagnostics(rows, curve.steps[-1])
        return found

    def notes(self, diagnostics: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[str]:
        """Lines on what is left out, since not all parts of a pooled run, or not all seeds, have it."""
        for name, group, curve in zip(self.names, self.folders, self.curves, strict=True):
            for run in group if len(group) > 1 else ():
                if (last := curve_of([run]).steps[-1]) > curve.steps[-1]:
                    yield (
                        f"note: {name}: compared after {curve.steps[-1]:,} updates, where all its runs were "
                        f"evaluated; {run} was after {last:,}"
                    )
            found, seeds = diagnostics.get(name, {}), len(curve.seeds)
            if few := [each for each, values in found.items() if len(values) < seeds]:
                yield f"note: {name}: not all of its {seeds} seeds have {', '.join(few)}"


def compare_runs(folders: Sequence[Path], picture: Path | None, *, pool: bool = False) -> ComparedRuns:
    """Prints the table of some runs, plots their learning curves, and returns the data.

    Random actions are included if `evaluate.py --policy random` was called on one of the runs.

    Args:
        pool: runs that differ in their seeds alone are one.
    Raises:
        UserError: a folder holds no run, or one that was never evaluated, or pooled runs share a seed.
    """
    settings = {folder: read_settings(folder) for folder in folders}
    groups = pooled(settings) if pool else [[folder] for folder in folders]
    curves = [curve_of(group) for group in groups]
    labels = [curve.data for curve in curves]
    names = names_of({group[0]: settings[group[0]] for group in groups}, labels)
    named = dict(zip(names, curves, strict=True))
    random, envs = random_curves(settings), dict.fromkeys(run.env for run in settings.values())
    for env, curve in random.items():
        named[f"random actions on {env}" if len(envs) > 1 else "random actions"] = curve
    title = ", ".join(envs)
    print_tables(comparison_table(named, title=title))
    if picture:
        plot_comparison(named, picture, title=title)
    return ComparedRuns(names, groups, [settings[group[0]] for group in groups], curves, random)


_OF_EACH_RUN = {
    "": ("seed", "seeds", "log"),
    "run": ("segment", "checkpoint_every", "keep", "batch_devices"),
    "eval": ("batch",),
    "data": ("path", "dir", "source", "mirror", "shards"),  # the data themselves are compared
}
"""Settings, by table, in which runs that are pooled may differ, since no result depends on them."""


def shared_settings(run: Settings[Any]) -> dict[str, Any]:
    """Returns the settings that runs which are pooled have in common."""
    every = run.to_dict()
    for table, names in _OF_EACH_RUN.items():
        for name in names:
            (every[table] if table else every).pop(name)
    return every


def data_of(folder: Path) -> Any:
    """Returns the checksums of the data of a run, as its record has them; None where there is none."""
    every = launches(folder)
    return every[-1].get("data", {}).get("content") if every else None


def pooled(settings: Mapping[Path, Settings[Any]]) -> list[list[Path]]:
    """Groups runs of the same data that differ in their seeds alone, each group in the place of its first.

    Raises:
        UserError: two runs of a group have a seed in common.
    """
    groups: dict[str, dict[int, Path]] = {}
    for folder, run in settings.items():
        key = json.dumps([shared_settings(run), data_of(folder)], sort_keys=True)
        by_seed = groups.setdefault(key, {})
        for seed in range(run.seed, run.seed + run.seeds):
            if seed in by_seed:
                raise UserError(f"--pool: {by_seed[seed]} and {folder} both have seed {seed}; leave one out")
            by_seed[seed] = folder
    return [list(dict.fromkeys(by_seed.values())) for by_seed in groups.values()]


def runs_in(folder: Path) -> Iterator[Path]:
    """Yields `folder`, if it is a run, or the runs in it.

    Raises:
        UserError: there is no run.
    """
    inside = [run for run in runs_within(folder) if (run / EVAL).exists() and (run / EVAL).stat().st_size]
    if is_run(folder) and not inside:
        yield folder
        return
    if not inside:
        raise UserError(f"{folder} is no run and holds none that was evaluated; name folders of runs")
    yield from inside


def curve_of(folders: Sequence[Path]) -> Curve:
    """Returns the learning curve of a run, or of the seeds of several together.

    Raises:
        UserError: a run was never evaluated, or they were never evaluated after the same update.
    """
    rows = list[Mapping[str, Any]]()
    for folder in folders:
        if not (folder / EVAL).exists():
            raise UserError(f"{folder} has no {EVAL}; train it until the first evaluation")
        found = list(read_rows(folder / EVAL))
        check_rows(found, str(folder / EVAL))
        rows += found
    return learning_curve(rows, " with ".join(str(folder / EVAL) for folder in folders))


def names_of(settings: Mapping[Path, Settings[Any]], data: Sequence[str] = ()) -> list[str]:
    """Returns distinct names: algorithm, noise, and the environment, hyperparameters and data that differ.

    Args:
        data: a label of the data of each run; names have of it what tells apart runs of equal settings.
    """
    every = list(settings.values())
    several = len({run.env for run in every}) > 1
    kinds = [f"{run.algo} on {run.env}" if several else run.algo for run in every]
    kinds = [" ".join([kind, *noise_of(run)]) for kind, run in zip(kinds, every, strict=True)]
    names = []
    for kind, run in zip(kinds, every, strict=True):
        alike = [other.hp for other, name in zip(every, kinds, strict=True) if name == kind]
        known = [field.name for field in dataclasses.fields(run.hp)]
        differing = [name for name in known if len({getattr(hp, name) for hp in alike}) > 1]
        names.append(" ".join([kind, *(f"{name}={getattr(run.hp, name)}" for name in differing)]))
    names = told_apart(names, [re.split(r" \(|\)|, ", label) for label in data] or [[]] * len(names))
    names = told_apart(names, [[f"({folder.name})"] for folder in settings])
    return told_apart(names, [[f"({folder})"] for folder in settings])


def told_apart(names: Sequence[str], words: Sequence[Sequence[str]]) -> list[str]:
    """Adds to names that several things share those of each thing's words that not all of them have."""
    longer = []
    for name, own in zip(names, words, strict=True):
        alike = [other for each, other in zip(names, words, strict=True) if each == name]
        longer.append(" ".join([name, *(word for word in own if not all(word in other for other in alike))]))
    return longer


def noise_of(settings: Settings[Any]) -> list[str]:
    """Returns the noise on the actions of a run's evaluations as text; nothing without."""
    return [f"eval.noise={settings.eval.noise:g}"] if settings.eval.noise else []


def hyperparameters(settings: Settings[Any]) -> str:
    """Returns the hyperparameters that are not the defaults of their class, and the noise, as text."""
    defaults = type(settings.hp)()
    pairs = ((f.name, getattr(settings.hp, f.name)) for f in dataclasses.fields(defaults))
    changed = [f"{name}={json.dumps(value)}" for name, value in pairs if value != getattr(defaults, name)]
    return " ".join([*changed, *noise_of(settings)])


def random_curves(settings: Mapping[Path, Settings[Any]]) -> dict[str, Curve]:
    """Returns the latest results of random actions by environment, from evaluations of the runs."""
    found = {}
    for folder, run in settings.items():
        path = folder / EVALUATIONS
        for line in read_rows(path) if path.exists() else ():
            if line.get("policy") == RANDOM:
                found[run.env] = learning_curve(rows_within(line, path), str(path))
    return found


def rows_within(line: Mapping[str, Any], path: Path) -> list[Any]:
    """Returns the rows of a line of `evaluations.jsonl`.

    Raises:
        UserError: the line has no valid rows.
    """
    fault = misfit(line, rows=list) or next(filter(None, map(misfit, line["rows"])), None)
    if fault:
        raise UserError(f"{path}: a line holds no evaluation ({fault}); restore it or delete the line")
    return line["rows"]


def table_rows(curve: Curve, algo: str, env: str, preset: str = "", hp: str = "") -> Iterator[Row]:
    """Yields the rows of a run: all tasks together, and each task if there are several."""
    columns = {"all": slice(None)}
    if len(curve.tasks) > 1:
        columns |= {str(task): slice(i, i + 1) for i, task in enumerate(curve.tasks)}
    for task, which in columns.items():
        yield _row(curve, curve.last()[:, which], task, curve.measure.name, algo, env, preset, hp)


def diagnostics_rows(
    found: Mapping[str, np.ndarray], curve: Curve, algo: str, env: str, preset: str, hp: str
) -> Iterator[Row]:
    """Yields a row for each diagnostic of a run, whose values of each seed are given."""
    for name, values in found.items():
        yield _row(curve, values[:, None], "all", DIAGNOSTICS + name, algo, env, preset, hp)


def _row(
    curve: Curve, scores: np.ndarray, task: str, measure: str, algo: str, env: str, preset: str, hp: str
) -> Row:
    """The row of scores [S, tasks] of the last evaluation, or of one of its diagnostics."""
    mean = summarise(scores).mean
    return Row(
        algo=algo,
        env=env,
        preset=preset,
        task=task,
        measure=measure,
        value=mean.value,
        low=mean.low,
        high=mean.high,
        seeds=len(scores),
        episodes=curve.episodes,
        updates=curve.steps[-1],
        hp=hp,
        data=curve.data,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
