"""The flat store: plain arrays of rows, converted once from dataset files, that open without reading.

    <store>/meta.json                  what is inside and which files it was made from
    <store>/train-000/obs.npy          float32 or uint16 [N, D], rows of whole episodes laid end to end
    <store>/train-000/action.npy       the same type [N, A]
    <store>/train-000/episodes.npy     int64 [E, 2]: first row and row count of each episode; where rewards
                                       are recorded [E, 3]: also whether it terminated
    <store>/train-000/reward.npy       float32 [N], where rewards are recorded
    <store>/train-000/checks.npy       uint32 [E, 2 or 3]: CRC-32 of the rows of each episode in `obs.npy`,
                                       `action.npy` (and `reward.npy`)
    <store>/train-000/shard.json       which file it was made from, and what was found in it
    <store>/val/...                    as float32, of the first `-val.npz`, if there is any

One `train-NNN` per shard, in the order of the file names. uint16 rows are codes (`quantize.py`), of one
codec for all shards. The reader is the host; `window.py` moves rows to the device, `convert.py` makes
stores.

An opened store holds its files: what another process does under their names, it reads the rows that it
opened. `meta.json` carries a checksum of itself and one of `episodes.npy` and `checks.npy`, compared when the
store is opened; the rows are compared with `checks.npy` where they are read. The latter checksum depends
on the data alone, not on names, places or times: two stores with the same `content` train alike.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import tokenize
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt32

from mac.atomic_files import fsync, load_json, write_json
from mac.data.provenance import UNKNOWN, Provenance, of_meta
from mac.data.quantize import BLOCK, Affine, Codec, ColumnSummary, merge_summaries, summarize
from mac.errors import UserError, one_line, refusal

FORMAT = 3
"""Version of the layout above, and of what is read from a file; a store of another one is made again."""

META, OBS, ACTION, EPISODES = "meta.json", "obs.npy", "action.npy", "episodes.npy"
REWARD, CHECKS = "reward.npy", "checks.npy"
DTYPES = ("float32", "uint16")
"""Types in which rows may be stored."""

ROWS = ("obs", "action", "reward")
"""Fields of a `ShardRows` that hold rows, in the order of the columns of `checks.npy`."""

_BROKEN = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, SyntaxError, OverflowError,
    RecursionError, tokenize.TokenError,
)  # fmt: skip
"""Exceptions that damage makes Python and NumPy raise, whose header parser is Python's own."""


class Rows:
    """The rows of an array file that is held open: the same ones, whatever takes the file's name.

    They are read, not mapped: mapped pages would count as this process's memory, and all of a store
    passes by in time; and a disk that fails would end the process instead of raising an error.
    """

    def __init__(self, descriptor: int, name: str):
        """Takes the descriptor of an open file, closed with the last reference; `name` is for messages.

        Raises:
            ValueError: it is no array in C order, or not all of one (NumPy's parser raises other errors too).
        """
        self._descriptor, self._name = descriptor, name
        weakref.finalize(self, os.close, descriptor)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):  # what `np.save` writes
                raise ValueError(f"{name}: array format {version}")
            self.shape, fortran, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._offset = file.tell()
        if fortran or not self.shape or self.dtype.hasobject:
            raise ValueError(f"{name}: not rows of numbers")
        self.nbytes = int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize
        if os.fstat(descriptor).st_size != self._offset + self.nbytes:
            raise ValueError(f"{name}: its size is not that of its rows")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Shaped[np.ndarray, "..."]:
        """Reads the rows of a plain slice from the file, or all rows for any other index."""
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            out = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
            self.read(start, out)
            return out
        return self[:][key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "N ..."]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def read(self, start: int, out: Shaped[np.ndarray, "M ..."]) -> None:
        """Copies rows from `start` on into `out`, which is contiguous.

        Raises:
            UserError: the file cannot be read.
        """
        if not out.size:
            return
        view, at = out.data.cast("B"), self._offset + start * out[:1].nbytes
        try:
            while len(view):
                count = os.preadv(self._descriptor, [view], at)
                if not count:
                    raise OSError("the file ends too soon")
                view, at = view[count:], at + count
        except OSError as error:
            raise UserError(f"{self._name}: cannot be read ({one_line(error)}); check the disk") from error


class ShardRows(NamedTuple):
    """Rows of one shard; the fields are those of `raw_dataset.RawDataset`.

    Attributes:
        obs: of every state, as stored; an array, or `Rows` of a file.
        codec: maps stored numbers to values; None if they are values.
        checks: CRC-32 of each episode's rows, a column per field of `ROWS`; None if unknown.
        name: the folder, for messages.
    """

    obs: Any
    action: Any
    first: Int[np.ndarray, " E"]
    length: Int[np.ndarray, " E"]
    codec: Codec | None = None
    reward: Any = None
    terminated: Bool[np.ndarray, " E"] | None = None
    checks: UInt32[np.ndarray, "E K"] | None = None
    name: str = ""

    def read(self, name: str, first: int, last: int, out: Shaped[np.ndarray, "M ..."]) -> None:
        """Copies the rows of episodes `first`, ..., `last - 1` of field `name` into `out`, and checks them.

        Raises:
            UserError: the file cannot be read, or is damaged.
        """
        copy_rows(getattr(self, name), int(self.first[first]), out)
        if self.checks is None:
            return
        found = episode_checksums(out, self.length[first:last])
        wrong = np.flatnonzero(found != self.checks[first:last, ROWS.index(name)])
        if wrong.size:
            raise _damaged(
                Path(self.name).parent, f"{wrong.size} episodes of {name} in {Path(self.name).name} changed"
            )


class Statistics(NamedTuple):
    """Summaries of observations, in the environment's units.

    Attributes:
        train: of all training rows.
        val: of the rows of all validation files; None if there is none.
    """

    train: ColumnSummary
    val: ColumnSummary | None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON data, exact to the bit; `from_dict` is the inverse."""
        return {"train": self.train.to_dict(), "val": self.val and self.val.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Statistics":
        """The statistics that `to_dict` described."""
        return cls(
            ColumnSummary.from_dict(values["train"]), values["val"] and ColumnSummary.from_dict(values["val"])
        )


class ContentChecksums(NamedTuple):
    """Checksums of what is trained on: of training rows, and of validation rows (None if there are none).

    They depend on the values and on how these are stored, not on a file's name, place, time or format.
    """

    train: str
    val: str | None

    def __str__(self) -> str:
        return f"{self.train[:8]}, validation {self.val[:8] if self.val else 'none'}"


class Store(NamedTuple):
    """An opened store.

    Attributes:
        path: its folder.
        env: name of the environment that it was prepared for.
        train: one split per shard; all are stored alike.
        val: validation split of the first shard that has one, None if there is none.
        notes: one line for each thing that a user should know about the data.
        provenance: where the data come from.
        summaries: of all rows, as found when they were converted; None: not known.
        content: checksums of what is trained on; None: not known.
        meta: `meta.json` as it was when the store was opened.
    """

    path: Path
    env: str
    train: tuple[ShardRows, ...]
    val: ShardRows | None
    notes: tuple[str, ...]
    provenance: Provenance = UNKNOWN
    summaries: Statistics | None = None
    content: ContentChecksums | None = None
    meta: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a folder that `convert.prepare` made, and holds its files.

        Raises:
            UserError: if it is missing, of another format version, or damaged.
        """
        path = Path(path)
        while True:
            with _Folder(path) as folder:
                try:
                    return cls._read(folder)
                except _BROKEN as error:
                    if folder.replaced():
                        continue  # another conversion took the name while this one was opened
                    if isinstance(error, UserError):
                        raise
                    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                        raise _refused(path, error) from error
                    raise _damaged(path, one_line(error)) from error

    @classmethod
    def _read(cls, folder: "_Folder") -> "Store":
        path = folder.path
        meta = folder.meta()
        if meta.get("seal") != metadata_checksum(meta):
            raise ValueError(f"{META} is not as it was written")
        codec = meta["codec"] and Codec(*(Affine.from_dict(meta["codec"][k]) for k in Codec._fields))
        columns = tuple(meta["columns"])
        folder.make_room(3 * (len(meta["train"]) + 1))
        train = tuple(_open_split(folder, name, rows, columns, codec) for name, rows in meta["train"].items())
        val = _open_split(folder, "val", meta["val"], columns, None) if meta["val"] else None
        summaries = meta["statistics"] and Statistics.from_dict(meta["statistics"])
        content = content_of(train, val, summaries)
        if list(content) != meta["content"]:
            raise ValueError(f"{EPISODES} or {CHECKS} are not as they were written")
        notes = tuple(meta["notes"])
        return cls(path, meta["env"], train, val, notes, of_meta(meta), summaries, content, meta)

    @property
    def statistics(self) -> Statistics:
        """Summaries of the observations of training and of validation rows."""
        if self.summaries is not None:
            return self.summaries
        parts = [summarize(values_of(split)) for split in self.train]
        return Statistics(merge_summaries(parts), self.val and summarize(values_of(self.val)))

    @property
    def statistics_obs(self) -> Float[np.ndarray, "N D"]:
        """Rows that stand for all: validation if there is any, else those of the first training shard."""
        return values_of(self.val or self.train[0])

    @property
    def recorded(self) -> bool:
        """Returns whether rewards and terminations are recorded."""
        return self.train[0].terminated is not None

    @property
    def rows(self) -> int:
        """Training rows in all shards, final states included."""
        return sum(len(split.obs) for split in self.train)

    @property
    def episodes(self) -> int:
        """Training episodes in all shards."""
        return sum(len(split.first) for split in self.train)

    @property
    def dtype(self) -> str:
        """Type of the stored training rows, one of `DTYPES`."""
        return self.train[0].obs.dtype.name

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of observations and of actions."""
        return self.train[0].obs.shape[1], self.train[0].action.shape[1]

    def check(self) -> None:
        """Reads all rows and compares them with their checksums.

        Raises:
            UserError: naming the first array that is damaged.
        """
        for split in (*self.train, *([self.val] if self.val else [])):
            for name in ROWS[: 2 if split.reward is None else 3]:
                array = getattr(split, name)
                for first, last in spans(split.length):
                    out = np.empty((int(split.length[first:last].sum()), *array.shape[1:]), array.dtype)
                    split.read(name, first, last, out)


def spans(length: Int[np.ndarray, " E"], rows: int = BLOCK) -> list[tuple[int, int]]:
    """Consecutive episodes in groups of about `rows` rows, as first and last + 1."""
    first = np.flatnonzero(np.diff((np.cumsum(length) - length) // rows, prepend=-1))
    return [(int(a), int(b)) for a, b in zip(first, [*first[1:], len(length)], strict=True)]


def values_of(split: ShardRows) -> Float[np.ndarray, "N D"]:
    """Observations of a split in the environment's units."""
    return split.obs[:] if split.codec is None else split.codec.obs.decode(split.obs[:])


def read_meta(path: Path) -> dict[str, Any] | None:
    """A store's description as it was written, or None if there is no such one of this format."""
    if not is_store(path):
        return None
    try:
        meta = load_json(path / META)
        whole = (
            isinstance(meta, dict)
            and meta.get("format") == FORMAT
            and meta.get("seal") == metadata_checksum(meta)
        )
    except (OSError, ValueError):
        return None
    return meta if whole else None


def is_store(path: Path) -> bool:
    """Returns whether a folder is a store, of whatever version, rather than a folder of `.npz` files."""
    return (path / META).is_file()


def copy_rows(array: Any, start: int, out: Shaped[np.ndarray, "M ..."]) -> None:
    """Copies rows of an array or of a file from `start` on into `out`, which is contiguous.

    Raises:
        UserError: the file cannot be read.
    """
    if isinstance(array, Rows):
        array.read(start, out)
    else:
        out[:] = array[start : start + len(out)]


# Checksums.


def episode_checksums(
    rows: Shaped[np.ndarray, "N ..."], length: Int[np.ndarray, " E"]
) -> UInt32[np.ndarray, " E"]:
    """CRC-32 of the rows of each episode, of which `rows`, contiguous, holds one after the other."""
    view, width = rows.reshape(-1).view(np.uint8).data, rows[:1].nbytes
    ends = np.cumsum(length) * width
    return np.asarray(
        [zlib.crc32(view[a:b]) for a, b in zip(ends - length * width, ends, strict=True)], np.uint32
    )


def content_of(
    train: tuple[ShardRows, ...], val: ShardRows | None, summaries: Statistics | None
) -> ContentChecksums:
    """Checksums of what is trained on, from the checksums of its episodes."""
    ranges = [] if summaries is None or summaries.val is None else [summaries.val.low, summaries.val.high]
    held = None if val is None else _digest(val, *ranges)
    return ContentChecksums(hashlib.sha256("".join(map(_digest, train)).encode()).hexdigest()[:32], held)


def _digest(split: ShardRows, *more: np.ndarray) -> str:
    maps = [] if split.codec is None else [np.concatenate(affine) for affine in split.codec]
    terminated = [] if split.terminated is None else [split.terminated]
    shape = np.asarray([*split.obs.shape, *split.action.shape], np.int64)
    checks = np.zeros(0, np.uint32) if split.checks is None else split.checks
    found = hashlib.sha256(split.obs.dtype.name.encode())
    for array in (shape, split.length, *terminated, checks, *maps, *more):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:32]


def metadata_checksum(meta: Mapping[str, Any]) -> int:
    """Checksum of a description, without the one that it holds."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, default=str).encode())


def save_checks(folder: Path, length: Int[np.ndarray, " E"], arrays: Sequence[np.ndarray]) -> None:
    """Writes the checksums of a split's rows; `arrays` are as they are stored, in the order of `ROWS`."""
    with open(folder / CHECKS, "wb") as file:
        np.save(
            file, np.stack([episode_checksums(np.ascontiguousarray(rows), length) for rows in arrays], axis=1)
        )
        fsync(file)


def save_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Writes the description of a store whose arrays are all there, with the checksums that it must have.

    Args:
        meta: at least `env`, `columns`, `dtype`, `codec`, `train` and `val` (rows), `notes`, `statistics`.
    """
    codec = meta["codec"] and Codec(*(Affine.from_dict(meta["codec"][k]) for k in Codec._fields))
    columns, summaries = (
        tuple(meta["columns"]),
        meta["statistics"] and Statistics.from_dict(meta["statistics"]),
    )
    with _Folder(path) as folder:
        folder.make_room(3 * (len(meta["train"]) + 1))
        train = tuple(_open_split(folder, name, rows, columns, codec) for name, rows in meta["train"].items())
        val = _open_split(folder, "val", meta["val"], columns, None) if meta["val"] else None
    whole = dict(meta) | {"format": FORMAT, "content": list(content_of(train, val, summaries))}
    whole = json.loads(json.dumps(whole, default=str))  # as it will be read
    write_json(path / META, whole | {"seal": metadata_checksum(whole)})


# Opening.


class _Folder:
    """A store's folder that is held open: its files are of one folder, whatever takes the name meanwhile."""

    def __init__(self, path: Path):
        self.path, self._held = path, -1

    def __enter__(self) -> "_Folder":
        try:
            self._held = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _absent(self.path) from error
        except OSError as error:
            raise _refused(self.path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._held)

    def open(self, name: str) -> int:
        """Descriptor of a regular file of the folder, for reading."""
        # A pipe would otherwise wait for its writer.
        found = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._held)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise ValueError(f"{name} is no regular file")
        return found

    def rows(self, name: str) -> Rows:
        """An array of the folder."""
        return Rows(self.open(name), str(self.path / name))

    def meta(self) -> dict[str, Any]:
        """The description, of this format."""
        try:
            with open(self.open(META), "rb") as file:
                meta = json.loads(file.read().decode("utf-8"))
        except FileNotFoundError as error:
            raise _absent(self.path) from error
        if not isinstance(meta, dict):
            raise ValueError(f"{META} holds no description")
        if meta.get("format") != FORMAT:
            raise _absent(self.path, meta.get("format"))
        return meta

    def replaced(self) -> bool:
        """Returns whether another folder has the name by now."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._held)) is False
        except OSError:
            return False

    def make_room(self, files: int) -> None:
        """Raises the limit of open files if so many more may not fit."""
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = len(os.listdir("/proc/self/fd")) + files + 256
            if soft < wanted:
                most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _open_split(
    folder: _Folder, name: str, rows: int, columns: tuple[int, ...], codec: Codec | None
) -> ShardRows:
    def opened(file: str, dtype: type, shape: tuple[int, ...]) -> Rows:
        found = folder.rows(f"{name}/{file}")
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(f"{name}/{file}: {found.dtype} {found.shape}, not {np.dtype(dtype)} {shape}")
        return found

    wanted = np.float32 if codec is None else np.uint16
    obs, action = (opened(f, wanted, (rows, n)) for f, n in zip((OBS, ACTION), columns, strict=True))
    episodes = folder.rows(f"{name}/{EPISODES}")[:]
    if episodes.dtype != np.int64 or episodes.ndim != 2 or episodes.shape[1] not in (2, 3):
        raise ValueError(f"{name}/{EPISODES}: {episodes.dtype} {episodes.shape}")
    first, length = np.ascontiguousarray(episodes[:, 0]), np.ascontiguousarray(episodes[:, 1])
    if not len(length) or length.min() < 1 or length.max() > rows or length.sum() != rows:
        raise ValueError(f"{name}: row counts disagree")
    if (first != np.cumsum(length) - length).any():
        raise ValueError(f"{name}: episodes do not lie end to end")
    terminated = episodes[:, 2].astype(bool) if episodes.shape[1] == 3 else None
    if terminated is not None and (terminated != episodes[:, 2]).any():
        raise ValueError(f"{name}/{EPISODES}: an episode's end is neither 0 nor 1")
    reward = None if terminated is None else opened(REWARD, np.float32, (rows,))
    checks = folder.rows(f"{name}/{CHECKS}")[:]
    if checks.dtype != np.uint32 or checks.shape != (len(length), 2 if terminated is None else 3):
        raise ValueError(f"{name}/{CHECKS}: {checks.dtype} {checks.shape}")
    return ShardRows(obs, action, first, length, codec, reward, terminated, checks, str(folder.path / name))


def _absent(path: Path, version: Any = None) -> UserError:
    if version == 2:
        return UserError(
            f"{path}: a dataset store of format 2, without checksums; "
            f"`python experiments/convert_data.py {path}` adds them"
        )
    return UserError(f"{path}: no dataset store of format {FORMAT} here; make it from the .npz again")


def _refused(path: Path, error: OSError) -> UserError:
    remedy = "check the disk and the folder's rights"
    if error.errno == errno.EMFILE:
        remedy = "raise the limit of open files (ulimit -n): a store holds up to 3 files of each shard"
    return UserError(f"{path}: cannot be read ({refusal(error)}); {remedy}")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: damaged store ({why}); delete this folder, and make it again")
