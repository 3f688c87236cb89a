"""One writer at a time: a job that was queued twice must not mix its results."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from mac.atomic_files import remove_leftovers
from mac.errors import UserError


def lock(descriptor: int, path: Path, patience: float = 0.0) -> None:
    """Holds an open file or folder for this process until it is closed, if the system has locks.

    Args:
        patience: seconds to wait for another process that holds it.
    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: run without the guard
        return
    limit = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= limit:
                raise UserError(
                    f"{path} is being written by another process: wait for it, or choose another --out"
                ) from None
            time.sleep(0.05)
        except OSError:
            return  # a file system without locks


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds an existing folder for this process while entered; the system frees it if the process dies.

    What a process that was killed left half-written there is deleted.

    Raises:
        UserError: another process holds it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that does not open folders
        yield
        return
    try:
        lock(descriptor, folder)
        remove_leftovers(folder)
        yield
    finally:
        os.close(descriptor)
