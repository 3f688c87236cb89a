"""All settings of a run, typed and checked; their docstrings are the command line's help."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from experiments.launch.hparams import GROUPS, build, convert, unknown_name
from mac.data.normalize import Normalize
from mac.data.sources.catalogue import SHARDS
from mac.errors import UserError
from mac.run.train import RunConfig

HP = TypeVar("HP")
Preset = Literal["auto", "paper", "laptop"]
PRESETS: tuple[str, ...] = typing.get_args(Preset)
Engine = Literal["auto", "c", "mjx", "warp"]
Resident = Literal["auto", "yes", "no"]
StoredAs = Literal["auto", "float32", "uint16"]
From = Literal["auto", "local", "download", "generate"]


@dataclass(frozen=True)
class EvalConfig:
    """Settings of the evaluation of policies."""

    episodes: int = 15
    """episodes per task and seed in each evaluation"""
    engine: Engine = "auto"
    """physics: `c` MuJoCo C on host threads, `mjx` in JAX, `warp` MuJoCo Warp; auto = the best one here"""
    batch: int = 0
    """most environments simulated at a time, where memory is short; 0 = all; results do not depend on it"""

    def __post_init__(self):
        if self.episodes < 1:
            raise UserError(f"--eval.episodes={self.episodes}: must be at least 1")
        if self.batch < 0:
            raise UserError(f"--eval.batch={self.batch}: must be at least 0")


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
    """whether all rows stay on the device, or windows of them take turns; auto = if they fit"""
    normalize: Normalize = "minmax"
    """how observations are normalised: minmax to [-1, 1] (MAC's), standard by mean and deviation, or none"""
    window: int = 1_001_000
    """most rows of a window, where windows take turns"""
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
                f"--data.path names a file, so nothing is there to {self.source}; give one of them"
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
    """algorithm to train, a name in `baselines.REGISTRY`"""
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
    out: Path | None = None
    """run folder; None = a new one, runs/ALGO_ENV_PRESET_DATE"""
    resume: bool = False
    """continue the run in --out (None = the newest in runs/) with the settings it was started with"""
    dry_run: bool = False
    """print sizes, memory and time estimates, and exit"""
    list: bool = False
    """print every algorithm with its paper and the settings that it has, and exit"""

    def __post_init__(self):
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.steps >= 2**31:
            raise UserError(f"--steps={self.steps}: must be below 2**31")
        if not 0 <= self.seed <= 2**31 - self.seeds:
            raise UserError(f"--seed={self.seed}: seeds must be in [0, 2**31)")

    def to_dict(self) -> dict[str, Any]:
        """What belongs to the run itself, as JSON data; `from_dict` is its inverse."""
        values = dataclasses.asdict(self)
        for name in _OF_THE_LAUNCH:
            del values[name]
        return _jsonable(values)


_OF_THE_LAUNCH = ("out", "resume", "dry_run", "list")


def from_dict(values: dict[str, Any], hp: type[Any], where: str) -> Settings[Any]:
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
    top = {k: convert(v, hints[k], f"{where}: {k}") for k, v in values.items() if k not in groups}
    return Settings(**groups, **top)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, Path) else value
