"""From the command line to one typed, checked `Settings`.

Two stages: `--algo`, `--env` and `--preset` select the rows of `hparams.toml` and the class of the
hyperparameters; then tyro reads all flags over the defaults so made. A resumed run takes its
defaults from its own `config.json` instead.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from baselines import REGISTRY
from envs_mjx.registry import parse as parse_env
from experiments.cli.counts import SYNTAX, whole_number
from experiments.cli.settings import PRESETS, Settings, from_dict
from experiments.launch.hparams import HPARAMS, SELECTORS, load_rows, merge_rows, require_steps, unknown_name
from experiments.launch.saved_run import CONFIG, read_config, runs_within
from mac.errors import UserError, one_line
from mac.run.segment import use_cpu_devices

PROGRAM = "python experiments/run.py"
_NUMBERS = f"Whole numbers may be written as {SYNTAX}."
RUNS = Path("runs")
"""The folder of runs, if none is named."""


class _First(NamedTuple):
    """The flags that decide the defaults of all others; None where not given."""

    algo: str | None
    env: str | None
    preset: str | None
    seeds: int | None
    out: Path | None
    resume: bool
    help: bool


def parse(argv: Sequence[str]) -> tuple[Settings[Any], str]:
    """Settings for a command line, and the reason for the preset. Starts JAX.

    Raises:
        UserError: an unknown flag, name or key, a value out of range, or a device that is missing; in
            one line.
        SystemExit: after printing the help.
    """
    first = _first_stage(argv)
    saved = _saved(first) if first.resume and first.out else {}
    chosen = {name: getattr(first, name) or saved.get(name) or getattr(Settings, name) for name in SELECTORS}
    entry = REGISTRY.get(chosen["algo"])
    if entry is None:
        raise unknown_name("--algo", chosen["algo"], REGISTRY)
    parse_env(chosen["env"])
    if chosen["preset"] not in PRESETS:
        raise unknown_name("--preset", chosen["preset"], PRESETS)
    backend = start_jax(first.seeds or saved.get("seeds") or Settings.seeds, first.help)
    preset, reason = _choose_preset(chosen["preset"], backend)
    rows, asked = [] if saved else load_rows(HPARAMS), (chosen["algo"], chosen["env"], preset)
    if saved:
        values, where, reason = saved, str(first.out), "of the run that is continued"
    else:
        values, where = merge_rows(rows, *asked), str(HPARAMS)
    default = from_dict(values | chosen, entry.config, where)
    if not saved:
        require_steps(values, rows, *asked)
    settings = _second_stage(argv, entry.config, default)
    return dataclasses.replace(settings, preset=preset, out=first.out or settings.out), reason


def _first_stage(argv: Sequence[str]) -> _First:
    """Reads its flags only; what is wrong with others is left to the second stage."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*SELECTORS, "seeds", "out"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        known = vars(parser.parse_known_args(list(argv))[0])
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; see --help") from error
    seeds, out = known["seeds"], known["out"]
    if seeds is not None:
        try:
            known["seeds"] = whole_number(seeds)
        except ValueError as error:
            raise UserError(f"--seeds={seeds}: {error}") from error
        if known["seeds"] < 1:
            raise UserError(f"--seeds={seeds}: must be a whole number of at least 1")
    if out is None and known["resume"] and not known["help"]:
        out = _newest_run()
    known["out"] = None if out is None else Path(out)
    return _First(**known)


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


def start_jax(seeds: int, for_help: bool = False) -> str:
    """Sets up devices and the compile cache, and starts JAX; returns the backend's name."""
    with contextlib.suppress(RuntimeError):  # JAX runs already: keep its devices
        use_cpu_devices(seeds)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mac-jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where the plugin is not installed at all
        if for_help:
            return "cpu"
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX cannot start on JAX_PLATFORMS={wanted!r} ({one_line(error)}); unset JAX_PLATFORMS to use "
            "the CPU, or install the extra `cuda12` or `cuda13` on a machine with a GPU"
        ) from error


def _choose_preset(preset: str, backend: str) -> tuple[str, str]:
    if preset != "auto":
        return preset, "as asked"
    if backend == "cpu":
        return "laptop", "no accelerator found; --preset paper for the paper's sizes"
    return "paper", f"accelerator found ({backend}); --preset laptop for a quick look"


def _second_stage(argv: Sequence[str], config: type[Any], default: Settings[Any]) -> Settings[Any]:
    """All flags, over `default`."""
    return read_flags(Settings[config], argv, PROGRAM, default)


def read_flags(cls: Any, argv: Sequence[str], program: str, default: Any = None) -> Any:
    """A command line as an instance of dataclass `cls`, over the values of `default` if given.

    Raises:
        UserError: an unknown flag, or a value that does not fit, in one line.
        SystemExit: after printing the help.
    """
    _check_flags(argv, cls if default is None else default)
    over = {} if default is None else {"default": default}
    said, rejected = io.StringIO(), list[str]()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                args=list(argv),
                prog=program,
                description=f"{_about(cls)}\n\n{_NUMBERS}",
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=_registry(rejected),
                **over,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _reason(stop, said.getvalue(), rejected) from None


def _about(cls: Any) -> str:
    """The docstring of a dataclass, or of the generic one that is given its hyperparameters' class."""
    return inspect.cleandoc(typing.get_origin(cls).__doc__ if typing.get_origin(cls) else cls.__doc__)


def _registry(rejected: list[str]) -> ConstructorRegistry:
    """Reads whole numbers, which may be written as `1M`; the rest is read in tyro's own way.

    Args:
        rejected: gets what is wrong with each word that is no number.
    """
    registry = ConstructorRegistry()

    def read(words: list[str]) -> int:
        try:
            return whole_number(words[0])
        except ValueError as error:
            rejected.append(str(error))
            raise

    @registry.primitive_rule
    def whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=read,
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _check_flags(argv: Sequence[str], default: Any) -> None:
    """Finds misspelt flags by our own message, of one line, where the parser prints a page.

    Raises:
        UserError: with the flags that are closest.
    """
    known = ["--help", *flags(default)]
    for word in argv:
        flag = word.split("=", 1)[0].replace("_", "-")
        if word.startswith("--") and flag not in known:
            # A flag's last part is compared too, so that `--lr` finds `--hp.lr`.
            names = {f"--{name.split('.')[-1]}": name for name in known} | {name: name for name in known}
            close = [names[name] for name in difflib.get_close_matches(flag, names, n=2, cutoff=0.7)]
            hint = f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "see --help"
            raise UserError(f"unknown flag {flag}; {hint}")


def flags(default: Any, prefix: str = "--") -> Iterator[str]:
    """The names of all flags, such as `--hp.lr`, of a dataclass; what has no default has no flag."""
    for field in dataclasses.fields(default):
        if not hasattr(default, field.name):
            continue
        value, name = getattr(default, field.name), prefix + field.name.replace("_", "-")
        yield from flags(value, f"{name}.") if dataclasses.is_dataclass(value) else (name,)


def _reason(stop: SystemExit, box: str, rejected: Sequence[str]) -> UserError:
    """What the parser rejected: our own error where it was one, else its framed message as one line."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │|╭╮╰╯+") for line in text.splitlines()]
    body = [line for line in lines[1:] if line]
    rules = [i for i, line in enumerate(body) if set(line) <= set("─━-")]
    # Where the terminal has no box characters, a rule follows the title too.
    first = 1 if rules[:1] == [0] else 0
    last = next((i for i in rules if i >= first), len(body))
    said = " ".join(body[first:last]).removeprefix("Error parsing ").rstrip(".")
    said = re.sub(r"^Missing from .*?: (\S+) .*", r"\1 is missing", said)
    said = said.replace("Unrecognized options:", "unexpected argument")
    if rejected:  # of one of several numbers, or of a type that may be None, the parser says less
        flag, _, why = said.partition(": ")
        if why.startswith(("no type matching", "Could not find valid parse")):
            said = f"{flag}: {rejected[-1]}"
    said = re.sub(r"could not convert string to float: ('.*')", r"\1 is not a number", said)
    return UserError(f"{said or one_line(stop)}; see --help")
