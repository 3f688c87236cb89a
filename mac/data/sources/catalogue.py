"""Catalogue of public datasets: their files, hosts and sizes, by name.

| collection | name, for example | files |
|---|---|---|
| OGBench | `cube-single-play-v0` | `NAME.npz`, `NAME-val.npz` |
| OGBench, large | the same, and a number of shards | `STEM-100m-v0/STEM-v0-000.npz`, `...-000-val.npz` |
| D4RL | `hopper-medium-replay-v2` | `hopper_medium_replay-v2.hdf5` |
| Minari | `mujoco/hopper/medium-v0` | `mujoco/hopper/medium-v0/data/main_data.hdf5` |

None of these hosts publishes checksums; `download` records those of the first download.

Sources: `ogbench.utils` 1.2 and the README of OGBench (Park et al. 2025) for the large sets; D4RL (Fu et al.
2020); Minari 0.5, `minari/storage/remotes/huggingface.py`. The mirror of D4RL's files on Hugging Face belongs
to a third party.
"""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, urlsplit

SHARDS = 100
"""Numbered files of a large OGBench set."""

OGBENCH = "https://rail.eecs.berkeley.edu/datasets/ogbench"
D4RL = "https://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
D4RL_MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
MINARI = "https://huggingface.co/datasets/farama-minari"
PRIMARY = {
    "OGBench": ("rail.eecs.berkeley.edu",),
    "D4RL": ("rail.eecs.berkeley.edu",),
    "Minari": ("huggingface.co",),
}
"""Hosts of the authors of each collection."""

_ROWS = {  # training states of OGBench's ordinary files; 1,001,000 if not listed
    "cube-triple-": 3_003_000,
    "cube-quadruple-": 5_005_000,
    "puzzle-4x5-": 3_003_000,
    "puzzle-4x6-": 5_005_000,
    "pointmaze-giant-navigate": 1_000_500,
    "pointmaze-[a-z]+-stitch": 1_005_000,
    "antmaze-giant-navigate": 1_000_500,
    "antmaze-[a-z]+-stitch": 1_005_000,
    "antmaze-[a-z]+-explore": 5_010_000,
    "humanoidmaze-giant-navigate": 4_001_000,
    "humanoidmaze-giant-stitch": 4_010_000,
    "humanoidmaze-[a-z]+-navigate": 2_001_000,
    "humanoidmaze-[a-z]+-stitch": 2_005_000,
}
_LARGE_ONLY = ("cube-octuple-",)  # OGBench has no ordinary file of these
_LARGE = re.compile(
    r"cube-(double|triple|quadruple|octuple)-play|cube-quadruple-noisy|scene-play"
    r"|puzzle-(3x3|4x4|4x5|4x6)-play|humanoidmaze-giant-navigate"
)
_D4RL_ROWS = {"medium-expert": 2_000_000, "full-replay": 1_000_000}
_D4RL_ROWS_OF = {"halfcheetah": 202_000, "hopper": 402_000, "walker2d": 302_000}  # medium-replay


class RemoteFile(NamedTuple):
    """One file of a dataset.

    Attributes:
        name: path below the collection's address, and below the folder of downloads.
        urls: addresses, in the order of attempts.
    """

    name: str
    urls: tuple[str, ...]


class PublicDataset(NamedTuple):
    """The public files of one dataset.

    Attributes:
        dataset: name of the dataset.
        collection: `OGBench`, `D4RL` or `Minari`.
        files: training file first.
        main: path that training opens, below the folder of downloads: the first file, or a folder of shards.
        rows: approximate number of training states.
    """

    dataset: str
    collection: str
    files: tuple[RemoteFile, ...]
    main: str
    rows: int

    @property
    def folder(self) -> str:
        """Returns the name of the folder of this collection's downloads."""
        return self.collection.lower()

    @property
    def hosts(self) -> str:
        """Returns the hosts of the files, for messages."""
        return ", ".join(dict.fromkeys(urlsplit(url).netloc for url in self.files[0].urls))


def find_public_dataset(dataset: str, shards: int = 0, mirror: str | None = None) -> PublicDataset | None:
    """Returns the public files of a dataset; None if there are none that this program supports.

    Args:
        dataset: a name as in the module's table.
        shards: number of files of OGBench's large set; 0 is the ordinary file.
        mirror: address to use instead of the known ones, with the same files below it.
    """
    if match := re.fullmatch(r"(hopper|walker2d|halfcheetah)-([a-z-]+)-v2", dataset):
        robot, level = match[1], match[2]
        name = f"{robot}_{level.replace('-', '_')}-v2.hdf5"
        rows = _D4RL_ROWS_OF[robot] if level == "medium-replay" else _D4RL_ROWS.get(level, 1_000_000)
        return _list(dataset, "D4RL", [name], [D4RL, D4RL_MIRROR], mirror, rows)
    if "/" in dataset:
        name = f"{dataset}/data/main_data.hdf5"
        namespace, rest = name.split("/", 1)
        found = _list(dataset, "Minari", [name], [MINARI], mirror, 1_000_000)
        public = RemoteFile(name, (f"{MINARI}/{namespace}/resolve/main/{quote(rest)}",))
        return found if mirror else found._replace(files=(public,))
    stem = dataset.removesuffix("-v0")
    if shards:
        return _large(dataset, stem, shards, mirror)
    if dataset.startswith(_LARGE_ONLY):
        return None
    names = [f"{dataset}.npz", f"{dataset}-val.npz"]
    return _list(dataset, "OGBench", names, [OGBENCH], mirror, ordinary_rows(dataset))


def ordinary_rows(dataset: str) -> int:
    """Returns the number of training states in OGBench's ordinary file."""
    return next((rows for pattern, rows in _ROWS.items() if re.match(pattern, dataset)), 1_001_000)


def large_folder(dataset: str) -> str:
    """Returns the folder of OGBench's large set."""
    return f"{dataset.removesuffix('-v0')}-100m-v0"


def has_large_set(dataset: str) -> bool:
    """Returns whether OGBench's README names a set of 100M transitions."""
    return _LARGE.fullmatch(dataset.removesuffix("-v0")) is not None


def _large(dataset: str, stem: str, shards: int, mirror: str | None) -> PublicDataset | None:
    giant = stem.startswith("humanoidmaze-giant")
    count = SHARDS // 4 if giant else SHARDS  # a shard of `giant` has 4M transitions
    if not has_large_set(dataset) or shards > count:
        return None
    folder = large_folder(dataset)
    names = [f"{folder}/{stem}-v0-{i:03d}{part}.npz" for i in range(shards) for part in ("", "-val")]
    rows = shards * (4_001_000 if giant else 1_001_000)
    return _list(dataset, "OGBench", names, [OGBENCH], mirror, rows)._replace(main=folder)


def _list(
    dataset: str, collection: str, names: list[str], addresses: list[str], mirror: str | None, rows: int
) -> PublicDataset:
    addresses = [mirror.rstrip("/")] if mirror else addresses
    files = tuple(RemoteFile(name, tuple(f"{a}/{quote(name)}" for a in addresses)) for name in names)
    return PublicDataset(dataset, collection, files, names[0], rows)


def other_programs_copies(dataset: str, shards: int = 0) -> tuple[Path, ...]:
    """Returns the file, or folder of shards, in which other programs keep this dataset on this machine."""
    home = Path.home()
    if "/" in dataset:
        return (home / ".minari" / "datasets" / PurePosixPath(dataset) / "data" / "main_data.hdf5",)
    found = find_public_dataset(dataset, shards)
    if found is None:
        return ()
    if found.collection == "D4RL":
        return (home / ".d4rl" / "datasets" / found.main,)
    return (home / ".ogbench" / "data" / found.main,)
