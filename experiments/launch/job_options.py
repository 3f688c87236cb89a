"""Options of jobs: `--jobs local:4` runs processes side by side here, `--jobs slurm` submits to a cluster."""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from experiments.cli.arguments import read_duration
from mac.errors import UserError


class Jobs(NamedTuple):
    """Where runs are to run.

    Attributes:
        processes: how many at a time on this machine; None where it is not said.
    """

    where: Literal["local", "slurm"]
    processes: int | None = None


def read_jobs(text: str) -> Jobs:
    """Reads `--jobs`.

    Raises:
        UserError: it is none of `slurm`, `local` and `local:N`.
    """
    match = re.fullmatch(r"(?P<slurm>slurm)|local(?::(?P<count>[1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--jobs {text}: write slurm, local, or local:N for N processes at a time")
    if match["slurm"]:
        return Jobs("slurm")
    return Jobs("local", int(match["count"]) if match["count"] else None)


@dataclass(frozen=True)
class JobConfig:
    """What `--jobs slurm` asks of the cluster for each job; what is not given is the cluster's own choice."""

    time: str = "4h"
    """time limit such as 30m, 4h or 2d; before it a run writes a checkpoint, and its job queues again"""
    grace: str = "2m"
    """how long before the time limit a run is asked to stop; a quarter of the limit at most"""
    partition: str | None = None
    """partition of the cluster"""
    account: str | None = None
    """account that pays"""
    gpus: int = 0
    """GPUs of each job"""
    cpus: int = 0
    """processor cores of each job; 0 = the cluster's choice"""
    memory: str | None = None
    """memory of each job, such as 16G"""
    at_once: int = 0
    """most jobs of a grid that run at a time; 0 = all"""
    requeues: int = 100
    """how often a job may queue again after its time limit"""
    extra: tuple[str, ...] = ()
    """further options of sbatch, such as qos=high or exclusive"""
    setup: tuple[str, ...] = ()
    """shell commands before a run, such as 'module load cuda'"""

    def __post_init__(self):
        for name, least in (("time", 60), ("grace", 1)):
            if read_duration(getattr(self, name), f"--job.{name}") < least:
                raise UserError(f"--job.{name} {getattr(self, name)}: must be at least {least} seconds")
        for name in ("gpus", "cpus", "at_once", "requeues"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise UserError(f"--job.{flag}={getattr(self, name)}: must be at least 0")
        if self.memory is not None and re.fullmatch(r"\d+[KMGT]?", self.memory) is None:
            raise UserError(f"--job.memory {self.memory}: write a size such as 16G")
        for word in self.extra:
            if re.fullmatch(r"[a-z][a-z0-9-]*(=.+)?", word) is None:
                raise UserError(f"--job.extra {word}: write NAME=VALUE or NAME, without dashes before it")

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        return -int(-read_duration(self.time, "--job.time") // 60)

    @property
    def warning(self) -> int:
        """Seconds before the time limit at which a run is asked to stop."""
        return int(min(read_duration(self.grace, "--job.grace"), 15 * self.minutes))

    @property
    def options(self) -> dict[str, Any]:
        """Options of sbatch by their names; True of one without a value."""
        named = {"partition": self.partition, "account": self.account, "mem": self.memory}
        found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        found |= {"requeue": True}
        for word in self.extra:
            name, has_value, value = word.partition("=")
            found[name] = value if has_value else True
        return found


NO_WISHES = JobConfig()
"""The cluster's own choices."""
