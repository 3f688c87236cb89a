"""Schedule of the GPU benchmark: its parts in order of value, within a budget of time.

Parts that were never tried come first, in the order of the list; then those that failed before; then the
part that fills what is left of the budget.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from experiments.benchmarks.gpu.records import Records
from mac.errors import UserError

Status = Literal["done", "partial", "failed", "overran", "skipped"]
RESERVE = 5.0  # seconds at the end for the summary and for ending processes
LEAST_BUDGET = 30.0
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def read_budget(text: str) -> float:
    """Returns the seconds of a budget such as `9m`, `540`, `90s` or `1.5h`.

    Raises:
        UserError: it is malformed, or less than `LEAST_BUDGET`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    if match is None:
        raise UserError(f"--budget={text}: write seconds, minutes or hours, such as 540, 9m or 1.5h")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds < LEAST_BUDGET:
        raise UserError(f"--budget={text}: must be at least {LEAST_BUDGET:.0f} seconds")
    return seconds


class Budget:
    """Seconds that one call may take, from the start of the process on."""

    def __init__(self, seconds: float, *, spent: float = 0.0, clock: Callable[[], float] = time.monotonic):
        """Starts the clock; `spent` seconds have passed already."""
        self._clock = clock
        self._end = clock() + seconds - spent

    def left(self) -> float:
        """Returns the seconds that parts may still take."""
        return self._end - self._clock() - RESERVE


@dataclass(frozen=True)
class Part:
    """One measurement, which is recorded as a whole.

    Attributes:
        name: unique; its first word is its kind.
        about: seconds that it takes on a GPU, compiling included; it does not begin with less time left.
        most: seconds after which it is ended; after it overran, twice as many as it took then.
        own_process: runs in a process of its own and not in the one that parts share.
        grace: seconds that it gets to end in order once its time is up; without any its process is killed.
        after: parts that must be done before.
        background: runs beside the following parts, until its end or that of the call.
        rest: takes what is left of the budget, and goes on in the next call.
        environment: variables of its process.
        unavailable: why it cannot be measured here, if so.
    """

    name: str
    about: float
    most: float
    own_process: bool = False
    grace: float = 0.0
    after: tuple[str, ...] = ()
    background: bool = False
    rest: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    unavailable: str = ""


class Outcome(NamedTuple):
    """Outcome of a part: its result, or the reason why there is none."""

    status: Status
    seconds: float = 0.0
    result: Mapping[str, Any] = {}
    reason: str = ""


class RunningPart(Protocol):
    """A part in the background."""

    def wait(self, seconds: float) -> Outcome | None:
        """Returns its outcome, or None if it still runs after so many seconds."""
        ...

    def stop(self) -> Outcome:
        """Ends it in order."""
        ...


class Runner(Protocol):
    """What runs parts; `processes.Processes` does so in processes."""

    def run(self, part: Part, seconds: float) -> Outcome:
        """Runs a part to its end, or for so many seconds."""
        ...

    def start(self, part: Part) -> RunningPart:
        """Starts a part in the background."""
        ...


def run_parts(
    parts: Sequence[Part], records: Records, budget: Budget, runner: Runner, say: Callable[[str], None]
) -> None:
    """Runs what is not done yet and fits the budget; records every outcome at once."""
    running: dict[str, tuple[Part, RunningPart]] = {}

    def record(part: Part, outcome: Outcome) -> None:
        if outcome.status != "skipped" or outcome.reason != records.last_reason(part.name):
            records.add(part.name, outcome)
        say(f"{outcome.status:8} {part.name}" + (f": {outcome.reason}" if outcome.reason else ""))

    def collect(name: str, seconds: float) -> None:
        part, process = running[name]
        if (outcome := process.wait(seconds)) is not None:
            del running[name]
            record(part, outcome)

    try:
        for part in in_order(parts, records):
            for name in list(running):
                collect(name, 0.0)
            if reason := _obstacle(part, records, budget, running):
                record(part, Outcome("skipped", reason=reason))
                continue
            for name in part.after:
                if name in running:
                    say(f"waiting  for {name}")
                    collect(name, max(0.0, budget.left() - part.about))
            if reason := _obstacle(part, records, budget):
                record(part, Outcome("skipped", reason=reason))
            elif part.background:
                say(f"running  {part.name}, in the background")
                running[part.name] = part, runner.start(part)
            else:
                say(f"running  {part.name}, {budget.left():.0f} s left")
                record(part, runner.run(part, seconds_for(part, records, budget)))
    finally:
        for part, process in running.values():
            record(part, process.stop())


def in_order(parts: Sequence[Part], records: Records) -> list[Part]:
    """Returns the parts that are not done, in the order in which they are tried."""
    todo = [part for part in parts if not records.done(part.name)]
    return sorted(todo, key=lambda part: (part.rest, records.attempts(part.name) > 0 and not part.rest))


def seconds_for(part: Part, records: Records, budget: Budget) -> float:
    """Returns the seconds that a part may take in this call."""
    left = budget.left() - part.grace
    return left if part.rest else min(left, max(part.most, 2 * records.longest(part.name)))


def _obstacle(part: Part, records: Records, budget: Budget, running: Mapping[str, Any] | None = None) -> str:
    """Returns the reason why a part cannot begin now; parts that are `running` may still end."""
    if part.unavailable:
        return part.unavailable
    for name in part.after:
        if not records.done(name) and name not in (running or {}):
            return f"{name} is not done"
    needed = part.about if part.rest else max(part.about, 1.5 * records.longest(part.name))
    if needed + part.grace > budget.left():
        return f"takes about {needed + part.grace:.0f} s, {max(budget.left(), 0):.0f} s were left"
    return ""
