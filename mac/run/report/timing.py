"""Timing of long work: progress, rate and remaining time."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

WINDOW = 20  # updates that the rate looks back on


class Meter:
    """Counts one job's units of work against a clock.

    The rate leaves out what precedes the first update (compiling) and what runs within `pause`
    (evaluating); the remaining time assumes that such pauses go on as often as before.

    Args:
        total: units of work.
        clock: seconds, monotonic.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total = total
        self.done = 0
        self._clock = clock
        self._paused = 0.0
        self._start = clock()
        self._first: tuple[float, int] | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def update(self, done: int) -> None:
        """Reports that `done` units are complete, counted from the start of the whole job."""
        now = self._clock()
        self._first = self._first or (now, done)
        self._recent.append((now - self._paused, done))
        self.done, self._last = done, now

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def elapsed(self) -> float:
        """Seconds since the meter was made."""
        return self._clock() - self._start

    def rate(self) -> float | None:
        """Units per second of late; None before the second update."""
        if len(self._recent) < 2:
            return None
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else None

    def remaining(self) -> float | None:
        """Seconds to the end; None before the second update."""
        if self._first is None or self.done <= self._first[1]:
            return None
        seconds, units = self._last - self._first[0], self.done - self._first[1]
        return max(0.0, (self.total - self.done) * seconds / units - (self._clock() - self._last))


def duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
