"""Stopping politely: the first Ctrl-C or SIGTERM asks, the second insists."""

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, `asked` turns True at the first SIGINT or SIGTERM; `signal` is its number.

    The training loop looks at `asked` between segments, writes a checkpoint and leaves. A second
    signal acts as it would without this class.
    """

    def __init__(self):
        self.asked = False
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked, self.signal = True, number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
