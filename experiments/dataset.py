"""Finding the dataset of a run, or making it, and opening it as a flat store."""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from envs_mjx.episodes import EPISODE_ROWS
from envs_mjx.registry import parse
from experiments.settings import DataConfig
from mac.data.store import Store, prepare, shard_files
from mac.errors import UserError
from mac.types import EnvSpec


def ogbench_folder() -> Path:
    """Where the ogbench package keeps its downloads."""
    return Path.home() / ".ogbench" / "data"


def generated_file(data: DataConfig, dataset: str) -> Path:
    """Where a generated dataset goes: its folder names its size and seed, so that none passes for another."""
    rows = -(-data.rows // EPISODE_ROWS) * EPISODE_ROWS
    return data.dir / f"generated-{rows}-seed{data.seed}" / f"{dataset}.npz"


def locate(data: DataConfig, env: str) -> tuple[Path, bool]:
    """The dataset's file or folder of shards, and whether it exists.

    Looks at `--data.path`, then for OGBench's file name in `--data.dir` and in ogbench's own folder,
    then for what an earlier run or `collect.py` generated.

    Raises:
        UserError: `--data.path` is given and there is no dataset.
    """
    dataset = parse(env).dataset
    if data.path is not None:
        shard_files(data.path)
        return data.path, True
    generated = generated_file(data, dataset)
    shards = generated.with_suffix("")  # where `collect.py` puts several files
    if (shards / f"{dataset}.json").exists():  # all of them are there
        return shards, True
    places = [data.dir / f"{dataset}.npz", ogbench_folder() / f"{dataset}.npz", generated]
    return next(((p, True) for p in places if p.exists()), (generated, False))


def store_folder(data: DataConfig, source: Path) -> Path:
    """Where the converted copy of `source` goes: beside nothing of the user's, under `--data.dir`."""
    name = source.resolve().name.removesuffix(".npz")
    return data.dir / "stores" / f"{source.resolve().parent.name}-{name}"


def open_store(data: DataConfig, source: Path, spec: EnvSpec) -> Store:
    """The store of a dataset, converted on first use.

    Raises:
        UserError: the files are damaged or do not fit the environment, or the disk refuses.
    """
    return prepare(source, store_folder(data, source), spec)


def count_rows(source: Path) -> int | None:
    """Training rows of a dataset, from the files' headers alone; None if they cannot be read."""
    try:
        return sum(_header_rows(file) for file in shard_files(source))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # reading the whole file will say why


def _header_rows(file: Path) -> int:
    with zipfile.ZipFile(file) as archive, archive.open("observations.npy") as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)[0][0]
        return np.lib.format.read_array_header_2_0(stream)[0][0]


def check_writable(folder: Path, flag: str) -> None:
    """Finds out early that results could not be written.

    Raises:
        UserError: naming the folder and the flag that chooses another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}); choose another {flag}"
        ) from error
