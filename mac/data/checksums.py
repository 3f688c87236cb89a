"""SHA-256 of dataset files, kept from call to call, so that files that did not change are not read again."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from mac.atomic_files import load_json, locked, write_json
from mac.errors import UserError, refusal

KEPT = ".checksums.json"
"""Name of the file in which they are kept, in the folder of stores."""


class Checksums:
    """Checksums of files, remembered for as long as a file is the same by all that the system tells of it.

    A file is taken for unchanged if its path, size, inode and both its times are: the time of the last
    change of the inode cannot be set by a copying program, as the time of modification can.
    """

    def __init__(self, kept: Path | None = None):
        """Remembers in the file `kept`, if it can be read and written; None: for this object's life only."""
        self._kept, self._known = kept, {}
        if kept is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._known = dict(load_json(kept))

    def of(self, files: Sequence[Path]) -> list[str]:
        """The checksum of each file's content.

        Raises:
            UserError: a file cannot be read.
        """
        found, new = [], {}
        for file in files:
            key, state = str(file.resolve()), _state(file)
            known = self._known.get(key)
            if not (isinstance(known, list) and len(known) == 2 and known[0] == state):
                known = [state, sha256(file)]
                new[key] = known
            found.append(known[1])
        if new:
            self._keep(new)
        return found

    def _keep(self, new: dict[str, list]) -> None:
        self._known |= new
        if self._kept is None or not self._kept.parent.is_dir():
            return
        lock = self._kept.with_name(self._kept.name + ".lock")
        with contextlib.suppress(UserError), locked(lock):  # else the folder may only be read
            there = Checksums(self._kept)._known | new
            write_json(self._kept, {key: value for key, value in there.items() if os.path.exists(key)})


def sha256(path: Path) -> str:
    """Checksum of a file's content.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({refusal(error)})") from error


def _state(file: Path) -> list[int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({refusal(error)})") from error
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
