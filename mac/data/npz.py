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
from typing import Any

import numpy as np

from mac.data.raw import (
    RawDataset,
    check_equal_rows,
    check_file,
    check_range,
    check_values,
    episodes_between,
    flags,
    matrix,
    with_final_states,
)
from mac.errors import UserError, one_line

BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What numpy, zipfile and zlib raise on a file that is damaged or not theirs."""


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
    obs = matrix(path, arrays, "observations")
    action = matrix(path, arrays, "actions")
    terminal = flags(path, arrays, "terminals")
    check_equal_rows(path, arrays)
    check_values(path, "observations", obs)
    check_values(path, "actions", action)
    check_range(path, action)
    if "next_observations" in arrays:
        return _from_regular(path, obs, action, terminal, matrix(path, arrays, "next_observations"))
    if "valids" in arrays:
        valid = flags(path, arrays, "valids")
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
    check_file(path, "an OGBench .npz")
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


def _episodes(path: Path, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """First row and row count of each episode, given which rows are the last of one."""
    ends = np.flatnonzero(last).astype(np.int64)
    if ends.size == 0:
        raise UserError(
            f"{path}: 'terminals' never marks the end of an episode; set it on each episode's last row"
        )
    return episodes_between(path, ends, len(last))


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
    check_values(path, "next_observations", next_obs)
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
    data = RawDataset(obs, action, first, length, notes)
    return with_final_states(data, next_obs[final], np.ones(len(first), bool))
