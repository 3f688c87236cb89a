"""The job of one call of `run.py`: what its settings come to, checked before anything is written.

`prepare_launch` finds the dataset, the environment, the algorithm, and what a resumed run has done already.
`make_job` loads the data onto the device and gathers what `mac.run.train` needs.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from envs_mjx.action_noise import with_action_noise
from envs_mjx.base import AbstractEnv
from envs_mjx.registry import TaskId, make, resolve_engine
from experiments.launch import dataset, saved_run, sweep
from experiments.launch.device_estimate import card_memory
from experiments.launch.settings import CONFIG, RUNS, Settings, is_run, read_config
from mac.algorithm import AbstractAlgorithm
from mac.atomic_files import visible
from mac.data.normalize import fit_normalizer
from mac.data.store import Store
from mac.data.window import make_held_out
from mac.errors import UserError, refusal
from mac.run.io.checkpoint_compat import assumed_defaults, check_config
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL, METRICS
from mac.run.io.run_outputs import CHECKPOINTS, Outputs
from mac.run.train import TrainJob
from mac.types import EnvSpec

MAY_DIFFER = ("log", "run.segment", "run.eval_every", "run.checkpoint_every", "run.keep")
MAY_DIFFER += ("run.precision", "run.kernels", "run.batch_devices")
MAY_DIFFER += ("eval.episodes", "eval.engine", "eval.batch")
MAY_DIFFER += ("data.path", "data.dir", "data.source", "data.mirror", "data.shards")


class Launch(NamedTuple):
    """One call of the program.

    Attributes:
        task_id: the environment, parsed.
        choice: where the dataset is, or how it will come to be there.
        known: its rows, and how they are stored.
        folder: of the run; where none was asked for, a free name, which `occupied` makes sure of.
        reached: updates done by the run that is continued; None without a checkpoint of it.
        finished: whether nothing is left to do.
    """

    settings: Settings[Any]
    task_id: TaskId
    engine: str
    env: AbstractEnv
    algo: AbstractAlgorithm
    choice: dataset.DatasetChoice
    known: dataset.DatasetFacts
    folder: Path
    reached: int | None
    finished: bool

    @property
    def title(self) -> str:
        """Title of the run, for tables, pictures and the progress display."""
        return f"{self.settings.algo} on {self.settings.env}"


def prepare_launch(settings: Settings[Any]) -> Launch:
    """Finds out what there is to do; writes nothing.

    Raises:
        UserError: for a folder, dataset or environment that does not fit.
    """
    settings = with_env_of_data(settings)
    folder = settings.out or default_run_folder(settings)
    reached, finished = progress_of(settings, folder)
    task_id, engine = settings.task_id, choose_engine(settings)
    env = with_action_noise(make(task_id, engine), settings.eval.noise)
    settings, choice = choose_dataset(settings, task_id, folder, env.spec, finished)
    algo = saved_run.build_algorithm(settings, env.spec)
    for _, each in sweep.run_folders(settings, folder) if settings.sweep else ():
        each.hp.check_env(env.spec)
    known = dataset.dataset_facts(settings.data, choice.path, choice.rows)
    if not finished:
        free = card_memory(settings.device) if settings.device else None
        settings = dataclasses.replace(
            settings, data=dataset.fit_device(settings.data, known, env.spec, free)
        )
    return Launch(settings, task_id, engine, env, algo, choice, known, folder, reached, finished)


def with_env_of_data(settings: Settings[Any]) -> Settings[Any]:
    """The settings with the widths of the file in the name of data without an environment."""
    return dataclasses.replace(settings, env=dataset.env_of_data(settings.env, settings.data.path))


def choose_engine(settings: Settings[Any]) -> str:
    """Returns the physics engine; on a card that is not there, `auto` is `mjx`, which compiles for it."""
    if settings.device and settings.eval.engine == "auto":
        return "mjx"
    return resolve_engine(settings.eval.engine)


def choose_dataset(
    settings: Settings[Any], task_id: TaskId, folder: Path, spec: EnvSpec, finished: bool
) -> tuple[Settings[Any], dataset.DatasetChoice]:
    """Returns the dataset's place or source; of a resumed run also the settings that lead there from here.

    Raises:
        UserError: it is nowhere.
    """
    if settings.resume and not finished:
        if found := saved_run.find_source(folder, settings, spec):
            return dataclasses.replace(settings, data=found[0]), dataset.DatasetChoice(found[1], "local")
        if settings.data.path is not None:
            raise saved_run.missing_dataset(folder, settings)
    return settings, dataset.choose_source(settings.data, task_id)


def default_run_folder(settings: Settings[Any]) -> Path:
    """A new folder in runs/, named after what runs in it and when it started."""
    env = settings.env.replace("/", "-")  # Minari's names have slashes
    name = f"{settings.algo}_{env}_{settings.preset}_{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for path in _names(RUNS / name) if not path.exists())


def progress_of(settings: Settings[Any], folder: Path) -> tuple[int | None, bool]:
    """Updates done by the run in `folder` (None without a checkpoint), and whether that is all of them.

    Raises:
        UserError: there is a run and it is not to be resumed, or it has other settings.
    """
    if not settings.resume:
        if is_run(folder):
            raise UserError(
                f"{folder} holds a run already; continue it with --resume, or choose another --out"
            )
        if left := [name for name in (METRICS, EVAL, CHECKPOINTS) if (folder / name).exists()]:
            raise UserError(
                f"{folder} holds {left[0]} of a run without its {CONFIG}: restore that file, or choose "
                "another --out"
            )
        return None, False
    before = read_config(folder)
    if settings.hp.cooldown > 0 and before.get("steps") != settings.steps:
        raise UserError(
            f"--steps={settings.steps}: the learning rate of {folder} cools down towards its end at "
            f"update {before.get('steps')}; keep --steps, or choose another --out"
        )
    check_config(folder, before, settings.to_dict(), may_differ(settings), settings.defaults)
    with Outputs(folder, sweep.variants(settings), (), settings.run.keep) as outputs:
        reached = outputs.latest()
        return reached, reached is not None and settings.steps <= reached and outputs.evaluated(reached)


def folder_notes(settings: Settings[Any], folder: Path) -> Iterator[str]:
    """Lines on what a folder holds: a run begun before some settings existed, or files of no run."""
    if not settings.resume:
        if strangers := [path.name for path in visible(folder, "*")]:
            shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if strangers[3:] else "")
            yield f"note: {folder} is not empty ({shown}); the run is added to what is there"
    elif taken := assumed_defaults(read_config(folder), settings.to_dict(), settings.defaults):
        values = ", ".join(f"{key}={value}" for key, value in taken.items())
        them = "its default" if len(taken) == 1 else "their defaults"
        yield f"note: {folder} was begun before {', '.join(taken)} existed: takes {them}, {values}"


def may_differ(settings: Settings[Any]) -> tuple[str, ...]:
    """Keys of the settings that may change when a run is resumed."""
    # A learning rate that cools down is a function of the run's length.
    return MAY_DIFFER if settings.hp.cooldown > 0 else (*MAY_DIFFER, "steps")


def make_job(launch: Launch, store: Store) -> TrainJob:
    """Loads the data onto the device and gathers what training needs."""
    for note in store.notes:
        print(f"note: {note}")
    settings, env, algo = launch.settings, launch.env, launch.algo
    if launch.reached is None:
        normalizer, notes = fit_normalizer(settings.data.normalize, store.statistics)
        for note in notes:
            print(f"note: {note}")
    else:  # what was trained so far goes on with the numbers that it has seen
        parts = [each for each, its in sweep.run_folders(settings, launch.folder) if not its.sweep]
        data = (launch.reached, store, launch.choice.path, env.spec)
        normalizer, *_ = [saved_run.resumed_normalizer(each, *data) for each in parts]
    task = launch.task_id.task
    relabel = None if task is None else lambda obs: env.relabel(obs, task)
    return TrainJob(
        algo=algo,
        env=env,
        window=dataset.make_source(settings.data, store, normalizer, algo.sample, relabel),
        normalizer=normalizer,
        seed=settings.seed,
        seeds=settings.seeds,
        steps=settings.steps,
        episodes=settings.eval.episodes,
        run=settings.run,
        engine=launch.engine,
        config=settings.to_dict(),
        may_differ=may_differ(settings),
        defaults=settings.defaults,
        batch=settings.eval.batch,
        held_out=make_held_out(store, normalizer, algo.sample),
        data=store.provenance.label,
        kept={"data": saved_run.record_of(store), "normalizer": saved_run.plain_normalizer(normalizer)},
        sweep=sweep.variants(settings),
    )


# Its folder.


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
    if folder.is_file():
        raise UserError(f"--out {folder}: is a file, not a folder; choose another --out")
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
    dataset.check_writable(folder, "--out")
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
