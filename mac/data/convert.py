"""Turning dataset files, OGBench's `.npz` and D4RL's and Minari's hdf5, into the flat store, once.

A shard is converted in a folder of its own that takes its name when it is whole; the store does when
all its shards are there. So whatever kills a conversion, the next one goes on with the shards that are
missing. Codes (`quantize.py`) need the range of every column before the first row is written, so for them
the files are read twice; what the first reading found is kept too.

A store belongs to the content of its files: a file that is moved, renamed or touched has the store that it
had, and one that was changed has another.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mac.atomic_files import load_json, locked, read_json, write_json, writing
from mac.data.checksums import KEPT, Checksums
from mac.data.provenance import generator_record, provenance_of
from mac.data.quantize import Codec, ColumnSummary, fit_affine, merge_summaries
from mac.data.raw_dataset import RawDataset, check_file
from mac.data.shards import (
    SHARD,
    ConvertedShard,
    merged,
    quality,
    read_file,
    read_part,
    shard_files,
    sizes_in,
    sizes_of,
    statistics,
    summarize_columns,
    val_file,
    write_rows,
)
from mac.data.store import (
    ACTION,
    DTYPES,
    EPISODES,
    FORMAT,
    META,
    OBS,
    REWARD,
    ShardRows,
    Statistics,
    Store,
    is_store,
    read_meta,
    save_checks,
    save_meta,
)
from mac.errors import UserError, one_line
from mac.free_memory import free_host_memory
from mac.types import EnvSpec

Progress = Callable[[int, int], Any]
"""Called with rows done so far and rows in all; codes count each row twice."""


class Sources(NamedTuple):
    """The files of a dataset, as they are now.

    Attributes:
        train: training files, in the order of their names; `val` the validation files beside them.
        columns: of observations and actions, which the files must have.
        recorded: whether rewards and terminations are taken from the files.
        sha256: checksum of each training file, then of each validation file.
        checksums: remembers them.
    """

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    columns: tuple[int, int]
    recorded: bool
    sha256: tuple[str, ...]
    checksums: Checksums

    @classmethod
    def of(cls, path: str | Path, spec: EnvSpec, checksums: Checksums) -> "Sources":
        """The files at `path`, for an environment.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        train = shard_files(path)
        val = tuple(file for file in map(val_file, train) if file.exists())
        for file in (*train, *val):
            check_file(file, "an .npz or .hdf5")
        found = checksums.of((*train, *val))
        return cls(train, val, (spec.obs_dim, spec.action_dim), spec.recorded, tuple(found), checksums)

    def check_unchanged(self) -> None:
        """Raises UserError if a file is not any more what it was."""
        files = (*self.train, *self.val)
        for file, before, now in zip(files, self.sha256, self.checksums.of(files), strict=True):
            if before != now:
                raise UserError(f"{file}: changed while it was converted; start again when it is whole")

    @property
    def by_name(self) -> dict[str, str]:
        """Checksum of each file by its name."""
        return {file.name: each for file, each in zip((*self.train, *self.val), self.sha256, strict=True)}

    def wanted(self, dtype: str | None) -> dict[str, Any]:
        """Returns the description that their store has, whatever the files' names and places are."""
        count = len(self.train)
        found = {"format": FORMAT, "columns": list(self.columns), "recorded": self.recorded}
        found |= {"made_from": {"train": list(self.sha256[:count]), "val": list(self.sha256[count:])}}
        return found if dtype is None else found | {"dtype": dtype}

    def key(self, dtype: str) -> str:
        """A few digits that no two stores of other content or type share."""
        return hashlib.sha256(json.dumps(self.wanted(dtype), sort_keys=True).encode()).hexdigest()[:10]


def prepare(
    train_npz: str | Path,
    store_dir: str | Path,
    spec: EnvSpec,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Store:
    """Opens the store of a dataset, converting the dataset first if that has not been done.

    A store is up to date if its sources had the same content, and it has the environment's widths; otherwise
    it is replaced, while whoever has it open goes on reading what was opened. Several processes may call this
    at once: one converts, the others wait. A conversion that was killed leaves nothing that is read, and is
    continued.

    Args:
        train_npz: a file, or a folder of shards; see `shard_files`.
        store_dir: folder of the store, made as needed; its parent holds unfinished files meanwhile.
        spec: the environment whose observation and action widths the files must have.
        dtype: how rows are to be stored, one of `DTYPES`; None is as they are, else float32.
    Raises:
        UserError: for any problem with the files, widths, disk space or permissions; or if `store_dir` holds
            something else than a store.
    """
    store_dir = Path(store_dir)
    return convert(
        Sources.of(train_npz, spec, Checksums(store_dir.parent / KEPT)), store_dir, spec, dtype, progress
    )


def convert(
    sources: Sources,
    store_dir: Path,
    spec: EnvSpec,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Store:
    """Does what `prepare` does, with files whose checksums are known."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype={dtype}: rows are stored as {' or '.join(DTYPES)}")
    wanted = sources.wanted(dtype)
    if current := _open_current(store_dir, wanted):
        return current
    if (
        store_dir.exists()
        and not is_store(store_dir)
        and (not store_dir.is_dir() or any(store_dir.iterdir()))
    ):
        raise UserError(f"{store_dir}: holds something else than a dataset store; choose another folder")
    with writing(store_dir):
        store_dir.parent.mkdir(parents=True, exist_ok=True)
    with writing(store_dir), locked(store_dir.with_name(f".{store_dir.name}.lock")):
        # Another process may have converted while this one waited for the lock.
        if current := _open_current(store_dir, wanted):
            return current
        return _Conversion(sources, store_dir, spec, {"dtype": "float32"} | wanted, progress).run()


class _Conversion:
    """One call of `prepare` that has something to do. Holds the lock."""

    def __init__(
        self,
        sources: Sources,
        store_dir: Path,
        spec: EnvSpec,
        wanted: dict[str, Any],
        progress: Progress | None,
    ):
        self.sources, self.store_dir, self.spec = sources, store_dir, spec
        self.files, self.val = sources.train, sources.val
        self.wanted, self.progress = wanted, progress or (lambda done, total: None)
        self.work = store_dir.with_name(f".{store_dir.name}.part")
        self.coded = wanted["dtype"] == "uint16"
        self.widths = (spec.obs_dim, spec.action_dim)
        self.done = 0
        # A damaged file counts nothing here, and is reported when it is read.
        self.sizes = {file: sizes_of(file) for file in (*self.files, *self.val)}
        self.total = sum(self.sizes[file].rows for file in self.files) * (2 if self.coded else 1)

    def run(self) -> Store:
        self.work.mkdir(exist_ok=True)
        try:
            self._check_space()
            found = (
                [self._survey("survey", i, file) for i, file in enumerate(self.files)] if self.coded else []
            )
            codec = Codec(*(fit_affine(summary) for summary in merged(found))) if self.coded else None
            parts = {
                f"train-{i:03d}": self._shard(f"train-{i:03d}", file, codec)
                for i, file in enumerate(self.files)
            }
            val = [self._shard("val", self.val[0], None)] if self.val else []
            val += [self._survey("survey-val", i, file) for i, file in enumerate(self.val) if i]
            self.sources.check_unchanged()
            self._tidy({*parts, "val"} if val else set(parts))
            save_meta(self.work, self._meta(parts, val))
            store = Store.open(self.work)  # before others can replace it
            _swap(self.work, self.store_dir)
            return _moved(store, self.store_dir)
        finally:
            if not any(self.work.glob(f"*/{SHARD}")) and not any(self.work.glob("survey-*")):
                shutil.rmtree(self.work, ignore_errors=True)  # there is nothing to continue from

    def _survey(self, name: str, number: int, file: Path) -> ConvertedShard:
        """Reads and checks a file, and returns what is in it."""
        kept = self.work / f"{name}-{number:03d}.json"
        part, checksum = read_part(kept), self.sources.by_name[file.name]
        if part is None or part.sha256 != checksum:
            data = self._read(file)
            part = ConvertedShard(
                file.name, checksum, None, len(data.obs), list(data.notes), summarize_columns(data)
            )
            write_json(kept, part._asdict())
        if file in self.files:
            self._count(part.rows)
        return part

    def _shard(self, name: str, file: Path, codec: Codec | None) -> ConvertedShard:
        """Converts one file, unless an earlier attempt did."""
        folder, checksum = self.work / name, self.sources.by_name[file.name]
        plain = None if codec is None else {key: affine.to_dict() for key, affine in codec._asdict().items()}
        part = read_part(folder / SHARD)
        if part is None or (part.sha256, part.codec) != (checksum, plain) or not self._is_whole(folder, part):
            shutil.rmtree(folder, ignore_errors=True)
            data, new = self._read(file), folder.with_name(name + ".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            loss = write_rows(new, data, codec)
            facts = (len(data.obs), list(data.notes), summarize_columns(data), loss, sizes_in(new))
            part = ConvertedShard(file.name, checksum, plain, *facts)
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

    def _is_whole(self, folder: Path, part: ConvertedShard) -> bool:
        """Returns whether a kept shard is as it was left, and of this environment's widths."""
        widths = tuple(len(summary["low"]) for summary in part.summary)
        recorded = REWARD in (part.sizes or {})
        return (widths, recorded, sizes_in(folder)) == (self.widths, self.spec.recorded, part.sizes)

    def _tidy(self, wanted: set[str]) -> None:
        """Deletes what an earlier conversion of other files left."""
        for path in self.work.iterdir():
            if path.name not in wanted:
                path.unlink() if path.is_file() else shutil.rmtree(path)

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

    def _meta(self, parts: dict[str, ConvertedShard], val: Sequence[ConvertedShard]) -> dict[str, Any]:
        found = list(parts.values())
        notes = [note for part in (*found, *val) for note in part.notes]
        if not val:
            notes.append(
                f"{val_file(self.files[0])}: absent, so the normaliser's statistics come from training rows"
            )
        checksums = self.sources.by_name
        made_by, rows = generator_record(self.files[0]), sum(part.rows for part in found)
        return self.wanted | {
            "env": self.spec.name,
            "codec": found[0].codec,
            "train": {name: part.rows for name, part in parts.items()},
            "val": val[0].rows if val else 0,
            "notes": notes,
            "quality": quality(found),
            "statistics": statistics(found, val).to_dict(),
            "sources": [[file.name, file.stat().st_size] for file in (*self.files, *self.val)],
            "checksums": checksums,
            "source": provenance_of(self.files, made_by, rows, checksums).to_dict(),
            "made_by": made_by,
        }


def upgrade(path: Path) -> bool:
    """Adds checksums to a store of format 2, whose dataset files may be gone; False if it has another format.

    Its rows are taken to be as they were written: that version could not check them.

    Raises:
        UserError: it is damaged, or cannot be written.
    """
    meta = read_json(path / META)
    if not isinstance(meta, dict) or meta.get("format") != 2:
        return False
    with writing(path), locked(path.with_name(f".{path.name}.lock")):
        try:
            val = ["val"] if meta["val"] else []
            parts = {name: load_json(path / name / SHARD) for name in (*meta["train"], *val)}
            for name in parts:
                files = [path / name / file for file in (EPISODES, OBS, ACTION, REWARD)]
                arrays = [np.load(file, mmap_mode="r") for file in files if file.exists()]
                save_checks(path / name, np.asarray(arrays[0][:, 1]), arrays[1:])
            found = [ColumnSummary.from_dict(part["summary"][0]) for part in parts.values()]
            train = merge_summaries(found[: len(meta["train"])])
            meta["statistics"] = Statistics(train, found[-1] if val else None).to_dict()
            meta["sources"] = [[name, size] for name, size, *_ in meta["sources"]]
            save_meta(path, meta | {"made_from": None})
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged store ({one_line(error)}); make it again") from error
    return True


def _open_current(path: Path, wanted: dict[str, Any]) -> Store | None:
    """The store, if there is one that matches and is whole; a damaged one is converted again."""
    if read_meta(path) is None:
        return None
    with contextlib.suppress(UserError):
        store = Store.open(path)
        if store.meta and all(store.meta.get(key) == value for key, value in wanted.items()):
            return store
    return None


def _swap(new: Path, store_dir: Path) -> None:
    """Puts `new` in the place of `store_dir`; rows of the old one that are open stay readable."""
    old = new.with_name(new.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if store_dir.exists():
        os.replace(store_dir, old)
    os.replace(new, store_dir)
    shutil.rmtree(old, ignore_errors=True)


def _moved(store: Store, path: Path) -> Store:
    """An open store whose folder has another name now."""

    def named(split: ShardRows) -> ShardRows:
        return split._replace(name=str(path / Path(split.name).name))

    val = None if store.val is None else named(store.val)
    return store._replace(path=path, train=tuple(map(named, store.train)), val=val)
