"""Killed without warning at any moment, a run continues to the same bits; no row is lost or doubled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mac.run.io.logger import METRICS
from tests.helpers.toy_algorithm import SEEDS, SPARSE, make_job, result, run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_at_five_random_moments_changes_nothing(tmp_path: Path, seed: int):
    steps = 96
    run(make_job(steps, run=SPARSE), tmp_path / "straight")
    script = [
        sys.executable,
        "-m",
        "tests.helpers.toy_algorithm",
        str(tmp_path / "killed"),
        str(steps),
        "5",
        str(seed),
    ]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path / "killed") == result(tmp_path / "straight")
    rows = [json.loads(line) for line in (tmp_path / "killed" / METRICS).read_text().splitlines()]
    found = [(row["step"], row["seed"]) for row in rows]
    assert found == [(step, number) for step in range(2, steps + 1, 2) for number in SEEDS]
