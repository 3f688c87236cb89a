"""Evaluations within a run: compiled once, in batches, and what they report."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import pytest

from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.logger import EVAL, read_rows
from mac.run.io.run_outputs import CHECKPOINTS, Outputs, Variant
from mac.run.train import Diverged
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_algorithm import RUN, Silent, Walk, make_job, result, run
from tests.helpers.toy_env import PointEnv


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


class Unsound(PointEnv):
    """The third step of task 2 gives `bad` in place of the state and, if `paid`, of the reward."""

    bad: float = eqx.field(static=True, default=math.nan)
    paid: bool = eqx.field(static=True, default=True)

    def reset(self, key: Any, task: Any) -> Any:
        return dataclasses.replace(super().reset(key, task), dropped=task)

    def step(self, state: Any, action: Any) -> Any:
        new = super().step(state, action)
        bad = (new.t == 3) & (state.dropped == 2)
        reward = jnp.where(bad & self.paid, self.bad, new.reward)
        return dataclasses.replace(new, obs=jnp.where(bad, self.bad, new.obs), reward=reward)


class Still(Walk):
    """Does not move, so no episode ends early; with `never`, the actions of seed 4 are not finite."""

    never: bool = eqx.field(static=True, default=False)

    def act(self, state: Any, obs: Any, goal: Any, key: Any) -> Any:
        bad = self.never & (state.nets["number"] == 4)
        return jnp.where(bad, jnp.nan, jnp.zeros((len(obs), 1, 2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e11])
@pytest.mark.parametrize("paid", [True, False])
def test_unstable_physics_is_a_failed_episode_and_a_warning(
    bad: float, paid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """-1 in each of two steps, then the state is unsound; in task 1 the episodes go on to the limit of 12."""
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    job = make_job(algo=Still(), env=Unsound(bad=bad, paid=paid))
    assert run(job, tmp_path).step == 12
    found = [
        (row["task"], row["success"], row["return"], row["length"], row["unstable"])
        for row in read_rows(tmp_path / EVAL)
    ]
    assert found == 4 * [(1, 0.0, -12.0, 12.0, 0), (2, 0.0, -2.0, 2.0, 2)]
    said = [note for note in notes if "unstable" in note]
    assert len(said) == 2, "one at 8 and one at 12"
    assert all("on engine toy became unstable in 4 episodes (task 2: 4)" in note for note in said)


def test_unstable_physics_leaves_other_episodes_alone(tmp_path: Path):
    run(make_job(), tmp_path / "sound")
    run(make_job(env=Unsound()), tmp_path / "unsound")
    pair = [[r for r in read_rows(tmp_path / name / EVAL) if r["task"] == 1] for name in ("sound", "unsound")]
    assert [{**row, "dropped": 0} for row in pair[1]] == pair[0]


def test_actions_that_are_not_finite_leave_a_checkpoint(tmp_path: Path):
    """Seed 4's policy, whose weights are finite; the checkpoint of update 8 came before its evaluation."""
    job = make_job(algo=Still(never=True))
    for resume in (False, True):
        with pytest.raises(Diverged) as caught:
            run(job, tmp_path, resume=resume)
        said = str(caught.value)
        assert "after update 8 the policy of seed 4 gave actions that are not finite in task 1" in said
        assert "the checkpoint of update 8 stays" in said and "\n" not in said
    assert list(read_rows(tmp_path / EVAL)) == []
    run(make_job(algo=Still()), tmp_path, resume=True)
    run(make_job(algo=Still()), tmp_path / "straight")
    assert result(tmp_path) == result(tmp_path / "straight")


@pytest.mark.parametrize("when", ["evaluating", "success"])
def test_what_fails_in_an_evaluation_loses_and_doubles_no_row(when: str, tmp_path: Path):
    """Before its rows are written, and after them, but before the checkpoint learns of it."""

    def fail(what: str, step: int) -> None:
        if (what, step) == (when, 8):
            raise RuntimeError("stands for a kill")

    with pytest.raises(RuntimeError, match="a kill"):
        run(make_job(), tmp_path / "cut", hook=fail)
    with CheckpointStore(tmp_path / "cut" / CHECKPOINTS) as store:
        assert store.latest() == 8 and store.meta()["evaluated"] == 0
    run(make_job(), tmp_path / "cut", resume=True)
    run(make_job(), tmp_path / "straight")
    assert result(tmp_path / "cut") == result(tmp_path / "straight")


SWEEP = tuple(Variant(name, {}, {"name": name}) for name in "ab")


@pytest.mark.slow
@pytest.mark.parametrize("learnt", slow_except(["a"], ["a", "b", "ab", ""]))
def test_a_sweep_killed_while_it_marks_an_evaluation_resumes(learnt: str, tmp_path: Path):
    """Only some of its two runs know of the evaluation of update 8; neither loses nor doubles a row."""
    job = make_job(sweep=SWEEP, run=dataclasses.replace(RUN, keep=9))
    run(job, tmp_path / "straight")
    cut = tmp_path / "cut"
    run(job._replace(steps=8), cut)
    for name in set("ab") - set(learnt):
        with CheckpointStore(cut / name / CHECKPOINTS) as store:
            meta = store.meta(8)
            store.save(8, {}, {"config": meta["config"], **meta["before"]})
    run(job, cut, resume=True)
    for name in "ab":
        assert result(cut / name) == result(tmp_path / "straight" / name)


def test_a_run_is_finished_only_after_its_last_evaluation(tmp_path: Path):
    """Though its last checkpoint is written before that."""
    job, known = make_job(), []

    def look(what: str, step: int) -> None:
        with Outputs(tmp_path, job.variants, job.numbers, 2) as outputs:
            while (what, step) == ("success", 12) and outputs.latest() != 12:  # it is being written
                time.sleep(0.01)
            if step == 12 and what == "success":
                known.append(outputs.evaluated(12))

    run(job, tmp_path, hook=look)
    look("success", 12)
    assert known == [False, True]
