"""Evaluations within a run: compiled once, in batches, and what they report."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from mac.run.logger import EVAL, read_rows
from tests.toy import PointEnv
from tests.walk import Silent, Walk, make_job, result, run


def test_evaluations_of_a_run_are_compiled_once(tmp_path: Path):
    traces: list[int] = []

    class Watched(Walk):
        def act(self, state: Any, obs: Any, goal: Any, key: Any) -> Any:
            traces.append(1)
            return super().act(state, obs, goal, key)

    run(make_job(2, algo=Watched(), batch=3), tmp_path / "one")
    once = len(traces)
    run(make_job(12, algo=Watched(), batch=3), tmp_path / "two")
    assert {row["step"] for row in read_rows(tmp_path / "two" / EVAL)} == {8, 12}
    assert len(traces) == once > 0


def test_batch_of_evaluations_changes_no_row(tmp_path: Path):
    run(make_job(), tmp_path / "whole")
    run(make_job(batch=3), tmp_path / "parts")
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


class Crowded(PointEnv):
    """Drops two contacts at every reset."""

    def reset(self, key: Any, task: Any) -> Any:
        return dataclasses.replace(super().reset(key, task), dropped=jnp.full((), 2))


def test_contacts_left_out_are_reported_once_per_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    run(make_job(env=Crowded()), tmp_path)
    assert {row["dropped"] for row in read_rows(tmp_path / EVAL)} == {4}
    assert len(notes) == 2, "one at 8 and one at 12"
    assert all("engine toy had no room for 16 contacts (task 1: 8, task 2: 8)" in note for note in notes)
