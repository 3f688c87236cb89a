"""Compatibility of a checkpoint with the run that resumes from it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mac.errors import UserError


def check_shapes(path: Path, saved: Mapping[str, list[Any]], expected: Mapping[str, Any]) -> None:
    """Compares the description of a checkpoint's arrays with the leaves of a template.

    Args:
        saved: dtype name, shape (and more) of each saved array.
        expected: leaves with `shape` and `dtype`, by the same names.
    Raises:
        UserError: naming the first array that differs, and how many more do.
    """
    there = {name: (tuple(shape), dtype) for name, (dtype, shape, *_) in saved.items()}
    here = {name: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for name, leaf in expected.items()}
    differing = [name for name in there | here if there.get(name) != here.get(name)]
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{path}: checkpoint of another configuration: {name} is {_show(there.get(name))} there, "
            f"{_show(here.get(name))} here{more}; use the run's own settings, or another --out"
        )


def _show(array: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if array is None else f"{array[1]}{list(array[0])}"


def check_config(
    path: Path,
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    may_differ: Collection[str],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Compares two configurations, up to what JSON does to their types.

    Args:
        saved: nested dictionaries as read from JSON.
        current: the same, before JSON.
        may_differ: dotted keys that are not compared.
        defaults: as of `assumed_defaults`.
    Raises:
        UserError: naming the keys that differ, with both values.
    """
    there = _flat(saved) | assumed_defaults(saved, current, defaults)
    here = _flat(_plain(current))
    differing = [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(there | here)
        if there.get(key, _flat) != here.get(key, _flat) and key not in may_differ
    ]
    if differing:
        shown = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise UserError(
            f"{path} was begun with another configuration: {shown}; "
            "use the run's own settings, or another --out"
        )


def assumed_defaults(
    saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Values, by dotted key, of options that a run begun before them lacks and `current` leaves off.

    Args:
        saved: nested dictionaries as read from JSON.
        current: the same, before JSON.
        defaults: the values that mean "off", nested as `current`; no other key may be absent.
    """
    there, here = _flat(saved), _flat(_plain(current))
    off = _flat(_plain(defaults)).items()
    return {key: value for key, value in off if key not in there and here.get(key, _flat) == value}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    return json.loads(json.dumps(dict(values), default=str))


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by dotted key."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
