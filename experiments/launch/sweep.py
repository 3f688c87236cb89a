"""Sweeps: `--sweep hp.alpha=0.1,1,10` trains several configurations, each for all seeds, in one program."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.launch.hparams import unknown_name
from experiments.launch.settings import Settings
from mac.config import CommonConfig
from mac.errors import UserError
from mac.run.io.run_outputs import Variant

_PREFIX = "hp."


def variants(settings: Settings[Any]) -> tuple[Variant, ...]:
    """Returns the configurations trained at once: every combination of `--sweep`, or the only one.

    Raises:
        UserError: a hyperparameter that is unknown or cannot be swept, or a value that does not fit.
    """
    if not settings.sweep:
        return (Variant("", {}, settings.to_dict()),)
    axes: dict[str, list[float]] = {}
    for asked in settings.sweep:
        name, values = _read(asked, settings.hp)
        if name in axes:
            raise UserError(f"--sweep {asked}: {name} is given twice; give all its values at once")
        axes[name] = values
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = ",".join(f"{key}={_brief(value)}" for key, value in chosen.items())
        found.append(Variant(name, chosen, variant_settings(settings, chosen).to_dict()))
    return tuple(found)


def variant_settings(settings: Settings[Any], values: dict[str, float]) -> Settings[Any]:
    """Settings of a run of its own that does what one configuration of the sweep does.

    Raises:
        UserError: a value is out of range.
    """
    return dataclasses.replace(settings, hp=dataclasses.replace(settings.hp, **values), sweep=())


def run_folders(settings: Settings[Any], folder: Path) -> Iterator[tuple[Path, Settings[Any]]]:
    """Every folder in which the launch leaves a record, with the settings that belong there: `folder`, and
    in a sweep those of its configurations.
    """
    yield folder, settings
    for variant in variants(settings) if settings.sweep else ():
        yield folder / variant.name, variant_settings(settings, variant.values)


def _brief(value: float) -> str:
    """A number in few digits, but so many that no other number is written alike."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _read(asked: str, hp: CommonConfig) -> tuple[str, list[float]]:
    """The hyperparameter that `hp.NAME=V1,V2,...` names, and its values."""
    flag, _, text = asked.partition("=")
    name = flag.removeprefix(_PREFIX).replace("-", "_")
    known = [field.name for field in dataclasses.fields(hp)]
    sweepable = hp.sweepable()
    if not text or not flag.startswith(_PREFIX):
        raise UserError(f"--sweep {asked}: write hp.NAME=V1,V2,...; NAME may be {', '.join(sweepable)}")
    if name not in known:
        raise unknown_name(f"--sweep {asked}: hyperparameter", name, sweepable)
    if name not in sweepable:
        raise UserError(
            f"--sweep {asked}: {name} is static: it decides what is compiled, so start a run for each of its "
            f"values. What one program can train at once: {', '.join(sweepable)}"
        )
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError as error:
        raise UserError(f"--sweep {asked}: the values of {name} must be numbers between commas") from error
    if len(set(values)) < len(values):
        raise UserError(f"--sweep {asked}: a value of {name} is given twice; give each once")
    return name, values
