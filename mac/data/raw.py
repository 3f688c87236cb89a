"""Whole episodes as every reader of dataset files returns them, and the checks that all readers share.

A check raises `UserError` with one line that names the file, the array, the row and a remedy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from mac.errors import UserError

ACTION_SLACK = 1e-3
"""How far outside [-1, 1] an action may lie (rounding of a float16 file) before it is an error."""


class RawDataset(NamedTuple):
    """Whole episodes laid end to end.

    Attributes:
        obs: observation of each row's state, in the environment's units.
        action: action taken there, in [-1, 1]; without meaning on an episode's last row.
        first: row at which each episode begins.
        length: rows of each episode, i.e. its transitions plus one.
        notes: one line for each thing that a user should know about how the file was read.
        reward: what each row's action earned, 0 on an episode's last row; None if the file records none.
        fell: whether each episode ended by itself (a fall), and not by a time limit; None as `reward`.
    """

    obs: Float32[np.ndarray, "N D"]
    action: Float32[np.ndarray, "N A"]
    first: Int64[np.ndarray, " E"]
    length: Int64[np.ndarray, " E"]
    notes: tuple[str, ...] = ()
    reward: Float32[np.ndarray, " N"] | None = None
    fell: Bool[np.ndarray, " E"] | None = None


def check_file(path: Path, what: str) -> None:
    """Whether there is a file to read at all; `what` names what is expected, such as `.npz`."""
    if not path.exists():
        raise UserError(f"{path}: no such dataset file; give the path of {what} file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where one file ({what}) is expected")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; delete it and make or copy it again")


def matrix(path: Path, arrays: Mapping[str, Any], key: str) -> Float32[np.ndarray, "N C"]:
    """A floating-point array of rank 2, as float32."""
    value = _numbers(path, arrays, key)
    if value.ndim != 2 or value.shape[1] == 0:
        raise UserError(f"{path}: '{key}' has shape {value.shape}, (rows, columns) is needed")
    return _float32(path, key, value)


def vector(path: Path, arrays: Mapping[str, Any], key: str) -> Float32[np.ndarray, " N"]:
    """A floating-point array of one value per row, as float32."""
    value = _numbers(path, arrays, key)
    if value.ndim == 2 and value.shape[1] == 1:
        value = value[:, 0]
    if value.ndim != 1:
        raise UserError(f"{path}: '{key}' has shape {value.shape}, one value per row is needed")
    return _float32(path, key, value)


def _numbers(path: Path, arrays: Mapping[str, Any], key: str) -> np.ndarray:
    value = arrays[key]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = getattr(value, "dtype", "no array")
        hint = "; image observations are not supported" if kind == np.uint8 else ""
        raise UserError(f"{path}: '{key}' is {kind}, floating-point numbers are needed{hint}")
    return value


def _float32(path: Path, key: str, value: np.ndarray) -> Shaped[np.ndarray, "N ..."]:
    if len(value) == 0:
        raise UserError(f"{path}: '{key}' has no rows; make the dataset again")
    # A float64 too large for float32 becomes inf here, which the check for finite values reports.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value, dtype=np.float32)


def flags(path: Path, arrays: Mapping[str, Any], key: str) -> Bool[np.ndarray, " N"]:
    """An array of rank 1 that holds only zeros and ones, as booleans."""
    value = arrays[key]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "bfiu":
        raise UserError(
            f"{path}: '{key}' is {getattr(value, 'dtype', 'no array')}, 0/1 or booleans are needed"
        )
    if value.ndim != 1:
        raise UserError(f"{path}: '{key}' has shape {value.shape}, one value per row is needed")
    found = value.astype(bool)
    odd = np.flatnonzero(found != value)
    if odd.size:
        raise UserError(f"{path}: '{key}' is {value[odd[0]]} in row {odd[0]}; only 0 and 1 have a meaning")
    return found


def check_equal_rows(path: Path, arrays: Mapping[str, Any]) -> None:
    """All arrays have as many rows."""
    rows = {key: len(value) for key, value in arrays.items() if value.ndim}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"'{key}' {count}" for key, count in rows.items())
        raise UserError(f"{path}: the arrays have unequal row counts ({listed}); make the dataset again")


def check_values(path: Path, key: str, value: Float32[np.ndarray, "N ..."]) -> None:
    """All values are finite."""
    finite = np.isfinite(value).reshape(len(value), -1)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        at = f"row {row}, column {column}" if value.ndim > 1 else f"row {row}"
        raise UserError(
            f"{path}: '{key}' is not finite in float32 in {at} "
            f"({(~finite).any(1).sum()} such rows in all); remove those episodes or make the dataset again"
        )


def check_range(path: Path, action: Float32[np.ndarray, "N A"], key: str = "actions") -> None:
    """All actions are normalised."""
    beyond = np.abs(action) > 1 + ACTION_SLACK
    if beyond.any():
        row, column = np.argwhere(beyond)[0]
        raise UserError(
            f"{path}: '{key}' is {action[row, column]:.6g} in row {row}, column {column}; "
            "actions must be normalised to [-1, 1]"
        )


def episodes_between(
    path: Path, ends: Int64[np.ndarray, " ends"], rows: int
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"], tuple[str, ...]]:
    """First row and row count of each episode, given the last row of each; what follows is one more."""
    notes: tuple[str, ...] = ()
    tail = rows - 1 - int(ends[-1]) if ends.size else rows
    if tail > 0:
        ends = np.append(ends, rows - 1)
        notes = (f"{path}: stops within an episode; its last {tail} rows are kept as a shorter episode",)
    first = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    return first, (ends - first + 1).astype(np.int64), notes


def with_final_states(
    data: RawDataset, final_obs: Float32[np.ndarray, "E D"], where: Bool[np.ndarray, " E"]
) -> RawDataset:
    """Adds a row with the state `final_obs` behind each episode `where` is set; its action and reward are 0.

    Args:
        final_obs: the state after each episode's last action.
    """
    at = (data.first + data.length)[where]
    before = np.cumsum(where) - where
    nothing = np.zeros((1, data.action.shape[1]), np.float32)
    return data._replace(
        obs=np.insert(data.obs, at, final_obs[where], axis=0),
        action=np.insert(data.action, at, nothing, axis=0),
        first=data.first + before.astype(np.int64),
        length=data.length + where.astype(np.int64),
        reward=None if data.reward is None else np.insert(data.reward, at, np.float32(0)),
    )
