"""Runs cells one after the other, each as a process of `run.py`, within a budget of time."""

import contextlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.launch.settings import is_run
from experiments.reproduction.cells import LEFT, Cell, Plan, progress, record_failure, unlocked
from mac.errors import UserError, one_line
from mac.run.io.logger import METRICS, read_rows
from mac.run.report.timing import duration

RUN = Path(__file__).parents[1] / "run.py"
LOGS = "logs"
PATIENCE = 20.0
"""Seconds to wait for a process that another call left in a cell's folder."""
POLL = 0.1
SAY_EVERY = 60.0
_UNITS = {"s": 1, "m": 60, "h": 3600}
_LOCKED = "is being written by another process"
# Asks the child to stop when this process is killed, or it would keep its folder; exec keeps the setting.
_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15, 0, 0, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Budget:
    """The time that a call may take.

    Args:
        seconds: in all; None without a limit.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic):
        """The time begins now."""
        self._clock = clock
        self.end = None if seconds is None else clock() + seconds
        # A segment and a checkpoint, or an evaluation, are finished in this time at the end.
        self.reserve = 0.0 if seconds is None else min(60.0, 0.15 * seconds)
        self.least = 0.0 if seconds is None else min(20.0, 0.1 * seconds)

    @property
    def may_start(self) -> bool:
        """False if a process that is started now would have to stop before it trains."""
        return self.end is None or self._clock() < self.end - self.reserve - self.least

    @property
    def must_stop(self) -> bool:
        """True when it is time to ask a process to stop."""
        return self.end is not None and self._clock() >= self.end - self.reserve

    @property
    def is_over(self) -> bool:
        """True when a process that still runs is killed; what its last checkpoint holds is kept."""
        return self.end is not None and self._clock() >= self.end


def read_budget(text: str) -> float:
    """Seconds of a duration such as `90s`, `9m` or `1.5h`.

    Raises:
        UserError: it is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"--budget {text}: write a duration such as 90s, 9m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


class Outcome(NamedTuple):
    """What a call did: cells by how they ended.

    Attributes:
        cut: stopped for want of time, with a checkpoint.
        failed: with their lines.
        elsewhere: another process trains them.
        unavailable: with the reason.
        left: not begun for want of time.
    """

    done: list[Cell]
    cut: list[Cell]
    failed: dict[Cell, str]
    elsewhere: list[Cell]
    unavailable: dict[Cell, str]
    left: list[Cell]


def run_cells(
    cells: Sequence[Cell], plan: Plan, budget: Budget, say: Callable[[str], None] = print
) -> Outcome:
    """Runs what is missing, resumes what was cut, and skips what is done.

    Cells that failed before come last. A cell that fails does not stop the others.

    Raises:
        UserError: the folder of all runs cannot be written.
        KeyboardInterrupt: after the running cell has stopped with a checkpoint.
    """
    outcome = Outcome([], [], {}, [], {}, [])
    states = {cell: progress(cell, plan) for cell in cells}
    for cell, state in states.items():
        if state.status == "done":
            outcome.done.append(cell)
        elif state.status == "not available":
            outcome.unavailable[cell] = state.reason
    wanted = [cell for cell in cells if states[cell].status in (*LEFT, "running")]
    wanted.sort(key=lambda cell: states[cell].status == "failed")
    for number, cell in enumerate(wanted, start=1):
        if not budget.may_start:
            outcome.left.append(cell)
            continue
        say(f"[{number}/{len(wanted)}] {cell.title}")
        run_cell(cell, plan, budget, outcome, say)
    return outcome


def run_cell(
    cell: Cell, plan: Plan, budget: Budget, outcome: Outcome, say: Callable[[str], None] = print
) -> None:
    """Runs one cell to its end or to the budget's, and adds it to the outcome."""
    folder, began = plan.folder(cell), time.monotonic()
    if folder.is_dir():
        with unlocked(folder, PATIENCE) as free:
            if not free:
                say("  another process trains it: left to that one")
                outcome.elsewhere.append(cell)
                return
    status, lines = _launch(cell, plan, budget, say)
    state, took = progress(cell, plan), duration(time.monotonic() - began)
    if state.status == "done":
        record_failure(plan.out, cell, None)
        outcome.done.append(cell)
        say(f"  done after {took}")
    elif budget.must_stop and status in (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM):
        outcome.cut.append(cell)
        say(f"  stopped at update {state.reached:,} of {state.steps:,}: the budget is used up")
    elif any(_LOCKED in line for line in lines):
        outcome.elsewhere.append(cell)
        say("  another process trains it: left to that one")
    else:
        line = fault(status, lines)
        record_failure(plan.out, cell, line)
        outcome.failed[cell] = line
        say(f"  failed: {line}")


def command(cell: Cell, plan: Plan) -> list[str]:
    """The words of `run.py` that begin or continue a cell."""
    place = ["--out", str(plan.folder(cell)), "--data.dir", str(plan.data_dir)]
    if is_run(plan.folder(cell)):
        return [*place, "--resume"]
    words = ["--algo", cell.algo, "--env", cell.env, "--preset", cell.preset, "--seeds", str(cell.seeds)]
    return [*words, *cell.flags, *place]


def program() -> list[str]:
    """The words before those of `command`."""
    first = [sys.executable, "-c", _WITH_PARENT] if sys.platform == "linux" else [sys.executable]
    return [*first, str(RUN)]


def _launch(cell: Cell, plan: Plan, budget: Budget, say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Starts a cell's process and waits; returns its status and the last lines of its log."""
    words, log = [*program(), *command(cell, plan)], plan.out / LOGS / f"{cell.name}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(['python', str(RUN), *command(cell, plan)])}\n".encode())
            at = file.tell()
            file.flush()
            # Its own session: Ctrl-C reaches this process alone, which passes it on once.
            process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
    except OSError as error:
        raise UserError(f"cannot write {log} ({one_line(error)}); choose another --out") from error
    try:
        _wait(process, plan.folder(cell), budget, say)
    except BaseException:
        stop(process)
        raise
    with log.open("rb") as file:
        file.seek(at)
        return process.returncode, file.read().decode(errors="replace").splitlines()


def _wait(process: subprocess.Popen[bytes], folder: Path, budget: Budget, say: Callable[[str], None]) -> None:
    asked, said, at = False, time.monotonic(), 0
    while process.poll() is None:
        if budget.is_over:
            process.kill()
        elif budget.must_stop and not asked:
            process.terminate()
            asked = True
        if time.monotonic() - said > SAY_EVERY:
            said, before, at = time.monotonic(), at, _last_update(folder)
            if at > before:
                say(f"  update {at:,}")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a process to stop and waits until it has; a second Ctrl-C kills it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        process.wait()


def _last_update(folder: Path) -> int:
    """The newest update in a run's log; 0 without one."""
    last = 0
    with contextlib.suppress(UserError, OSError):
        for row in read_rows(folder / METRICS):
            last = row.get("step", last)
    return last


def fault(status: int, lines: Sequence[str]) -> str:
    """The one line that tells why a process failed."""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + ("; is memory short?" if name == "SIGKILL" else "")
    return f"status {status}: {lines[-1].strip() if lines else 'nothing was said'}"
