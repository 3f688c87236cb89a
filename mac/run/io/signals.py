"""Stopping politely: the first Ctrl-C or SIGTERM asks, the second insists; SIGUSR1 and SIGUSR2 only ask."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""What a cluster's scheduler sends before a time limit or a preemption, maybe to every process and twice."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or a scheduler's warning, raised as Ctrl-C is, so that what was begun is cleaned up."""


class Interrupt:
    """While entered, `asked` turns True at the first SIGINT, SIGTERM or warning; `signal` is its number.

    The training loop looks at `asked` between segments, writes a checkpoint and leaves. A second SIGINT or
    SIGTERM acts as it would without this class; a second warning does nothing. Outside the main thread, where
    Python takes no signals, nothing is ever asked.
    """

    def __init__(self):
        self.asked = False
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM, *WARNINGS):
            if _may_handle():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(tuple(self._before))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked, self.signal = True, number
        if number not in WARNINGS:
            self._restore((signal.SIGINT, signal.SIGTERM))

    def _restore(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """While entered, SIGTERM and warnings raise `Terminated` instead of ending the process on the spot."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if not _may_handle():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, *WARNINGS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()
