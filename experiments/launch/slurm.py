"""Runs as jobs of a SLURM cluster, through submitit: submission, the queue, and what a job does.

A job is a process that starts `run.py` and waits. SLURM warns it before a time limit or a preemption
(SIGUSR2); it then asks the run to stop, the run writes a checkpoint, and the job queues again. Each start
continues the run's folder, so a job that is requeued in any other way goes on as well.
"""

import contextlib
import io
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.launch.job_options import JobConfig
from mac.errors import UserError, one_line

ROOT = Path(__file__).parents[2]
RUN = ROOT / "experiments" / "run.py"
MOST = 1000
"""Jobs of an array; SLURM's own limit is 1001 unless it is configured otherwise."""
INTERRUPTED = tuple(
    status
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    for status in (128 + number, -number)
)
"""Statuses of a run that was asked to stop; it can be continued."""
LIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


class RunTask:
    """What a job does: starts a run of `run.py`, or continues it, and waits.

    Pickled by submitit, so it holds plain data until it is called.
    """

    def __init__(self, folder: Path, words: Sequence[str], log: Path):
        """Describes a run.

        Args:
            folder: of the run.
            words: of `run.py`, to begin or to continue it.
            log: file to which its output is added.
        """
        self.folder, self.words, self.log = folder, list(words), log
        self._child: int | None = None

    def command(self) -> list[str]:
        """The words of `run.py` for this start."""
        return self.words

    def ended(self, status: int, lines: Sequence[str]) -> None:
        """Takes note of the end of the run; `lines` are those that it printed."""

    def __call__(self) -> None:
        """Runs to the end.

        Raises:
            SystemExit: with the run's status, unless it is 0.
        """
        words = [sys.executable, str(RUN), *self.command()]
        with self.log.open("ab") as file:
            file.write(f"$ {shlex.join(words)}\n".encode())
            at = file.tell()
            file.flush()
            process = subprocess.Popen(words, stdout=file, stderr=file)
        self._child = process.pid
        # Handlers of signals run while this waits, and may wait for the same process: it is not reaped yet.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        status, self._child = process.wait(), None
        with self.log.open("rb") as file:
            file.seek(at)
            lines = file.read().decode(errors="replace").splitlines()
        print(f"{shlex.join(words)}: status {status}; output in {self.log}", flush=True)
        self.ended(status, lines)
        if status:
            raise SystemExit(status if status > 0 else 128 - status)

    def checkpoint(self) -> Any:
        """Lets the run write a checkpoint; called by submitit when SLURM warns. Returns what to do next."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGUSR2)  # a second warning, if SLURM warned it too, does nothing
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
            self._child = None
        return DelayedSubmission(self)


def submit(tasks: Sequence[RunTask], name: str, config: JobConfig, folder: Path) -> list[str]:
    """Submits a job for each task, as arrays where there are several; returns the jobs' ids.

    Args:
        name: of the jobs in the queue.
        folder: for what submitit and SLURM write; all machines of the cluster must see it.
    Raises:
        UserError: submitit or SLURM is missing, or SLURM refuses.
    """
    submitit = _submitit()
    if shutil.which("sbatch") is None:
        raise UserError(
            "--jobs slurm: this machine has no sbatch; call from one of the cluster's, or take --jobs local"
        )
    _make(folder)
    try:
        executor = submitit.SlurmExecutor(
            folder.absolute(), max_num_timeout=config.requeues, python=_patient(sys.executable)
        )
        executor.update_parameters(
            job_name=name,
            time=config.minutes,
            signal_delay_s=config.warning,
            array_parallelism=config.at_once or MOST,
            # The tree that submits is the one that runs, whatever is installed.
            setup=[f"cd {shlex.quote(os.getcwd())}", _python_path(), *config.setup],
            # Since SLURM 22.05 srun does not take the cores from sbatch.
            srun_args=[f"--cpus-per-task={config.cpus}"] if config.cpus else [],
            additional_parameters=config.options,
            **({"cpus_per_task": config.cpus} if config.cpus else {}),
            **({"gpus_per_node": config.gpus} if config.gpus else {}),
        )
        found: list[str] = []
        for at in range(0, len(tasks), MOST):
            # submitit prints what sbatch says, which the error repeats.
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(task) for task in tasks[at : at + MOST]]
            found += [job.job_id for job in jobs]
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"--jobs slurm: sbatch refuses: {_reason(error)}") from error
    return found


def _submitit() -> Any:
    """The package, which must not log here: it would set up logging anew for the whole process.

    Raises:
        UserError: it is not installed.
    """
    before = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"--jobs slurm needs submitit: pip install -e '.[slurm]' ({error})") from error
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]
        if before is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = before
    logger = logging.getLogger("submitit")
    logger.handlers[:], logger.propagate = [logging.NullHandler()], False
    return submitit


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({one_line(error)}); choose another --out") from error


def _patient(python: str) -> str:
    """The shell's words for Python, which ignores SLURM's warning until submitit handles it.

    A process that is warned in its first seconds would end, and its job with it, before SLURM requeues it.
    """
    return f'sh -c \'trap "" USR2; exec "$@"\' sh {shlex.quote(python)}'


def _python_path() -> str:
    return f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"


def _reason(error: Exception) -> str:
    """SLURM's own words, without the Python around them."""
    said = [line for line in str(error).splitlines() if line.startswith("sbatch: ")]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in said) or one_line(
        error
    )


class QueuedJob(NamedTuple):
    """A job that is not over.

    Attributes:
        state: SLURM's word, such as PENDING.
        reason: why it waits, or the machines where it runs.
    """

    state: str
    reason: str

    @property
    def waits(self) -> bool:
        """True if it does not run."""
        return self.state not in ("RUNNING", "COMPLETING", "SUSPENDED")


def queue() -> dict[str, QueuedJob]:
    """The jobs of this user that are not over, by id; none on a machine without SLURM.

    Raises:
        UserError: SLURM does not answer.
    """
    program = shutil.which("squeue")
    if program is None:
        return {}
    words = [program, "--me", "--noheader", "--array", "--format=%i|%T|%R"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(f"squeue: {_last_line(error.stderr)}; try again when SLURM answers") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"squeue: {one_line(error)}; try again when SLURM answers") from error
    rows = (line.strip().split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    return {number: QueuedJob(state, reason.strip("()")) for number, state, reason in rows if state in LIVE}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1]
