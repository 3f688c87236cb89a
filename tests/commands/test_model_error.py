"""The study of model errors as a command: what it writes, how it repeats itself, and what may go wrong."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.evaluate import EVALUATIONS
from experiments.launch.saved_run import open_dataset, open_run
from experiments.model_error import main
from experiments.model_error_study import success_by_error
from experiments.model_error_study.open_loop import held_out, open_loop_errors
from mac.run.io.logger import EVAL, append_row, read_rows

SIZES = ["--env", "cube-single", "--seeds", "2", "--hidden", "8", "--batch", "4", "--trajectories", "8"]
STUDY = [*SIZES, "--chunks", "1", "4", "--steps", "3", "--horizon", "12"]


def table(path: Path) -> list[dict[str, str]]:
    """Rows below the comments."""
    return list(csv.DictReader(line for line in path.read_text().splitlines() if line[0] != "#"))


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a failing command prints on standard error."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def study(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny study."""
    out = tmp_path_factory.mktemp("study")
    assert main([*STUDY, *data, "--out", str(out)]) == 0
    return out


def test_study_writes_every_multiple_of_each_chunk_length(study: Path):
    rows = table(study / "model_error.csv")
    found = [(int(row["chunk"]), int(row["horizon"])) for row in rows]
    assert found == [(1, h) for h in range(1, 13)] + [(4, h) for h in (4, 8, 12)]
    for row in rows:
        error, low, high = (float(row[name]) for name in ("error", "seed_low", "seed_high"))
        assert 0 < low <= error <= high
        assert (row["seeds"], row["updates"], row["trajectories"], row["episodes"]) == ("2", "3", "8", "1")
    assert (study / "model_error.png").read_bytes().startswith(b"\x89PNG")
    head = (study / "model_error.csv").read_text().splitlines()[0]
    assert head.startswith("# command: python experiments/model_error.py --env cube-single")


def test_all_chunk_lengths_run_along_the_same_trajectories(study: Path):
    still: dict[str, set[str]] = {}
    for row in table(study / "model_error.csv"):
        still.setdefault(row["horizon"], set()).add(row["still"])
    assert all(len(values) == 1 for values in still.values()) and len(still) == 12


def test_same_command_gives_the_same_table(
    study: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*STUDY, *data, "--out", str(tmp_path)]) == 0
    assert table(tmp_path / "model_error.csv") == table(study / "model_error.csv")
    said = capsys.readouterr().out
    assert "at 12 steps" in said and "constant state" in said and str(tmp_path) in said


@pytest.mark.slow
def test_success_is_the_runs_and_error_its_own_models(finished: Path, tmp_path: Path):
    flags = ["--steps", "0", "--trajectories", "16", "--horizon", "20", "--seed", "5"]
    assert main([*flags, "--policy", str(finished), "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["success.csv", "success.png"]
    run = open_run(finished)
    real = held_out(open_dataset(finished, run.settings, run.algo.env), run.normalizer)
    errors = open_loop_errors(run.state.nets.model, real, 10, 20, 16, seed=5)
    success = {row["seed"]: row["success"] for row in read_rows(finished / EVAL)}
    rows = table(tmp_path / "success.csv")
    assert [int(row["seed"]) for row in rows] == [0, 1]
    for i, row in enumerate(rows):
        assert (row["chunk"], row["rollout"], row["step"], row["horizon"]) == ("10", "20", "10", "20")
        assert float(row["success"]) == success[i]
        np.testing.assert_allclose(float(row["error"]), errors.model[i, 1].mean(), rtol=1e-3)
    assert rows[0]["error"] != rows[1]["error"]


def test_run_without_an_evaluation_is_evaluated(copied: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fake(ask: success_by_error.evaluate.Args) -> int:
        asked.append((ask.run, ask.step))
        rows = [{"step": 10, "seed": s, "task": 2, "success": 0.25 + s / 2, "episodes": 4} for s in (0, 1)]
        append_row(copied / EVALUATIONS, {"rows": rows})
        return 0

    monkeypatch.setattr(success_by_error.evaluate, "evaluate_again", fake)
    success_by_error.policy_rows(copied, 10, 4, 0)
    assert asked == []
    (copied / EVAL).write_text("")
    rows = success_by_error.policy_rows(copied, 10, 4, 0)
    assert asked == [(copied, 10)]
    assert [(row.seed, row.success, row.episodes) for row in rows] == [(0, 0.25, 4), (1, 0.75, 4)]


BAD = {
    ("--env", "cube-sngle"): ("--env=cube-sngle", "cube-single"),
    ("--chunks", "0"): ("--chunks", "at least 1"),
    ("--chunks", "2", "2"): ("--chunks", "once"),
    ("--chunks", "5"): ("--horizon=12", "multiple of the chunk length, 5"),
    ("--chunks", "39", "--horizon", "39"): ("chunk=39", "the longest has 39"),
    ("--horizon", "40"): ("--horizon=40", "longest has 39"),
    ("--steps", "0"): ("--steps=0", "at least 1"),
    ("--seeds", "0"): ("--seeds=0", "at least 1"),
    ("--lr", "nan"): ("--lr=nan", "positive"),
    ("--cooldown", "2"): ("--cooldown=2", "[0, 1]"),
    ("--horizn", "4"): ("--horizn", "--horizon"),
    ("--policy", "nowhere"): ("nowhere", "holds no run"),
}


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_flag_is_one_line_with_the_remedy(
    flags: tuple[str, ...], data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = error_of(capsys, *STUDY, *data, "--out", str(tmp_path), *flags)
    assert all(part in said for part in BAD[flags]), said
    assert not list(tmp_path.iterdir())


def test_dataset_without_held_out_rows_is_one_line(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = error_of(capsys, *STUDY, "--data.dir", str(tmp_path), "--out", str(tmp_path / "out"))
    assert "generate_data.py --env cube-single-play-v0" in said and "--data.path" in said
    alone = shutil.copy(data[1], tmp_path / "alone.npz")
    said = error_of(
        capsys, *STUDY, "--data.path", str(alone), "--data.dir", str(tmp_path), "--out", str(tmp_path / "out")
    )
    assert "no held-out data" in said and "generate_data.py" in said


def test_horizon_that_a_run_cannot_be_measured_at_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--steps", "0", "--policy", str(finished), "--out", str(tmp_path), "--horizon"]
    assert "multiple of the chunk length, 10" in error_of(capsys, *flags, "25")
    assert f"{finished}" in error_of(capsys, *flags, "40")


def test_run_without_its_dataset_is_one_line(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"path": str(copied / "gone.npz")}
    (copied / "config.json").write_text(json.dumps(config))
    record = json.loads((copied / "run.json").read_text())
    record["launches"][-1]["data"]["store"] = str(copied / "gone")  # its own converted copy is gone, too
    (copied / "run.json").write_text(json.dumps(record))
    said = error_of(
        capsys, "--steps", "0", "--policy", str(copied), "--horizon", "10", "--out", str(tmp_path / "out")
    )
    assert "gone.npz" in said and "was not found" in said


def test_diverged_training_names_chunk_length_and_seed(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = [*STUDY, *data, "--steps", "20", "--lr", "1e30", "--out", str(tmp_path)]
    assert main(flags) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 actions, seed 0" in said and "--lr" in said
