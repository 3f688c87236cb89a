"""From the command line and `hparams.toml` to one typed, checked `Settings`.

Two stages: `--algo`, `--env` and `--preset` select the rows of `hparams.toml` and the class of the
hyperparameters; then tyro reads all flags over the defaults so made.
"""

import argparse
import contextlib
import dataclasses
import difflib
import fnmatch
import io
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import tyro

from baselines import REGISTRY
from envs_mjx.registry import parse as parse_env
from mac.errors import UserError, one_line
from mac.run.record import read_json
from mac.run.segment import use_cpu_devices
from mac.run.train import RunConfig

HP = TypeVar("HP")
HPARAMS = Path(__file__).with_name("hparams.toml")
GROUPS = ("hp", "run", "eval", "data")
SELECTORS = ("algo", "env", "preset")


@dataclass(frozen=True)
class EvalConfig:
    """How policies are evaluated."""

    episodes: int = 15
    """episodes per task and seed in each evaluation"""
    engine: Literal["auto", "mjx", "c"] = "auto"
    """physics: `mjx` in JAX, `c` MuJoCo C on host threads; auto = mjx on an accelerator, else c"""

    def __post_init__(self):
        if self.episodes < 1:
            raise UserError(f"--eval.episodes={self.episodes}: must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Where the dataset comes from."""

    path: Path | None = None
    """an OGBench .npz file, or a folder of shards; default: search, else generate"""
    dir: Path = Path("data")
    """folder for generated datasets and converted stores; also searched, as is ~/.ogbench/data"""
    rows: int = 1_001_000
    """rows to generate if no dataset is found (1001 per episode; a tenth more for validation)"""
    seed: int = 0
    """seed of the generated dataset"""

    def __post_init__(self):
        if self.rows < 1:
            raise UserError(f"--data.rows={self.rows}: must be at least 1")


@dataclass(frozen=True)
class Settings(Generic[HP]):
    """Trains an offline RL algorithm on all seeds at once, and evaluates it in batched physics."""

    hp: HP
    """hyperparameters of the algorithm"""
    run: RunConfig
    eval: EvalConfig
    data: DataConfig
    algo: str = "mac"
    """algorithm"""
    env: str = "cube-single-play-singletask-task2-v0"
    """OGBench dataset name: environment, data and task"""
    preset: Literal["auto", "paper", "laptop"] = "auto"
    """defaults: the paper's, or ones that learn on two CPU cores; auto = paper on an accelerator, else laptop"""
    seeds: int = 4
    """number of seeds, trained together"""
    seed: int = 0
    """first seed; the run uses SEED ... SEED + SEEDS - 1"""
    steps: int = 1_000_000
    """updates per seed"""
    out: Path | None = None
    """run folder; default: runs/ALGO_ENV_PRESET_DATE"""
    resume: bool = False
    """continue the run in --out (default: the newest in runs/) with the settings it was started with"""
    dry_run: bool = False
    """print sizes, memory and time estimates, and exit"""

    def __post_init__(self):
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.seed < 2**31 - self.seeds:
            raise UserError(f"--seed={self.seed}: must be in [0, 2**31 - seeds)")

    def plain(self) -> dict[str, Any]:
        """All settings as JSON data, without what does not belong to the run itself."""
        values = dataclasses.asdict(self)
        for name in ("out", "resume", "dry_run"):
            del values[name]
        return _jsonable(values)


def parse(argv: Sequence[str]) -> tuple[Settings[Any], str]:
    """Settings for a command line, and the reason for the preset.

    Raises:
        UserError: an unknown flag, name or key, or a value out of range; in one line.
        SystemExit: after printing the help.
    """
    first = _first_stage(argv)
    saved = _saved(first) if first["resume"] else {}
    chosen = {name: first[name] or saved.get(name) or getattr(Settings, name) for name in SELECTORS}
    seeds = first["seeds"] or saved.get("seeds") or Settings.seeds
    _start_jax(seeds)
    entry = REGISTRY.get(chosen["algo"])
    if entry is None:
        raise _unknown("--algo", chosen["algo"], REGISTRY)
    parse_env(chosen["env"])
    preset, reason = _choose_preset(chosen["preset"])
    values = saved or merge_rows(load_rows(HPARAMS), chosen["algo"], chosen["env"], preset)
    defaults = _defaults(entry.config, values, str(HPARAMS) if not saved else "the run's config.json")
    top = {k: v for k, v in values.items() if k not in GROUPS} | {**chosen, "preset": preset, "seeds": seeds}
    settings = _second_stage(argv, entry.config, Settings(**defaults, **top))
    return dataclasses.replace(settings, preset=preset, out=first["out"] or settings.out), reason


def _first_stage(argv: Sequence[str]) -> dict[str, Any]:
    """The flags that decide the defaults of all others; errors in them are left to the second stage."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*SELECTORS, "seeds", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--resume", action="store_true")
    try:
        known = vars(parser.parse_known_args(list(argv))[0])
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; see --help") from error
    if known["seeds"] is not None:
        if not known["seeds"].lstrip("-").isdecimal() or int(known["seeds"]) < 1:
            raise UserError(f"--seeds={known['seeds']}: must be a whole number of at least 1")
        known["seeds"] = int(known["seeds"])
    if known["resume"] and known["out"] is None:
        known["out"] = _newest_run()
    known["out"] = known["out"] and Path(known["out"])
    return known


def _newest_run() -> Path:
    runs = sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError("--resume: there is no run in runs/; name its folder with --out")
    return runs[-1].parent


def _saved(first: dict[str, Any]) -> dict[str, Any]:
    """The settings that the run to be resumed was started with."""
    path = first["out"] / "config.json"
    if not path.exists():
        raise UserError(f"--resume: {first['out']} holds no run (no config.json); check --out, or leave --resume out")
    values = read_json(path)
    for name in ("algo", "env"):
        if first[name] and first[name] != values.get(name):
            raise UserError(
                f"--{name}={first[name]}: the run in {first['out']} has {values.get(name)}; choose another --out"
            )
    return values


def _start_jax(seeds: int) -> None:
    """Sets up devices and the compile cache, and starts JAX, so that a missing device is reported here."""
    use_cpu_devices(seeds)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mac-jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        jax.devices()
    except RuntimeError as error:
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX cannot start on JAX_PLATFORMS={wanted!r} ({one_line(error)}); unset JAX_PLATFORMS to use the CPU, "
            "or install the extra `cuda12` or `cuda13` on a machine with a GPU"
        ) from error


def _choose_preset(preset: str) -> tuple[str, str]:
    backend = jax.default_backend()
    if preset != "auto":
        return preset, "as asked"
    if backend == "cpu":
        return "laptop", "no accelerator found; --preset paper for the paper's sizes"
    return "paper", f"accelerator found ({backend}); --preset laptop for a quick look"


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a hyperparameter file.

    Raises:
        UserError: it is not TOML, or a row lacks its source or has an unknown key.
    """
    try:
        rows = tomllib.loads(path.read_text()).get("row", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    for i, row in enumerate(rows, start=1):
        if not row.get("source"):
            raise UserError(f"{path}, row {i}: `source` is missing; say where the values come from")
        for key in row:
            if key not in (*SELECTORS, *GROUPS, "source", "steps"):
                raise _unknown(f"{path}, row {i}: key", key, (*SELECTORS, *GROUPS, "source", "steps"))
    return rows


def merge_rows(rows: list[dict[str, Any]], algo: str, env: str, preset: str) -> dict[str, Any]:
    """Values of all rows that match, later ones winning; at least one must match.

    Raises:
        UserError: none matches.
    """
    wanted = {"algo": algo, "env": env, "preset": preset}
    merged: dict[str, Any] = {group: {} for group in GROUPS}
    found = [r for r in rows if all(fnmatch.fnmatchcase(v, r.get(k, "*")) for k, v in wanted.items())]
    if not found:
        raise UserError(f"{HPARAMS}: no row for --algo {algo} --env {env} --preset {preset}; add one, or choose another")
    for row in found:
        for group in GROUPS:
            merged[group] |= row.get(group, {})
        merged |= {"steps": row["steps"]} if "steps" in row else {}
    return merged


def _defaults(config: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    classes = {"hp": config, "run": RunConfig, "eval": EvalConfig, "data": DataConfig}
    out = {}
    for group, cls in classes.items():
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = values.get(group, {})
        for key in given:
            if key not in fields:
                raise _unknown(f"{where}: {group} key", key, fields)
        out[group] = cls(**{k: _typed(v, k) for k, v in given.items()})
    return out


def _typed(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if name in ("path", "dir") and value is not None else value


def _second_stage(argv: Sequence[str], config: type[Any], default: Settings[Any]) -> Settings[Any]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Settings[config],
                args=list(argv),
                default=default,
                prog="python experiments/run.py",
                config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes) if False else (tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_flatten(said.getvalue())) from None


def _flatten(box: str) -> str:
    """The framed, many-lined message of the parser as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │╭╮╰╯─━┃┏┓┗┛|") for line in text.splitlines()]
    return "; ".join(line for line in lines if line).replace(":;", ":")


def _unknown(what: str, name: str, known: Any) -> UserError:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"
    return UserError(f"{what} {name!r} is not known; {hint}")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, Path) else value
