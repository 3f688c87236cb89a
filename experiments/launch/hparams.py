"""`hparams.toml`: hyperparameters that differ by algorithm, environment and preset, as rows of data."""

import dataclasses
import fnmatch
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from baselines import REGISTRY, AlgorithmEntry
from envs_mjx.registry import TaskId
from experiments.cli.arguments import alternatives
from mac.errors import UserError, one_line, unknown_name

HPARAMS = Path(__file__).parents[1] / "hparams.toml"
SELECTORS = ("algo", "env", "preset")
GROUPS = ("hp", "run", "eval", "data")
_ROW_KEYS = (*SELECTORS, *GROUPS, "source", "steps")


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a hyperparameter file.

    Raises:
        UserError: it is not TOML, or a row lacks its source, has an unknown key or a wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    for key in content:
        if key != "row":
            raise unknown_name(f"{path}: key", key, ["row"])
    rows = content.get("row", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: rows must be tables that begin with [[row]]")
    for i, row in enumerate(rows, start=1):
        _check_row(f"{path}, row {i}", row)
    return rows


def _check_row(where: str, row: dict[str, Any]) -> None:
    for key, value in row.items():
        if key not in _ROW_KEYS:
            raise unknown_name(f"{where}: key", key, _ROW_KEYS)
        if key in SELECTORS and isinstance(value, list) and value and all(isinstance(x, str) for x in value):
            continue
        wanted = dict if key in GROUPS else int if key == "steps" else str
        if not isinstance(value, wanted):
            kind = {dict: "a table", int: "a whole number", str: "a text"}[wanted]
            raise UserError(f"{where}: {key} = {value!r} must be {kind}")
    if not row.get("source"):
        raise UserError(f"{where}: `source` is missing; say where the values come from")


def rows_for(entry: AlgorithmEntry) -> list[dict[str, Any]]:
    """The rows of `hparams.toml`, then those of an algorithm of one's own.

    Raises:
        UserError: a file of rows is damaged.
    """
    return [*load_rows(HPARAMS), *(load_rows(entry.hparams) if entry.hparams else ())]


def merge_rows(rows: list[dict[str, Any]], algo: str, env: TaskId, preset: str) -> dict[str, Any]:
    """Values of all rows that match, later ones winning: one dictionary per group, and maybe `steps`."""
    merged: dict[str, Any] = {group: {} for group in GROUPS}
    for row in (row for row in rows if row_applies(row, algo, env, preset)):
        for group in GROUPS:
            merged[group] |= row.get(group, {})
        if "steps" in row:
            merged["steps"] = row["steps"]
    return merged


def row_applies(row: dict[str, Any], algo: str, env: TaskId | None, preset: str) -> bool:
    """True if a row applies; to any environment if `env` is None.

    Rows that name `env.hparams_of` apply too: of `NAME-play-v0`, whose goals are whole observations, that is
    `NAME-play-oraclerep-v0`; of Minari's `mujoco/NAME/LEVEL-v0` D4RL's `NAME-LEVEL-v2`.
    """
    wanted: dict[str, tuple[str, ...]] = {"algo": (algo,), "preset": (preset,)}
    if env is not None:
        wanted["env"] = (env.name, env.hparams_of)
    return all(
        any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns(row, key))
        for key, names in wanted.items()
    )


def patterns(row: dict[str, Any], key: str) -> list[str]:
    """A row's patterns of algorithms, environments or presets."""
    value = row.get(key, "*")
    return value if isinstance(value, list) else [value]


def require_steps(
    merged: dict[str, Any], rows: list[dict[str, Any]], algo: str, env: TaskId, preset: str
) -> None:
    """Checks that a row says how long to train; an algorithm or environment of one's own needs none.

    Raises:
        UserError: none of the merged rows says it.
    """
    if "steps" not in merged and algo in REGISTRY and env.collection != "registered":
        raise _missing(rows, algo, env, preset)


def _missing(rows: list[dict[str, Any]], algo: str, env: TaskId, preset: str) -> UserError:
    whole = [row for row in rows if "steps" in row]
    known = [
        pattern for row in whole if row_applies(row, algo, None, preset) for pattern in patterns(row, "env")
    ]
    where = ", ".join(dict.fromkeys(known)) or "no environment"
    others = [name for row in whole for name in patterns(row, "preset") if row_applies(row, algo, env, name)]
    remedy = f"take --preset {others[0]}" if others else "choose another environment or preset"
    return UserError(
        f"{HPARAMS.name} has no row for --algo {algo} --env {env.name} --preset {preset} that says how long "
        f"to train, only for {where}; {remedy}, or add a row"
    )


def build(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """An instance of dataclass `cls` from a file's values; what they leave out keeps its default.

    Args:
        where: file and table, for messages.
    Raises:
        UserError: an unknown key, a value of another type than the field's, or one out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_name(f"{where}: key", key, fields)
    typed = {key: to_field_type(value, fields[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**typed)
    except UserError as error:  # it names a flag, but this value came from the file
        raise UserError(f"{where}: {error}") from error


def to_field_type(value: Any, hint: Any, where: str) -> Any:
    """A value as TOML or JSON holds it, in a field's own type: lists become tuples, texts paths.

    Raises:
        UserError: it has another type.
    """
    options = alternatives(hint)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            item = typing.get_args(option)[0]
            return tuple(to_field_type(x, item, where) for x in value)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and type(value) in (int, float):
            return float(value)
        if option in (int, bool, str, types.NoneType) and type(value) is option:
            return value
    raise UserError(f"{where} = {value!r} must be {' or '.join(map(_describe, options))}")


def _describe(option: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    if typing.get_origin(option) is tuple:
        return f"a list, each entry {_describe(typing.get_args(option)[0])}"
    return names.get(option, "absent")
