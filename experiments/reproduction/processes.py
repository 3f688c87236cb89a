"""Processes of this machine that write to a log, end with their parent, and keep to a budget of time."""

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mac.errors import UserError, one_line

POLL = 0.1
"""Seconds between looks at a process."""
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


class LoggedProcess:
    """A process whose output is added to a log.

    It has a session of its own: Ctrl-C reaches the parent alone, which passes it on once.
    """

    def __init__(
        self, words: Sequence[str], shown: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ):
        """Starts it.

        Args:
            words: the command.
            shown: the command as the log says it.
            env: its environment; None for this process's.
        Raises:
            UserError: the log cannot be written.
        """
        self._log, self._asked = log, False
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                file.write(f"$ {shlex.join(shown)}\n".encode())
                self._at = file.tell()
                file.flush()
                self._process = subprocess.Popen(
                    words, stdout=file, stderr=file, start_new_session=True, env=env
                )
        except OSError as error:
            raise UserError(f"cannot write {log} ({one_line(error)}); choose another --out") from error

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None

    @property
    def status(self) -> int:
        """Its exit status; minus a signal's number if that ended it."""
        return self._process.wait()

    def wait(self) -> None:
        """Returns when it has ended."""
        self._process.wait()

    def wait_a_little(self) -> None:
        """Returns after `POLL` seconds, or when it ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(POLL)

    def keep_to(self, budget: Budget) -> None:
        """Asks it to stop when it is time, and kills it when the budget is over."""
        if budget.is_over:
            self.kill()
        elif budget.must_stop and not self._asked:
            self.terminate()
            self._asked = True

    def terminate(self) -> None:
        """Asks it to stop."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def lines(self) -> list[str]:
        """The lines that it has written so far."""
        with self._log.open("rb") as file:
            file.seek(self._at)
            return file.read().decode(errors="replace").splitlines()


def guarded(script: Path) -> list[str]:
    """The command of a Python script that is asked to stop when this process is killed."""
    first = [sys.executable, "-c", _WITH_PARENT] if sys.platform == "linux" else [sys.executable]
    return [*first, str(script)]


def stop(processes: Sequence[LoggedProcess]) -> None:
    """Asks processes to stop and waits until they have; a second Ctrl-C kills them."""
    left = [process for process in processes if not process.has_ended]
    for process in left:
        process.terminate()
    try:
        for process in left:
            process.wait()
    except KeyboardInterrupt:
        for process in left:
            process.kill()
        for process in left:
            process.wait()


def fault(status: int, lines: Sequence[str]) -> str:
    """The one line that tells why a process failed."""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if status < 0:
        name = signal.Signals(-status).name
        return f"ended by {name}" + ("; is memory short?" if name == "SIGKILL" else "")
    return f"status {status}: {lines[-1].strip() if lines else 'nothing was said'}"
