"""The rows a run leaves behind: `metrics.jsonl` and `eval.jsonl`, one JSON object per line.

A checkpoint records how many bytes of each file it covers (`RunLog.sync`); a resumed run cuts both
files back to that position and writes the same rows again. So no row is ever lost or doubled,
whatever moment the process was killed at.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mac.errors import UserError, one_line
from mac.run.claim import lock
from mac.run.rows import eval_rows
from mac.types import EnvSpec, Episodes

METRICS = "metrics.jsonl"
EVAL = "eval.jsonl"


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
            None for a new file.
    Raises:
        UserError: the file cannot be written, another process is writing it, it already has rows
            although `position` is None, or it is shorter than `position`.
    """

    def __init__(self, path: Path, position: int | None = None):
        self.path = path
        self.position = position or 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._claim(position)
        except OSError as error:
            self._file.close()
            raise self._failure(error) from error
        except UserError:
            self._file.close()
            raise

    def _claim(self, position: int | None) -> None:
        lock(self._file.fileno(), self.path)
        size = os.fstat(self._file.fileno()).st_size
        if position is None and size:
            raise UserError(
                f"{self.path} holds a run already: add --resume to continue it, or choose another --out"
            )
        if size < self.position:
            raise UserError(
                f"{self.path} has {size} bytes but its checkpoint was written at {self.position}: "
                "the file was shortened; restore it, or choose another --out"
            )
        with open(self.path, "rb") as file:
            file.seek(max(self.position - 1, 0))
            if self.position and file.read(1) != b"\n":
                raise UserError(
                    f"{self.path} was edited after its checkpoint: restore it, or choose another --out"
                )
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
        reason = error.strerror or one_line(error)
        return UserError(f"cannot write {self.path}: {reason}; free space or set rights, then --resume")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file to which many programs write, one after the other; whole or not at all.

    Raises:
        UserError: the file cannot be written, or another process is writing it.
    """
    position = None
    with contextlib.suppress(FileNotFoundError):
        position = path.read_bytes().rfind(b"\n") + 1  # without what is left of a write cut short
    with contextlib.closing(JsonlWriter(path, position)) as writer:
        writer.write([row])
        writer.sync()


class RunLog:
    """Both files of one run.

    Args:
        folder: the run's folder.
        positions: what `sync` returned when the checkpoint to resume from was written; an empty
            mapping when the run left no checkpoint (both files are emptied); None for a new run.
    Raises:
        UserError: as `JsonlWriter`.
    """

    def __init__(self, folder: Path, positions: Mapping[str, int] | None = None):
        self._writers: dict[str, JsonlWriter] = {}
        for name in (METRICS, EVAL):
            try:
                position = None if positions is None else positions.get(name, 0)
                self._writers[name] = JsonlWriter(folder / name, position)
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

    def evals(
        self,
        step: int,
        seeds: Sequence[int],
        tasks: Sequence[int],
        result: Episodes,
        engine: str,
        data: str = "",
        spec: EnvSpec | None = None,
    ) -> list[dict[str, Any]]:
        """Writes one row per seed and task, as `eval_rows` makes them, and returns the rows."""
        rows = eval_rows(step, seeds, tasks, result, engine, data, spec)
        self._writers[EVAL].write(rows)
        return rows

    def sync(self) -> dict[str, int]:
        """Forces all rows to the disk; returns the byte position of each file, for the checkpoint."""
        return {name: writer.sync() for name, writer in self._writers.items()}

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
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}") from error
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; delete the line and try again")
        yield {name: math.nan if value is None else value for name, value in row.items()}
