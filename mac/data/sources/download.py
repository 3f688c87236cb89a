"""Downloads all files of a public dataset, and records their checksums."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mac.atomic_files import locked, writing
from mac.data.provenance import LEDGER, DownloadRecord, download_records, record_download
from mac.data.sources.catalogue import PublicDataset, RemoteFile
from mac.data.sources.http_download import Progress, RetryPolicy, Unavailable, download
from mac.errors import UserError
from mac.formatting import counted

Display = Callable[[str], contextlib.AbstractContextManager[Progress]]
Say = Callable[[str], Any]
"""Callback with a line for the user."""


def fetch(
    listing: PublicDataset,
    folder: Path,
    *,
    display: Display | None = None,
    say: Say = lambda text: None,
    patience: RetryPolicy | None = None,
) -> Path:
    """Downloads the missing files of a dataset; returns the path that training opens.

    The first download records the files' checksums in `checksums.json` in their folder; a later download of a
    file must have the same checksum. Several processes may call this function at once: one downloads, the
    others wait.

    Args:
        folder: folder of downloads, with a folder for each collection.
        display: context manager that shows the progress of a file, given the file's name.
    Raises:
        Unavailable: no address provides a file.
        UserError: the checksum of a file differs from the recorded one, or the disk refuses.
    """
    home = folder / listing.folder
    display = display or (lambda name: contextlib.nullcontext(lambda done, total: None))
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    for i, remote in enumerate(listing.files):
        path = home / remote.name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with locked(lock, lambda name=remote.name: say(f"waiting for another process that downloads {name}")):
            if not path.exists():
                _download_file(listing, remote, path, display, patience)
        if i == 0:
            _check_room(listing, home, path)
    return home / listing.main


def is_here(listing: PublicDataset, folder: Path) -> bool:
    """Returns whether every file was downloaded."""
    return all((folder / listing.folder / remote.name).exists() for remote in listing.files)


def _download_file(
    listing: PublicDataset,
    remote: RemoteFile,
    path: Path,
    display: Display,
    patience: RetryPolicy | None,
) -> None:
    entry = download_records(path.parent).get(path.name)
    known = None if entry is None else entry.sha256
    try:
        with display(remote.name) as progress:
            result = download(remote.urls, path, known=known, progress=progress, patience=patience)
    except Unavailable:
        raise
    except UserError as error:
        if known is None:
            raise
        raise UserError(
            f"{error}; if the change is meant, delete its entry in {path.parent / LEDGER}"
        ) from error
    record_download(path, DownloadRecord(result.sha256, result.size, result.url, listing.collection))


def _check_room(listing: PublicDataset, home: Path, path: Path) -> None:
    """Checks the free disk space; training files of a large set are as large as its first."""
    missing = sum(
        not (home / remote.name).exists() for remote in listing.files if "-val" not in Path(remote.name).name
    )
    need, free = missing * 1.1 * path.stat().st_size, shutil.disk_usage(home).free
    if need > free:
        raise UserError(
            f"{home}: about {need / 1e6:,.0f} MB are needed for {counted(missing, 'missing file')}, "
            f"{free / 1e6:,.0f} MB are free; free some space, take fewer --data.shards or choose another "
            "--data.dir"
        )
