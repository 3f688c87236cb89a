"""Turning dataset files, OGBench's `.npz` and D4RL's and Minari's hdf5, into the flat store, once.

A shard is converted in a folder of its own that takes its name when it is whole; the store does when
all its shards are there. So whatever kills a conversion, the next one goes on with the shards that are
missing. Codes (`codec.py`) need the range of every column before the first row is written, so for them
the files are read twice; what the first reading found is kept too.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mac.data.codec import Codec, fit_affine
from mac.data.memory import free_host_memory
from mac.data.provenance import describe, origin
from mac.data.raw import RawDataset
from mac.data.shards import (
    SHARD,
    Part,
    fingerprint,
    merged,
    quality,
    read_file,
    read_part,
    sha256,
    shard_files,
    sizes_in,
    sizes_of,
    summarize,
    val_file,
    write_rows,
)
from mac.data.store import DTYPES, FORMAT, META, Store, read_meta
from mac.errors import UserError
from mac.files import locked, write_json, writing
from mac.types import EnvSpec

Progress = Callable[[int, int], Any]
"""Called with rows done so far and rows in all; codes count each row twice."""


def prepare(
    train_npz: str | Path,
    store_dir: str | Path,
    spec: EnvSpec,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Store:
    """Opens the store of a dataset, converting the dataset first if that has not been done.

    A store is up to date if its sources have the same names, sizes and modification times, and it has
    the environment's widths; otherwise it is replaced. Several processes may call this at once: one
    converts, the others wait. A conversion that was killed leaves nothing that is read, and is continued.

    Args:
        train_npz: a file, or a folder of shards; see `shard_files`.
        store_dir: folder of the store, made as needed; its parent holds unfinished files meanwhile.
        spec: the environment whose observation and action widths the files must have.
        dtype: how rows are to be stored, one of `DTYPES`; None is as they are, else float32.
    Raises:
        UserError: for any problem with the files, widths, disk space or permissions.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype}: rows are stored as {' or '.join(DTYPES)}")
    store_dir = Path(store_dir)
    files = shard_files(train_npz)
    val = val_file(files[0])
    sources = [fingerprint(p) for p in (*files, val) if p.exists()]
    wanted = {"format": FORMAT, "columns": [spec.obs_dim, spec.action_dim], "sources": sources}
    wanted |= {"recorded": True} if spec.recorded else {}
    wanted |= {} if dtype is None else {"dtype": dtype}
    if current := _open_current(store_dir, wanted):
        return current
    with writing(store_dir):
        store_dir.parent.mkdir(parents=True, exist_ok=True)
    with writing(store_dir), locked(store_dir.with_name(f".{store_dir.name}.lock")):
        # Another process may have converted while this one waited for the lock.
        if not _open_current(store_dir, wanted):
            wanted = {"dtype": "float32"} | wanted
            _Conversion(files, val if val.exists() else None, store_dir, spec, wanted, progress).run()
    return Store.open(store_dir)


class _Conversion:
    """One call of `prepare` that has something to do. Holds the lock."""

    def __init__(
        self,
        files: Sequence[Path],
        val: Path | None,
        store_dir: Path,
        spec: EnvSpec,
        wanted: dict[str, Any],
        progress: Progress | None,
    ):
        self.files, self.val, self.store_dir, self.spec = files, val, store_dir, spec
        self.wanted, self.progress = wanted, progress or (lambda done, total: None)
        self.work = store_dir.with_name(f".{store_dir.name}.part")
        self.coded = wanted["dtype"] == "uint16"
        self.widths = (spec.obs_dim, spec.action_dim)
        self.done = 0
        # A damaged file counts nothing here, and is reported when it is read.
        self.sizes = {file: sizes_of(file) for file in (*files, *([val] if val else []))}
        self.total = sum(self.sizes[file].rows for file in files) * (2 if self.coded else 1)

    def run(self) -> None:
        self.work.mkdir(exist_ok=True)
        try:
            self._check_space()
            codec = self._survey() if self.coded else None
            parts = {
                f"train-{i:03d}": self._shard(f"train-{i:03d}", file, codec)
                for i, file in enumerate(self.files)
            }
            val = self._shard("val", self.val, None) if self.val else None
            write_json(self.work / META, self._meta(parts, val, codec))
            _swap(self.work, self.store_dir)
        finally:
            if not any(self.work.glob(f"*/{SHARD}")) and not any(self.work.glob("survey-*")):
                shutil.rmtree(self.work, ignore_errors=True)  # there is nothing to continue from

    def _survey(self) -> Codec:
        """Reads and checks all files, and returns the codec of their rows."""
        found = []
        for i, file in enumerate(self.files):
            kept = self.work / f"survey-{i:03d}.json"
            part = read_part(kept)
            if part is None or part.source != fingerprint(file):
                data = self._read(file)
                part = Part(fingerprint(file), "", None, len(data.obs), [], summarize(data))
                write_json(kept, part._asdict())
            found.append(part)
            self._count(part.rows)
        return Codec(*(fit_affine(summary) for summary in merged(found)))

    def _shard(self, name: str, file: Path, codec: Codec | None) -> Part:
        """Converts one file, unless an earlier attempt did."""
        folder, source = self.work / name, fingerprint(file)
        plain = None if codec is None else {key: affine.plain() for key, affine in codec._asdict().items()}
        part = read_part(folder / SHARD)
        if part is None or (part.source, part.codec) != (source, plain) or not self._is_whole(folder, part):
            shutil.rmtree(folder, ignore_errors=True)
            data, new = self._read(file), folder.with_name(name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            loss = write_rows(new, data, codec)
            facts = (len(data.obs), list(data.notes), summarize(data), loss, sizes_in(new))
            part = Part(source, sha256(file), plain, *facts)
            write_json(new / SHARD, part._asdict())
            os.replace(new, folder)
        if name != "val":
            self._count(part.rows)
        return part

    def _read(self, file: Path) -> RawDataset:
        data = read_file(file, self.spec)
        have = (data.obs.shape[1], data.action.shape[1])
        if have != self.widths:
            raise UserError(
                f"{file}: has {have[0]} observation and {have[1]} action columns, {self.spec.name} has "
                f"{self.widths[0]} and {self.widths[1]}; this dataset belongs to another environment"
            )
        return data

    def _is_whole(self, folder: Path, part: Part) -> bool:
        """Whether a kept shard is as it was left, and of this environment's widths."""
        widths = tuple(len(summary["low"]) for summary in part.summary)
        return widths == self.widths and sizes_in(folder) == part.sizes

    def _count(self, rows: int) -> None:
        self.done += rows
        self.progress(min(self.done, self.total), self.total)

    def _check_space(self) -> None:
        """Compares what is still to be written with the free space, and what is read with the memory."""
        largest = max(self.sizes, key=lambda file: self.sizes[file].reading)
        memory, free = self.sizes[largest].reading, free_host_memory()
        if free is not None and memory > free:
            raise UserError(
                f"{largest}: {memory / 1e6:,.0f} MB of memory to read it, {free / 1e6:,.0f} MB are free; "
                "split it into shards, as OGBench's large datasets are"
            )
        need = sum(sizes.stored for sizes in self.sizes.values())
        if self.coded:
            need -= sum(self.sizes[file].stored for file in self.files) // 2
        need -= sum(f.stat().st_size for f in self.work.glob("*/*.npy"))
        free = shutil.disk_usage(self.store_dir.parent).free
        if need > free:
            other = "" if self.coded else ", prepare it with --dtype uint16 (half the size)"
            raise UserError(
                f"{self.store_dir.parent}: {need / 1e6:,.0f} MB are needed to convert the dataset, "
                f"{free / 1e6:,.0f} MB are free; free some space{other} or choose another data folder"
            )

    def _meta(self, parts: dict[str, Part], val: Part | None, codec: Codec | None) -> dict[str, Any]:
        found = list(parts.values())
        notes = [note for part in (*found, *([val] if val else [])) for note in part.notes]
        if val is None:
            notes.append(
                f"{val_file(self.files[0])}: absent, so the normaliser's statistics come from training rows"
            )
        checksums = {part.source[0]: part.sha256 for part in (*found, *([val] if val else []))}
        made_by, rows = origin(self.files[0]), sum(part.rows for part in found)
        return self.wanted | {
            "env": self.spec.name,
            "codec": found[0].codec,
            "train": {name: part.rows for name, part in parts.items()},
            "val": val.rows if val else 0,
            "notes": notes,
            "quality": quality(found),
            "checksums": checksums,
            "source": describe(self.files, made_by, rows, checksums).plain(),
            "made_by": made_by,
        }


def _open_current(path: Path, wanted: dict[str, Any]) -> Store | None:
    """The store, if there is one that matches and is whole; a damaged one is converted again."""
    meta = read_meta(path)
    if meta is None or any(meta.get(key) != value for key, value in wanted.items()):
        return None
    with contextlib.suppress(UserError):
        return Store.open(path)
    return None


def _swap(new: Path, store_dir: Path) -> None:
    """Puts `new` in the place of `store_dir`; rows already mapped from the old one stay readable."""
    for survey in new.glob("survey-*.json"):
        survey.unlink()
    old = new.with_name(new.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if store_dir.exists():
        os.replace(store_dir, old)
    os.replace(new, store_dir)
    shutil.rmtree(old, ignore_errors=True)
