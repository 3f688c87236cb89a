"""Trains an offline RL algorithm on all seeds at once: `python experiments/run.py --seeds 4`."""

import contextlib
import dataclasses
import itertools
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from baselines import REGISTRY
from envs_mjx.registry import make, parse, resolve_engine
from experiments.cli import arguments
from experiments.cli.exit_status import exit_status
from experiments.cli.listing import listing
from experiments.cli.output import outlive_output
from experiments.cli.settings import Settings
from experiments.data import device_fit, locate, run_store
from experiments.launch import cost_estimate, saved_run, sweep
from experiments.launch.saved_run import CONFIG
from experiments.report import compare
from mac.atomic_files import remove_leftovers
from mac.data.normalize import fit
from mac.data.store import Store
from mac.data.window import make_held_out
from mac.errors import UserError, refusal
from mac.formatting import counted
from mac.machine import cores
from mac.run.io.checkpoint_compat import check_config
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_metadata import cpu_model, record_end, record_launch
from mac.run.io.run_outputs import CHECKPOINTS, Outputs
from mac.run.report.plot import plot_learning_curve
from mac.run.report.progress import open_progress
from mac.run.report.stats import learning_curve
from mac.run.report.table import print_tables, results_table
from mac.run.report.timing import duration
from mac.run.train import TrainJob, TrainResult, train
from mac.types import EnvSpec

PICTURE = "learning_curve.png"
LEFT = (PICTURE, EVAL, METRICS, CONFIG, CHECKPOINTS)
MAY_DIFFER = ("run.segment", "run.eval_every", "run.checkpoint_every", "run.keep")
MAY_DIFFER += ("eval.episodes", "eval.engine", "eval.batch")
MAY_DIFFER += ("data.path", "data.dir", "data.source", "data.mirror", "data.shards")


class Launch(NamedTuple):
    """One call of the program.

    Attributes:
        choice: where the dataset is, or how it will come to be there.
        known: its rows, and how they are stored.
        folder: of the run; where none was asked for, a free name, which `occupied` makes sure of.
        reached: updates done by the run that is continued; None without a checkpoint of it.
        finished: whether nothing is left to do.
    """

    settings: Settings[Any]
    engine: str
    env: Any
    algo: Any
    choice: locate.Choice
    known: run_store.Facts
    folder: Path
    reached: int | None
    finished: bool

    @property
    def title(self) -> str:
        """Title of the run, for tables, pictures and the progress display."""
        return f"{self.settings.algo} on {self.settings.env}"


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 1 diverged, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: show_list() if "--list" in argv else run(*arguments.parse(argv)),
        short_of_memory="take fewer --seeds, a smaller --hp.batch, or evaluate in parts with --eval.batch",
        interrupted="nothing half-written was left behind; a download goes on where it was",
    )


def show_list() -> int:
    """Prints what there is to train; returns the exit status."""
    print(listing())
    return 0


def run(settings: Settings[Any], reason: str) -> int:
    """Does what the settings say; returns the exit status."""
    launch = prepare(settings)
    if settings.dry_run or launch.finished:
        announce(launch, reason)
        if settings.dry_run:
            return 0
        remove_leftovers(launch.folder)  # of a process that was killed while it drew the picture
        return finish(launch, TrainResult(launch.reached or 0))
    outlive_output()
    with occupied(launch.folder, anew=settings.out is None) as folder:
        launch = launch._replace(folder=folder)
        announce(launch, reason)
        return finish(launch, train_here(launch, settings))


@contextlib.contextmanager
def occupied(folder: Path, *, anew: bool) -> Iterator[Path]:
    """Holds a run's folder for this process while entered, and makes it if it is missing.

    If it is still empty at the end, because the data could not be made, say, then it is deleted again, and
    so are the folders above it that were made for it.

    Args:
        anew: take the next free name instead, if there is such a folder: it is another launch's.
    Raises:
        UserError: it cannot be written, or another process holds it.
    """
    made = [each for each in folder.parents if not each.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            folder = _new(folder)
            made.insert(0, folder)
        elif not folder.exists():
            folder.mkdir(exist_ok=True)
            made.insert(0, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({refusal(error)}); choose another --out") from error
    run_store.check_writable(folder, "--out")
    with lock_folder(folder):
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                for each in made:
                    each.rmdir()


def _new(folder: Path) -> Path:
    """Makes `folder`, or, where that name is taken, one with a number after it."""
    for name in _names(folder):
        with contextlib.suppress(FileExistsError):
            name.mkdir()
            return name
    raise AssertionError


def _names(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))


def prepare(settings: Settings[Any]) -> Launch:
    """Finds out what there is to do; writes nothing.

    Raises:
        UserError: for a folder, dataset or environment that does not fit.
    """
    folder = settings.out or default_folder(settings)
    reached, finished = progress_of(settings, folder)
    engine = resolve_engine(settings.eval.engine)
    env = make(settings.env, engine)
    settings, choice = choose(settings, folder, env.spec, finished)
    algo = REGISTRY[settings.algo].algorithm(settings.hp, env.spec, settings.steps)
    known = run_store.facts(settings.data, choice.path, choice.rows)
    if not finished:
        settings = dataclasses.replace(settings, data=device_fit.resolve(settings.data, known, env.spec))
    return Launch(settings, engine, env, algo, choice, known, folder, reached, finished)


def choose(
    settings: Settings[Any], folder: Path, spec: EnvSpec, finished: bool
) -> tuple[Settings[Any], locate.Choice]:
    """Where the dataset is or comes from, and for a run that goes on the settings that lead there from here.

    Raises:
        UserError: it is nowhere.
    """
    if settings.resume and not finished:
        if found := saved_run.find_source(folder, settings, spec):
            return dataclasses.replace(settings, data=found[0]), locate.Choice(found[1], "local")
        if settings.data.path is not None:
            raise saved_run.missing_dataset(folder, settings)
    return settings, locate.choose(settings.data, settings.env)


def default_folder(settings: Settings[Any]) -> Path:
    """A new folder in runs/, named after what runs in it and when it started."""
    env = settings.env.replace("/", "-")  # Minari's names have slashes
    name = f"{settings.algo}_{env}_{settings.preset}_{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for path in _names(arguments.RUNS / name) if not path.exists())


def progress_of(settings: Settings[Any], folder: Path) -> tuple[int | None, bool]:
    """Updates done by the run in `folder` (None without a checkpoint), and whether that is all of them.

    Raises:
        UserError: there is a run and it is not to be resumed, or it has other settings.
    """
    if not settings.resume:
        if saved_run.is_run(folder):
            raise UserError(
                f"{folder} holds a run already; continue it with --resume, or choose another --out"
            )
        return None, False
    before = saved_run.read_config(folder)
    if settings.hp.cooldown > 0 and before.get("steps") != settings.steps:
        raise UserError(
            f"--steps={settings.steps}: the learning rate of {folder} cools down towards its end at "
            f"update {before.get('steps')}; keep --steps, or choose another --out"
        )
    check_config(folder, before, settings.to_dict(), may_differ(settings))
    with Outputs(folder, sweep.variants(settings), (), settings.run.keep) as outputs:
        reached = outputs.latest()
        return reached, reached is not None and settings.steps <= reached and outputs.evaluated(reached)


def may_differ(settings: Settings[Any]) -> tuple[str, ...]:
    """Keys of the settings that may change when a run is resumed."""
    # A learning rate that cools down is a function of the run's length.
    return MAY_DIFFER if settings.hp.cooldown > 0 else (*MAY_DIFFER, "steps")


def announce(launch: Launch, reason: str) -> None:
    """Says in a few lines what will happen, and what it will cost."""
    settings, spec = launch.settings, launch.env.spec
    known, choice = launch.known, launch.choice
    rows, held = device_fit.windows(settings.data, known)
    count = len(sweep.variants(settings))
    lanes = settings.seeds * count
    sizes = cost_estimate.make_plan(launch.algo, spec, rows, lanes, known.dtype, held)
    device = jax.devices()[0]
    where = f"{cpu_model()}, {counted(cores(), 'core')}" if device.platform == "cpu" else device.device_kind
    left = max(settings.steps - (launch.reached or 0), 0)
    evaluations = 0 if launch.finished else -(-left // settings.run.eval_every)
    episodes = lanes * settings.eval.episodes * len(spec.tasks)
    parts = {
        "data": cost_estimate.seconds_to_collect(round(1.1 * known.rows))
        if choice.how == "generate"
        else 0.0,
        "training": cost_estimate.seconds_to_train(sizes, left * lanes),
        "evaluation": cost_estimate.seconds_to_evaluate(evaluations, episodes, spec),
    }
    done = "" if launch.reached is None else f", {launch.reached:,} of them done"
    print(f"algorithm    {REGISTRY[settings.algo].title}")
    print(f"environment  {settings.env}, evaluated on engine {launch.engine}")
    print(f"preset       {settings.preset} ({reason})")
    print(f"device       {where}")
    each = f" of each of {count} configurations" if settings.sweep else ""
    print(f"seeds        {settings.seeds} ({settings.seed} to {settings.seed + settings.seeds - 1}){each}")
    print(f"updates      {settings.steps:,} of each seed{done}")
    print(f"data         {choice.path} ({device_fit.describe(settings.data, known)}{choice.describe()})")
    if note := cost_estimate.data_note(settings.preset, spec, known.rows, locate.larger(settings.env)):
        print(f"note         {note}")
    if choice.found:
        print(f"source       {run_store.provenance(choice.path).label}")
    print(f"results      {launch.folder}")
    print(f"time         {cost_estimate.describe_time(parts)}", flush=True)
    if settings.dry_run:
        print("\n".join(cost_estimate.describe(sizes, launch.algo, spec, rows)))
        print(cost_estimate.describe_evaluation(launch.env, episodes, settings.eval.batch))


def train_here(launch: Launch, asked: Settings[Any]) -> TrainResult:
    """Makes the data ready, trains, and keeps a record of it in the run's folder.

    Args:
        asked: the settings before anything was decided.
    """
    began = time.perf_counter()
    if not launch.choice.found:
        locate.obtain(launch.choice, asked.data, asked.env)
        # Now its rows can be counted, which decides how they are fed.
        launch = prepare(dataclasses.replace(asked, out=launch.folder))
    settings, folder, source = launch.settings, launch.folder, launch.choice.path
    with run_store.shown(f"converting {source.name}") as progress:
        store = run_store.open_store(settings.data, source, launch.env.spec, progress)
    job = make_job(launch, store)
    seconds = {"data": time.perf_counter() - began}
    notes: dict[str, None] = {}  # the runs of a sweep have most of them in common
    for each, its in sweep.folders(settings, folder):
        data = saved_run.record_of(store)
        notes |= dict.fromkeys(record_launch(each, its.to_dict(), data=data, resumed_from=launch.reached))
        saved_run.save_normalizer(each, job.normalizer)
    for note in notes:
        print(note)
    try:
        with open_progress(launch.title, job.steps, "updates", seeds=job.lanes) as progress:
            outcome = train(job, folder, progress, resume=settings.resume)
    except UserError as error:
        with contextlib.suppress(UserError):  # a full disk may be what went wrong
            for each, _ in sweep.folders(settings, folder):
                record_end(each, error=str(error))
        raise
    outcome.seconds = seconds | outcome.seconds
    spent = {name: round(value, 2) for name, value in outcome.seconds.items()}
    for each, _ in sweep.folders(settings, folder):
        record_end(each, step=outcome.step, signal=outcome.interrupted or None, seconds=spent)
    return outcome


def make_job(launch: Launch, store: Store) -> TrainJob:
    """Loads the data onto the device and gathers what training needs."""
    for note in store.notes:
        print(f"note: {note}")
    settings, env, algo = launch.settings, launch.env, launch.algo
    if launch.reached is None:
        normalizer, notes = fit(settings.data.normalize, store.statistics)
        for note in notes:
            print(f"note: {note}")
    else:  # what was trained so far goes on with the numbers that it has seen
        parts = [each for each, its in sweep.folders(settings, launch.folder) if not its.sweep]
        data = (launch.reached, store, launch.choice.path, env.spec)
        normalizer, *_ = [saved_run.resumed_normalizer(each, *data) for each in parts]
    task = parse(settings.env).task
    relabel = None if task is None else lambda obs: env.relabel(obs, task)
    return TrainJob(
        algo=algo,
        env=env,
        window=device_fit.make_source(settings.data, store, normalizer, algo.sample, relabel),
        normalizer=normalizer,
        seed=settings.seed,
        seeds=settings.seeds,
        steps=settings.steps,
        episodes=settings.eval.episodes,
        run=settings.run,
        engine=launch.engine,
        config=settings.to_dict(),
        may_differ=may_differ(settings),
        batch=settings.eval.batch,
        held_out=make_held_out(store, normalizer, algo.sample.chunk, every_row=algo.sample.every_row),
        data=store.provenance.label,
        kept={"data": saved_run.record_of(store), "normalizer": saved_run.plain_normalizer(normalizer)},
        sweep=sweep.variants(settings),
    )


def finish(launch: Launch, outcome: TrainResult) -> int:
    """Prints the table and the paths, and draws the picture; returns the exit status."""
    folder = launch.folder
    if outcome.interrupted:
        print(f"stopped at update {outcome.step:,}; a checkpoint is written. Continue with:")
        print(f"  {again(folder)}")
        return 128 + outcome.interrupted
    parts = [each for each, its in sweep.folders(launch.settings, folder) if not its.sweep]
    rows = {each: list(read_rows(each / EVAL)) for each in parts}
    curves = {each: learning_curve(rows[each], str(each / EVAL)) for each in parts}
    if not launch.settings.sweep:  # shown first, since a full disk refuses the picture
        print_tables(results_table(curves[folder], title=launch.title))
    for each in parts:
        plot_learning_curve(rows[each], each / PICTURE, title=launch.title)
    if launch.settings.sweep:
        compare(parts, folder / PICTURE)
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in outcome.seconds.items())
    print(f"finished at update {outcome.step:,}" + (f" ({spent})" if spent else ": nothing was left to do"))
    if (waited := outcome.seconds.get("wait")) is not None:
        share = waited / (waited + outcome.seconds.get("train", 0.0) or 1.0)
        print(f"waited for data {duration(waited)}, {share:.1%} of the training time")
    for path in (*parts, folder / PICTURE) if launch.settings.sweep else (folder / name for name in LEFT):
        print(f"  {path}")
    return 0


def again(folder: Path) -> str:
    """The command that continues the run in `folder`, to be called from the same place as this one."""
    called = os.path.basename(sys.argv[0]) == "run.py"
    program = ["python", sys.argv[0]] if called else arguments.PROGRAM.split()
    return shlex.join([*program, "--out", str(folder), "--resume"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
