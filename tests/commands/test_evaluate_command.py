"""Evaluating a saved run again: the same episodes, in other numbers, elsewhere, and what may go wrong."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ogbench
import pytest

from envs_mjx.registry import parse
from experiments import evaluate as program
from experiments.evaluate import EVALUATIONS, main
from experiments.launch.saved_run import by_environment, open_run, with_acting_hparams
from experiments.launch.settings import read_settings
from experiments.ogbench_eval import evaluation
from experiments.ogbench_eval.worker import Start
from mac.errors import UserError
from mac.run.evaluate import episode_keys, evaluation_keys
from mac.run.io.logger import EVAL, read_rows
from mac.types import Episodes
from tests.helpers.command_line import content
from tests.helpers.fake_env_pool import Lanes
from tests.helpers.pytest_params import slow_except

ENV = "cube-single-play-singletask-task2-v0"


def again(folder: Path, *flags: str) -> dict[str, Any]:
    """The line that an evaluation adds."""
    assert main([str(folder), *flags]) == 0
    return list(read_rows(folder / EVALUATIONS))[-1]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command prints on standard error."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# On our engines.


def test_evaluation_again_gives_the_rows_of_training(copied: Path, capsys: pytest.CaptureFixture[str]):
    before = content(copied)
    line = again(copied, "--engine", "c")
    assert line["rows"] == list(read_rows(copied / EVAL))
    said = capsys.readouterr().out
    for part in ("2 seeds after 10 updates", "engine c, task 2", "1 per task and seed, 2 in all"):
        assert part in said
    assert "95% interval" in said and "at 10 updates" in said and str(copied / EVALUATIONS) in said
    assert "after 10 updates (engine c, 1 per task and seed)" in said
    after = content(copied)
    assert after.pop(EVALUATIONS) and after == before


def test_line_tells_how_it_was_made(copied: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def fake(_: Any, env: Any, episodes: int, keys: jax.Array, **how: Any) -> Episodes:
        asked.update(how, env=env.spec.name, engine=env.engine.name, keys=jr.key_data(keys))
        zero = jnp.zeros((2, 1, episodes), jnp.int32)
        return Episodes(zero > 0, zero.astype(float), zero, zero)

    monkeypatch.setattr(program, "evaluate", fake)
    line = again(copied, "--episodes", "2", "--batch", "3", "--seed", "5")
    wanted = {"engine": "c", "env": ENV, "tasks": [2], "step": 10, "episodes": 2, "seed": 5, "batch": 3}
    assert {name: line[name] for name in wanted} == wanted
    assert {"mujoco", "jax", "ogbench"} <= set(line["versions"]) and line["hardware"]["cores"] >= 1
    assert line["seconds"] > 0 and line["started"] and line["command"]
    assert [(row["seed"], row["task"], row["episodes"]) for row in line["rows"]] == [(0, 2, 2), (1, 2, 2)]
    np.testing.assert_array_equal(asked.pop("keys"), jr.key_data(evaluation_keys(jnp.arange(2), 10, 5)))
    assert asked == {"batch": 3, "tasks": (2,), "env": ENV, "engine": "c"}


def test_policies_may_act_otherwise_than_in_training(copied: Path):
    plain = read_settings(copied)
    settings = with_acting_hparams(plain, ("candidates-test=1", "execute=2"))
    assert (settings.hp.candidates_test, settings.hp.execute) == (1, 2)
    assert dataclasses.replace(settings, hp=plain.hp) == plain


@pytest.mark.slow
def test_changes_of_acting_are_played_and_recorded(copied: Path):
    line = again(copied, "--hp", "candidates_test=1")
    assert line["hp"] == ["candidates_test=1"]


@pytest.mark.parametrize(
    ("change", "parts"),
    {
        "lr=1": ("NAME=VALUE", "candidates_test"),
        "candidates_test": ("candidates_test", "whole number"),
        "candidates_test=0": ("candidates-test=0", "at least 1"),
        "execute=many": ("execute", "'many'", "whole number"),
    }.items(),
)
def test_wrong_change_of_acting_is_one_line(copied: Path, change: str, parts: tuple[str, ...], capsys: Any):
    line = error_of(capsys, str(copied), "--hp", change)
    assert all(part in line for part in parts)


def test_lines_add_up_and_a_torn_one_is_cut(copied: Path):
    whole = json.dumps({"rows": [], "mark": 1}) + "\n"
    (copied / EVALUATIONS).write_text(whole + '{"torn')
    again(copied)
    again(copied)
    lines = list(read_rows(copied / EVALUATIONS))
    assert lines[0] == {"rows": [], "mark": 1} and len(lines) == 3
    assert lines[1]["rows"] == lines[2]["rows"]


def test_damaged_rows_of_training_are_noted(copied: Path, capsys: pytest.CaptureFixture[str]):
    """A repetition needs none of them; only the comparison is left out."""
    text = (copied / EVAL).read_text()
    (copied / EVAL).write_text(text.replace('"step"', '"stop"', 1))
    want = list(read_rows(copied / EVAL))
    line = again(copied, "--engine", "c")
    assert line["rows"] == [{"step": row.pop("stop", 10), **row} for row in want]
    said = capsys.readouterr().out
    assert f"no comparison with the evaluation in training: {copied / EVAL}, line 1: step is missing" in said
    assert "in training  " not in said


@pytest.mark.slow
def test_other_tasks_of_a_single_task_run_may_be_played(copied: Path):
    line = again(copied, "--tasks", "4", "2")
    assert [(row["task"], row["seed"]) for row in line["rows"]] == [(4, 0), (4, 1), (2, 0), (2, 1)]
    assert line["rows"][2:] == list(read_rows(copied / EVAL))


def test_a_row_may_go_elsewhere(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before, out = content(copied), tmp_path / "else where" / "rows.jsonl"
    assert main([str(copied), "--out", str(out)]) == 0
    assert content(copied) == before and len(out.read_text().splitlines()) == 1
    assert str(out) in capsys.readouterr().out


def test_tasks_are_found_in_the_environments_that_hold_them():
    def held(name: str, tasks: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        return [(env.name, each) for env, each in by_environment(parse(name), tasks, "--tasks")]

    assert held(ENV, ()) == [(ENV, (2,))]
    default = "scene-noisy-singletask-v0"
    assert held(default, (5, 2)) == [
        ("scene-noisy-singletask-task5-v0", (5,)),
        (default, (2,)),
    ]
    assert held("puzzle-3x3-play-v0", ()) == [("puzzle-3x3-play-v0", (1, 2, 3, 4, 5))]
    assert held("cube-double-play-oraclerep-v0", (3, 1)) == [("cube-double-play-oraclerep-v0", (3, 1))]


def test_draws_are_other_episodes_and_draw_0_is_that_of_training():
    seeds = jnp.arange(2)
    keys = [
        jr.key_data(evaluation_keys(seeds, step, draw)) for step, draw in ((7, 0), (7, 1), (8, 0), (7, 2))
    ]
    assert len({np.asarray(k).tobytes() for k in keys}) == 4
    np.testing.assert_array_equal(keys[0][1], jr.key_data(evaluation_keys(seeds[1:], 7))[0])


def test_run_without_a_normaliser_takes_that_of_its_checkpoint(copied: Path):
    saved = open_run(copied).normalizer
    (copied / "normalizer.json").unlink()
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"path": str(copied / "gone.npz")}  # nor is its dataset needed
    (copied / "config.json").write_text(json.dumps(config))
    for got, want in zip(jax.tree.leaves(open_run(copied).normalizer), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(got, want)


BAD = {
    ("--engine", "bullet"): ("'bullet'", "'ogbench'"),
    ("--tasks", "6"): ("--tasks 6", "cube-single has tasks 1 to 5"),
    ("--tasks", "2", "2"): ("--tasks 2", "each once"),
    ("--step", "7"): ("--step=7", "checkpoints of updates 10"),
    ("--episodes", "0"): ("--episodes=0", "at least 1"),
    ("--batch", "-1"): ("--batch=-1", "at least 0"),
    ("--noise", "-1"): ("--noise=-1", "at least 0"),
    ("--engine", "ogbench", "--noise", "0.1"): ("--noise=0.1", "--noise 0"),
    ("--sed", "1"): ("--sed", "--seed"),
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_flag_is_one_line_with_the_remedy(
    finished: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    said = error_of(capsys, str(finished), *flags)
    assert all(part in said for part in BAD[flags])


def test_folder_without_a_run_or_a_checkpoint_is_one_line(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "RUN" in error_of(capsys)
    assert "holds no run" in error_of(capsys, str(tmp_path / "nowhere"))
    shutil.rmtree(copied / "checkpoints")
    assert "no checkpoint yet" in error_of(capsys, str(copied))
    (copied / "normalizer.json").write_text('{"center": [1.0]}')
    (copied / "config.json").write_text("{")
    assert "not JSON" in error_of(capsys, str(copied))


def test_damaged_normaliser_is_one_line(copied: Path, capsys: pytest.CaptureFixture[str]):
    (copied / "normalizer.json").write_text('{"center": [1.0], "half_range": [1.0]}')
    assert "expected 28 numbers" in error_of(capsys, str(copied))


# In the original environment.


@pytest.mark.slow
def test_original_environment_plays_every_episode(copied: Path):
    """Untrained policies fail, so every episode lasts 200 steps at a reward of -1."""
    line = again(copied, "--engine", "ogbench", "--episodes", "2", "--batch", "2")
    wanted = {"step": 10, "task": 2, "success": 0.0, "return": -200.0, "length": 200.0}
    wanted |= {
        "episodes": 2,
        "engine": "ogbench",
        "dropped": 0,
        "unstable": 0,
        "data": "local file small.npz",
    }
    for seed, row in enumerate(line["rows"]):
        # A failure is continued forever: -1 / (1 - 0.99).
        assert row.pop("realised_return") == pytest.approx(-100, rel=1e-5)
        assert np.isfinite(row.pop("predicted_return"))
        assert row == {"step": 10, "seed": seed} | wanted


@pytest.mark.slow
def test_environments_in_worker_processes_are_the_packages():
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 5)).astype(np.float32)
    name = "cube-double-play-v0"
    with evaluation.EnvPool(name, 3, film=True) as fleet:
        fleet.execute([(0, Start(7, 1)), (1, Start(8, 4)), (2, Start(9, 5))])
        played = fleet.execute([(2, actions[:2]), (1, actions)])
    env: Any = ogbench.make_env_and_datasets(name, env_only=True)
    env.reset(seed=8, options={"task_id": 4})
    total = 0.0
    for action in actions:
        obs, reward, *_ = env.step(action)
        total += reward
    np.testing.assert_array_equal(played[1].obs, np.float32(obs))
    assert (played[1].reward, played[1].steps, played[1].done) == (total, 6, False)
    last = played[1].film[-1]
    np.testing.assert_array_equal(last.qpos, env.unwrapped._data.qpos)
    np.testing.assert_allclose(sorted(last.target[0][:, 1]), [-0.1, 0.1])
    assert (played[0].steps, len(played[1].film), last.buttons.size) == (2, 6, 0)


@pytest.mark.parametrize("batch", slow_except([7], [1, 4, 7, 100]))
def test_results_go_to_the_right_seed_task_and_episode(
    finished: Path, batch: int, monkeypatch: pytest.MonkeyPatch
):
    """In the toy pool an episode's length, return and success follow from its seed."""
    monkeypatch.setattr(evaluation, "EnvPool", Lanes)
    run, tasks, episodes = open_run(finished), (12, 3), 5
    keys = evaluation_keys(jnp.asarray(run.numbers), 10)
    ended: list[int] = []
    got = evaluation.play_official(run, ENV, tasks, episodes, keys, batch=batch, report=ended.append)
    assert ended[-1] == 20 and ended == sorted(ended) and got.realised is not None
    for s in range(2):
        for t, task in enumerate(tasks):
            for e in range(episodes):
                key = jr.split(jr.fold_in(jr.fold_in(keys[s], task), e))[0]
                seed = evaluation.start_seed(key)
                length, pay = task + seed % 3, seed % 100
                assert got.length[s, t, e] == length
                assert got.episode_return[s, t, e] == length * pay
                assert bool(got.success[s, t, e]) == (pay % 2 == 0)
                gamma = run.settings.hp.discount
                later = length if pay % 2 == 0 else 100_000  # a failure is continued with its last reward
                want = pay * (1 - gamma**later) / (1 - gamma)
                assert got.realised[s, t, e] == pytest.approx(want, rel=1e-5)
    most = max(len(commands) for commands in Lanes.asked)
    assert most == max(2, 2 * min(batch // 2, 10))
    # Every episode starts at the same state, so that expectations differ by the episodes' keys alone.
    task, episode = np.repeat(tasks, episodes), np.tile(np.arange(episodes), len(tasks))
    noise = episode_keys(keys, jnp.asarray(task), jnp.asarray(episode))[1]
    start = jnp.zeros((2, len(task), 28))
    want = evaluation.expect(run.policies, start, None, noise)
    np.testing.assert_allclose(got.predicted, want.reshape(2, len(tasks), episodes), rtol=1e-4, atol=1e-4)


def test_missing_package_and_failing_process_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with (
        evaluation.EnvPool("cube-septuple-play-v0", 1) as fleet,
        pytest.raises(UserError, match=r"engine ogbench failed: .*cube-septuple") as caught,
    ):
        fleet.execute([(0, Start(0, 1))])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(evaluation, "NEEDED", ("ogbench", "no_such_package"))
    said = error_of(capsys, str(finished), "--engine", "ogbench")
    assert "no_such_package" in said and "pip install" in said


def test_memory_that_runs_out_names_the_batch(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 GB")

    monkeypatch.setattr(program, "play_episodes", fail)
    assert "--batch" in error_of(capsys, str(finished))
