"""Files of a run: rows and checkpoints, in its folder or in one for each variant of a sweep.

Of several processes the first writes the rows, and each its part of the checkpoints.

A sweep trains several configurations in one program, as further seeds. Each leaves what a run of its own
would have left, so that whatever reads a run reads a variant of a sweep.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from mac.algorithm import TrainState
from mac.atomic_files import misfit
from mac.errors import UserError, refusal, remedy
from mac.run import hosts
from mac.run.io.checkpoint import Checkpoint, CheckpointStore
from mac.run.io.eval_rows import Evaluation
from mac.run.io.logger import EVAL, RunLog, compare_rows

CHECKPOINTS = "checkpoints"  # subfolder of a run's folder
MARK = ("evaluated", "log", "checksums")
"""Entries of a checkpoint's `meta`: step of the last evaluation; bytes and CRC-32 of the files of rows."""


class Variant(NamedTuple):
    """One configuration of a sweep.

    Attributes:
        name: its folder, within that of the sweep; empty for a run that is no sweep.
        values: of the hyperparameters in which variants differ.
        config: what its checkpoints must agree with to be resumed, as plain data.
    """

    name: str
    values: dict[str, float]
    config: dict[str, Any]


class Outputs:
    """Rows and checkpoints of all variants; lanes are their seeds, variant by variant.

    `with Outputs(...) as outputs:` waits for the last checkpoint at the end.
    """

    def __init__(
        self,
        folder: Path,
        variants: Sequence[Variant],
        seeds: Sequence[int],
        keep: int,
        kept: Mapping[str, Any] | None = None,
    ):
        """Nothing is read or written yet; `keep` newest checkpoints stay, each with the facts `kept`."""
        self._kept = dict(kept or {})
        self.variants, self.seeds = tuple(variants), list(seeds)
        self.folders = [folder / variant.name for variant in variants]
        self._stores = [CheckpointStore(each / CHECKPOINTS, keep) for each in self.folders]
        self._logs: list[RunLog] = []

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for each in (*self._stores, *self._logs):
                stack.callback(each.close)

    def latest(self) -> int | None:
        """Step of the newest checkpoint that all variants have, None if there is none."""
        common = set.intersection(*(set(store.steps()) for store in self._stores))
        return max(common, default=None)

    def evaluated(self, step: int) -> bool:
        """Returns whether the checkpoints of `step` were written after the evaluation of that step."""
        return all(self._mark(store, step)["evaluated"] == step for store in self._stores)

    def restore(
        self,
        template: TrainState,
        may_differ: tuple[str, ...],
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> Checkpoint:
        """The newest checkpoint of all variants, as one state, and the `meta` of the first.

        Raises:
            UserError: as `CheckpointStore.restore`.
        """
        step, parts = hosts.from_first(self.latest()), []
        assert step is not None
        for i, (variant, store) in enumerate(zip(self.variants, self._stores, strict=True)):
            part = self._part(template, i)
            parts.append(store.restore(part, step, variant.config, may_differ, defaults).state)
        marks = [self._mark(store, step) for store in self._stores]
        if any(mark["evaluated"] != step for mark in marks):
            # Killed while they learnt of an evaluation: as if none of them had.
            marks = [mark.get("before", mark) for mark in marks]
        self._open([(mark["log"], mark.get("checksums", {})) for mark in marks])
        state = jax.tree.map(lambda *x: np.concatenate(x), *parts) if len(parts) > 1 else parts[0]
        return Checkpoint(step, dataclasses.replace(state, swept=template.swept), marks[0])

    def begin(self, again: bool) -> None:
        """Opens the files of rows, emptied if the run is begun `again` because it left no checkpoint.

        Raises:
            UserError: they hold rows, and the run is not begun again.
        """
        self._open([({} if again else None, {})] * len(self.variants))

    def metrics(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes one row per lane; `values` are arrays of shape [lanes]."""
        for i, log in enumerate(self._logs):
            log.metrics(step, self.seeds, {name: value[self._range(i)] for name, value in values.items()})

    def evals(self, evaluation: Evaluation) -> list[dict[str, Any]]:
        """Writes one row per lane and task, and returns the rows; `result` has a leading axis of lanes."""
        rows = []
        for i, log in enumerate(self._logs):
            part = jax.tree.map(lambda x, i=i: x[self._range(i)], evaluation.result)
            rows += log.evals(evaluation._replace(result=part), self.seeds)
        return rows

    def save(self, step: int, state: TrainState, evaluated: int) -> None:
        """Begins to write a checkpoint of every variant; `evaluated` is the step of the last evaluation.

        Checkpoints of this step that were written before that evaluation only learn of it.
        """
        if not hosts.is_first():  # whose rows and marks are those that count
            for i, store in enumerate(self._stores):
                store.save(step, self._part(state, i), {})
            return
        for i, (variant, store, log) in enumerate(zip(self.variants, self._stores, self._logs, strict=True)):
            store.wait()
            before = {}
            if len(self._stores) > 1 and step in store.steps():
                # A kill between two variants leaves one that knows of the evaluation and one that does not.
                mark = self._mark(store, step)
                before = {"before": {name: mark[name] for name in MARK if name in mark}}
            mark = {"evaluated": evaluated, "log": log.sync(), "checksums": log.checksums()}
            store.save(step, self._part(state, i), {**self._kept, "config": variant.config, **mark, **before})
            if i + 1 < len(self._stores):
                store.wait()  # Orbax writes one at a time

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            UserError: it could not be written.
        """
        for store in self._stores:
            store.wait()

    def notes(self) -> list[str]:
        """Lines for the user, about what was found in the folders of checkpoints; each is told once."""
        found = [note for store in self._stores for note in store.notes]
        for store in self._stores:
            store.notes.clear()
        return found

    def _mark(self, store: CheckpointStore, step: int) -> dict[str, Any]:
        """Returns the state of evaluations and rows for a checkpoint.

        Raises:
            UserError: it is damaged.
        """
        meta = store.meta(step)
        if fault := _unmarked(meta) or ("before" in meta and _unmarked(meta["before"])):
            raise store.damaged(step, fault)
        return meta

    def _open(self, marks: Sequence[tuple[Mapping[str, int] | None, Mapping[str, int]]]) -> None:
        for folder, mark in zip(self.folders, marks, strict=True):
            if hosts.is_first():
                self._logs.append(RunLog(folder, *mark))

    def _range(self, variant: int) -> slice:
        return slice(variant * len(self.seeds), (variant + 1) * len(self.seeds))

    def _part(self, state: TrainState, variant: int) -> TrainState:
        """One variant's lanes, as a run of its own has them."""
        state = dataclasses.replace(state, swept={})
        return state if len(self.variants) == 1 else jax.tree.map(lambda x: x[self._range(variant)], state)


def check_evaluations(folder: Path, step: int) -> None:
    """Checks that the evaluations of a run are those that its checkpoint of `step`, its last, records.

    Checkpoints of older versions record less, and what is not recorded is not checked.

    Raises:
        UserError: they are not, or cannot be read.
    """
    path = folder / EVAL
    with CheckpointStore(folder / CHECKPOINTS) as store:
        meta = store.meta(step)
        if fault := _unmarked(meta):
            raise store.damaged(step, fault)
    if (position := meta["log"].get(EVAL)) is None:
        return
    try:
        size = path.stat().st_size
        _, fault = compare_rows(path, position, meta.get("checksums", {}).get(EVAL))
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}; {remedy(error, 'restore it')}") from error
    if size > position:
        fault = (
            fault or f"has {size} bytes but its last checkpoint was written at {position}: rows were added"
        )
    if fault:
        raise UserError(f"{path} {fault}; restore it")


def _unmarked(meta: Any) -> str | None:
    """The first reason why a checkpoint's `meta` does not tell of rows; older ones lack the checksums."""
    if fault := misfit(meta, evaluated=int, log=dict):
        return fault
    sums = meta.get("checksums", {})
    if not isinstance(sums, dict) or not all(type(n) is int for n in (*meta["log"].values(), *sums.values())):
        return "log and checksums must hold whole numbers"
    return None
