"""The files of a dataset, as OGBench has them: their names, and how they are filled and put together.

A dataset is one pair `<stem>.npz`, `<stem>-val.npz`, or several pairs `<stem>-000.npz`,
`<stem>-000-val.npz`, ... A file under way is a folder with one `.npy` per column, at its full size, into
which episodes are written as they arrive, in any order. So memory is bounded whatever a file's size: rows
go straight to their places on disk, and the `.npz` is put together by copying.
"""

import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from envs_mjx.datagen.data_policy import Rows
from mac.atomic_files import fsync, replace_file

TRAIN, VAL = 0, 1
_DISK_TYPES = {"button_states": np.dtype(np.int64)}  # of the other columns: float32
_TERMINALS = "terminals"
_BLOCK = 1 << 20  # bytes copied at a time


class Part(NamedTuple):
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
    """A pair of files."""

    train: Part
    val: Part

    @property
    def keys(self) -> Iterator[tuple[int, int]]:
        """Split and number of each episode."""
        return (key for part in self for key in part.keys)


class Column(NamedTuple):
    """One array of a file: numbers per row, and their type on disk."""

    width: int
    dtype: np.dtype


def make_shards(stem: str, episodes: int, per_shard: int) -> tuple[Shard, ...]:
    """How `episodes` training episodes are shared out over pairs of files. The validation file of each
    pair has a tenth as many, at least one.
    """
    starts = range(0, episodes, per_shard)
    shards: list[Shard] = []
    for number, first in enumerate(starts):
        count, name = min(per_shard, episodes - first), f"{stem}-{number:03}" if len(starts) > 1 else stem
        val_first = sum(shard.val.episodes for shard in shards[-1:]) + (shards[-1].val.first if shards else 0)
        val = Part(f"{name}-val", VAL, val_first, max(count // 10, 1))
        shards.append(Shard(Part(name, TRAIN, first, count), val))
    return tuple(shards)


def columns(widths: Mapping[str, int]) -> dict[str, Column]:
    """Arrays of a file, given the widths of `Rows` (0: there is no such array)."""
    kinds = {name: _DISK_TYPES.get(name, np.dtype(np.float32)) for name in widths}
    return {name: Column(width, kinds[name]) for name, width in widths.items() if width}


def row_bytes(layout: Mapping[str, Column]) -> int:
    """Bytes of a row on disk."""
    return sum(column.width * column.dtype.itemsize for column in layout.values()) + 1


class Bench:
    """The files under way of one dataset, in a working folder. Errors of the disk are `OSError`s, and
    `UserError`s where a file is put in its place.
    """

    def __init__(self, work: Path, layout: Mapping[str, Column], rows: int):
        """Args: the folder, the arrays of a file, and the rows of each episode."""
        self.work, self.layout, self.rows = work, layout, rows

    def holds(self, part: Part) -> bool:
        """Whether a file is under way, so that what was put into it is still there."""
        return all(self._array(part, name).exists() for name in self.layout)

    def put(self, part: Part, episode: int, rows: Rows) -> None:
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

    def settle(self, part: Part) -> None:
        """Returns when all that was put into a file is on the disk."""
        for name in self.layout:
            with open(self._array(part, name), "r+b") as file:
                fsync(file)

    def assemble(self, part: Part, final: Path) -> None:
        """Makes the `.npz` of a file that is full."""
        replace_file(final, lambda file: self._pack(part, file), part=self.work / f"{part.stem}.npz.part")

    def drop(self, part: Part) -> None:
        """Removes what was under way of a file."""
        shutil.rmtree(self.work / part.stem, ignore_errors=True)

    def _array(self, part: Part, name: str) -> Path:
        return self.work / part.stem / f"{name}.npy"

    def _reserve(self, path: Path, part: Part, column: Column) -> None:
        """An array of the right size, so that a full disk is noticed before the work and not after it."""
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

    def _pack(self, part: Part, file: IO[bytes]) -> None:
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
