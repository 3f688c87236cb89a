"""One writer at a time: a job that was queued twice must not mix its results."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mac.errors import UserError


def lock(descriptor: int, path: Path) -> None:
    """Holds an open file or folder for this process until it is closed, if the system has locks.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: run without the guard
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path} is being written by another process: wait for it, or choose another --out"
        ) from None
    except OSError:
        pass  # a file system without locks


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Holds an existing folder for this process while entered; the system frees it if the process dies.

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
        yield
    finally:
        os.close(descriptor)
