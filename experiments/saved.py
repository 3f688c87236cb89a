"""A run's folder, read again: its settings, its normaliser, and the policies of a checkpoint."""

import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from baselines import REGISTRY
from envs_mjx.registry import make, parse, task_ids
from experiments import dataset, sources
from experiments.hparams import convert, unknown_name
from experiments.settings import Settings, from_plain
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer, fit_minmax
from mac.data.provenance import from_plain as from_record
from mac.data.store import Store
from mac.errors import UserError, refusal, remedy
from mac.files import misfit, read_json, write_json
from mac.run.checkpoint import Checkpoint, CheckpointStore
from mac.run.outputs import CHECKPOINTS
from mac.run.record import launches
from mac.run.segment import seed_keys
from mac.types import EnvSpec

CONFIG, NORMALIZER, EVALUATIONS = "config.json", "normalizer.json", "evaluations.jsonl"
RANDOM = "random"  # the policy of lines of EVALUATIONS that are about uniform random actions


class SavedRun(NamedTuple):
    """The policies of one checkpoint, and all that is needed to act with them.

    Attributes:
        step: updates that the checkpoint has seen.
        state: leading axis S, the run's seeds.
    """

    folder: Path
    settings: Settings[Any]
    algo: AbstractAlgorithm
    normalizer: Normalizer
    step: int
    state: TrainState

    @property
    def numbers(self) -> list[int]:
        """The seeds' numbers."""
        return list(range(self.settings.seed, self.settings.seed + self.settings.seeds))

    @property
    def title(self) -> str:
        """What was trained, for tables and pictures."""
        return f"{self.settings.algo} on {self.settings.env}"


def is_run(folder: Path) -> bool:
    """Whether a run was started in `folder`."""
    return (folder / CONFIG).exists()


def runs_within(folder: Path) -> list[Path]:
    """The runs in the folders that `folder` holds, by name."""
    try:
        return sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.parent.name[0] != ".")
    except OSError as error:
        raise UserError(f"cannot read {folder}: {refusal(error)}; {remedy(error, 'check it')}") from error


def name_one(runs: Sequence[Path]) -> str:
    """A remedy: to name one of these runs."""
    more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
    return f"name one of its runs: {', '.join(map(str, runs[:4]))}{more}"


def read_config(folder: Path, asked_by: str = "") -> dict[str, Any]:
    """The settings that the run in `folder` was last started with, as plain data.

    Args:
        asked_by: what an error's line begins with, such as a flag.
    Raises:
        UserError: there is no run, or its settings cannot be read.
    """
    if not is_run(folder):
        within = runs_within(folder)
        then = name_one(within) if within else "name a run's folder"
        raise UserError(f"{asked_by}{folder} holds no run (no {CONFIG} in it); {then}")
    values = read_json(folder / CONFIG)
    if fault := misfit(values, algo=str, env=str):
        raise UserError(
            f"{folder / CONFIG} holds no settings of a run ({fault}); restore it, or choose another folder"
        )
    return values


def read_settings(folder: Path) -> Settings[Any]:
    """The settings of the run in `folder`.

    Raises:
        UserError: there is no run, or its settings are not those of this version.
    """
    values = read_config(folder)
    entry = REGISTRY.get(values["algo"])
    if entry is None:
        raise unknown_name(f"{folder / CONFIG}: algo", values["algo"], REGISTRY)
    return from_plain(values, entry.config, str(folder / CONFIG))


def open_run(folder: Path, step: int | None = None, settings: Settings[Any] | None = None) -> SavedRun:
    """The policies of a run's checkpoint, the newest or that of update `step`; writes nothing.

    Args:
        settings: those of the run, if not as they were saved (see `acting_otherwise`).
    Raises:
        UserError: no run, no such checkpoint, or a damaged file.
    """
    settings = settings or read_settings(folder)
    spec = make(settings.env, "c").spec
    algo = REGISTRY[settings.algo].algorithm(settings.hp, spec, settings.steps)
    keys = seed_keys(settings.seed, settings.seeds)
    template = jax.eval_shape(jax.vmap(algo.init), keys)
    found = _restore(folder, template, step)
    return SavedRun(folder, settings, algo, load_normalizer(folder, settings, spec), found.step, found.state)


def acting_otherwise(settings: Settings[Any], changes: Sequence[str]) -> Settings[Any]:
    """Settings of a run whose policies are to act otherwise than they did in training.

    Args:
        changes: `NAME=VALUE` of hyperparameters that only acting reads (`ACTING` of the algorithm's Config).
    Raises:
        UserError: another name, or a value that does not fit.
    """
    cls, values = type(settings.hp), {}
    allowed: tuple[str, ...] = getattr(cls, "ACTING", ())
    for change in changes:
        name, _, value = change.partition("=")
        name = name.replace("-", "_")
        if name not in allowed:
            known = ", ".join(allowed) or "none"
            raise UserError(
                f"--hp {change}: write NAME=VALUE; acting alone reads, of {settings.algo}: {known}"
            )
        try:
            given = json.loads(value)
        except ValueError:
            given = value
        values[name] = convert(given, typing.get_type_hints(cls)[name], f"--hp {name}")
    return dataclasses.replace(settings, hp=dataclasses.replace(settings.hp, **values))


def _restore(folder: Path, template: Any, step: int | None) -> Checkpoint:
    with CheckpointStore(folder / CHECKPOINTS) as store:
        there = store.steps()
        if not there and (within := runs_within(folder)):
            raise UserError(f"{folder} is a sweep: {name_one(within)}")
        if not there:
            raise UserError(f"{folder} has no checkpoint yet; wait for the first one, or continue the run")
        if step is not None and step not in there:
            known = ", ".join(f"{s:,}" for s in there)
            raise UserError(f"--step={step}: {folder} has checkpoints of updates {known}")
        try:
            return store.restore(template, step)
        except UserError:
            # The run may go on meanwhile, and delete its oldest checkpoint while that is being read.
            if step is not None or there[-1] in store.steps():
                raise
            return store.restore(template)


def save_normalizer(folder: Path, normalizer: Normalizer) -> None:
    """Writes `normalizer.json`, so that the policies can act without the dataset; exact to the bit.

    Raises:
        UserError: the folder cannot be written.
    """
    values = {
        f.name: np.asarray(getattr(normalizer, f.name)).tolist() for f in dataclasses.fields(normalizer)
    }
    write_json(folder / NORMALIZER, values)


def load_normalizer(folder: Path, settings: Settings[Any], spec: EnvSpec) -> Normalizer:
    """The normaliser of the run in `folder`; for a run that left none, that of its dataset.

    Raises:
        UserError: the file is damaged, or there is neither it nor the dataset.
    """
    path = folder / NORMALIZER
    if not path.exists():
        return fit_minmax(open_dataset(folder, settings, spec).statistics_obs)
    values = read_json(path)
    try:
        parts = {f.name: np.asarray(values[f.name], np.float32) for f in dataclasses.fields(Normalizer)}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no normaliser ({error}); restore it, or delete it") from error
    if any(part.shape != (spec.obs_dim,) for part in parts.values()):
        raise UserError(f"{path} does not fit {spec.name}: expected {spec.obs_dim} numbers each; delete it")
    return Normalizer(**{name: jnp.asarray(part) for name, part in parts.items()})


def open_dataset(folder: Path, settings: Settings[Any], spec: EnvSpec) -> Store:
    """The store of the run's dataset; paths are relative to where the run was started, or to here.

    Raises:
        UserError: the dataset is not there, or damaged.
    """
    places = [Path(launch["folder"]) for launch in reversed(launches(folder)) if "folder" in launch]
    for place in (Path(), *places):
        there = settings.data.path and place / settings.data.path
        data = dataclasses.replace(settings.data, path=there, dir=place / settings.data.dir)
        is_there = there is None or there.exists()
        if is_there and (source := sources.search(data, settings.env)):
            return dataset.open_store(data, source, spec)
    wanted = settings.data.path or parse(settings.env).dataset
    raise UserError(
        f"the dataset of {folder} ({wanted}) is needed and not there; "
        "call from the folder where the run was started"
    )


def data_label(folder: Path) -> str:
    """Where the data of the run in `folder` come from, in a few words."""
    found = launches(folder)
    return from_record(found[-1].get("data") if found else None).label


def by_environment(name: str, tasks: tuple[int, ...], flag: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names of environments that hold `tasks` of the scene of `name`, each with those that it holds.

    A goal-conditioned environment holds all five tasks; a single-task one has a sibling for each; one whose
    dataset records its rewards holds a single task.

    Args:
        tasks: empty for those of `name` itself.
        flag: what an error's line begins with.
    Raises:
        UserError: a task that does not exist, or one that is asked for twice.
    """
    here, known = parse(name), task_ids(name)
    for task in tasks:
        if task not in known or tasks.count(task) > 1:
            there = f"tasks 1 to {len(known)}; name each once" if len(known) > 1 else "task 1 only"
            raise UserError(f"{flag} {task}: {here.family} has {there}")
    if here.task is None:
        return [(name, tasks or known)]
    stem = here.dataset.removesuffix("-v0")
    names = {task: f"{stem}-singletask-task{task}-v0" for task in tasks or (here.task,)} | {here.task: name}
    return [(names[task], (task,)) for task in tasks or (here.task,)]
