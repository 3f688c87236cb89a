"""One's own data without an environment: npz, hdf5 and Minari, training, resume, report, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from envs_mjx.data_only import data_only_env, has_goals, is_data_only
from envs_mjx.registry import make, parse
from experiments import evaluate, model_error, render_video, report, run
from experiments.launch.dataset import env_of_data
from mac.data.shards import read_file
from mac.errors import UserError
from mac.run.io.logger import EVAL, METRICS, read_rows
from tests.helpers.command_line import params
from tests.helpers.hdf5_files import FALL, LIMIT, d4rl_arrays, write_d4rl, write_minari

EPISODES = tuple((30, FALL if number % 2 else LIMIT) for number in range(8))
SIZES = [
    "--preset", "laptop", "--seeds", "2", "--hp.hidden", "8", "--hp.batch", "8", "--hp.candidates", "2",
    "--hp.rollout", "2", "--hp.flow-steps", "2", "--hp.candidates-test", "2", "--hp.cooldown", "0",
    "--run.segment", "2", "--run.eval-every", "4",
]  # fmt: skip


def episodes() -> dict[str, np.ndarray]:
    """Rows with recorded rewards: three columns of noise, and half of the episodes terminate."""
    found = d4rl_arrays(EPISODES)
    noise = np.random.default_rng(0).normal(size=found["observations"].shape).astype(np.float32)
    return found | {"observations": noise, "next_observations": np.concatenate([noise[1:], noise[:1]])}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same rows in all kinds of files."""
    folder, rows = tmp_path_factory.mktemp("own"), episodes()
    np.savez(folder / "mine.npz", **rows)  # pyright: ignore[reportArgumentType]
    np.savez(folder / "mine-val.npz", **rows)  # pyright: ignore[reportArgumentType]
    write_d4rl(folder / "mine.hdf5", rows)
    write_minari(folder / "minari.hdf5", rows, EPISODES)
    plain = {name: rows[name] for name in ("observations", "actions")}
    ends = rows["terminals"] | rows["timeouts"]
    np.savez(folder / "states.npz", **plain, terminals=ends)  # pyright: ignore[reportArgumentType]
    return folder


@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    """A run of four updates on the npz file."""
    words = ["--env", "data-only", "--data.path", str(files / "mine.npz"), "--data.dir", str(files)]
    assert run.main([*SIZES, *words, "--steps", "4", "--out", str(files / "run")]) == 0
    return files / "run"


@pytest.mark.parametrize("name", ["mine.npz", "mine.hdf5", "minari.hdf5"])
def test_kinds_of_files_hold_the_same_rows(files: Path, name: str):
    spec = make(env_of_data("data-only", files / name)).spec
    assert (spec.name, spec.obs_dim, spec.action_dim, spec.recorded) == ("data-only-3x2", 3, 2, True)
    found, rows = read_file(files / name, spec), episodes()
    steps = np.delete(np.arange(len(found.obs)), (found.first + found.length - 1))
    np.testing.assert_array_equal(found.obs[steps], rows["observations"])
    np.testing.assert_array_equal(found.action[steps], rows["actions"])
    assert found.reward is not None and found.terminated is not None
    np.testing.assert_array_equal(found.reward[steps], rows["rewards"])
    assert found.terminated.tolist() == [how == FALL for _, how in EPISODES]


def test_run_on_data_alone_has_diagnostics_and_no_evaluation(trained: Path):
    rows = list(read_rows(trained / METRICS))
    found = {row["seed"] for row in rows if "diagnostics/drift_10" in row}
    assert found == {0, 1}
    assert not (trained / EVAL).exists() or not (trained / EVAL).read_text()
    assert json.loads((trained / "config.json").read_text())["env"] == "data-only-3x2"


def test_run_on_data_alone_resumes_to_the_same_end(
    files: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--env", "data-only", "--data.path", str(files / "mine.npz"), "--data.dir", str(files)]
    out = ["--out", str(tmp_path / "cut")]
    assert run.main([*SIZES, *words, "--steps", "2", *out]) == 0
    capsys.readouterr()
    assert run.main([*out, "--resume", "--steps", "4"]) == 0
    said = capsys.readouterr().out
    assert "environment  none, data alone (3 observation and 2 action columns)" in said
    assert "drift_10" in said and "no environment, so no evaluation" in said
    assert params(tmp_path / "cut") == params(trained)


def test_report_shows_diagnostics_of_data_alone(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(trained)]) == 0
    assert "drift_10" in capsys.readouterr().out


def test_report_sends_diagnostics_to_trackers(trained: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tensorboard.summary.writer.record_writer")
    assert report.main([str(trained), "--log", "tensorboard"]) == 0
    assert f"records of {trained}" in capsys.readouterr().out
    assert list(trained.rglob("events.out.tfevents.*"))


def test_report_of_data_alone_writes_no_evaluations(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert report.main([str(trained), "--out", str(tmp_path / "r.csv")]) == 2
    assert "--out: runs on data alone have no evaluations" in capsys.readouterr().err
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.parametrize("program", [evaluate.main, render_video.main])
def test_nothing_is_played_without_an_environment(
    trained: Path, capsys: pytest.CaptureFixture[str], program: Callable[[list[str]], int]
):
    assert program([str(trained)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("trained on data alone (data-only-3x2), so there is nothing to play it in")


@pytest.mark.slow
def test_data_without_rewards_train_on_goals(files: Path, tmp_path: Path):
    words = ["--env", "data-only-goals", "--data.path", str(files / "states.npz"), "--data.dir", str(files)]
    assert run.main([*SIZES, *words, "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["env"] == "data-only-goals-3x2"


@pytest.mark.slow
def test_model_error_needs_no_environment(files: Path, tmp_path: Path):
    words = ["--env", "data-only", "--data.path", str(files / "mine.npz"), "--data.dir", str(files)]
    sizes = ["--chunks", "1", "5", "--steps", "4", "--seeds", "2", "--hidden", "8", "--batch", "8"]
    sizes += ["--horizon", "10", "--trajectories", "8", "--out", str(tmp_path)]
    assert model_error.main([*words, *sizes]) == 0
    assert (tmp_path / "model_error.csv").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--env", "data-only"], "--env data-only needs --data.path FILE"),
        (["--env", "data-only", "--data.path", "states.npz"], "holds no rewards"),
        (["--env", "data-only", "--data.path", "none.npz"], "no such dataset"),
        (["--env", "antsoccer-arena-navigate-v0"], "OGBench's antsoccer tasks are not in this project"),
        (["--env", "visual-cube-single-play-v0"], "OGBench's visual tasks are not in this project"),
        (["--env", "D4RL/pen/human-v2"], "Minari's 'D4RL/pen/human-v2' has no environment here"),
    ],
)
def test_what_data_alone_cannot_do_is_one_line(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], said: str,
):  # fmt: skip
    monkeypatch.chdir(files)
    assert run.main([*SIZES, *words, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "run").exists()


def test_names_of_data_alone_tell_widths_and_goals():
    assert is_data_only("data-only-28x5") and not is_data_only("data-only-28")
    assert has_goals("data-only-goals-28x5") and not has_goals("data-only-28x5")
    assert parse("data-only-goals-3x2").goals == "goal" and make("data-only-goals-3x2").spec.goal_dim == 3
    with pytest.raises(UserError, match=r"needs --data\.path"):
        data_only_env("data-only")
