"""The flat store: plain arrays of rows, converted once from `.npz` files, that open without reading.

    <store>/meta.json                  what is inside and which files it was made from
    <store>/train-000/obs.npy          float32 or uint16 [N, D], rows of whole episodes laid end to end
    <store>/train-000/action.npy       the same type [N, A]
    <store>/train-000/episodes.npy     int64 [E, 2]: first row and row count of each episode; where rewards
                                       are recorded [E, 3]: also whether it ended in a fall
    <store>/train-000/reward.npy       float32 [N], where rewards are recorded
    <store>/train-000/shard.json       which file it was made from, and what was found in it
    <store>/val/...                    as float32, if the first file has a `-val.npz` beside it

One `train-NNN` per shard, in the order of the file names. uint16 rows are codes (`codec.py`), of one
codec for all shards. The reader is the host; `window.py` moves rows to the device, `convert.py` makes
stores.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mac.data.codec import Affine, Codec
from mac.data.provenance import UNKNOWN, Provenance, of_meta
from mac.errors import UserError, one_line

FORMAT = 2
"""Version of the layout above; a store of another version is converted again."""

META, OBS, ACTION, EPISODES = "meta.json", "obs.npy", "action.npy", "episodes.npy"
REWARD = "reward.npy"
DTYPES = ("float32", "uint16")
"""How rows may be stored."""


class Split(NamedTuple):
    """Memory-mapped rows of one shard; the fields are those of `raw.RawDataset`.

    `codec` says how stored numbers become values; None if they are values.
    """

    obs: Shaped[np.ndarray, "N D"]
    action: Shaped[np.ndarray, "N A"]
    first: Int[np.ndarray, " E"]
    length: Int[np.ndarray, " E"]
    codec: Codec | None = None
    reward: Shaped[np.ndarray, " N"] | None = None
    fell: Bool[np.ndarray, " E"] | None = None


class Store(NamedTuple):
    """An opened store.

    Attributes:
        path: its folder.
        env: name of the environment that it was prepared for.
        train: one split per shard; all are stored alike.
        val: validation split of the first shard, None if there was none.
        notes: one line for each thing that a user should know about the data.
        provenance: where the data come from.
    """

    path: Path
    env: str
    train: tuple[Split, ...]
    val: Split | None
    notes: tuple[str, ...]
    provenance: Provenance = UNKNOWN

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a folder that `convert.prepare` made.

        Raises:
            UserError: if it is missing, of another format version, or damaged.
        """
        path = Path(path)
        meta = read_meta(path)
        if meta is None:
            raise UserError(f"{path}: no dataset store of format {FORMAT} here; make it from the .npz again")
        try:
            codec = meta["codec"] and Codec(*(Affine.from_plain(meta["codec"][k]) for k in Codec._fields))
            train = tuple(_open_split(path / name, rows, codec) for name, rows in meta["train"].items())
            val = _open_split(path / "val", meta["val"], None) if meta["val"] else None
            return cls(path, meta["env"], train, val, tuple(meta["notes"]), of_meta(meta))
        except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: damaged store ({one_line(error)}); delete this folder, and make it again"
            ) from error

    @property
    def statistics_obs(self) -> Float[np.ndarray, "N D"]:
        """The rows that normaliser statistics come from: validation if there is any, else training."""
        split = self.val or self.train[0]
        return split.obs if split.codec is None else split.codec.obs.decode(split.obs)

    @property
    def recorded(self) -> bool:
        """Whether rewards and falls are recorded."""
        return self.train[0].fell is not None

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
        """How training rows are stored, one of `DTYPES`."""
        return self.train[0].obs.dtype.name

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of observations and of actions."""
        return self.train[0].obs.shape[1], self.train[0].action.shape[1]


def read_meta(path: Path) -> dict[str, Any] | None:
    """A store's description, or None if there is no readable one of this format."""
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def is_store(path: Path) -> bool:
    """Whether a folder is a store, of whatever version, rather than a folder of `.npz` files."""
    return (path / META).is_file()


def read_rows(array: Shaped[np.ndarray, "N ..."], start: int, out: Shaped[np.ndarray, "M ..."]) -> None:
    """Copies rows from `start` on into `out`, which is contiguous.

    A memory-mapped array is read as a file: mapped pages would count as this process's memory, and all
    of a store passes by in time.

    Raises:
        UserError: the file cannot be read.
    """
    if not isinstance(array, np.memmap) or array.filename is None:
        out[:] = array[start : start + len(out)]
        return
    view = out.data.cast("B")
    try:
        with open(array.filename, "rb", buffering=0) as file:
            file.seek(array.offset + start * out[:1].nbytes)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise OSError("the file ends too soon")
                view = view[count:]
    except OSError as error:
        raise UserError(
            f"{array.filename}: cannot be read ({one_line(error)}); make the store again"
        ) from error


def _open_split(folder: Path, rows: int, codec: Codec | None) -> Split:
    obs = np.load(folder / OBS, mmap_mode="r")
    action = np.load(folder / ACTION, mmap_mode="r")
    episodes = np.load(folder / EPISODES)
    if not len(obs) == len(action) == rows == episodes[:, 1].sum():
        raise ValueError(f"{folder.name}: row counts disagree")
    wanted = np.float32 if codec is None else np.uint16
    if not obs.dtype == action.dtype == wanted:
        raise ValueError(f"{folder.name}: rows are {obs.dtype} and {action.dtype}, not {wanted.__name__}")
    plain = Split(obs, action, episodes[:, 0], episodes[:, 1], codec)
    if episodes.shape[1] < 3:
        return plain
    reward = np.load(folder / REWARD, mmap_mode="r")
    if reward.shape != (rows,) or reward.dtype != np.float32:
        raise ValueError(f"{folder.name}: rewards are {reward.dtype} {reward.shape}, not float32 ({rows},)")
    return plain._replace(reward=reward, fell=episodes[:, 2].astype(bool))
