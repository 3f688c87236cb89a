"""Trains an offline RL algorithm on all seeds at once: `python experiments/run.py --seeds 4`."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.launch import dataset, loggers, process_group, saved_run, slurm, sweep
from experiments.launch.announce import announce
from experiments.launch.job import Launch, folder_notes, make_job, occupied, prepare_launch
from experiments.launch.listing import algorithm_list
from experiments.launch.settings import CONFIG, PROGRAM, Settings, is_run, parse_command_line
from experiments.report import compare_runs
from mac.atomic_files import remove_leftovers, write_json
from mac.errors import UserError
from mac.run import hosts
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_metadata import record_end, record_launch
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.report.plot import plot_learning_curve
from mac.run.report.progress import Progress, open_progress
from mac.run.report.stats import learning_curve
from mac.run.report.table import (
    NOT_EVALUATED,
    diagnostics_tables,
    last_diagnostics,
    print_tables,
    results_table,
)
from mac.run.report.timing import duration
from mac.run.train import TrainResult, train

PICTURE = "learning_curve.png"
JOBS = "jobs"
LEFT = (PICTURE, EVAL, METRICS, CONFIG, CHECKPOINTS)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 1 diverged, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: show_list() if "--list" in argv else run(*parse_command_line(argv)),
        short_of_memory="take fewer --seeds, a smaller --hp.batch, or evaluate in parts with --eval.batch",
        interrupted="nothing half-written was left behind; a download goes on where it was",
    )


def show_list() -> int:
    """Prints what there is to train; returns the exit status."""
    print(algorithm_list())
    return 0


def run(settings: Settings[Any], reason: str) -> int:
    """Does what the settings say; returns the exit status."""
    loggers.require_installed(settings.trackers)
    launch = prepare_launch(settings)
    if hosts.is_first():
        for note in folder_notes(settings, launch.folder):
            print(note)
    if settings.jobs and not settings.dry_run:
        return submit(launch, settings, reason)
    if settings.dry_run or launch.finished:
        if not hosts.is_first():
            return 0
        announce(launch, reason)
        if settings.dry_run:
            return 0
        remove_leftovers(launch.folder)  # of a process that was killed while it drew the picture
        return finish(launch, TrainResult(launch.reached or 0))
    ignore_write_errors()
    with process_group.held(launch, settings) as launch:
        if hosts.is_first():
            announce(launch, reason)
        outcome = train_here(launch, settings)
        return finish(launch, outcome) if hosts.is_first() else outcome.status


def submit(launch: Launch, asked: Settings[Any], reason: str) -> int:
    """Submits the run to a cluster; returns the exit status.

    Its settings are written into its folder, and the job continues a run that may have done nothing yet.
    """
    if launch.finished:
        print(f"{launch.folder}: nothing is left to do")
        return 0
    with occupied(launch.folder, anew=asked.out is None) as folder:
        config, logs = folder / CONFIG, folder / JOBS
        before = config.read_bytes() if is_run(folder) else None
        write_json(config, dataclasses.replace(asked, env=launch.settings.env).to_dict())
        words = ["--out", str(folder.absolute()), "--resume"]
        try:
            task = slurm.RunTask(folder.absolute(), words, logs.absolute() / "run.log")
            (number,) = slurm.submit([task], folder.name, asked.job, logs)
        except UserError:
            if before is None:
                config.unlink(missing_ok=True)
                shutil.rmtree(logs, ignore_errors=True)
            else:
                config.write_bytes(before)
            raise
    print(f"run       {launch.title}, preset {asked.preset} ({reason})")
    print(
        f"job       {number}, {duration(60.0 * asked.job.minutes)}; a longer run queues again, and continues"
    )
    print(f"results   {folder}")
    print(f"logs      {logs}/")
    print(f"state     squeue --job {number}\ncancel    scancel {number}")
    return 0


def train_here(launch: Launch, asked: Settings[Any]) -> TrainResult:
    """Makes the data ready, trains, and keeps a record of it in the run's folder.

    Args:
        asked: the settings before anything was decided.
    """
    began = time.perf_counter()
    if not launch.choice.found:
        dataset.obtain(launch.choice, asked.data, launch.task_id)
        # Now its rows can be counted, which decides how they are fed.
        launch = prepare_launch(dataclasses.replace(asked, out=launch.folder))
    launch = process_group.with_data_of_first(launch)
    settings, folder, source = launch.settings, launch.folder, launch.choice.path
    with dataset.shown(f"converting {source.name}") as progress:
        store = dataset.open_store(settings.data, source, launch.env.spec, progress)
    job = make_job(launch, store)
    process_group.check_agreement(launch, store)
    seconds = {"data": time.perf_counter() - began}
    notes: dict[str, None] = {}  # the runs of a sweep have most of them in common
    records = list(sweep.run_folders(settings, folder)) if hosts.is_first() else []
    for each, its in records:
        data = saved_run.record_of(store)
        numerics = launch.algo.numerics.resolved()._asdict()
        recorded = record_launch(
            each, its.to_dict(), data=data, resumed_from=launch.reached, numerics=numerics
        )
        notes |= dict.fromkeys(recorded)
        saved_run.save_normalizer(each, job.normalizer)
    for note in notes:
        print(note)
    try:
        with (
            open_progress(launch.title, job.steps, "updates", seeds=job.lanes) as progress,
            tracked(settings, folder, progress),
        ):
            outcome = train(job, folder, progress, resume=settings.resume)
    except UserError as error:
        with contextlib.suppress(UserError):  # a full disk may be what went wrong
            for each, _ in records:
                record_end(each, error=str(error))
        raise
    outcome.seconds = seconds | outcome.seconds
    spent = {name: round(value, 2) for name, value in outcome.seconds.items()}
    for each, _ in records:
        record_end(each, step=outcome.step, signal=outcome.interrupted or None, seconds=spent)
    return outcome


@contextlib.contextmanager
def tracked(settings: Settings[Any], folder: Path, progress: Progress) -> Iterator[None]:
    """Feeds the trackers that `--log` names while entered, with each run of a sweep by itself."""
    if not hosts.is_first():
        yield
        return
    parts = [each for each, its in sweep.run_folders(settings, folder) if not its.sweep]
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(loggers.RunTrackers(each, settings.trackers, progress.note)) for each in parts
        ]
        for tracker, place in loggers.places(runs, folder):
            progress.note(f"{tracker:12s} {place}")

        def catch_up() -> None:
            for run in runs:
                run.catch_up()

        progress.listener = catch_up
        try:
            yield
        finally:
            with contextlib.suppress(UserError):  # what ended the training says more
                catch_up()


def finish(launch: Launch, outcome: TrainResult) -> int:
    """Prints the table and the paths, and draws the picture; returns the exit status."""
    folder = launch.folder
    if outcome.interrupted:
        print(f"stopped at update {outcome.step:,}; a checkpoint is written. Continue with:")
        print(f"  {again(folder)}")
        return outcome.status
    parts = [each for each, its in sweep.run_folders(launch.settings, folder) if not its.sweep]
    if not launch.env.spec.tasks:
        return finish_without_environment(launch, parts, outcome)
    rows = {each: list(read_rows(each / EVAL)) for each in parts}
    curves = {each: learning_curve(rows[each], str(each / EVAL)) for each in parts}
    if not launch.settings.sweep:  # shown first, since a full disk refuses the picture
        print_tables(results_table(curves[folder], title=launch.title))
    for each in parts:
        plot_learning_curve(rows[each], each / PICTURE, title=launch.title)
    if launch.settings.sweep:
        compare_runs(parts, folder / PICTURE)
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in outcome.seconds.items())
    print(f"finished at update {outcome.step:,}" + (f" ({spent})" if spent else ": nothing was left to do"))
    if (waited := outcome.seconds.get("wait")) is not None:
        share = waited / (waited + outcome.seconds.get("train", 0.0) or 1.0)
        print(f"waited for data {duration(waited)}, {share:.1%} of the training time")
    for path in (*parts, folder / PICTURE) if launch.settings.sweep else (folder / name for name in LEFT):
        print(f"  {path}")
    return 0


def finish_without_environment(launch: Launch, parts: Sequence[Path], outcome: TrainResult) -> int:
    """Prints the diagnostics of a run on data alone; returns the exit status."""
    names = [each.name if launch.settings.sweep else "mean (seeds)" for each in parts]
    found = [last_diagnostics(read_rows(each / METRICS)) for each in parts]
    named = dict(zip(names, found, strict=True))
    print_tables(*diagnostics_tables(named, title=launch.title, caption=NOT_EVALUATED))
    print(f"finished at update {outcome.step:,}")
    for path in (folder / name for folder in parts for name in (METRICS, CONFIG, CHECKPOINTS)):
        print(f"  {path}")
    return 0


def again(folder: Path) -> str:
    """The command that continues the run in `folder`, to be called from the same place as this one."""
    called = os.path.basename(sys.argv[0]) == "run.py"
    program = ["python", sys.argv[0]] if called else PROGRAM.split()
    return shlex.join([*program, "--out", str(folder), "--resume"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
