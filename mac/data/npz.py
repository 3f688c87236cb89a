"""Reading of OGBench `.npz` files, in any of the three layouts in which they are found.

An OGBench trajectory of T transitions has T+1 states. The layouts differ in how they say so:

- *disk* (what OGBench hosts): T+1 rows, `terminals` set on the last row only;
- *compact* (`compact_dataset=True` of `ogbench.make_env_and_datasets`): T+1 rows, `valids` is 0 on
  the last row, and `terminals` is set on the last two;
- *regular* (its default): T rows and `next_observations`, `terminals` set on the T-th.

All three become the same rows: T+1 per episode, the action of the last row without meaning.
`terminals` marks the time limit, never success; rewards are not in the file.

Source: OGBench, Park et al. 2025, and `ogbench.utils.load_dataset` (1.2), to whose arrays the
tests compare ours.
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from mac.errors import UserError, one_line

ACTION_SLACK = 1e-3
"""How far outside [-1, 1] an action may lie (rounding of a float16 file) before it is an error."""

BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What numpy, zipfile and zlib raise on a file that is damaged or not theirs."""


class RawDataset(NamedTuple):
    """Whole episodes laid end to end.

    Attributes:
        obs: observation of each row's state, in the environment's units.
        action: action taken there, in [-1, 1]; without meaning on an episode's last row.
        first: row at which each episode begins.
        length: rows of each episode, i.e. its transitions plus one.
        notes: one line for each thing that a user should know about how the file was read.
    """

    obs: Float32[np.ndarray, "N D"]
    action: Float32[np.ndarray, "N A"]
    first: Int64[np.ndarray, " E"]
    length: Int64[np.ndarray, " E"]
    notes: tuple[str, ...] = ()


def read(path: str | Path) -> RawDataset:
    """Reads and checks one file; extra keys (`qpos`, `rewards`, ...) are ignored.

    A file that stops within an episode keeps that part: its last state becomes the end of a
    shorter episode, and `notes` says so.

    Raises:
        UserError: if the file is missing, damaged, not an OGBench archive, or holds values that
            cannot be trained on (wrong dtype, rank or length, NaN, actions outside [-1, 1]).
    """
    path = Path(path)
    arrays = _load(path)
    obs = _matrix(path, arrays, "observations")
    action = _matrix(path, arrays, "actions")
    terminal = _flags(path, arrays, "terminals")
    _equal_rows(path, arrays)
    _check_values(path, "observations", obs)
    _check_values(path, "actions", action)
    _check_range(path, action)
    if "next_observations" in arrays:
        return _from_regular(path, obs, action, terminal, _matrix(path, arrays, "next_observations"))
    if "valids" in arrays:
        valid = _flags(path, arrays, "valids")
        _check_compact(path, terminal, valid)
        terminal = ~valid
    first, length, notes = _episodes(path, terminal)
    if (length < 2).any():
        raise UserError(
            f"{path}: row {first[length < 2][0]} is an episode of one row; 'terminals' must be set once per "
            "episode, on its last row (a compact file also needs the key 'valids')"
        )
    return RawDataset(obs, action, first, length, notes)


def stated_sizes(path: str | Path) -> tuple[int, int]:
    """Rows of a file, and bytes of its observations and actions when unpacked, from its headers alone.

    Raises:
        OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error: it is damaged, which
            `read` explains.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(archive.getinfo(f"{name}.npy").file_size for name in ("observations", "actions"))
        with archive.open("observations.npy") as stream:
            if np.lib.format.read_magic(stream) == (1, 0):
                return np.lib.format.read_array_header_1_0(stream)[0][0], size
            return np.lib.format.read_array_header_2_0(stream)[0][0], size


def _load(path: Path) -> Mapping[str, Any]:
    """The arrays of the archive that this module knows, by name."""
    wanted = ("observations", "actions", "terminals", "valids", "next_observations")
    if not path.exists():
        raise UserError(f"{path}: no such dataset file; give the path of an OGBench .npz file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, where one .npz file is expected")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; delete it and make or copy it again")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a complete .npz archive (cut short, or another format); copy or make it again"
        )
    name = "its index"
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [k for k in wanted[:3] if k not in archive.files]
            if missing:
                found = ", ".join(archive.files[:8]) or "nothing"
                raise UserError(
                    f"{path}: key '{missing[0]}' is missing (found: {found}); not an OGBench dataset"
                )
            arrays = {}
            for name in wanted:
                if name in archive.files:
                    arrays[name] = archive[name]
            return arrays
    except UserError:
        raise
    except BROKEN as error:
        if "allow_pickle" in str(error):
            raise UserError(f"{path}: '{name}' holds Python objects; numbers (float32) are needed") from error
        raise UserError(
            f"{path}: damaged at {name} ({one_line(error)}); copy or make the file again"
        ) from error


def _matrix(path: Path, arrays: Mapping[str, Any], key: str) -> Float32[np.ndarray, "N C"]:
    """A floating-point array of rank 2, as float32."""
    value = arrays[key]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = getattr(value, "dtype", "no array")
        hint = "; image observations are not supported" if kind == np.uint8 else ""
        raise UserError(f"{path}: '{key}' is {kind}, floating-point numbers are needed{hint}")
    if value.ndim != 2 or value.shape[1] == 0:
        raise UserError(f"{path}: '{key}' has shape {value.shape}, (rows, columns) is needed")
    if len(value) == 0:
        raise UserError(f"{path}: '{key}' has no rows; make the dataset again")
    # A float64 too large for float32 becomes inf here, which the check for finite values reports.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value, dtype=np.float32)


def _flags(path: Path, arrays: Mapping[str, Any], key: str) -> np.ndarray:
    """An array of rank 1 that holds only zeros and ones, as booleans."""
    value = arrays[key]
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "bfiu":
        raise UserError(
            f"{path}: '{key}' is {getattr(value, 'dtype', 'no array')}, 0/1 or booleans are needed"
        )
    if value.ndim != 1:
        raise UserError(f"{path}: '{key}' has shape {value.shape}, one value per row is needed")
    flags = value.astype(bool)
    odd = np.flatnonzero(flags != value)
    if odd.size:
        raise UserError(f"{path}: '{key}' is {value[odd[0]]} in row {odd[0]}; only 0 and 1 have a meaning")
    return flags


def _equal_rows(path: Path, arrays: Mapping[str, Any]) -> None:
    rows = {key: len(value) for key, value in arrays.items() if value.ndim}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"'{key}' {count}" for key, count in rows.items())
        raise UserError(f"{path}: the arrays have unequal row counts ({listed}); make the dataset again")


def _check_values(path: Path, key: str, value: Float32[np.ndarray, "N C"]) -> None:
    finite = np.isfinite(value)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise UserError(
            f"{path}: '{key}' is not finite in float32 in row {row}, column {column} "
            f"({(~finite).any(1).sum()} such rows in all); remove those episodes or make the dataset again"
        )


def _check_range(path: Path, action: Float32[np.ndarray, "N A"]) -> None:
    beyond = np.abs(action) > 1 + ACTION_SLACK
    if beyond.any():
        row, column = np.argwhere(beyond)[0]
        raise UserError(
            f"{path}: 'actions' is {action[row, column]:.6g} in row {row}, column {column}; "
            "actions must be normalised to [-1, 1]"
        )


def _episodes(path: Path, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """First row and row count of each episode, given which rows are the last of one."""
    ends = np.flatnonzero(last).astype(np.int64)
    if ends.size == 0:
        raise UserError(
            f"{path}: 'terminals' never marks the end of an episode; set it on each episode's last row"
        )
    notes: tuple[str, ...] = ()
    tail = len(last) - 1 - int(ends[-1])
    if tail > 0:
        ends = np.append(ends, len(last) - 1)
        notes = (f"{path}: stops within an episode; its last {tail} rows are kept as a shorter episode",)
    first = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    return first, ends - first + 1, notes


def _check_compact(path: Path, terminal: np.ndarray, valid: np.ndarray) -> None:
    """`terminals` of a compact file are set on every final row, on the row before it, and nowhere else."""
    expected = ~valid
    expected[:-1] |= ~valid[1:]
    # OGBench's loader also marks the last row of a file that stops within an episode.
    expected[-1] |= terminal[-1]
    odd = np.flatnonzero(expected != terminal)
    if odd.size:
        raise UserError(
            f"{path}: 'terminals' and 'valids' contradict each other in row {odd[0]}; make the file again"
        )


def _from_regular(
    path: Path, obs: np.ndarray, action: np.ndarray, terminal: np.ndarray, next_obs: np.ndarray
) -> RawDataset:
    """Appends to each episode the final state, which the regular layout holds in `next_observations`."""
    if next_obs.shape != obs.shape:
        raise UserError(f"{path}: 'next_observations' has shape {next_obs.shape}, 'observations' {obs.shape}")
    _check_values(path, "next_observations", next_obs)
    first, length, notes = _episodes(path, terminal)
    final = first + length - 1
    follows = (next_obs[:-1] == obs[1:]).all(axis=1)
    follows[final[:-1]] = True
    if not follows.all():
        row = int(np.flatnonzero(~follows)[0])
        raise UserError(
            f"{path}: 'next_observations' of row {row} is not the observation of row {row + 1}; "
            "rows must be in time order, with 'terminals' set at each episode's last transition"
        )
    at = final + 1
    rows = np.insert(obs, at, next_obs[final], axis=0)
    actions = np.insert(action, at, np.zeros((1, action.shape[1]), np.float32), axis=0)
    shift = np.arange(len(first), dtype=np.int64)
    return RawDataset(rows, actions, first + shift, length + 1, notes)
