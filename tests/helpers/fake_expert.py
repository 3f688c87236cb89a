"""Fake simulation of a scripted expert, without physics, and other helpers for tests of files."""

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs_mjx.datagen.data_policy import StepRecords, TargetEvents
from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.generate import generate, work_folder
from envs_mjx.datagen.simulate_episodes import EpisodeBatch, EpisodeJob, Simulator


def number(split: int, index: int, attempt: int) -> int:
    """Returns the number in every row of an episode."""
    return 100_000 * split + 100 * index + attempt


def fails(job: EpisodeJob) -> bool:
    """Rejects every fifth episode at first, every tenth twice."""
    return job.index % 5 == 3 and job.attempt < 1 + (job.index % 10 == 3)


def run(
    self: Simulator,
    jobs: Sequence[EpisodeJob],
    tick: Callable[[int], None] = lambda rows: None,
    stop: threading.Event | None = None,
) -> EpisodeBatch:
    """`Simulator.run` without physics: the rows of an episode say which one it is."""
    del stop
    sizes, length = self.policy.widths, self.policy.rows
    rows = {
        name: np.empty((len(jobs), length, size), bool if name == "button_states" else np.float32)
        for name, size in sizes.items()
    }
    for i, job in enumerate(jobs):
        for name, array in rows.items():
            array[i] = number(*job) if name != "button_states" else job.index % 2
    healthy = np.asarray([not fails(job) for job in jobs])
    tick(length * int(healthy.sum()))
    done = np.zeros((len(jobs), length), bool)
    done[:, :4] = True
    hit = done & (np.arange(length) < 3)
    return EpisodeBatch(
        tuple(jobs), StepRecords(**rows), TargetEvents(done, hit), healthy, np.zeros(len(jobs), int)
    )


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the simulation, so that only files are made."""
    monkeypatch.setattr(Simulator, "run", run)


NAME = "puzzle-3x3-play-v0"
REQUEST = DatasetSpec(NAME, episodes=25, per_shard=10, lanes=4)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Killed(BaseException):
    """Simulated death of the process: nothing catches it."""


def calls_until(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Makes call number `count` of a function raise `Killed`, before it does anything."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = itertools.count()

    def wrapped(*args: Any, **named: Any) -> Any:
        if next(calls) == count:
            raise Killed
        return original(*args, **named)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.fixture(name="straight")
def straight_fixture(instant: None, tmp_path: Path) -> Path:
    """Folder of a dataset that was made without interruption."""
    generate(REQUEST, tmp_path / "straight")
    return tmp_path / "straight"


def begin(folder: Path, monkeypatch: pytest.MonkeyPatch, waves: int = 3) -> Path:
    """Interrupts the generation of a dataset; returns its working folder."""
    with monkeypatch.context() as patch:
        calls_until(patch, Simulator, "run", waves)
        with pytest.raises(Killed):
            generate(REQUEST, folder)
    return work_folder(folder, NAME)
