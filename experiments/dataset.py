"""Opening the dataset of a run as a flat store, and what is known of it before (`sources` finds it)."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.settings import DataConfig
from mac.data.convert import Progress, prepare
from mac.data.provenance import Provenance, describe, of_meta, origin
from mac.data.shards import shard_files, sizes_of
from mac.data.store import Store, is_store, read_meta
from mac.errors import UserError
from mac.run.progress import open_progress
from mac.types import EnvSpec


class Facts(NamedTuple):
    """What is known of a dataset before it is opened: training rows, and how they will be stored."""

    rows: int
    dtype: str


def store_folder(data: DataConfig, source: Path) -> Path:
    """Where the converted copy of `source` goes: beside nothing of the user's, under `--data.dir`."""
    source = source.resolve()
    name = source.name.removesuffix(".npz").removesuffix(".hdf5")
    above = [source.parent.name]
    if name == "main_data":  # all of Minari's files have this name, in folders such as hopper/medium-v0/data
        above = [folder.name for folder in reversed(source.parents[1:3])]
    return data.dir / "stores" / "-".join([*above, name])


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
def shown(title: str, unit: str = "rows", *, scale: int = 1) -> Iterator[Progress]:
    """A display of work done, which appears when there is something to show.

    Args:
        scale: what is counted, in `unit`s.
    """
    with contextlib.ExitStack() as stack:
        display: list[Any] = []
        shown_at = -math.inf

        def count(done: int, total: int) -> None:
            nonlocal shown_at
            if not display:
                display.append(stack.enter_context(open_progress(title, total // scale, unit)))
            now = time.monotonic()
            if now >= shown_at + 0.2 or done >= total:  # a rate needs steps of some length
                shown_at = now
                display[0].count(done // scale, total // scale)

        yield count


def facts(data: DataConfig, source: Path, expected: int | None = None) -> Facts:
    """Training rows of a dataset, and how they will be stored.

    Args:
        expected: rows of one that is not there yet; of others the files' headers tell.
    """
    folder = source if is_store(source) else store_folder(data, source)
    dtype = (read_meta(folder) or {}).get("dtype", "float32") if data.dtype == "auto" else data.dtype
    return Facts(expected or count_rows(source) or data.rows, dtype)


def provenance(source: Path) -> Provenance:
    """Where a dataset that is there comes from, as far as what lies beside it tells."""
    if is_store(source):
        return of_meta(read_meta(source) or {})
    files = shard_files(source)
    return describe(files, origin(files[0]), count_rows(source) or 0)


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
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}); choose another {flag}"
        ) from error
