"""Runs cells one after the other or side by side, each as a process of `run.py`, within a budget of time."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.cli.arguments import read_duration
from experiments.launch.settings import is_run
from experiments.reproduction.cells import LEFT, Cell, Plan, Progress, progress, record_failure, unlocked
from experiments.reproduction.processes import Budget, LoggedProcess, fault, guarded, stop
from mac.cgroup_limits import cores
from mac.errors import UserError
from mac.run.io.logger import METRICS, read_rows
from mac.run.report.timing import duration

RUN = Path(__file__).parents[1] / "run.py"
PATIENCE = 20.0
"""Seconds to wait for a process that another call left in a cell's folder."""
SAY_EVERY = 60.0
_LOCKED = "is being written by another process"


def read_budget(text: str) -> float:
    """Seconds of a duration such as `90s`, `9m` or `1.5h`.

    Raises:
        UserError: it is no duration.
    """
    return read_duration(text, "--budget")


# Room for processes.


class Slot(NamedTuple):
    """Room for one process on this machine.

    Attributes:
        cores: processor cores that it may use; empty for all.
        gpu: the only GPU that it sees, as `CUDA_VISIBLE_DEVICES` names it; None for all.
    """

    cores: tuple[int, ...] = ()
    gpu: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the process."""
        return dict(os.environ) | ({} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu})

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Lets processes that are started meanwhile inherit the cores; XLA takes all that it may use."""
        if not self.cores:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def slots(count: int | None, gpus: Sequence[str] | None = None) -> list[Slot]:
    """Divides this machine into rooms for processes that run side by side.

    Args:
        count: rooms; None is one for each GPU, or one for two cores on a machine without a GPU.
        gpus: the GPUs; None asks nvidia-smi.
    """
    gpus = visible_gpus() if gpus is None else gpus
    limit = cores()  # of a quota, which does not say which
    mine = sorted(os.sched_getaffinity(0))[:limit] if hasattr(os, "sched_getaffinity") else []
    count = count or len(gpus) or max(1, limit // 2)
    if count == 1:
        return [Slot()]
    # With more rooms than cores, several share one.
    shares = [tuple(mine[i::count]) or tuple(mine[i % len(mine) :][:1]) if mine else () for i in range(count)]
    return [Slot(share, gpus[i % len(gpus)] if gpus else None) for i, share in enumerate(shares)]


def visible_gpus() -> list[str]:
    """The GPUs that processes may use, as `CUDA_VISIBLE_DEVICES` names them; none without NVIDIA's driver."""
    program, chosen = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = [program, "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    return []


# Cells.


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
    cells: Sequence[Cell],
    plan: Plan,
    budget: Budget,
    say: Callable[[str], None] = print,
    rooms: Sequence[Slot] = (Slot(),),
    queued: Mapping[Cell, Progress] | None = None,
) -> Outcome:
    """Runs what is missing, resumes what was cut, and skips what is done.

    Cells that failed before come last. A cell that fails does not stop the others.

    Args:
        rooms: one for each cell that runs at a time.
        queued: cells that a cluster's queue holds, which are left to it.
    Raises:
        UserError: the folder of all runs cannot be written.
        KeyboardInterrupt: after the running cells have stopped with a checkpoint.
    """
    outcome = Outcome([], [], {}, [], {}, [])
    states = {cell: progress(cell, plan) for cell in cells} | dict(queued or {})
    for cell, state in states.items():
        if state.status == "done":
            outcome.done.append(cell)
        elif state.status == "not available":
            outcome.unavailable[cell] = state.reason
        elif state.status == "unusable":
            outcome.failed[cell] = state.reason
        elif state.status == "queued":
            outcome.elsewhere.append(cell)
    wanted = [cell for cell in cells if states[cell].status in (*LEFT, "running")]
    wanted.sort(key=lambda cell: states[cell].status == "failed")
    waiting, free, running = deque(enumerate(wanted, start=1)), deque(rooms), list[Running]()
    if len(rooms) > 1 and wanted:
        say(f"{len(rooms)} processes at a time")
    try:
        while waiting or running:
            while waiting and free and budget.may_start:
                number, cell = waiting.popleft()
                say(f"[{number}/{len(wanted)}] {cell.title}")
                if cell_runs := begin(
                    cell, plan, outcome, say, free[0], f"{cell.title}: " * (len(rooms) > 1)
                ):
                    free.popleft()
                    running.append(cell_runs)
            if waiting and not budget.may_start:
                outcome.left.extend(cell for _, cell in waiting)
                waiting.clear()
            for each in running:
                each.watch(budget)
            for each in [each for each in running if each.process.has_ended]:
                running.remove(each)
                free.append(each.slot)
                each.end(plan, budget, outcome)
            if running:
                running[0].process.wait_a_little()
    except BaseException:
        stop([each.process for each in running])
        raise
    return outcome


class Running:
    """The process of a cell."""

    def __init__(self, cell: Cell, plan: Plan, slot: Slot, say: Callable[[str], None]):
        """Starts it.

        Raises:
            UserError: its log cannot be written.
        """
        self.cell, self.slot, self.folder, self._say = cell, slot, plan.folder(cell), say
        self._began = self._said = time.monotonic()
        self._update = 0
        words = command(cell, plan)
        with slot.entered():
            self.process = LoggedProcess(
                [*program(), *words], ["python", str(RUN), *words], plan.log(cell), slot.environment
            )

    def watch(self, budget: Budget) -> None:
        """Asks the process to stop when it is time, and says how far it is."""
        self.process.keep_to(budget)
        if time.monotonic() - self._said > SAY_EVERY:
            self._said, before, self._update = time.monotonic(), self._update, _last_update(self.folder)
            if self._update > before:
                self._say(f"update {self._update:,}")

    def end(self, plan: Plan, budget: Budget, outcome: Outcome) -> None:
        """Adds the cell, whose process has ended, to the outcome."""
        status, lines, cell = self.process.status, self.process.lines(), self.cell
        state, took = progress(cell, plan), duration(time.monotonic() - self._began)
        if state.status == "done":
            record_failure(plan.out, cell, None)
            outcome.done.append(cell)
            self._say(f"done after {took}")
        elif budget.must_stop and status in (-signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGTERM):
            outcome.cut.append(cell)
            self._say(f"stopped at update {state.reached:,} of {state.steps:,}: the budget is used up")
        elif is_locked(lines):
            outcome.elsewhere.append(cell)
            self._say("another process trains it: left to that one")
        else:
            line = state.reason if state.status == "unusable" and status == 0 else fault(status, lines)
            record_failure(plan.out, cell, line)
            outcome.failed[cell] = line
            self._say(f"failed: {line}")


def begin(
    cell: Cell,
    plan: Plan,
    outcome: Outcome,
    say: Callable[[str], None] = print,
    slot: Slot = Slot(),  # noqa: B008 (immutable)
    title: str = "",
) -> Running | None:
    """Starts the process of a cell; None if another process has it, which the outcome then says."""
    folder = plan.folder(cell)
    if folder.is_dir():
        with unlocked(folder, PATIENCE) as free:
            if not free:
                say(f"  {title}another process trains it: left to that one")
                outcome.elsewhere.append(cell)
                return None
    return Running(cell, plan, slot, lambda text: say(f"  {title}{text}"))


def command(cell: Cell, plan: Plan) -> list[str]:
    """The words of `run.py` that begin or continue a cell."""
    place = ["--out", str(plan.folder(cell)), "--data.dir", str(plan.data_dir)]
    if is_run(plan.folder(cell)):
        return [*place, "--resume"]
    words = ["--algo", cell.algo, "--env", cell.env, "--preset", cell.preset, "--seeds", str(cell.seeds)]
    return [*words, *cell.flags, *place]


def program() -> list[str]:
    """The words before those of `command`."""
    return guarded(RUN)


def _last_update(folder: Path) -> int:
    """The newest update in a run's log; 0 without one."""
    last = 0
    with contextlib.suppress(UserError, OSError):
        for row in read_rows(folder / METRICS):
            last = row.get("step", last)
    return last


def is_locked(lines: Sequence[str]) -> bool:
    """True if a process ended because another one has its folder."""
    return any(_LOCKED in line for line in lines)
