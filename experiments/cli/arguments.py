"""Reads command lines: flags of a typed dataclass, by tyro, with errors of one line; and starts JAX."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import typing
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from mac.errors import UserError, one_line
from mac.run.segment import use_cpu_devices

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
