"""The windows of a training run: one that stays on the device, or many that rotate.

Data that do not fit on the device pass by as windows of equal shapes. All shards are cut into blocks of
whole episodes; an epoch is a random order of all blocks, and each window takes the next few. Which
blocks those are follows from the seed and the number of the window alone, so a run that is resumed
needs nothing but its step. While one window trains, the next is read and moved to the device.
"""

import abc
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from mac.data.normalize import Normalizer
from mac.data.store import Store
from mac.data.window import (
    EpisodeRange,
    Relabel,
    WindowCapacity,
    make_window,
    recorded_terminations,
    start_counts,
)
from mac.errors import UserError
from mac.types import SampleSpec, Window

BLOCK_ROWS = 16_000
"""Rows of a block, about: enough for the disk to read in one go, few enough for windows to be mixed."""

Put = Callable[[Any], Any]
"""Moves a tree of arrays to the devices."""


class ResidentData(NamedTuple):
    """A plan of one window that holds all of a store; the fields are those of `RotatingWindows`."""

    store: Store
    normalizer: Normalizer
    spec: SampleSpec
    relabel: Relabel | None = None

    def window(self, put: Put) -> Window:
        """The window, on the devices; from the host's memory there, without a copy in between."""
        return put(make_window(*self, put=put))


class RotatingWindows(NamedTuple):
    """A plan of windows over all of a store.

    Attributes:
        store: whose rows are drawn.
        normalizer: folded into the observations.
        spec: how chunks are drawn.
        relabel: reward and mask of each row, or None.
        blocks: consecutive whole episodes, over all shards.
        per_window: blocks in each window.
        room: shape of every window.
        updates: how many updates each window serves.
        seed: of the order of the blocks.
    """

    store: Store
    normalizer: Normalizer
    spec: SampleSpec
    relabel: Relabel | None
    blocks: tuple[EpisodeRange, ...]
    per_window: int
    room: WindowCapacity
    updates: int
    seed: int

    def members(self, number: int) -> list[int]:
        """The blocks of window `number`, ascending; no block is in two windows of an epoch.

        Blocks that do not fill a window are left out of the epoch: others each time.
        """
        epoch, at = divmod(number, len(self.blocks) // self.per_window)
        order = epoch_order(self.seed, epoch, len(self.blocks))
        return sorted(order[at * self.per_window : (at + 1) * self.per_window].tolist())

    def window(self, number: int, put: Put) -> Window:
        """Window `number` (from 0 on), on the devices; a pure function of the plan and the number."""
        pieces = [self.blocks[i] for i in self.members(number)]
        made = make_window(
            self.store,
            self.normalizer,
            self.spec,
            self.relabel,
            pieces=pieces,
            room=self.room,
            put=put,
        )
        return put(made)


def plan_rotation(
    store: Store,
    normalizer: Normalizer,
    spec: SampleSpec,
    relabel: Relabel | None = None,
    *,
    rows: int,
    updates: int,
    seed: int,
) -> RotatingWindows:
    """Windows of at most about `rows` rows, each for `updates` updates.

    Raises:
        UserError: if `rows` is less than the longest episode, or some window could hold no chunk.
    """
    target = min(BLOCK_ROWS, max(rows // 16, 1))
    blocks = tuple(
        piece for i, split in enumerate(store.train) for piece in _cut(i, split.length, target, rows)
    )
    lengths = [store.train[b.shard].length[b.first : b.last] for b in blocks]
    sizes, counts = np.asarray([x.sum() for x in lengths]), np.asarray([len(x) for x in lengths])
    # As many blocks as fit even if the largest ones meet.
    per_window = int(np.searchsorted(np.cumsum(np.sort(sizes)[::-1]), rows, side="right"))
    if per_window < 1:
        raise UserError(
            f"--data.window={rows}: the longest episode has {sizes.max():,} rows; take a larger window"
        )
    per_window = min(per_window, len(blocks))
    terminated = [None if relabel else recorded_terminations(store, [block]) for block in blocks]
    starts = np.sort(
        [
            start_counts(x, spec.chunk, f, spec.starts_anywhere).sum()
            for x, f in zip(lengths, terminated, strict=True)
        ]
    )
    if not starts[:per_window].any():
        raise UserError(
            f"--data.window={rows}: some windows would hold no episode long enough for chunk={spec.chunk}; "
            "take a larger window or a smaller chunk"
        )
    room = WindowCapacity(*(int(np.sort(x)[::-1][:per_window].sum()) for x in (sizes, counts)))
    return RotatingWindows(store, normalizer, spec, relabel, blocks, per_window, room, updates, seed)


def _cut(shard: int, length: Int[np.ndarray, " E"], target: int, most: int) -> list[EpisodeRange]:
    """The episodes of a shard in blocks of about `target` rows."""
    if length.max() > most:
        raise UserError(
            f"--data.window={most}: the longest episode has {length.max():,} rows; take a larger window"
        )
    number = (np.cumsum(length) - length) // target
    first = np.flatnonzero(np.diff(number, prepend=-1))
    return [
        EpisodeRange(shard, int(a), int(b)) for a, b in zip(first, [*first[1:], len(length)], strict=True)
    ]


def epoch_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, " count"]:
    """A random order of `count` blocks; the same wherever and whenever it is asked for."""
    # Raw numbers of a named generator: NumPy promises them to stay the same, unlike `permutation`.
    raw = np.random.Philox(key=np.asarray([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(raw, kind="stable")


Source = Window | ResidentData | RotatingWindows
"""The source of a run's windows, before there are devices to put them on."""


class WindowFeed(abc.ABC):
    """Gives the window of each update. Close it at the end.

    Attributes:
        updates: updates that a window serves; None if there is only one.
        loading: seconds that the first window took.
        waiting: seconds that training waited for later ones.
    """

    updates: int | None = None

    def __init__(self) -> None:
        self.loading = self.waiting = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds to report: `load` if rows were read, and `wait` where windows rotate."""
        load = {"load": self.loading} if self.loading else {}
        return load | ({} if self.updates is None else {"wait": self.waiting})

    @abc.abstractmethod
    def at(self, step: int) -> Window:
        """The window that update number `step` draws from."""

    def close(self) -> None:  # noqa: B027 - a hook
        """Hook: ends what runs in the background; by default nothing does."""


class Resident(WindowFeed):
    """One window, which stays on the devices."""

    def __init__(self, source: Window | ResidentData, put: Put):
        super().__init__()
        began = time.perf_counter()
        if isinstance(source, Window):
            self._window = put(source)
        else:
            self._window = source.window(put)
            self.loading = time.perf_counter() - began

    def at(self, step: int) -> Window:
        return self._window


class Rotating(WindowFeed):
    """The windows of a plan, each read and moved to the devices while the one before it trains.

    Args:
        last: number of the last update of the run, so that nothing is read for after it.
    """

    def __init__(self, plan: RotatingWindows, put: Put, last: int):
        super().__init__()
        self.updates, self._plan, self._put = plan.updates, plan, put
        self._last = last // plan.updates
        self._number, self._window = -1, None
        self._next: tuple[int, Future[Window]] | None = None
        self._reader = ThreadPoolExecutor(1, "window")

    def at(self, step: int) -> Window:
        number = step // self._plan.updates
        if self._window is None or number != self._number:
            began, first = time.perf_counter(), self._window is None
            self._window = self._take(number)
            self._number = number
            seconds = time.perf_counter() - began
            self.loading, self.waiting = self.loading + seconds * first, self.waiting + seconds * (not first)
            if number < self._last:
                self._next = number + 1, self._reader.submit(self._make, number + 1)
        return self._window

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._window = self._next = None

    def _take(self, number: int) -> Window:
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == number:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].cancel()
        return self._reader.submit(self._make, number).result()

    def _make(self, number: int) -> Window:
        # Waiting here, in the background, keeps the transfer out of the training thread.
        return jax.block_until_ready(self._plan.window(number, self._put))


def open_feed(source: Source, put: Put, steps: int) -> WindowFeed:
    """The feed of a run of `steps` updates."""
    if isinstance(source, RotatingWindows):
        return Rotating(source, put, max(steps - 1, 0))
    return Resident(source, put)
