"""Reads command lines: flags of a typed dataclass, by tyro, with errors of one line; and starts JAX."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from experiments.cli.cuda_plugin import quiet_where_no_gpu
from experiments.cli.exit_status import is_out_of_memory
from mac.errors import UserError, one_line
from mac.run import hosts
from mac.run.mesh import use_cpu_devices

SYNTAX = "200000, 200_000, 200k, 1.5M or 1e6"
"""Whole numbers as people write them: the one syntax of all flags that count something."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_DIGITS = r"\d+(?:_\d+)*"
_NUMBER = re.compile(rf"([+-]?{_DIGITS}(?:\.\d*)?(?:e[+-]?\d{{1,3}})?)([kmbg]?)", re.ASCII | re.IGNORECASE)
_NUMBERS = f"Whole numbers may be written as {SYNTAX}."


def read_count(text: str) -> tuple[int, bool]:
    """A whole number such as 200_000, 200k, 1.5M, 1B or 1e6, and whether it has a unit.

    Raises:
        ValueError: it is no number, or no whole one.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a whole number; write it as {SYNTAX}")
    value = Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    if value != value.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number")
    return int(value), bool(match[2])


def whole_number(text: str) -> int:
    """The value of `read_count`.

    Raises:
        ValueError: it is no number, or no whole one.
    """
    return read_count(text)[0]


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_duration(text: str, flag: str) -> float:
    """Seconds of a duration such as `90s`, `9m`, `1.5h` or `2d`; more than 0.

    Raises:
        UserError: it is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"{flag} {text}: write a duration such as 90s, 9m or 1.5h")
    return float(match[1]) * _SECONDS[match[2]]


def read_flags(cls: Any, argv: Sequence[str], program: str, default: Any = None) -> Any:
    """Reads a command line as an instance of dataclass `cls`, over the values of `default` if given.

    Raises:
        UserError: an unknown flag, or a value that does not fit, in one line.
        SystemExit: after printing the help.
    """
    if not {"--help", "-h"} & set(argv):
        _check(argv, list(_flags(cls, default)))
    over = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                args=list(argv),
                prog=program,
                description=f"{_about(cls)}\n\n{_NUMBERS}",
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=_registry(),
                **over,
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, UserError):  # raised by a dataclass that checks its own values
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        print(said.getvalue(), file=sys.stderr, end="")
        raise


def _about(cls: Any) -> str:
    """The docstring of a dataclass, or of the generic one that is given its hyperparameters' class."""
    return inspect.cleandoc(typing.get_origin(cls).__doc__ if typing.get_origin(cls) else cls.__doc__)


def _registry() -> ConstructorRegistry:
    """Reads whole numbers, which may be written as `1M`; the rest is read in tyro's own way."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda words: whole_number(words[0]),
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    return registry


# Checks before tyro's, whose messages are a framed page.


class _Flag(NamedTuple):
    """A field of a dataclass on the command line: `--hp.lr`, or `RUN` if it is positional."""

    name: str
    hint: Any
    required: bool
    positional: bool

    @property
    def many(self) -> bool:
        """True if it takes any number of words."""
        return typing.get_origin(self.hint) is tuple


def flags(default: Any) -> list[str]:
    """The names of all flags, such as `--hp.lr`, of a dataclass."""
    return [flag.name for flag in _flags(type(default), default) if not flag.positional]


def _flags(cls: Any, default: Any, prefix: str = "--") -> Iterator[_Flag]:
    cls = typing.get_origin(cls) or cls
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        value = getattr(cls if default is None else default, field.name, dataclasses.MISSING)
        if dataclasses.is_dataclass(value):
            yield from _flags(type(value), value, f"{prefix}{field.name}.")
            continue
        hint, marks = hints[field.name], ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *marks = typing.get_args(hint)
        positional = tyro.conf.Positional in marks
        name = next(filter(None, (getattr(mark, "metavar", None) for mark in marks)), field.name.upper())
        name = name if positional else prefix + field.name.replace("_", "-")
        required = value in (dataclasses.MISSING, tyro.MISSING) and typing.get_origin(hint) is not tuple
        yield _Flag(name, hint, required, positional)


def _check(argv: Sequence[str], known: Sequence[_Flag]) -> None:
    """Finds what is wrong with a command line, and says it in one line.

    Raises:
        UserError: an unknown flag, with the closest ones; a value that is missing, superfluous or malformed.
    """
    by_name = {flag.name: flag for flag in known if not flag.positional}
    places, given, flag = [flag for flag in known if flag.positional], set[str](), None
    for word in argv:
        if word.startswith("--"):
            _require_value(flag, given)
            name, has_value, value = word.partition("=")
            flag = by_name.get(name.replace("_", "-"))
            if flag is None:
                raise _unknown_flag(name, list(by_name))
            if has_value:
                _check_value(flag, value)
            elif not (flag.hint is bool or flag.many):
                continue  # its value is the next word
        else:
            flag = flag or next((each for each in places if each.many or each.name not in given), None)
            if flag is None:
                raise UserError(f"unexpected argument {word!r}; see --help")
            _check_value(flag, word)
        given.add(flag.name)
        flag = flag if flag.many else None
    _require_value(flag, given)
    missing = [flag.name for flag in known if flag.required and flag.name not in given]
    if missing:
        raise UserError(f"{missing[0]} is missing; see --help")


def _require_value(flag: _Flag | None, given: set[str]) -> None:
    if flag is not None and flag.name not in given:
        raise UserError(f"{flag.name} needs a value; see --help")


def _check_value(flag: _Flag, word: str) -> None:
    hint = typing.get_args(flag.hint)[0] if flag.many else flag.hint
    options = alternatives(hint)
    faults = [fault for fault in (_fault(option, word) for option in options) if fault is not None]
    if len(faults) == len(options):
        raise UserError(f"{flag.name}: {faults[0]}; see --help")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Returns the types that a union allows; of another type the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fault(hint: Any, word: str) -> str | None:
    """The reason why a word is no value of a type; None if it is one."""
    if hint is types.NoneType:
        return None if word == "None" else f"{word!r} is not None"
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return None if word in choices else f"{word!r} is none of {', '.join(map(repr, choices))}"
    if hint is bool:
        return f"unexpected value {word!r}"
    if hint is Path and not word:
        return "'' names no file or folder"
    try:
        if hint is int:
            whole_number(word)
        elif hint is float:
            float(word)
    except ValueError as error:
        return str(error) if hint is int else f"{word!r} is not a number"
    return None


def _unknown_flag(name: str, known: list[str]) -> UserError:
    # Last parts are compared: `--lr` finds `--hp.lr`, and `--hp.` alone makes no two flags alike.
    name, last = name.replace("_", "-"), {flag: flag.lstrip("-").split(".")[-1] for flag in known}
    parts = difflib.get_close_matches(name.lstrip("-").split(".")[-1], set(last.values()), n=2, cutoff=0.7)
    near = difflib.get_close_matches(name, [flag for flag in known if last[flag] in parts], n=2, cutoff=0)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
    return UserError(f"unknown flag {name}; {hint}")


def cache_folder() -> Path:
    """The folder of what is kept to save time, and can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mac-jax"


def start_jax(seeds: int, for_help: bool = False, place: hosts.Place | None = None) -> str:
    """Sets up devices and the compile cache, and starts JAX; returns the backend's name.

    Args:
        place: of this process among those of one run; None if it is alone.
    """
    # Whoever names a number of virtual devices gets it.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already: keep its devices
            use_cpu_devices(seeds)
    if place is not None:
        hosts.start(place)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        with quiet_where_no_gpu():
            return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where the plugin is not installed at all
        if for_help:
            return "cpu"
        wanted = os.environ.get("JAX_PLATFORMS", "")
        if is_out_of_memory(error):
            raise UserError(
                "JAX cannot start on the GPU, whose memory other programs hold (nvidia-smi names them): end "
                f"them, or choose another GPU with CUDA_VISIBLE_DEVICES ({one_line(error)})"
            ) from error
        raise UserError(
            f"JAX cannot start on JAX_PLATFORMS={wanted!r} ({one_line(error)}); unset JAX_PLATFORMS to use "
            "the CPU, or install the extra `cuda12` or `cuda13` on a machine with a GPU"
        ) from error
