"""Stopping politely: the first Ctrl-C or SIGTERM asks, the second insists."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is, so that what was begun is cleaned up."""


class Interrupt:
    """While entered, `asked` turns True at the first SIGINT or SIGTERM; `signal` is its number.

    The training loop looks at `asked` between segments, writes a checkpoint and leaves. A second
    signal acts as it would without this class. Outside the main thread, where Python takes no
    signals, nothing is ever asked.
    """

    def __init__(self):
        self.asked = False
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            if _may_handle():
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


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """While entered, SIGTERM raises `Terminated` instead of ending the process on the spot."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if not _may_handle():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()
