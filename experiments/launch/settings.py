"""All settings of a run, typed and checked: from the command line, `hparams.toml`, or a run's `config.json`.

The command line is read in two stages. `--algo`, `--env` and `--preset` select rows of `hparams.toml` and the
class of the hyperparameters; then tyro reads all flags over the defaults so made. A resumed run takes its
defaults from its own `config.json` instead. The fields' docstrings are the help.
"""

import argparse
import contextlib
import dataclasses
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from baselines import algorithms, get_algorithm
from envs_mjx.action_noise import check_sigma
from envs_mjx.registry import TaskId
from envs_mjx.registry import parse as parse_env
from experiments.cli.arguments import read_flags, start_jax, whole_number
from experiments.deviceless.cards import CardName
from experiments.launch.hparams import (
    GROUPS,
    HPARAMS,
    SELECTORS,
    build,
    merge_rows,
    require_steps,
    rows_for,
    to_field_type,
)
from experiments.launch.job_options import NO_WISHES, JobConfig, read_jobs
from experiments.launch.loggers import Tracker
from mac.atomic_files import misfit, read_json, visible
from mac.data.normalize import Normalize
from mac.data.sources.catalogue import SHARDS
from mac.errors import UserError, refusal, remedy, unknown_name
from mac.run.hosts import Place, parse_place, place_from_environment
from mac.run.train import RunConfig

PROGRAM = "python experiments/run.py"
RUNS = Path("runs")
"""The folder of runs, if none is named."""
CONFIG = "config.json"
HP = TypeVar("HP")
Preset = Literal["auto", "paper", "laptop"]
PRESETS: tuple[str, ...] = typing.get_args(Preset)
Engine = Literal["auto", "c", "mjx", "warp"]
Resident = Literal["auto", "yes", "no"]
StoredAs = Literal["auto", "float32", "uint16"]
From = Literal["auto", "local", "download", "generate"]
ProgramName = Literal["segment", "evaluate", "diagnose", "init"]
"""A run's compiled functions."""


@dataclass(frozen=True)
class EvalConfig:
    """Settings of the evaluation of policies."""

    episodes: int = 15
    """episodes per task and seed in each evaluation"""
    engine: Engine = "auto"
    """physics: `c` MuJoCo C on host threads, `mjx` in JAX, `warp` MuJoCo Warp; auto = the best one here"""
    batch: int = 0
    """most environments simulated at a time, where memory is short; 0 = all; results do not depend on it"""
    noise: float = 0.0
    """standard deviation of noise on every executed action; as in the data, if they were made with --noise"""

    def __post_init__(self):
        if self.episodes < 1:
            raise UserError(f"--eval.episodes={self.episodes}: must be at least 1")
        if self.batch < 0:
            raise UserError(f"--eval.batch={self.batch}: must be at least 0")
        check_sigma("--eval.noise", self.noise)


@dataclass(frozen=True)
class DataConfig:
    """Settings of the dataset's source."""

    source: From = "auto"
    """`local` searches this machine, `download` fetches OGBench's, D4RL's or Minari's file, `generate` makes
    the data; auto = local, else generate where that is possible, else download"""
    path: Path | None = None
    """an .npz or .hdf5 file, a folder of shards, or convert_data.py's store; None = as --data.source says"""
    dir: Path = Path("data")
    """folder for downloads, generated datasets and converted stores; also searched, as are ~/.ogbench,
    ~/.d4rl and ~/.minari"""
    mirror: str | None = None
    """address of a copy of the public files, to download from instead of their hosts"""
    shards: int = 0
    """numbered files of OGBench's 100M dataset to use, at least; 0 = its ordinary file"""
    rows: int = 1_001_000
    """rows to generate (whole episodes; a tenth more for validation)"""
    seed: int = 0
    """seed of the generated dataset, and of the order of windows"""
    dtype: StoredAs = "auto"
    """how rows are stored: uint16 takes half the memory of float32; auto = as prepared, else float32"""
    resident: Resident = "auto"
    """all rows stay on the device, or windows of them rotate; auto = if they fit"""
    normalize: Normalize = "minmax"
    """normalisation of observations: minmax to [-1, 1] (MAC's), standard to mean 0 and standard
    deviation 1, or none"""
    window: int = 1_001_000
    """most rows of a rotating window"""
    window_updates: int = 1_000
    """updates that each of these windows serves"""

    def __post_init__(self):
        for name in ("rows", "window", "window_updates"):
            if getattr(self, name) < 1:
                raise UserError(f"--data.{name.replace('_', '-')}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--data.seed={self.seed}: must be in [0, 2**31)")
        if not 0 <= self.shards <= SHARDS:
            raise UserError(f"--data.shards={self.shards}: must be from 0 to {SHARDS}")
        if self.mirror is not None and not self.mirror.startswith(("http://", "https://")):
            raise UserError(f"--data.mirror={self.mirror}: must begin with http:// or https://")
        if self.path is not None and self.source in ("download", "generate"):
            raise UserError(
                f"--data.path names a file, so there is nothing to {self.source}; give one of them"
            )


@dataclass(frozen=True)
class Settings(Generic[HP]):
    """Trains an offline RL algorithm on all seeds at once, and evaluates it in batched physics."""

    hp: HP
    """Hyperparameters of the algorithm."""
    run: RunConfig
    eval: EvalConfig
    data: DataConfig
    algo: str = "mac"
    """algorithm to train, one that `--list` prints"""
    env: str = "cube-single-play-singletask-task2-v0"
    """OGBench dataset name: environment, data and task"""
    preset: Preset = "auto"
    """defaults: the paper's, or ones that learn on two CPU cores; auto = paper on an accelerator, else
    laptop"""
    seeds: int = 4
    """number of seeds, trained together"""
    seed: int = 0
    """first seed; the run uses SEED ... SEED + SEEDS - 1"""
    steps: int = 1_000_000
    """updates per seed"""
    sweep: tuple[str, ...] = ()
    """trains every combination of hp.NAME=V1,V2,... with all seeds in one program; each leaves a run of its
    own in the run folder"""
    log: tuple[Tracker, ...] = ()
    """experiment trackers that the results are also sent to, each an extra of the same name; W&B stays
    offline unless WANDB_MODE says otherwise; none = no more, for a run that is continued"""
    out: Path | None = None
    """run folder; None = a new one, runs/ALGO_ENV_PRESET_DATE"""
    resume: bool = False
    """continue the run in --out (None = the newest in runs/) with the settings it was started with"""
    auto_resume: bool = False
    """continue the run in --out if there is one, else start it: one command for the first start and every
    restart"""
    dry_run: bool = False
    """print sizes, memory and time estimates, and exit"""
    device: CardName | None = None
    """with --dry-run: compiles for this card, which need not exist here, and estimates the run on it; needs
    the extra `aot`"""
    device_programs: tuple[ProgramName, ...] = ("segment",)
    """with --device: what is compiled; evaluation takes minutes"""
    list: bool = False
    """print every algorithm with its paper and the settings that it has, and exit"""
    hosts: str | None = None
    """place of this process among those of one run on several hosts, ADDRESS:PORT,NUMBER,COUNT, the address
    being process 0's; None = as variables of torchrun or of a step of SLURM say, else it is alone"""
    jobs: str | None = None
    """`slurm` submits the run to a cluster and returns; None = it runs here"""
    job: JobConfig = NO_WISHES
    """with --jobs slurm: what the job asks for"""

    def __post_init__(self):
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.steps >= 2**31:
            raise UserError(f"--steps={self.steps}: must be below 2**31")
        if not 0 <= self.seed <= 2**31 - self.seeds:
            raise UserError(f"--seed={self.seed}: seeds must be in [0, 2**31)")
        if self.device and not self.dry_run:
            raise UserError(f"--device={self.device} compiles without running, so it needs --dry-run")
        if self.jobs is not None and read_jobs(self.jobs).where != "slurm":
            raise UserError(
                f"--jobs {self.jobs}: a run is one process; reproduce.py runs several side by side"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Experiment trackers that are fed."""
        return tuple(name for name in self.log if name != "none")

    @property
    def task_id(self) -> TaskId:
        """The environment, parsed.

        Raises:
            UserError: it is unknown.
        """
        return parse_env(self.env)

    @property
    def has_environment(self) -> bool:
        """False of data without an environment, where policies are not evaluated."""
        return self.task_id.collection != "file"

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings of the run itself as JSON data; `settings_from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        for name in _OF_THE_LAUNCH:
            del values[name]
        return _jsonable(values)

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """Defaults of the tables' values, as JSON data: what an option means to a run begun before it."""
        return {
            name: {
                field.name: _jsonable(field.default)
                for field in dataclasses.fields(getattr(self, name))
                if field.default is not dataclasses.MISSING
            }
            for name in GROUPS
        }


_OF_THE_LAUNCH = (
    "out", "resume", "auto_resume", "dry_run", "device", "device_programs", "list", "hosts", "jobs", "job",
)  # fmt: skip


def settings_from_dict(values: dict[str, Any], hp: type[Any], where: str) -> Settings[Any]:
    """Settings from a file's values; what they leave out keeps its default.

    Args:
        values: `to_dict()` of other settings, or a part of it.
        hp: class of the algorithm's hyperparameters.
        where: the file, for messages.
    Raises:
        UserError: an unknown key, a value of a wrong type, or one out of range.
    """
    hints = typing.get_type_hints(Settings)
    names = [f.name for f in dataclasses.fields(Settings) if f.name not in _OF_THE_LAUNCH]
    for key in values:
        if key not in names:
            raise unknown_name(f"{where}: key", key, names)
    classes = dict(zip(GROUPS, (hp, RunConfig, EvalConfig, DataConfig), strict=True))
    groups = {}
    for name, cls in classes.items():
        given = values.get(name, {})
        if not isinstance(given, dict):
            raise UserError(f"{where}: {name} = {given!r} must be a table")
        groups[name] = build(cls, given, f"{where}, {name}")
    top = {k: to_field_type(v, hints[k], f"{where}: {k}") for k, v in values.items() if k not in groups}
    return Settings(**groups, **top)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, Path) else value


# From the command line.


class _First(NamedTuple):
    """The flags that decide the defaults of all others; None where not given."""

    algo: str | None
    env: str | None
    preset: str | None
    seeds: int | None
    out: Path | None
    device: str | None
    jobs: str | None
    gpus: str | None
    hosts: str | None
    batch_devices: int
    resume: bool
    dry_run: bool
    help: bool

    @property
    def alone(self) -> bool:
        """True of a call that trains nothing, whatever variables say of other processes."""
        return self.help or self.dry_run or self.jobs is not None


def parse_command_line(argv: Sequence[str]) -> tuple[Settings[Any], str]:
    """Settings for a command line, and the reason for the preset. Starts JAX.

    Raises:
        UserError: an unknown flag, name or key, a value out of range, or a device that is missing; in
            one line.
        SystemExit: after printing the help.
    """
    first = _first_stage(argv)
    saved = _saved(first) if first.resume and first.out else {}
    chosen = {name: getattr(first, name) or saved.get(name) or getattr(Settings, name) for name in SELECTORS}
    entry, task_id = get_algorithm(chosen["algo"], "--algo"), parse_env(chosen["env"])
    if chosen["preset"] not in PRESETS:
        raise unknown_name("--preset", chosen["preset"], PRESETS)
    place = None if first.alone else find_place(first.hosts)
    seeds = first.seeds or saved.get("seeds") or Settings.seeds
    count = 1 if place is None else place.count
    backend = start_jax(max(seeds * first.batch_devices // count, 1), first.help, place)
    preset, reason = _choose_preset(chosen["preset"], backend, first)
    rows, asked = [] if saved else rows_for(entry), (chosen["algo"], task_id, preset)
    if saved:
        values, where, reason = saved, str(first.out), "of the run that is continued"
    else:
        values, where = merge_rows(rows, *asked), str(HPARAMS)
    default = settings_from_dict(values | chosen, entry.config, where)
    if not saved:
        require_steps(values, rows, *asked)
    check_owner(argv, chosen["algo"])
    settings = read_flags(Settings[entry.config], argv, PROGRAM, default)
    chosen_out = first.out or settings.out
    return dataclasses.replace(settings, preset=preset, out=chosen_out, resume=first.resume), reason


def check_owner(argv: Sequence[str], algo: str) -> None:
    """Refuses hyperparameters that other algorithms have, and this one has not, unless help is asked for.

    Raises:
        UserError: there is such a flag, `--hp.penalty` or `--sweep hp.penalty=1,2` for MAC, say.
    """
    if {"--help", "-h"} & set(argv):
        return
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if not flag.startswith(("--hp.", "hp.")):
            continue
        field = flag.partition("hp.")[2].replace("-", "_")
        owners = [name for name, entry in algorithms().items() if field in entry.config.__dataclass_fields__]
        if owners and algo not in owners:
            some = ", ".join(owners[:4]) + (", ..." if owners[4:] else "")
            some += " has it" if len(owners) == 1 else " have it"
            raise UserError(f"{flag}: {algo} has no such hyperparameter ({some}); see --algo {algo} --help")


def _first_stage(argv: Sequence[str]) -> _First:
    """Reads its flags only; what is wrong with others is left to the second stage."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*SELECTORS, "seeds", "out", "device", "hosts"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--run.batch-devices", "--run.batch_devices", dest="batch_devices", default="1")
    parser.add_argument("--dry-run", "--dry_run", dest="dry_run", action="store_true")
    parser.add_argument("--jobs")
    parser.add_argument("--job.gpus", dest="gpus")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--auto-resume", "--auto_resume", dest="auto_resume", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        known = vars(parser.parse_known_args(list(argv))[0])
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; see --help") from error
    seeds, out, auto = known["seeds"], known["out"], known.pop("auto_resume")
    if seeds is not None:
        try:
            known["seeds"] = whole_number(seeds)
        except ValueError as error:
            raise UserError(f"--seeds={seeds}: {error}") from error
        if known["seeds"] < 1:
            raise UserError(f"--seeds={seeds}: must be a whole number of at least 1")
    if auto and not known["help"]:
        if out is None:
            raise UserError("--auto-resume needs --out DIR, the folder that every start names")
        known["resume"] = is_run(Path(out))
    if out is None and known["resume"] and not known["help"]:
        out = _newest_run()
    with contextlib.suppress(ValueError):  # which the second stage tells
        known["batch_devices"] = max(whole_number(known["batch_devices"]), 1)
    known["out"] = None if out is None else Path(out)
    return _First(**known)


def find_place(asked: str | None) -> Place | None:
    """This process's place among those of one run, as `--hosts` or variables say it; None if it is alone.

    Raises:
        UserError: what they say makes no sense.
    """
    place = place_from_environment(os.environ) if asked is None else parse_place(asked)
    return None if place is None or place.count == 1 else place


def _newest_run() -> Path:
    started = {}
    for run in runs_within(RUNS):
        with contextlib.suppress(OSError):  # deleted just now
            started[run] = (run / CONFIG).stat().st_mtime
    if not started:
        raise UserError(f"--resume: there is no run in {RUNS}/; name its folder with --out")
    return max(started, key=started.__getitem__)


def _saved(first: _First) -> dict[str, Any]:
    """The settings that the run to be resumed was started with."""
    values = read_config(first.out or Path(), "--resume: ")
    for name in SELECTORS:
        wanted = getattr(first, name)
        if wanted not in (None, "auto", values.get(name)):
            raise UserError(
                f"--{name}={wanted}: the run in {first.out} has {values.get(name)}; choose another --out"
            )
    return values


def _choose_preset(preset: str, backend: str, first: _First) -> tuple[str, str]:
    if preset != "auto":
        return preset, "as asked"
    if first.device:
        return "paper", f"that of accelerators, since --device is {first.device}"
    if first.jobs == "slurm" and first.gpus not in (None, "0"):
        return "paper", "that of accelerators, since --job.gpus asks for some"
    if first.jobs == "slurm":
        return "laptop", "without --job.gpus; --preset paper for the paper's sizes"
    if backend == "cpu":
        return "laptop", "no accelerator found; --preset paper for the paper's sizes"
    return "paper", f"accelerator found ({backend}); --preset laptop for a quick look"


# From the folder of a run.


def is_run(folder: Path) -> bool:
    """True if a run was started in `folder`.

    Raises:
        UserError: the folder cannot be examined.
    """
    try:
        return (folder / CONFIG).exists()
    except OSError as error:
        raise UserError(f"cannot read {folder}: {refusal(error)}; {remedy(error, 'check it')}") from error


def runs_within(folder: Path) -> list[Path]:
    """The runs in the folders that `folder` holds, by name."""
    try:
        return [path.parent for path in visible(folder, f"*/{CONFIG}")]
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
    entry = get_algorithm(values["algo"], f"{folder / CONFIG}: algo")
    return settings_from_dict(values, entry.config, str(folder / CONFIG))
