"""Runs parts of the GPU benchmark in worker processes, which are ended when a part takes too long."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.schedule import Outcome, Part
from mac.errors import one_line

_CLOSING = 10.0  # seconds that an idle worker gets to end by itself


class Processes:
    """Runner of parts: most share one process, so that JAX starts once."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], lock: int | None = None
    ):
        """Prepares to start workers.

        Args:
            command: starts a worker.
            log: file to which workers write what their programs print.
            environment: variables of every worker.
            lock: descriptor of a locked folder, which stays locked until the last worker has ended.
        """
        self._command, self._log, self._environment = list(command), log, dict(environment)
        self._descriptors = () if lock is None else (lock,)
        self._shared: Worker | None = None

    def run(self, part: Part, seconds: float) -> Outcome:
        """Runs a part to its end, or for so many seconds."""
        if part.own_process:
            self.close()  # the memory that it holds on the card
        worker = self._shared or self._worker(part)
        self._shared = worker  # so that `close` ends it, whatever happens
        worker.begin(part)
        try:
            outcome = worker.outcome(seconds) or worker.end()
        except KeyboardInterrupt:
            worker.end()
            raise
        if part.own_process or not worker.alive:
            self.close()
        return outcome

    def start(self, part: Part) -> "Background":
        """Starts a part in the background."""
        worker = self._worker(part)
        worker.begin(part)
        return Background(worker)

    def close(self) -> None:
        """Ends the shared process."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _worker(self, part: Part) -> "Worker":
        environment = self._environment | dict(part.environment)
        return Worker(self._command, self._log, environment, self._descriptors)


class Background:
    """A part that runs in the background, in a process of its own."""

    def __init__(self, worker: "Worker"):
        self._worker = worker

    def wait(self, seconds: float) -> Outcome | None:
        """Returns its outcome, or None if it still runs after so many seconds."""
        outcome = self._worker.outcome(seconds)
        if outcome is not None:
            self._worker.close()
        return outcome

    def stop(self) -> Outcome:
        """Ends it in order."""
        outcome = self._worker.end()
        self._worker.close()
        return outcome


class Worker:
    """A worker process and the part that it works on."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        descriptors: tuple[int, ...] = (),
    ):
        self._log = log
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | dict(environment),
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers in order
            )
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._part, self._began, self._logged = Part("", 0, 0), 0.0, 0

    @property
    def alive(self) -> bool:
        """Whether the process can take another part."""
        return self._process.poll() is None

    def begin(self, part: Part) -> None:
        """Asks for a part."""
        self._part, self._began, self._logged = part, time.monotonic(), self._log.stat().st_size
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died, which `outcome` tells
            self._process.stdin.write(part.name + "\n")
            self._process.stdin.flush()

    def outcome(self, seconds: float) -> Outcome | None:
        """Returns the outcome of the part, or None if it still runs after so many seconds."""
        try:
            line = self._answers.get(timeout=max(seconds, 0.0)) if seconds > 0 else self._answers.get_nowait()
        except queue.Empty:
            return None
        spent = time.monotonic() - self._began
        if line is None:
            status = self._process.wait()
            return Outcome("failed", spent, reason=f"status {status}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            return Outcome("failed", spent, reason=one_line(ValueError(answer["error"])))
        result: dict[str, Any] = answer["result"]
        return Outcome(result.pop("status", "done"), spent, result)

    def end(self) -> Outcome:
        """Ends the part: in order if it has time to, else by killing the process."""
        if self._part.grace and self.alive:
            os.kill(self._process.pid, signal.SIGINT)
            if (outcome := self.outcome(self._part.grace)) is not None:
                return outcome
        self._kill()
        spent = time.monotonic() - self._began
        return Outcome("overran", spent, reason=f"ended after {spent:.0f} s")

    def close(self) -> None:
        """Ends the process, in order if it is idle."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSING)
        self._kill()
        self._reader.join(_CLOSING)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole session, programs that it runs too
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _last_words(self) -> str:
        """Returns the last line that the part logged."""
        with open(self._log, "rb") as file:
            file.seek(self._logged)
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return one_line(ValueError(lines[-1])) if lines else "no message"
