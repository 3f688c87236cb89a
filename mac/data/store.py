"""The flat store: each `.npz` converted once to plain `.npy` files that open without reading.

    <store>/meta.json                  what is inside and which files it was made from
    <store>/train-000/obs.npy          float32 [N, D], rows of whole episodes laid end to end
    <store>/train-000/action.npy       float32 [N, A]
    <store>/train-000/episodes.npy     int64 [E, 2]: first row and row count of each episode
    <store>/val/...                    the same, if the first file has a `-val.npz` beside it

One `train-NNN` per shard, in the order of the file names. The reader is the host; `window.py` moves
a shard to the device. A conversion appears under its name only when it is complete.
"""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mac.data.npz import RawDataset, read
from mac.errors import UserError, one_line
from mac.types import EnvSpec

FORMAT = 1
"""Version of the layout above; a store of another version is converted again."""


class Split(NamedTuple):
    """Memory-mapped rows of one shard; the fields are those of `npz.RawDataset`."""

    obs: Float[np.ndarray, "N D"]
    action: Float[np.ndarray, "N A"]
    first: Int[np.ndarray, " E"]
    length: Int[np.ndarray, " E"]


class Store(NamedTuple):
    """An opened store.

    Attributes:
        path: its folder.
        env: name of the environment that it was prepared for.
        train: one split per shard.
        val: validation split of the first shard, None if there was none.
        notes: one line for each thing that a user should know about the data.
    """

    path: Path
    env: str
    train: tuple[Split, ...]
    val: Split | None
    notes: tuple[str, ...]

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a folder that `prepare` made.

        Raises:
            UserError: if it is missing, of another format version, or damaged.
        """
        path = Path(path)
        meta = _read_meta(path)
        if meta is None:
            raise UserError(
                f"{path}: no dataset store of format {FORMAT} here; run `prepare` on the .npz again"
            )
        try:
            train = tuple(_open_split(path / name, rows) for name, rows in meta["train"].items())
            val = _open_split(path / "val", meta["val"]) if meta["val"] else None
        except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: damaged store ({one_line(error)}); delete this folder, it is made again"
            ) from error
        return cls(path, meta["env"], train, val, tuple(meta["notes"]))

    @property
    def statistics_obs(self) -> Float[np.ndarray, "N D"]:
        """The rows that normaliser statistics come from: validation if there is any, else training."""
        return (self.val or self.train[0]).obs

    @property
    def rows(self) -> int:
        """Training rows in all shards, final states included."""
        return sum(len(split.obs) for split in self.train)

    @property
    def episodes(self) -> int:
        """Training episodes in all shards."""
        return sum(len(split.first) for split in self.train)


def shard_files(path: str | Path) -> tuple[Path, ...]:
    """The training files at `path`: itself, or a folder's `*.npz` without `*-val.npz`, by name.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such dataset; give an OGBench .npz file or a folder of them")
    if not path.is_dir():
        return (path,)
    files = tuple(sorted(p for p in path.glob("*.npz") if not p.stem.endswith("-val")))
    if not files:
        raise UserError(f"{path}: this folder holds no training .npz file")
    return files


def val_file(train: Path) -> Path:
    """Where OGBench keeps the validation split of a training file."""
    return train.with_name(train.stem + "-val.npz")


def prepare(train_npz: str | Path, store_dir: str | Path, spec: EnvSpec) -> Store:
    """Opens the store of a dataset, converting the dataset first if that has not been done.

    A store is up to date if its sources have the same names, sizes and modification times and it
    was made for the same environment; otherwise it is replaced. Several processes may call this at
    once: one converts, the others wait. A conversion that was killed leaves nothing that is read.

    Args:
        train_npz: a file, or a folder of shards; see `shard_files`.
        store_dir: folder of the store, made as needed; its parent holds temporary files meanwhile.
        spec: the environment whose observation and action widths the files must have.
    Raises:
        UserError: for any problem with the files, widths, disk space or permissions.
    """
    store_dir = Path(store_dir)
    files = shard_files(train_npz)
    val = val_file(files[0])
    sources = [_fingerprint(p) for p in (*files, val) if p.exists()]
    wanted = {"format": FORMAT, "env": spec.name, "sources": sources}
    if current := _open_current(store_dir, wanted):
        return current
    with _writing_to(store_dir), _lock(store_dir):
        # Another process may have converted while this one waited for the lock.
        if not _open_current(store_dir, wanted):
            _check_space(files, val, store_dir)
            _convert(files, val if val.exists() else None, store_dir, spec, wanted)
    return Store.open(store_dir)


def _convert(files: Sequence[Path], val: Path | None, store_dir: Path, spec: EnvSpec, wanted: dict) -> None:
    prefix = f".{store_dir.name}.new-"
    for stale in store_dir.parent.glob(prefix + "*"):
        shutil.rmtree(stale, ignore_errors=True)  # left by a killed conversion; we hold the lock
    new = Path(tempfile.mkdtemp(prefix=prefix, dir=store_dir.parent))
    try:
        notes: list[str] = []
        train = {}
        for i, file in enumerate(files):
            name = f"train-{i:03d}"
            train[name] = _write_split(new / name, file, spec, notes)
        rows = _write_split(new / "val", val, spec, notes) if val else 0
        if not val:
            notes.append(
                f"{val_file(files[0])}: absent, so the normaliser's statistics come from the training rows"
            )
        meta = wanted | {"train": train, "val": rows, "notes": notes}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        new.chmod(0o755)  # mkdtemp makes it private
        _swap(new, store_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_split(folder: Path, file: Path, spec: EnvSpec, notes: list[str]) -> int:
    """Converts one file and returns its row count."""
    data = read(file)
    _check_widths(file, data, spec)
    notes.extend(data.notes)
    folder.mkdir()
    np.save(folder / "obs.npy", data.obs)
    np.save(folder / "action.npy", data.action)
    np.save(folder / "episodes.npy", np.stack([data.first, data.length], axis=1))
    return len(data.obs)


def _check_widths(file: Path, data: RawDataset, spec: EnvSpec) -> None:
    have = (data.obs.shape[1], data.action.shape[1])
    if have != (spec.obs_dim, spec.action_dim):
        raise UserError(
            f"{file}: has {have[0]} observation and {have[1]} action columns, {spec.name} has "
            f"{spec.obs_dim} and {spec.action_dim}; this dataset belongs to another environment"
        )


def _open_split(folder: Path, rows: int) -> Split:
    obs = np.load(folder / "obs.npy", mmap_mode="r")
    action = np.load(folder / "action.npy", mmap_mode="r")
    episodes = np.load(folder / "episodes.npy")
    if not len(obs) == len(action) == rows == episodes[:, 1].sum():
        raise ValueError(f"{folder.name}: row counts disagree")
    return Split(obs, action, episodes[:, 0], episodes[:, 1])


def _fingerprint(file: Path) -> list[str | int]:
    stat = file.stat()
    return [file.name, stat.st_size, stat.st_mtime_ns]


def _read_meta(path: Path) -> dict | None:
    """The store's description, or None if there is no readable one of this format."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def _open_current(path: Path, wanted: dict) -> Store | None:
    """The store, if there is one that matches and is whole; a damaged one is converted again."""
    meta = _read_meta(path)
    if meta is None or any(meta.get(key) != value for key, value in wanted.items()):
        return None
    with contextlib.suppress(UserError):
        return Store.open(path)
    return None


def _check_space(files: Sequence[Path], val: Path, store_dir: Path) -> None:
    """Compares the arrays' uncompressed size with the free space; a damaged file is reported later."""
    need = 0
    for file in (*files, val):
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            need += sizes.get("observations.npy", 0) + sizes.get("actions.npy", 0)
    free = shutil.disk_usage(store_dir.parent).free
    if need > free:
        raise UserError(
            f"{store_dir.parent}: {need / 1e6:.0f} MB are needed to convert the dataset, "
            f"{free / 1e6:.0f} MB are free; free some space or choose another data folder"
        )


def _swap(new: Path, store_dir: Path) -> None:
    """Puts `new` in the place of `store_dir`; rows already mapped from the old one stay readable."""
    old = new.with_name(new.name + ".old")
    if store_dir.exists():
        os.replace(store_dir, old)
    os.replace(new, store_dir)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _writing_to(store_dir: Path) -> Iterator[None]:
    """Makes the parent folder, and turns the system's refusals within into one line for the user."""
    try:
        store_dir.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{store_dir}: cannot write the dataset store here ({one_line(error)}); "
            "choose another data folder or free some space"
        ) from error


@contextlib.contextmanager
def _lock(store_dir: Path) -> Iterator[None]:
    """Holds a lock file beside the store; the system frees it even if this process is killed."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: the swap is still atomic, only work may be done twice
        yield
        return
    with (store_dir.parent / f".{store_dir.name}.lock").open("w") as handle:
        # Some network filesystems have no locks; converting twice is better than not at all.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
