"""Experiment trackers, fed from a run's rows: `--log tensorboard wandb trackio`.

The rows of `metrics.jsonl` and `eval.jsonl` are the record; a tracker holds a copy. Every launch empties the
tracker's log of the run and sends the rows from the first one on, those of earlier launches included. So
the log equals the rows whatever moment the process was killed at, and no mark of what was sent can be wrong.
W&B in its online mode is the exception: its server keeps what it has, and tells how many records that is.
"""

import abc
import contextlib
import importlib
import io
import json
import math
import os
import shlex
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mac.atomic_files import replace_file, writing
from mac.errors import UserError, one_line
from mac.run.io.logger import EVAL, METRICS, rows_after

Tracker = Literal["tensorboard", "wandb", "trackio", "none"]
PROJECT = "mac-jax"
"""Project of W&B (unless WANDB_PROJECT names another) and of trackio."""
MEAN = "mean"
"""Curve of the mean over seeds; the others are called `seed0`, `seed1`, ..."""
_MODULES = {"tensorboard": "tensorboard.summary.writer.record_writer", "wandb": "wandb", "trackio": "trackio"}
_IDENTITY = ("step", "seed", "task", "episodes")
"""Columns of rows that are no result."""


# Points.


class Record(NamedTuple):
    """Values of all curves at one step, by curve and name; curves are `mean` and `seed0`, `seed1`, ..."""

    step: int
    curves: dict[str, dict[str, float]]


def metrics_record(rows: Sequence[Mapping[str, Any]]) -> Record:
    """The record of rows of `metrics.jsonl` that were written together, one for each seed."""
    return _record(rows[0]["step"], {row["seed"]: _numbers(row) for row in rows})


def eval_record(rows: Sequence[Mapping[str, Any]]) -> Record:
    """The record of one evaluation: `eval/success`, the mean over tasks, and `eval/success/task1`, ..."""
    several = len({row["task"] for row in rows}) > 1
    seeds: dict[int, dict[str, float]] = {}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        found = {row["task"]: _numbers(row) for row in rows if row["seed"] == seed}
        seeds[seed] = {f"eval/{name}": value for name, value in _means(found.values()).items()}
        for task, values in found.items() if several else ():
            seeds[seed] |= {f"eval/{name}/task{task}": value for name, value in values.items()}
    return _record(rows[0]["step"], seeds)


def _record(step: int, seeds: Mapping[int, dict[str, float]]) -> Record:
    return Record(step, {MEAN: _means(seeds.values())} | {f"seed{n}": values for n, values in seeds.items()})


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The results of a row; no curve can show those that are not finite."""
    numbers = {k: v for k, v in row.items() if k not in _IDENTITY and type(v) in (int, float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _means(tables: Any) -> dict[str, float]:
    """The mean of each value that every table has."""
    tables = list(tables)
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: math.fsum(table[name] for table in tables) / len(tables) for name in names}


def _together(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Groups rows that were written together: of one step, each seed and task once."""
    group: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        key = row["step"], row["seed"], row.get("task")
        if key in group or (group and key[0] != next(iter(group))[0]):
            yield list(group.values())
            group = {}
        group[key] = row
    if group:
        yield list(group.values())


class RowReader:
    """Reads a run's rows as records in the order of training; each call goes on where the last one ended."""

    def __init__(self, folder: Path):
        self._positions = {folder / METRICS: 0, folder / EVAL: 0}

    def records(self) -> list[Record]:
        """The records since the last call. An evaluation follows the metrics of its step.

        Raises:
            UserError: a file is damaged.
        """
        found: list[Record] = []
        for path, make in zip(self._positions, (metrics_record, eval_record), strict=True):
            if path.exists():
                rows, self._positions[path] = rows_after(path, self._positions[path])
                try:
                    found += [make(group) for group in _together(rows)]
                except (KeyError, TypeError) as error:
                    raise UserError(f"{path}: a row lacks {one_line(error)}; restore the file") from error
        return sorted(found, key=lambda record: record.step)  # stable


# Trackers.


class AbstractLog(abc.ABC):
    """A tracker's log of one run, empty when opened."""

    where: str
    """Tells the user how to look at it."""

    @classmethod
    def where_all(cls, folder: Path) -> str | None:
        """Tells how to look at the logs of all runs in `folder` at once; None if each is opened alone."""
        del folder
        return None

    @abc.abstractmethod
    def write(self, record: Record) -> None:
        """Adds the points of a record."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Makes points visible to the tracker's readers."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the log."""


class TensorBoardLog(AbstractLog):
    """Event files in RUN/tensorboard, a folder for each curve, so that seeds share TensorBoard's charts."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        del config
        self._folder = folder / "tensorboard"
        for old in self._folder.glob("*/events.out.tfevents.*"):
            old.unlink()
        self._writers: dict[str, Any] = {}
        self.where = f"tensorboard --logdir {shlex.quote(str(self._folder))}"

    @classmethod
    def where_all(cls, folder: Path) -> str | None:
        return f"tensorboard --logdir {shlex.quote(str(folder))}"

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        for curve, values in record.curves.items():
            points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._event(curve, step=record.step, summary=Summary(value=points))

    def _event(self, curve: str, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        if curve not in self._writers:
            self._open(curve)
        self._writers[curve].write(Event(wall_time=time.time(), **content).SerializeToString())

    def _open(self, curve: str) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyright: ignore[reportMissingImports]

        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        path = self._folder / curve / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writers[curve] = RecordWriter(open(path, "wb"))  # noqa: SIM115 - closed by `close`
        self._event(curve, file_version="brain.Event:2")
        # A TensorBoard that is open drops what it has read of the file before.
        self._event(curve, step=0, session_log=SessionLog(status=SessionLog.START))

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class WandbLog(AbstractLog):
    """A run of W&B in RUN/wandb, offline unless WANDB_MODE says otherwise.

    `critic/loss` is the mean over seeds, `seed0/critic/loss` that of a seed; the x axis is `updates`. W&B's
    own step counts records.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        mode = os.environ.get("WANDB_MODE", "offline")
        name = identity(folder)
        home = Path(os.environ.get("WANDB_DIR") or folder)
        for old in (home / "wandb").glob(f"offline-run-*-{name}"):
            shutil.rmtree(old)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=name,
            dir=home,
            config=dict(config),
            mode=mode,  # pyright: ignore[reportArgumentType]
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("updates", hidden=True)
        self._run.define_metric("*", step_metric="updates")
        self._known = self._run.step  # records that the server has
        folder_of_run = shlex.quote(str(Path(self._run.dir).parent))
        self.where = f"wandb sync {folder_of_run}" if mode == "offline" else self._run.url or mode

    def write(self, record: Record) -> None:
        if self._known:
            self._known -= 1
            return
        self._run.log({"updates": record.step} | _flat(record))

    def flush(self) -> None:
        pass  # its own process writes

    def close(self) -> None:
        self._run.finish()


class TrackioLog(AbstractLog):
    """A run of trackio's local database, with the names of `WandbLog`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]
        from trackio.context_vars import current_run  # pyright: ignore[reportMissingImports]

        mark = {"tracker_id": identity(folder)}
        with contextlib.suppress(ValueError):  # the project has no run yet
            for run in list(trackio.Api().runs(PROJECT)):
                if (run.config or {}).get("tracker_id") == mark["tracker_id"]:
                    run.delete()
        current_run.set(None)  # else `init` would end the log of another run of a sweep
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                PROJECT, name=folder.resolve().name, config=dict(config) | mark, embed=False
            )
        self.where = f"trackio show --project {PROJECT}"

    def write(self, record: Record) -> None:
        self._run.log(_flat(record), step=record.step)

    def flush(self) -> None:
        pass  # its own thread writes, twice a second

    def close(self) -> None:
        from trackio.context_vars import current_run  # pyright: ignore[reportMissingImports]

        if current_run.get() is self._run:
            current_run.set(None)  # else it is ended once more when Python exits
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def identity(folder: Path) -> str:
    """The run's name for trackers that keep many runs in one place; it stays when the folder is moved."""
    path = folder / "tracker_id"
    if not path.exists():
        replace_file(path, lambda file: file.write(uuid.uuid4().hex[:12].encode()))
    return path.read_text()


def _flat(record: Record) -> dict[str, float]:
    """One table of all curves."""
    curves = record.curves.items()
    return {name if c == MEAN else f"{c}/{name}": x for c, values in curves for name, x in values.items()}


_LOGS = {"tensorboard": TensorBoardLog, "wandb": WandbLog, "trackio": TrackioLog}


# Sending.


def require_installed(trackers: Sequence[str]) -> None:
    """Checks that the packages of trackers can be imported.

    Raises:
        UserError: naming the one that is missing, and the extra that installs it.
    """
    for tracker in trackers:
        try:
            importlib.import_module(_MODULES[tracker])
        except ImportError as error:
            raise UserError(
                f"--log {tracker}: its package cannot be imported ({one_line(error)}); "
                f"pip install -e '.[{tracker}]', or leave it out"
            ) from error


class RunTrackers:
    """The trackers of one run; a context manager.

    A tracker that fails is left out from then on and told to `note`: training goes on, and the rows stay.

    Args:
        note: prints a line for the user.
    Raises:
        UserError: a tracker cannot be opened.
    """

    def __init__(self, folder: Path, trackers: Sequence[str], note: Any = print):
        self._folder, self._reader, self.note = folder, RowReader(folder), note
        self._logs: dict[str, AbstractLog] = {}
        self.sent = 0
        path = folder / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        for tracker in dict.fromkeys(trackers):
            try:
                with writing(folder):
                    self._logs[tracker] = _LOGS[tracker](folder, config)
            except UserError:
                self.close()
                raise
            except Exception as error:  # a tracker's errors are of any class
                self.close()
                raise UserError(f"--log {tracker}: {one_line(error)}; mend it, or leave it out") from error

    @property
    def places(self) -> dict[str, str]:
        """How to look at each log."""
        return {tracker: log.where for tracker, log in self._logs.items()}

    def catch_up(self) -> None:
        """Sends the rows that were not sent yet.

        Raises:
            UserError: the rows are damaged.
        """
        if not self._logs:
            return
        records = self._reader.records()
        self.sent += len(records)
        for tracker, log in list(self._logs.items()):
            with self._guarded(tracker):
                for record in records:
                    log.write(record)
                log.flush()

    def close(self) -> None:
        """Ends the logs."""
        for tracker, log in list(self._logs.items()):
            with self._guarded(tracker):
                log.close()
        self._logs = {}

    @contextlib.contextmanager
    def _guarded(self, tracker: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker's errors are of any class, and none may end the training
            self._logs.pop(tracker, None)
            folder = shlex.quote(str(self._folder))
            again = f"python experiments/report.py {folder} --log {tracker}"
            self.note(f"note: --log {tracker} stopped ({one_line(error)}); send all rows later: {again}")

    def __enter__(self) -> "RunTrackers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def places(runs: Sequence[RunTrackers], folder: Path) -> list[tuple[str, str]]:
    """Each tracker, and how to look at the logs of `runs`: a sweep in `folder`, or the run there."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for tracker, place in run.places.items():
            together = _LOGS[tracker].where_all(folder) if len(runs) > 1 else None
            found[tracker, together or place] = None
    return list(found)
