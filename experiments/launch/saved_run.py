"""A run's folder, read again: its settings, its normaliser, and the policies of a checkpoint."""

import contextlib
import dataclasses
import json
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from baselines import get_algorithm
from envs_mjx.registry import TaskId, make, parse, resolve_engine
from experiments.cli.arguments import whole_number
from experiments.launch import dataset
from experiments.launch.hparams import to_field_type
from experiments.launch.settings import DataConfig, Settings, name_one, read_settings, runs_within
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.atomic_files import read_json, write_json
from mac.data.normalize import Normalizer
from mac.data.provenance import provenance_from_dict as from_record
from mac.data.store import ContentChecksums, Store, read_meta
from mac.errors import UserError, one_line
from mac.run.evaluate import Policies, evaluation_keys
from mac.run.io.checkpoint import Checkpoint, CheckpointStore
from mac.run.io.run_metadata import launches
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.mesh import seed_keys
from mac.run.policy import Policy
from mac.types import EnvSpec

NORMALIZER, EVALUATIONS = "normalizer.json", "evaluations.jsonl"
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
    def policies(self) -> Policies:
        """What acts in an evaluation."""
        return Policies(self.algo, self.normalizer, self.state)

    def policy(self, number: int) -> Policy:
        """The policy of the seed of that number, for a loop of one's own."""
        at = self.numbers.index(number)
        state = jax.tree.map(lambda x: x[at : at + 1], self.state)
        (key,) = evaluation_keys(jnp.asarray([number]), self.step)
        return Policy(Policies(self.algo, self.normalizer, state), key)

    @property
    def title(self) -> str:
        """Title of the run, for tables and pictures."""
        return f"{self.settings.algo} on {self.settings.env}"


def open_run(folder: Path, step: int | None = None, settings: Settings[Any] | None = None) -> SavedRun:
    """The policies of a run's checkpoint, the newest or that of update `step`; writes nothing.

    Args:
        settings: those of the run, if not as they were saved (see `with_acting_hparams`).
    Raises:
        UserError: no run, no such checkpoint, or a damaged file.
    """
    settings = settings or read_settings(folder)
    spec = make(settings.task_id).spec
    algo = build_algorithm(settings, spec)
    keys = seed_keys(settings.seed, settings.seeds)
    template = jax.eval_shape(jax.vmap(algo.init), keys)
    found = _restore(folder, template, step)
    normalizer = load_normalizer(folder, found.meta, spec)
    return SavedRun(folder, settings, algo, normalizer, found.step, found.state.for_acting())


def build_algorithm(settings: Settings[Any], spec: EnvSpec) -> AbstractAlgorithm:
    """The algorithm of a run, with the arithmetic that the run asks for."""
    algo = get_algorithm(settings.algo).algorithm(settings.hp, spec, settings.steps)
    return settings.run.applied_to(algo)


def with_acting_hparams(settings: Settings[Any], changes: Sequence[str]) -> Settings[Any]:
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
        hint = typing.get_type_hints(cls)[name]
        try:
            given = whole_number(value) if hint is int else json.loads(value)
        except ValueError:
            given = value
        values[name] = to_field_type(given, hint, f"--hp {name}")
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
        while True:
            try:
                return store.restore(template, step)
            except UserError:
                # The run may go on meanwhile, and delete its oldest checkpoint while that is being read.
                newest = there[-1] if step is None else step
                if newest in (there := store.steps()) or not there:
                    raise
                if step is not None:
                    raise UserError(
                        f"--step={step}: the run goes on, and deleted this checkpoint while it was read; "
                        f"it has those of updates {', '.join(f'{s:,}' for s in there)}"
                    ) from None


# Normaliser.


def plain_normalizer(normalizer: Normalizer) -> dict[str, list[float]]:
    """Returns a normaliser as JSON data, exact to the bit."""
    return {f.name: np.asarray(getattr(normalizer, f.name)).tolist() for f in dataclasses.fields(normalizer)}


def save_normalizer(folder: Path, normalizer: Normalizer) -> None:
    """Writes `normalizer.json`, so that the policies can act without the dataset; exact to the bit.

    Raises:
        UserError: the folder cannot be written.
    """
    write_json(folder / NORMALIZER, plain_normalizer(normalizer))


def load_normalizer(folder: Path, kept: Mapping[str, Any], spec: EnvSpec) -> Normalizer:
    """The normaliser that the networks of a run's checkpoint were trained with.

    Args:
        kept: what was saved with the checkpoint; since version 3 of stores, also a copy of the normaliser.
    Raises:
        UserError: the file is damaged or was edited, or there is neither it nor a copy.
    """
    path, copy = folder / NORMALIZER, kept.get("normalizer")
    if not path.exists():
        if copy is None:
            raise UserError(
                f"{path} is missing, and the checkpoint, of an earlier version, has no copy of it; restore it"
            )
        return _normalizer(copy, f"{folder}: the checkpoint's copy of {NORMALIZER}", spec)
    remedy = "restore it" if copy is None else "delete it: the checkpoint has a copy"
    found = _normalizer(read_json(path), str(path), spec, remedy)
    if copy is not None and plain_normalizer(found) != copy:
        raise UserError(f"{path} is not the normaliser that the checkpoint was trained with; {remedy}")
    return found


def _normalizer(values: Any, where: str, spec: EnvSpec, remedy: str = "start a new run") -> Normalizer:
    try:
        parts = {f.name: np.asarray(values[f.name], np.float32) for f in dataclasses.fields(Normalizer)}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where} holds no normaliser ({one_line(error)}); {remedy}") from error
    if any(part.shape != (spec.obs_dim,) for part in parts.values()):
        raise UserError(f"{where} does not fit {spec.name}: expected {spec.obs_dim} numbers each; {remedy}")
    for name, part in parts.items():
        wrong = ~np.isfinite(part) | ((part < 0) & (name != "center"))
        if wrong.any():
            at = int(np.argmax(wrong))
            raise UserError(f"{where}: {name}[{at}] is {part[at]}; {remedy}")
    return Normalizer(**{name: jnp.asarray(part) for name, part in parts.items()})


# Dataset.


class TrainingData(NamedTuple):
    """The data that a run was trained on, as it was recorded.

    Attributes:
        label: where they come from, in a few words.
        content: their checksums; None of a run of an earlier version.
        store: a converted copy of them that is still there.
    """

    label: str
    content: ContentChecksums | None
    store: Path | None


def trained_on(folder: Path, kept: Mapping[str, Any] | None = None) -> TrainingData:
    """The data of a checkpoint, given what was saved with it, or of the run's newest launch."""
    recorded = [each["data"] for each in _launches(folder) if isinstance(each.get("data"), dict)]
    known = [*([kept["data"]] if kept and isinstance(kept.get("data"), dict) else []), *reversed(recorded)]
    values = known[0] if known else {}
    label, content = from_record(values).label, values.get("content")
    if not (isinstance(content, list) and len(content) == len(ContentChecksums._fields)):
        return TrainingData(label, None, None)
    stores = [Path(each["store"]) for each in known if isinstance(each.get("store"), str)]
    copies = (store for store in stores if (read_meta(store) or {}).get("content") == content)
    return TrainingData(label, ContentChecksums(*content), next(copies, None))


def record_of(store: Store) -> dict[str, Any]:
    """Returns the record that `trained_on` reads, as JSON data."""
    content = None if store.content is None else list(store.content)
    return store.provenance.to_dict() | {"content": content, "store": str(store.path.absolute())}


def check_same_data(folder: Path, trained: TrainingData, store: Store, source: Path) -> None:
    """Compares a dataset, the store of `source`, with the one that a run was trained on.

    Raises:
        UserError: it is another.
    """
    if trained.content is None or store.content is None:
        print(f"note: {folder}: saved by an earlier version; whether the data are the same is not checked")
        return
    if trained.content == store.content:
        return
    what = ""
    if trained.content.train == store.content.train:
        what = ": the same training rows, but " + (
            "other validation rows" if store.content.val else "no validation rows"
        )
    put = "put the former back or take another --out"
    if trained.store:
        put = f"--data.path {shlex.quote(str(trained.store))} has the former"
    raise UserError(
        f"{folder} was trained on {trained.label} (rows {trained.content}), and {source} is "
        f"{store.provenance.label} (rows {store.content}){what}; {put}"
    )


def resumed_normalizer(folder: Path, step: int, store: Store, source: Path, spec: EnvSpec) -> Normalizer:
    """The normaliser of a run that goes on from the checkpoint of update `step`, with the store of `source`.

    Raises:
        UserError: the data are not those that it was trained on, or the normaliser is missing or damaged.
    """
    with CheckpointStore(folder / CHECKPOINTS) as checkpoints:
        kept = checkpoints.meta(step)
    check_same_data(folder, trained_on(folder, kept), store, source)
    return load_normalizer(folder, kept, spec)


def find_source(folder: Path, settings: Settings[Any], spec: EnvSpec) -> tuple[DataConfig, Path] | None:
    """The dataset of the run in `folder`, with the settings that lead to it from here; None if not found.

    Paths are relative to where the run was started, or to here; where that leads to several datasets, the one
    that the run was trained on counts.

    Raises:
        UserError: a dataset was found and cannot be read.
    """
    found: dict[Path, tuple[DataConfig, Path]] = {}
    for place in places(folder):
        path = settings.data.path and place / settings.data.path
        data = dataclasses.replace(settings.data, path=path, dir=place / settings.data.dir)
        if (path is None or path.exists()) and (source := dataset.search(data, settings.task_id)):
            found.setdefault(source.resolve(), (data, source))
    choices = list(found.values())
    if len(choices) > 1 and (wanted := trained_on(folder).content):
        dtype = "float32" if settings.data.dtype == "auto" else settings.data.dtype
        same = [each for each in choices if dataset.content(*each, spec, dtype) == wanted]
        choices = same or choices
    return choices[0] if choices else None


def places(folder: Path) -> Iterator[Path]:
    """Folders that the paths of a run may be relative to: here, and where it was launched, newest first."""
    yield Path()
    for launch in reversed(_launches(folder)):
        if isinstance(where := launch.get("folder"), str):
            yield Path(where)


def open_dataset(folder: Path, settings: Settings[Any], spec: EnvSpec) -> Store:
    """The store of the run's dataset; paths are relative to where the run was started, or to here.

    Raises:
        UserError: the dataset is not there, is damaged, or is not the one that the run was trained on.
    """
    trained = trained_on(folder)
    if found := find_source(folder, settings, spec):
        store = dataset.open_store(*found, spec)
        if store.content == trained.content:
            return store
    # The run's own copy, if the files from which it was made are gone or were changed.
    if trained.store:
        return Store.open(trained.store)
    if found:
        check_same_data(folder, trained, store, found[1])
        return store
    raise missing_dataset(folder, settings)


def missing_dataset(folder: Path, settings: Settings[Any]) -> UserError:
    """Says which dataset of a run was not found, and where it was looked for."""
    wanted = settings.data.path or settings.task_id.dataset
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places(folder)))
    return UserError(
        f"the dataset of {folder} ({wanted}) is needed and was not found (looked in {looked}); "
        "call from the folder where the run was started, or name it with --data.path"
    )


def data_label(folder: Path) -> str:
    """Returns the provenance of the data of the run in `folder`, in a few words."""
    launches(folder)  # a damaged record is named here, not passed over
    return trained_on(folder).label


def _launches(folder: Path) -> list[dict[str, Any]]:
    """Returns the launches that `run.json` records; none if it is damaged."""
    with contextlib.suppress(UserError):
        return launches(folder)
    return []


def require_environment(env: TaskId) -> None:
    """Raises UserError if a run was trained on data without an environment, where nothing can be played."""
    if env.collection == "file":
        raise UserError(f"the run was trained on data alone ({env.name}), so there is nothing to play it in")


def evaluation_engine(env: TaskId, asked: str) -> str:
    """The engine that an evaluation plays on: `c`, `mjx`, `warp`, or `ogbench`, the original environment.

    Raises:
        UserError: there is no such engine, or no original of this environment.
    """
    if asked != "ogbench":
        return resolve_engine(asked)
    if env.collection == "registered":
        raise UserError(f"--engine ogbench: OGBench has no {env.name}; choose auto, c, mjx or warp")
    return asked


def evaluation_noise(settings: Settings[Any], asked: float | None, engine: str) -> float:
    """Standard deviation of the noise on executed actions: `asked`, or that of the run's own evaluations.

    Raises:
        UserError: `engine` is the original `ogbench`, which has none.
    """
    noise = settings.eval.noise if asked is None else asked
    if noise and engine == "ogbench":
        raise UserError(
            f"--noise={noise:g}: ogbench plays without noise; take another --engine, or --noise 0"
        )
    return noise


def by_environment(env: TaskId, tasks: tuple[int, ...], flag: str) -> list[tuple[TaskId, tuple[int, ...]]]:
    """Environments that hold `tasks` of the scene of `env`, each with those that it holds.

    A goal-conditioned environment holds all tasks; a single-task one has one like it for each; one whose
    dataset records its rewards holds a single task.

    Args:
        tasks: empty for those of `env` itself.
        flag: the beginning of an error's line.
    Raises:
        UserError: a task that does not exist, or one that is asked for twice.
    """
    single = env.collection == "registered" and env.task is not None
    known: list[int] = [env.task or 1] if single else list(env.tasks)
    for task in tasks:
        if task not in known or tasks.count(task) > 1:
            several = f"tasks {known[0]} to {known[-1]}; name each once"
            exist = several if len(known) > 1 else f"task {known[0]} only"
            raise UserError(f"{flag} {task}: {env.family} has {exist}")
    if env.task is None:
        return [(env, tasks or env.tasks)]
    stem = env.dataset.removesuffix("-v0")
    return [
        (env if task == env.task else parse(f"{stem}-singletask-task{task}-v0"), (task,))
        for task in tasks or (env.task,)
    ]
