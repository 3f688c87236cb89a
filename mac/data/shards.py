"""The files that a store is made from, and one shard of it with the note beside it of what it holds."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mac.atomic_files import fsync, load_json, visible
from mac.data import hdf5, npz
from mac.data import quantize as coding
from mac.data.quantize import Codec, CodingLoss, ColumnSummary
from mac.data.raw_dataset import RawDataset, Sizes
from mac.data.store import ACTION, CHECKS, EPISODES, OBS, REWARD, Statistics, save_checks
from mac.errors import UserError
from mac.types import EnvSpec

SHARD = "shard.json"


def shard_files(path: str | Path) -> tuple[Path, ...]:
    """The training files at `path`: itself, or a folder's `*.npz` without `*-val.npz`, by name; if it has
    none, its hdf5 files. Hidden files do not count.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such dataset; give an .npz or .hdf5 file, or a folder of them")
    if not path.is_dir():
        return (path,)
    for suffix in (".npz", *hdf5.SUFFIXES):
        files = [p for p in visible(path, f"*{suffix}") if not p.stem.endswith("-val")]
        if files:
            return tuple(files)
    raise UserError(f"{path}: this folder holds no training .npz file, nor an hdf5 file")


def val_file(train: Path) -> Path:
    """Returns the path of OGBench's validation split of a training file; D4RL and Minari have none."""
    return train.with_name(f"{train.stem}-val{train.suffix}")


def read_file(file: Path, spec: EnvSpec) -> RawDataset:
    """Reads and checks a file, by its suffix; rewards and terminations are read where `spec.recorded`.

    Raises:
        UserError: it is damaged, or lacks what the environment needs.
    """
    limit = spec.max_steps or None
    if file.suffix in hdf5.SUFFIXES:
        data = hdf5.read_hdf5(file, limit)
    elif spec.recorded:
        with npz.opened_arrays(file, npz.NEEDED, hdf5.WANTED) as arrays:
            if "rewards" not in arrays:
                raise UserError(
                    f"{file}: holds no rewards, which {spec.name} takes from its data; add 'rewards', or "
                    "take --env data-only-goals, which needs none"
                )
            data = hdf5.from_transitions(file, arrays, limit)
    else:
        data = npz.read_npz(file)
    return data if spec.recorded else data._replace(reward=None, terminated=None)


def stated_widths(file: Path) -> tuple[int, int]:
    """Columns of observations and of actions, from the headers of a file.

    Raises:
        UserError: it is damaged, or of another layout.
    """
    return (hdf5 if file.suffix in hdf5.SUFFIXES else npz).stated_widths(file)


class ConvertedShard(NamedTuple):
    """Description of a converted shard; kept beside it.

    Attributes:
        source: name of its file; `sha256` the checksum of the file's content.
        codec: how its rows are coded, as plain data; None for float32.
        rows: its rows.
        notes: what a user should know about the file.
        summary: of observations and actions, as plain data; so is `loss`, None for float32.
        sizes: bytes of its files.
    """

    source: str
    sha256: str
    codec: dict[str, Any] | None
    rows: int
    notes: list[str]
    summary: list[dict[str, Any]]
    loss: list[dict[str, Any]] | None = None
    sizes: dict[str, int] | None = None


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of each array in the folder of a shard; of those that are missing nothing is said."""
    found = {}
    for name in (OBS, ACTION, EPISODES, REWARD, CHECKS):
        with contextlib.suppress(OSError):
            found[name] = (folder / name).stat().st_size
    return found


def summarize_columns(data: RawDataset) -> list[dict[str, Any]]:
    """Summaries of observations and of actions, as plain data."""
    return [coding.summarize(rows).to_dict() for rows in (data.obs, data.action)]


def merged(parts: Sequence[ConvertedShard]) -> list[ColumnSummary]:
    """Summaries of observations and of actions over all parts."""
    return [
        coding.merge_summaries([ColumnSummary.from_dict(part.summary[i]) for part in parts]) for i in range(2)
    ]


def statistics(train: Sequence[ConvertedShard], val: Sequence[ConvertedShard]) -> Statistics:
    """Summaries of the observations of all training and of all validation rows."""
    return Statistics(merged(train)[0], merged(val)[0] if val else None)


def write_rows(folder: Path, data: RawDataset, codec: Codec | None) -> list[dict[str, Any]] | None:
    """Writes the arrays of a shard, and returns what its codes lose."""
    recorded = [] if data.terminated is None else [data.terminated.astype(np.int64)]
    _save(folder / EPISODES, np.stack([data.first, data.length, *recorded], axis=1))
    if data.reward is not None:
        _save(folder / REWARD, data.reward)
    losses, stored = [], []
    for i, (name, rows) in enumerate(((OBS, data.obs), (ACTION, data.action))):
        codes = rows if codec is None else codec[i].encode(rows)
        _save(folder / name, codes)
        stored.append(codes)
        if codec is not None:
            losses.append(coding.coding_loss(rows, codes, codec[i]).to_dict())
    save_checks(folder, data.length, [*stored, *([] if data.reward is None else [data.reward])])
    return losses or None


def quality(parts: Sequence[ConvertedShard]) -> dict[str, Any]:
    """Range and spread of each column, and, for codes, the largest and the typical (root mean square)
    error in units of the standard deviation and of the range; 0 for a constant column.
    """
    out: dict[str, Any] = {}
    for i, name in enumerate(Codec._fields):
        summary = merged(parts)[i]
        columns: dict[str, Any] = {"low": summary.low, "high": summary.high, "std": summary.std}
        if parts[0].loss is not None:
            loss = coding.merge_losses([CodingLoss.from_dict(part.loss[i]) for part in parts if part.loss])
            errors = {"largest": loss.largest, "typical": np.sqrt(loss.square / loss.rows)}
            for unit, size in (("std", summary.std), ("range", summary.high - summary.low)):
                for kind, error in errors.items():
                    columns[f"{kind}_error_in_{unit}"] = error / np.where(size > 0, size, 1.0)
        out[name] = {key: value.tolist() for key, value in columns.items()}
    return out


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
        fsync(file)


def read_part(path: Path) -> ConvertedShard | None:
    """Reads the note there; None if there is no readable one."""
    try:
        return ConvertedShard(**load_json(path))
    except (OSError, ValueError, TypeError):
        return None


def sizes_of(file: Path) -> Sizes:
    """Reads the headers of a file; zeros if it is damaged."""
    with contextlib.suppress(UserError):
        return (hdf5 if file.suffix in hdf5.SUFFIXES else npz).stated_sizes(file)
    return Sizes(0, 0, 0)
