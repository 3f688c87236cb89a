"""The rows a run leaves behind: `metrics.jsonl` and `eval.jsonl`, one JSON object per line.

A checkpoint records how many bytes of each file it covers (`RunLog.sync`); a resumed run cuts both
files back to that position and writes the same rows again. So no row is ever lost or doubled,
whatever moment the process was killed at. It records a CRC-32 of those bytes too, so that rows which were
edited since are found.
"""

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mac.atomic_files import require_regular
from mac.errors import UserError, refusal, remedy
from mac.run.io.eval_rows import Evaluation, eval_rows
from mac.run.io.folder_lock import lock

METRICS = "metrics.jsonl"
EVAL = "eval.jsonl"
ALL = -1
"""Position of a `JsonlWriter` that keeps all whole rows of a file."""


def _plain(value: Any) -> Any:
    """A JSON value: float32 in its shortest decimal form, null for NaN and infinity, which JSON lacks."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    number = np.asarray(value)
    if number.dtype.kind != "f":
        return number.item()
    return float(str(number[()])) if np.isfinite(number) else None


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps({name: _plain(value) for name, value in row.items()}).encode() + b"\n"


class JsonlWriter:
    """Appends whole rows to one file and knows how many bytes of it are rows.

    Args:
        path: the file; its folder is made if missing.
        position: bytes to keep, as returned by `sync` of an earlier run: what follows is cut off.
            None for a new file; `ALL` keeps all but a last row that was cut short.
        checksum: CRC-32 of those bytes, as `checksum` was then; None if it is not known.
        patience: seconds to wait for another process that is writing the file.
        then: what comes after the remedy, where the system refuses.
    Attributes:
        position, checksum: bytes that are rows, and their CRC-32.
    Raises:
        UserError: the file cannot be written, another process is writing it, it already has rows
            although `position` is None, or its first `position` bytes are not those of then.
    """

    def __init__(
        self,
        path: Path,
        position: int | None = None,
        checksum: int | None = None,
        *,
        patience: float = 0.0,
        then: str = "; then --resume",
    ):
        self.path = path
        self.position, self.checksum = 0, 0
        self._then = then
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                require_regular(path, device=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._failure(error) from error
        try:
            lock(self._file.fileno(), path, patience)
            self._keep(position, checksum)
        except OSError as error:
            self._file.close()
            raise self._failure(error) from error
        except UserError:
            self._file.close()
            raise

    def _keep(self, position: int | None, checksum: int | None) -> None:
        """Makes sure that the rows are those of then, and cuts off what follows them."""
        size = os.fstat(self._file.fileno()).st_size
        if position is None and size:
            raise UserError(
                f"{self.path} holds a run already: add --resume to continue it, or choose another --out"
            )
        self.position = self.path.read_bytes().rfind(b"\n") + 1 if position == ALL else position or 0
        self.checksum, fault = compare_rows(self.path, self.position, checksum)
        if fault:
            raise UserError(f"{self.path} {fault}; restore it, or choose another --out")
        if size > self.position:
            self._file.truncate(self.position)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows; other processes see them at once, a power failure may still lose them (`sync`).

        Raises:
            UserError: the disk is full or fails. No part of `rows` stays in the file.
        """
        data = memoryview(b"".join(map(_encode, rows)))
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._cut()
            raise self._failure(error) from error
        self.position += len(data)
        self.checksum = zlib.crc32(data, self.checksum)

    def sync(self) -> int:
        """Forces all rows to the disk; returns the position for a checkpoint to keep."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error
        return self.position

    def close(self) -> None:
        self._file.close()

    def _cut(self) -> None:
        # Where even this fails, the torn row is skipped by `read_rows` and cut at resume.
        with contextlib.suppress(OSError):
            self._file.truncate(self.position)

    def _failure(self, error: OSError) -> UserError:
        then = remedy(error, "check the disk") + self._then
        return UserError(f"cannot write {self.path}: {refusal(error)}; {then}")


def compare_rows(path: Path, position: int, checksum: int | None) -> tuple[int, str]:
    """Compares the first `position` bytes of a file of rows with what a checkpoint records of them.

    Returns their CRC-32, and how they differ in words that follow the file's name; empty if they do not.

    Args:
        checksum: CRC-32 of those bytes, as it was then; None if it is not known.
    Raises:
        OSError: the file cannot be read.
    """
    if (size := path.stat().st_size) < position:
        return 0, f"has {size} bytes but its checkpoint was written at {position}: the file was shortened"
    found, last = _sum_of(path, position)
    edited = position and (last != b"\n" or checksum not in (None, found))
    return found, "was edited after its checkpoint" if edited else ""


def _sum_of(path: Path, size: int) -> tuple[int, bytes]:
    """CRC-32 of the first `size` bytes of a file, and the last one of them."""
    checksum, last = 0, b""
    with open(path, "rb") as file:
        while size and (part := file.read(min(size, 1 << 20))):
            checksum, last, size = zlib.crc32(part, checksum), part[-1:], size - len(part)
    return checksum, last


def append_row(path: Path, row: Mapping[str, Any], *, patience: float = 10.0) -> None:
    """Adds a row to a file to which many programs write, one after the other; whole or not at all.

    Args:
        patience: seconds to wait for another process that is writing it.
    Raises:
        UserError: the file cannot be written, or another process is writing it.
    """
    with contextlib.closing(JsonlWriter(path, ALL, patience=patience, then="")) as writer:
        writer.write([row])
        writer.sync()


def check_appendable(path: Path, flag: str) -> None:
    """Finds out early that `append_row` could not write a file; changes nothing.

    Raises:
        UserError: naming the flag that chooses another file.
    """
    try:
        if path.exists():
            require_regular(path, device=True)
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {refusal(error)}; choose another file with {flag}") from error


class RunLog:
    """Both files of one run.

    Args:
        folder: the run's folder.
        positions: what `sync` returned when the checkpoint to resume from was written; an empty
            mapping when the run left no checkpoint (both files are emptied); None for a new run.
        checksums: what `checksums` returned then; empty if the checkpoint tells none.
    Raises:
        UserError: as `JsonlWriter`.
    """

    def __init__(
        self,
        folder: Path,
        positions: Mapping[str, int] | None = None,
        checksums: Mapping[str, int] | None = None,
    ):
        self._writers: dict[str, JsonlWriter] = {}
        for name in (METRICS, EVAL):
            try:
                position = None if positions is None else positions.get(name, 0)
                self._writers[name] = JsonlWriter(folder / name, position, (checksums or {}).get(name))
            except UserError:
                self.close()
                raise

    def metrics(self, step: int, seeds: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Writes one row per seed: `step`, `seed`, then each of `values`, arrays of shape [S]."""
        table = {name: np.asarray(column) for name, column in values.items()}
        rows = [
            {"step": step, "seed": seed, **{name: column[i] for name, column in table.items()}}
            for i, seed in enumerate(seeds)
        ]
        self._writers[METRICS].write(rows)

    def evals(self, evaluation: Evaluation, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Writes one row per seed and task, as `eval_rows` makes them, and returns the rows."""
        rows = eval_rows(evaluation, seeds)
        self._writers[EVAL].write(rows)
        return rows

    def sync(self) -> dict[str, int]:
        """Forces all rows to the disk; returns the byte position of each file, for the checkpoint."""
        return {name: writer.sync() for name, writer in self._writers.items()}

    def checksums(self) -> dict[str, int]:
        """CRC-32 of the rows of each file, to be kept beside what `sync` returns."""
        return {name: writer.checksum for name, writer in self._writers.items()}

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file; a last line without its newline (a write cut short) is skipped.

    Numbers that were not finite are read back as NaN.

    Raises:
        UserError: the file cannot be read, or a complete line is not a JSON object.
    """
    yield from rows_after(path, 0)[0]


def rows_after(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows from a byte position on, as `read_rows` gives them, and the position after them.

    Raises:
        UserError: as `read_rows`.
    """
    try:
        require_regular(path)
        with open(path, "rb") as file:
            file.seek(position)
            lines = file.read().split(b"\n")[:-1]
    except OSError as error:
        then = remedy(error, "restore it")
        raise UserError(f"cannot read {path}: {refusal(error)}; {then}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            after = f" after byte {position}" if position else ""
            raise UserError(f"{path}, line {number}{after}: not a JSON object; restore the file")
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows, position + sum(len(line) + 1 for line in lines)
