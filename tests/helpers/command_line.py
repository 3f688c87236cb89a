"""Helpers of the tests of the command line: flags of a tiny run, a tiny dataset, and results of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.run import main
from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.run_outputs import CHECKPOINTS

SIZES = [
    "--preset",
    "laptop",
    "--seeds",
    "2",
    "--hp.hidden",
    "8",
    "8",
    "--hp.batch",
    "8",
    "--hp.candidates",
    "2",
]
SIZES += [
    "--hp.rollout",
    "2",
    "--hp.flow-steps",
    "2",
    "--hp.flow-steps-test",
    "0",
    "--hp.candidates-test",
    "2",
]
SIZES += ["--hp.cooldown", "0", "--hp.execute", "10", "--run.segment", "5", "--eval.episodes", "1"]
OBS, ACTION = 28, 5  # of cube-single


def arrays(episodes: int = 3, length: int = 40) -> dict[str, np.ndarray]:
    """Returns random rows with the shapes of cube-single."""
    rng = np.random.default_rng(0)
    rows = episodes * length
    return {
        "observations": rng.normal(size=(rows, OBS)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
        "terminals": np.arange(rows) % length == length - 1,
    }


def write_data(folder: Path) -> list[str]:
    """Writes a small dataset; returns the flags that name it."""
    np.savez(folder / "small.npz", **arrays())  # pyright: ignore[reportArgumentType]
    np.savez(folder / "small-val.npz", **arrays(1))  # pyright: ignore[reportArgumentType]
    return ["--data.path", str(folder / "small.npz"), "--data.dir", str(folder)]


def finished_run(folder: Path) -> Path:
    """A finished run of 10 updates, and its dataset in the same folder."""
    folder.mkdir(exist_ok=True)
    assert main([*SIZES, *write_data(folder), "--steps", "10", "--out", str(folder / "run")]) == 0
    return folder / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def params(folder: Path) -> dict[str, Any]:
    """Returns description and checksum of each array of the newest checkpoint."""
    with CheckpointStore(folder / CHECKPOINTS) as store:
        return store._header(None)["arrays"]


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str], status: int = 2) -> str:
    """Returns the one line that a failing command prints on standard error."""
    capsys.readouterr()
    assert main(argv) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]
