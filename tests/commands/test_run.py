"""The command line from flags to a picture, again on the same folder, and on from there."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from envs_mjx.action_noise import NoisyActions
from experiments import run as program
from experiments.run import main
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.train import TrainJob, TrainResult
from tests.helpers.command_line import SIZES, content, error_of, params

# A run.


def test_run_leaves_everything_that_it_announces(
    finished: Path, data: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*SIZES, *data, "--steps", "10", "--out", str(finished), "--resume"]) == 0
    said = capsys.readouterr().out
    paths = [line.strip() for line in said.splitlines() if line.startswith(f"  {finished}")]
    assert len(paths) == 5
    for path in paths:
        assert os.path.getsize(path) > 0
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    metrics = list(read_rows(finished / METRICS))
    assert [(r["step"], r["seed"], "diagnostics/drift_10" in r) for r in metrics] == [
        (5, 0, False),
        (5, 1, False),
        (10, 0, False),
        (10, 1, False),
        (10, 0, True),
        (10, 1, True),
    ]
    evals = list(read_rows(finished / EVAL))
    assert [(r["step"], r["seed"], r["task"], r["episodes"], r["engine"]) for r in evals] == [
        (10, 0, 2, 1, "c"),
        (10, 1, 2, 1, "c"),
    ]
    assert all(0 <= r["success"] <= 1 and r["dropped"] == 0 for r in evals)
    for row, seen in zip(evals, metrics[4:], strict=True):
        for name in ("predicted_return", "realised_return"):
            assert seen[f"diagnostics/{name}"] == pytest.approx(row[name], rel=1e-5)


def test_record_tells_settings_versions_hardware_and_times(finished: Path):
    config = json.loads((finished / "config.json").read_text())
    assert (config["algo"], config["preset"], config["seeds"], config["hp"]["batch"]) == (
        "mac",
        "laptop",
        2,
        8,
    )
    (launch,) = json.loads((finished / "run.json").read_text())["launches"]
    assert launch["resumed_from"] is None and launch["step"] == 10 and launch["signal"] is None
    assert set(launch["seconds"]) == {"data", "load", "compile", "train", "evaluate", "checkpoint"}
    assert launch["started"] <= launch["ended"]
    assert launch["peak_memory_mb"]["host"] > 50
    assert {"jax", "mujoco", "python"} <= set(launch["versions"]) and launch["hardware"]["cores"] >= 1


@pytest.mark.slow
def test_output_that_is_no_terminal_is_plain_lines(
    copied: Path, data: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*SIZES, *data, "--steps", "15", "--out", str(copied), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\r" not in said
    for word in (
        "algorithm",
        "environment",
        "preset",
        "device",
        "seeds",
        "updates",
        "data",
        "results",
        "time",
    ):
        assert re.search(rf"^{word} ", said, re.MULTILINE), word
    assert re.search(r"10 of them done", said) and "resumed from the checkpoint of update 10" in said
    assert re.search(r"100% 15/15 updates", said)


def test_dry_run_prints_the_sizes_and_writes_nothing(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*SIZES, *data, "--steps", "10", "--dry-run"]) == 0
    said = capsys.readouterr().out
    # Each MLP of widths 8, 8: (in + 1) 8 + 16 + 9 * 8 + 16 + 9 out; inputs s 28, a 50, time 1.
    nets = {
        "model": (78, 28),
        "reward": (78, 1),
        "flow": (79, 50),
        "policy": (78, 50),
        "v": (28, 1),
        "q": (78, 1),
    }
    counts = {name: 8 * (i + 1) + 16 + 72 + 16 + 9 * o for name, (i, o) in nets.items()}
    for name, count in counts.items():
        assert f"{name} {count:,}" in said
    assert f"{sum(counts.values()):,} per seed" in said
    assert "data 120 x 33" in said and "GFLOP" in said and re.search(r"memory .* MB", said)
    assert re.search(r"evaluation   2 episodes, 2 at a time .* kB between steps", said)
    assert list(tmp_path.iterdir()) == []


# Again and on.


def test_second_launch_of_a_finished_run_changes_nothing(
    copied: Path, data: list[str], capsys: pytest.CaptureFixture[str]
):
    before = content(copied)
    assert main(["--out", str(copied), "--resume"]) == 0
    said = capsys.readouterr().out
    assert "finished at update 10: nothing was left to do" in said
    assert "95% interval" in said and str(copied / "learning_curve.png") in said
    after = content(copied)
    assert {name for name in before if before[name] != after[name]} <= {"learning_curve.png"}


def test_finished_run_needs_no_dataset_any_more(copied: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"path": None, "dir": str(copied / "nowhere")}
    (copied / "config.json").write_text(json.dumps(config))
    assert main(["--out", str(copied), "--resume"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_goes_on_to_more_steps_as_if_never_stopped(
    copied: Path, data: list[str], tmp_path: Path, quiet: None
):
    assert main(["--out", str(copied), "--resume", "--steps", "20"]) == 0
    assert main([*SIZES, *data, "--steps", "20", "--out", str(tmp_path / "straight")]) == 0
    assert params(copied) == params(tmp_path / "straight")
    # The first part's end, at 10, was evaluated: eval.jsonl tells of it, and so do the diagnoses of then.
    rows = [row for row in read_rows(copied / METRICS) if (row["step"], "critic/loss" in row) != (10, False)]
    assert rows == list(read_rows(tmp_path / "straight" / METRICS))
    launches = json.loads((copied / "run.json").read_text())["launches"]
    assert [launch["resumed_from"] for launch in launches] == [None, 10]
    assert json.loads((copied / "config.json").read_text())["steps"] == 20


def forget(run: Path, *names: str) -> None:
    """Makes a run one that was begun before these hyperparameters existed."""
    for path in (run / "config.json", *run.glob("checkpoints/*/meta.json")):
        values = json.loads(path.read_text())
        for name in names:
            del (values["meta"]["config"] if "meta" in values else values)["hp"][name]
        path.write_text(json.dumps(values))


@pytest.mark.slow
def test_resume_of_a_run_begun_before_an_option_existed(
    finished: Path, tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    old, new = [shutil.copytree(finished, tmp_path / name) for name in ("old", "new")]
    forget(old, "search_rounds", "search_elites")
    before, resume = content(old), ["--resume", "--steps", "20", "--out"]
    for name, value in (("search-rounds", "2"), ("search-elites", "0.25")):
        said = error_of(capsys, [*resume, str(old), f"--hp.{name}", value])
        assert f"hp.{name.replace('-', '_')} (absent there, {value} here);" in said
    assert content(old) == before
    assert main([*resume, str(old)]) == 0
    line = (
        f"note: {old} was begun before hp.search_rounds, hp.search_elites existed: takes their defaults, "
        "hp.search_rounds=1, hp.search_elites=0.5"
    )
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert main([*resume, str(new)]) == 0
    assert "was begun before" not in capsys.readouterr().out
    assert params(old) == params(new)
    for name in (METRICS, EVAL):
        assert (old / name).read_bytes() == (new / name).read_bytes()
    assert json.loads((old / "config.json").read_text())["hp"]["search_rounds"] == 1


def test_options_that_are_unknown_here_end_a_resume(copied: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads((copied / "config.json").read_text())
    config["hp"]["warp_factor"] = 9
    (copied / "config.json").write_text(json.dumps(config))
    assert "warp_factor" in error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])


def test_evaluations_have_noise_also_after_a_resume(
    copied: Path,
    data: list[str],
    tmp_path: Path,
    quiet: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    jobs: list[TrainJob] = []

    def train(job: TrainJob, *_: Any, **__: Any) -> TrainResult:
        jobs.append(job)
        return TrainResult(0, interrupted=2)

    monkeypatch.setattr(program, "train", train)
    config = json.loads((copied / "config.json").read_text())
    config["eval"]["noise"] = 0.1
    (copied / "config.json").write_text(json.dumps(config))
    resume = ["--out", str(copied), "--resume", "--steps", "20"]
    assert main([*SIZES, *data, "--eval.noise", "0.1", "--out", str(tmp_path / "new")]) == 130
    assert main(resume) == 130
    for job in jobs:
        assert isinstance(job.env, NoisyActions) and job.env.sigma == job.config["eval"]["noise"] == 0.1
    said = error_of(capsys, [*resume, "--eval.noise", "0"])
    assert "eval.noise (0.1 there, 0.0 here)" in said and len(jobs) == 2


def test_run_is_not_overwritten_without_resume(
    copied: Path, data: list[str], capsys: pytest.CaptureFixture[str]
):
    before = content(copied)
    said = error_of(capsys, [*SIZES, *data, "--out", str(copied)])
    assert "holds a run already" in said and "--resume" in said and str(copied) in said
    assert content(copied) == before


def test_folder_with_other_files_is_announced(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
):
    folder, words = tmp_path / "mine", [*SIZES, *data, "--steps", "10", "--dry-run", "--out"]
    folder.mkdir()
    (folder / ".hidden").touch()
    assert main([*words, str(folder)]) == 0
    assert "is not empty" not in capsys.readouterr().out
    for name in "dbca":
        (folder / name).touch()
    assert main([*words, str(folder)]) == 0
    line = f"note: {folder} is not empty (a, b, c and 1 more); the run is added to what is there"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--hp.batch", "9"], "hp.batch (8 there, 9 here)"),
        (["--hp.hidden", "8", "9"], "hp.hidden"),
        (["--seeds", "3"], "seeds (2 there, 3 here)"),
        (["--seed", "1"], "seed (0 there, 1 here)"),
        (["--env", "cube-double-play-singletask-v0"], "cube-double"),
        (["--preset", "paper"], "has laptop"),
        (["--hp.batch", "0"], "--hp.batch=0"),
    ],
)
def test_resume_with_other_settings_loses_nothing(
    finished: Path, flags: list[str], part: str, capsys: pytest.CaptureFixture[str]
):
    before = content(finished)
    assert part in error_of(capsys, ["--out", str(finished), "--resume", *flags])
    assert content(finished) == before


def test_cooling_run_cannot_be_extended_and_says_why(copied: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads((copied / "config.json").read_text())
    config["hp"]["cooldown"] = 0.5
    (copied / "config.json").write_text(json.dumps(config))
    said = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])
    assert "--steps=20" in said and "cools down" in said and "10" in said


def test_damaged_checkpoint_is_named(copied: Path, capsys: pytest.CaptureFixture[str], quiet: None):
    for part in (copied / CHECKPOINTS / "000000010" / "state").rglob("*"):
        if part.is_file():
            part.write_bytes(b"")
    said = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])
    assert "damaged checkpoint" in said and "000000010" in said


def test_two_processes_do_not_share_a_folder(copied: Path, capsys: pytest.CaptureFixture[str], quiet: None):
    before = content(copied)
    with lock_folder(copied):
        said = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])
    assert "another process" in said
    assert content(copied) == before
