"""The NPZ files of a dataset in OGBench's layout: their names, and a writer that fills them.

A dataset is one pair `<stem>.npz`, `<stem>-val.npz`, or several pairs `<stem>-000.npz`,
`<stem>-000-val.npz`, ... An unfinished file is a folder with one full-size `.npy` per column. Episodes are
written into it as they arrive, in any order, and the `.npz` is assembled by copying. So memory is bounded
whatever a file's size.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from envs_mjx.datagen.data_policy import StepRecords
from mac.atomic_files import fsync, replace_file

TRAIN, VAL = 0, 1
_DISK_TYPES = {"button_states": np.dtype(np.int64)}  # of the other columns: float32
_TERMINALS = "terminals"
_BLOCK = 1 << 20  # bytes copied at a time


class ShardFile(NamedTuple):
    """One file: `episodes` episodes of a split, from number `first` on."""

    stem: str
    split: int
    first: int
    episodes: int

    @property
    def keys(self) -> Iterator[tuple[int, int]]:
        """Split and number of each episode."""
        return ((self.split, i) for i in range(self.first, self.first + self.episodes))


class Shard(NamedTuple):
    """A pair of files, training and validation."""

    train: ShardFile
    val: ShardFile

    @property
    def keys(self) -> Iterator[tuple[int, int]]:
        """Split and number of each episode."""
        return (key for part in self for key in part.keys)


class ArraySpec(NamedTuple):
    """One array of a file: numbers per row, and their type on disk."""

    width: int
    dtype: np.dtype


def make_shards(stem: str, episodes: int, per_shard: int) -> tuple[Shard, ...]:
    """Distributes `episodes` training episodes over pairs of files. The validation file of each pair has a
    tenth as many, at least one.
    """
    starts = range(0, episodes, per_shard)
    shards: list[Shard] = []
    for number, first in enumerate(starts):
        count, name = min(per_shard, episodes - first), f"{stem}-{number:03}" if len(starts) > 1 else stem
        val_first = sum(shard.val.episodes for shard in shards[-1:]) + (shards[-1].val.first if shards else 0)
        val = ShardFile(f"{name}-val", VAL, val_first, max(count // 10, 1))
        shards.append(Shard(ShardFile(name, TRAIN, first, count), val))
    return tuple(shards)


def file_arrays(widths: Mapping[str, int]) -> dict[str, ArraySpec]:
    """Returns the arrays of a file, given the widths of `StepRecords` (0: no such array)."""
    kinds = {name: _DISK_TYPES.get(name, np.dtype(np.float32)) for name in widths}
    return {name: ArraySpec(width, kinds[name]) for name, width in widths.items() if width}


def file_row_bytes(layout: Mapping[str, ArraySpec]) -> int:
    """Returns the bytes of a row on disk."""
    return sum(column.width * column.dtype.itemsize for column in layout.values()) + 1


class NpzShardWriter:
    """Writer of the unfinished files of one dataset, in a working folder. Disk errors are `OSError`s, and
    `UserError`s where a finished file is moved into place.
    """

    def __init__(self, work: Path, layout: Mapping[str, ArraySpec], rows: int):
        """Args: the folder, the arrays of a file, and the rows of each episode."""
        self.work, self.layout, self.rows = work, layout, rows

    def holds(self, part: ShardFile) -> bool:
        """Returns whether a file is in progress, so that episodes written into it still exist."""
        return all(self._array(part, name).exists() for name in self.layout)

    def put(self, part: ShardFile, episode: int, rows: StepRecords) -> None:
        """Writes the rows of an episode, a number within its split."""
        for name, column in self.layout.items():
            path = self._array(part, name)
            if not path.exists():
                self._reserve(path, part, column)
            data = np.ascontiguousarray(getattr(rows, name), dtype=column.dtype)
            assert data.shape == (self.rows, column.width)
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size - (part.first + part.episodes - episode) * data.nbytes)
                file.write(data.data)

    def settle(self, part: ShardFile) -> None:
        """Flushes the arrays of a file to the disk (`fsync`)."""
        for name in self.layout:
            with open(self._array(part, name), "r+b") as file:
                fsync(file)

    def assemble(self, part: ShardFile, final: Path) -> None:
        """Assembles the `.npz` of a file whose episodes are all written."""
        replace_file(final, lambda file: self._pack(part, file), part=self.work / f"{part.stem}.npz.part")

    def drop(self, part: ShardFile) -> None:
        """Removes the working arrays of a file."""
        shutil.rmtree(self.work / part.stem, ignore_errors=True)

    def _array(self, part: ShardFile, name: str) -> Path:
        return self.work / part.stem / f"{name}.npy"

    def _reserve(self, path: Path, part: ShardFile, column: ArraySpec) -> None:
        """Allocates an array of the right size, so that a full disk is noticed before the work, not after
        it."""
        shape = part.episodes * self.rows, column.width
        size = shape[0] * shape[1] * column.dtype.itemsize

        def reserve(file: IO[bytes]) -> None:
            header = {"descr": column.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), size)
            else:
                file.truncate(file.tell() + size)

        replace_file(path, reserve, part=self.work / f"{part.stem}.{path.name}.part")

    def _pack(self, part: ShardFile, file: IO[bytes]) -> None:
        """Writes the `.npz`: the arrays as they are, and `terminals`."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in self.layout:
                with (
                    open(self._array(part, name), "rb") as source,
                    archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as target,
                ):
                    shutil.copyfileobj(source, target, _BLOCK)
            with archive.open(zipfile.ZipInfo(f"{_TERMINALS}.npy"), "w", force_zip64=True) as target:
                row = np.arange(part.episodes * self.rows) % self.rows
                np.lib.format.write_array(target, row == self.rows - 1, allow_pickle=False)
