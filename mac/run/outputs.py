"""What a run leaves on disk: rows and checkpoints, in its folder or in one for each variant of a sweep.

A sweep trains several configurations in one program, as further seeds. Each leaves what a run of its own
would have left, so that whatever reads a run reads a variant of a sweep.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mac.algorithm import TrainState
from mac.run.checkpoint import Checkpoint, CheckpointStore
from mac.run.logger import RunLog
from mac.types import EnvSpec, Episodes

CHECKPOINTS = "checkpoints"  # subfolder of a run's folder


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
        """Whether the checkpoints of `step` were written after the evaluation of that step."""
        return all(store.meta(step)["evaluated"] == step for store in self._stores)

    def restore(self, template: TrainState, may_differ: tuple[str, ...]) -> Checkpoint:
        """The newest checkpoint of all variants, as one state, and the `meta` of the first.

        Raises:
            UserError: as `CheckpointStore.restore`.
        """
        step, found = self.latest(), []
        for i, (variant, store) in enumerate(zip(self.variants, self._stores, strict=True)):
            found.append(store.restore(self._part(template, i), step, variant.config, may_differ))
        self._open([each.meta["log"] for each in found])
        parts = [each.state for each in found]
        state = jax.tree.map(lambda *x: np.concatenate(x), *parts) if len(parts) > 1 else parts[0]
        return Checkpoint(found[0].step, dataclasses.replace(state, swept=template.swept), found[0].meta)

    def begin(self, again: bool) -> None:
        """Opens the files of rows, emptied if the run is begun `again` because it left no checkpoint.

        Raises:
            UserError: they hold rows, and the run is not begun again.
        """
        self._open([{} if again else None] * len(self.variants))

    def metrics(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Writes one row per lane; `values` are arrays of shape [lanes]."""
        for i, log in enumerate(self._logs):
            log.metrics(step, self.seeds, {name: value[self._range(i)] for name, value in values.items()})

    def evals(
        self, step: int, tasks: Sequence[int], result: Episodes, engine: str, data: str, spec: EnvSpec
    ) -> list[dict[str, Any]]:
        """Writes one row per lane and task, and returns the rows; `result` has a leading axis of lanes."""
        rows = []
        for i, log in enumerate(self._logs):
            part = jax.tree.map(lambda x, i=i: x[self._range(i)], result)
            rows += log.evals(step, self.seeds, tasks, part, engine, data, spec)
        return rows

    def save(self, step: int, state: TrainState, evaluated: int) -> None:
        """Begins to write a checkpoint of every variant; `evaluated` is the step of the last evaluation."""
        for i, (variant, store, log) in enumerate(zip(self.variants, self._stores, self._logs, strict=True)):
            meta = self._kept | {"config": variant.config, "evaluated": evaluated, "log": log.sync()}
            store.save(step, self._part(state, i), meta)
            if i + 1 < len(self._stores):
                store.wait()  # Orbax writes one at a time

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            UserError: it could not be written.
        """
        for store in self._stores:
            store.wait()

    def _open(self, positions: Sequence[Mapping[str, int] | None]) -> None:
        for folder, position in zip(self.folders, positions, strict=True):
            self._logs.append(RunLog(folder, position))

    def _range(self, variant: int) -> slice:
        return slice(variant * len(self.seeds), (variant + 1) * len(self.seeds))

    def _part(self, state: TrainState, variant: int) -> TrainState:
        """One variant's lanes, as a run of its own has them."""
        state = dataclasses.replace(state, swept={})
        return state if len(self.variants) == 1 else jax.tree.map(lambda x: x[self._range(variant)], state)
