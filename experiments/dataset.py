"""Finding the dataset of a run, or making it, and opening it as a flat store."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from envs_mjx.episodes import EPISODE_ROWS
from envs_mjx.registry import parse
from experiments.settings import DataConfig
from mac.data.convert import Progress, prepare
from mac.data.shards import shard_files, sizes_of
from mac.data.store import Store, is_store, read_meta
from mac.errors import UserError
from mac.run.progress import open_progress
from mac.types import EnvSpec


class Facts(NamedTuple):
    """What is known of a dataset before it is opened: training rows, and how they will be stored."""

    rows: int
    dtype: str


def ogbench_folder() -> Path:
    """Where the ogbench package keeps its downloads."""
    return Path.home() / ".ogbench" / "data"


def generated_file(data: DataConfig, dataset: str) -> Path:
    """Where a generated dataset goes: its folder names its size and seed, so that none passes for another."""
    rows = -(-data.rows // EPISODE_ROWS) * EPISODE_ROWS
    return data.dir / f"generated-{rows}-seed{data.seed}" / f"{dataset}.npz"


def locate(data: DataConfig, env: str) -> tuple[Path, bool]:
    """The dataset's file, folder of shards or store, and whether it exists.

    Looks at `--data.path`, then for OGBench's file name in `--data.dir` and in ogbench's own folder,
    then for what an earlier run or `collect.py` generated.

    Raises:
        UserError: `--data.path` is given and there is no dataset.
    """
    dataset = parse(env).dataset
    if data.path is not None:
        if not is_store(data.path):
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


def open_store(data: DataConfig, source: Path, spec: EnvSpec, progress: Progress | None = None) -> Store:
    """The store of a dataset, converted on first use; or `source` itself, if it is a store.

    Raises:
        UserError: the files are damaged or do not fit the environment or the settings, or the disk
            refuses.
    """
    dtype = None if data.dtype == "auto" else data.dtype
    if not is_store(source):
        return prepare(source, store_folder(data, source), spec, dtype, progress)
    store = Store.open(source)
    if store.widths != (spec.obs_dim, spec.action_dim):
        raise UserError(
            f"{source}: has {store.widths[0]} observation and {store.widths[1]} action columns, {spec.name} "
            f"has {spec.obs_dim} and {spec.action_dim}; this dataset belongs to another environment"
        )
    if dtype not in (None, store.dtype):
        raise UserError(f"--data.dtype={dtype}: {source} is stored as {store.dtype}; prepare it as {dtype}")
    return store


@contextlib.contextmanager
def shown(title: str) -> Iterator[Progress]:
    """A display of rows done, which appears when there is something to show."""
    with contextlib.ExitStack() as stack:
        display: list[Any] = []

        def count(done: int, total: int) -> None:
            if not display:
                display.append(stack.enter_context(open_progress(title, total, "rows")))
            display[0].count(done, total)

        yield count


def facts(data: DataConfig, source: Path, found: bool) -> Facts:
    """Training rows of a dataset, from headers alone, and how they will be stored."""
    folder = source if is_store(source) else store_folder(data, source)
    dtype = (read_meta(folder) or {}).get("dtype", "float32") if data.dtype == "auto" else data.dtype
    return Facts((count_rows(source) if found else None) or data.rows, dtype)


def count_rows(source: Path) -> int | None:
    """Training rows of a dataset, from headers alone; None if they cannot be read."""
    if is_store(source):
        return sum((read_meta(source) or {}).get("train", {}).values()) or None
    # Reading a damaged file whole will say why.
    return sum(sizes_of(file)[0] for file in shard_files(source)) or None


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
