"""Opening the dataset of a run as a flat store, and what is known of it before (`locate` finds it)."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.cli.settings import DataConfig
from mac.atomic_files import visible, writing
from mac.data.checksums import KEPT, Checksums
from mac.data.convert import Progress, Sources, convert
from mac.data.provenance import Provenance, describe, of_meta, origin
from mac.data.shards import shard_files, sizes_of, val_file
from mac.data.store import META, Content, Store, is_store, read_meta
from mac.errors import UserError, refusal
from mac.run.report.progress import open_progress
from mac.types import EnvSpec


class Facts(NamedTuple):
    """What is known of a dataset before it is opened: training rows, and how they will be stored.

    `guessed` says that the rows are no fact but a default, since the files' headers cannot be read.
    """

    rows: int
    dtype: str
    guessed: bool = False


def store_folder(data: DataConfig, source: Path, files: Sources, dtype: str) -> Path:
    """Where the converted copy of `source` goes: beside nothing of the user's, under `--data.dir`.

    The end of its name follows from the files' content, so that no two datasets, nor two types of one,
    share it.
    """
    key = files.key(dtype)
    made = visible(stores(data), f"*-{key}")  # under whatever name the files had then
    return made[0] if made else stores(data) / f"{store_name(source)}-{key}"


def stores(data: DataConfig) -> Path:
    """Folder of all converted copies."""
    return data.dir / "stores"


def store_name(source: Path) -> str:
    """What the name of a converted copy begins with."""
    source = source.resolve()
    name = source.name.removesuffix(".npz").removesuffix(".hdf5")
    above = [source.parent.name]
    if name == "main_data":  # all of Minari's files have this name, in folders such as hopper/medium-v0/data
        above = [folder.name for folder in reversed(source.parents[1:3])]
    return "-".join([*above, name])


def checksums(data: DataConfig) -> Checksums:
    """Of dataset files, remembered beside the stores."""
    return Checksums(stores(data) / KEPT)


def stored_as(data: DataConfig, source: Path) -> str | None:
    """How the rows of a dataset are stored in the newest of its converted copies; None if there is none."""
    made: list[tuple[int, str]] = []
    files = shard_files(source)
    files = (*files, *(file for file in map(val_file, files) if file.exists()))
    for path in visible(stores(data), f"*/{META}"):
        meta = read_meta(path.parent) or {}
        # Only where names and sizes agree are files read as a whole.
        if [size for _, size in meta.get("sources", [])] != [file.stat().st_size for file in files]:
            continue
        made_from = meta.get("made_from") or {"train": [], "val": []}  # not known of a completed store
        if [*made_from["train"], *made_from["val"]] == checksums(data).of(files):
            made.append((path.stat().st_mtime_ns, meta["dtype"]))
    return max(made, default=(0, None))[1]


def open_store(data: DataConfig, source: Path, spec: EnvSpec, progress: Progress | None = None) -> Store:
    """The store of a dataset, converted on first use; or `source` itself, if it is a store.

    Raises:
        UserError: the files are damaged or do not fit the environment or the settings, or the disk
            refuses.
    """
    dtype = None if data.dtype == "auto" else data.dtype
    if not is_store(source):
        with writing(stores(data)):
            stores(data).mkdir(parents=True, exist_ok=True)
        files = Sources.of(source, spec, checksums(data))
        dtype = dtype or stored_as(data, source) or "float32"
        folder, old = store_folder(data, source, files, dtype), stores(data) / store_name(source)
        unused = f"{old}: the store of an earlier version, is not used any more and may be deleted"
        notes = (unused,) if is_store(old) and not folder.exists() else ()
        store = convert(files, folder, spec, dtype, progress)
        # The files may have other names, or be known as a download, since they were converted.
        known = describe(files.train, origin(files.train[0]), store.rows, files.by_name)
        return store._replace(notes=(*store.notes, *notes), provenance=known)
    store = Store.open(source)
    if store.widths != (spec.obs_dim, spec.action_dim):
        raise UserError(
            f"{source}: has {store.widths[0]} observation and {store.widths[1]} action columns, {spec.name} "
            f"has {spec.obs_dim} and {spec.action_dim}; this dataset belongs to another environment"
        )
    if dtype not in (None, store.dtype):
        raise UserError(f"--data.dtype={dtype}: {source} is stored as {store.dtype}; prepare it as {dtype}")
    return store


def content(data: DataConfig, source: Path, spec: EnvSpec, dtype: str) -> Content | None:
    """Checksums of what a dataset would be trained on; None if it was not converted yet."""
    if is_store(source):
        return Store.open(source).content
    files = Sources.of(source, spec, checksums(data))
    meta = read_meta(store_folder(data, source, files, dtype))
    return None if meta is None else Content(*meta["content"])


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
    dtype = data.dtype
    if dtype == "auto" and is_store(source):
        dtype = Store.open(source).dtype
    elif dtype == "auto":
        dtype = (source.exists() and stored_as(data, source)) or "float32"
    rows = expected or count_rows(source)
    return Facts(rows or data.rows, dtype, guessed=not rows)


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
    return sum(sizes_of(file).rows for file in shard_files(source)) or None


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
        raise UserError(f"cannot write to {folder} ({refusal(error)}); choose another {flag}") from error
