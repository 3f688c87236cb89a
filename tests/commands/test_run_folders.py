"""Run folders: their names, who makes and who deletes them, and damage to the files that describe a run."""

import csv
import json
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import evaluate, report
from experiments import run as program
from experiments.launch.settings import settings_from_dict
from experiments.run import main, occupied
from mac.config import Config
from mac.errors import UserError
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_metadata import launches
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.train import TrainResult
from tests.helpers.command_line import SIZES, content, error_of

HOPPER = "mujoco/hopper/medium-v0"


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quiet: None) -> list[Path]:
    """Launches, from an empty folder, that leave settings and no more; their folders in turn."""
    folders: list[Path] = []

    def leave(launch: Any, asked: Any) -> TrainResult:
        folders.append(launch.folder)
        (launch.folder / "config.json").write_text(json.dumps(launch.settings.to_dict()))
        return TrainResult(4, interrupted=2)

    monkeypatch.setattr(program, "train_here", leave)
    monkeypatch.chdir(tmp_path)
    return folders


# Names.


def test_a_name_with_slashes_is_one_folder_that_resume_finds(
    untrained: list[Path],
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    flags = ["--algo", "iql", "--preset", "laptop", "--hp.cooldown", "0"]
    assert main([*flags, "--env", HOPPER, "--data.source", "download"]) == 130
    (folder,) = untrained
    assert folder.parent == Path("runs") and folder.name.startswith("iql_mujoco-hopper-medium-v0_laptop_")
    assert main(["--resume", "--data.source", "download"]) == 130
    assert untrained[1] == folder
    (folder / EVAL).write_text("{}\n")
    assert list(report.runs_in(Path("runs"))) == [folder]


def test_launches_within_a_second_have_folders_of_their_own(
    untrained: list[Path], data: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    for _ in range(3):
        assert main([*SIZES, *data]) == 130
    assert len({path.name for path in untrained}) == 3
    assert [path.name.rpartition("000000")[2] for path in untrained] == ["", "-2", "-3"]
    assert os.listdir("runs") and {path.parent for path in untrained} == {Path("runs")}


def test_folders_are_made_exclusively(tmp_path: Path):
    """By six launches that chose the same name at the same time."""
    together = threading.Barrier(6)

    def take(_: int) -> str:
        together.wait(60)
        with occupied(tmp_path / "runs" / "a", anew=True) as mine:
            (mine / "config.json").touch()
            return mine.name

    with ThreadPoolExecutor(6) as pool:
        names = list(pool.map(take, range(6)))
    assert sorted(names) == ["a", "a-2", "a-3", "a-4", "a-5", "a-6"]


def test_the_newest_run_is_found_among_hidden_folders_and_files(
    untrained: list[Path], data: list[str], tmp_path: Path
):
    assert main([*SIZES, *data]) == 130
    hidden = tmp_path / "runs" / "._copy"
    hidden.mkdir()
    (hidden / "config.json").write_text("a Mac's")
    (tmp_path / "runs" / "notes.txt").touch()
    assert main(["--resume"]) == 130
    assert untrained[0] == untrained[1]


# Folders that stay empty.


def test_a_folder_that_stays_empty_is_deleted_with_its_parents(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), occupied(tmp_path / "a" / "b", anew=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "own").mkdir()
    with pytest.raises(UserError), occupied(tmp_path / "own", anew=False):
        raise UserError("no data")
    assert (tmp_path / "own").exists(), "it was the user's"
    with pytest.raises(UserError), occupied(tmp_path / "own" / "run", anew=True) as folder:
        (folder / "config.json").touch()
        raise UserError("the disk is full")
    assert (tmp_path / "own" / "run" / "config.json").exists()


def test_a_folder_that_another_process_holds_is_left_to_it(tmp_path: Path):
    (tmp_path / "run").mkdir()
    held, second = lock_folder(tmp_path / "run"), occupied(tmp_path / "run", anew=False)
    with held, pytest.raises(UserError, match="another process"), second:
        pass
    assert (tmp_path / "run").exists()


@pytest.mark.slow
def test_leftovers_of_a_killed_process_are_deleted_at_resume(copied: Path, quiet: None):
    left = [
        copied / ".learning_curve.png.99999999.mac-unfinished",
        copied / CHECKPOINTS / "000000010" / ".meta.json.99999999.mac-unfinished",
    ]
    for path in left:
        path.touch()
    assert main(["--out", str(copied), "--resume", "--steps", "15"]) == 0
    assert not any(path.exists() for path in left)


# How to go on.


def test_the_command_that_continues_is_quoted(
    untrained: list[Path],
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("sys.argv", ["/some where/experiments/run.py"])
    assert main([*SIZES, *data, "--out", "my runs/a"]) == 130
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words == ["python", "/some where/experiments/run.py", "--out", "my runs/a", "--resume"]


@pytest.mark.slow
def test_a_resume_without_a_checkpoint_says_that_it_begins_again(
    copied: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(copied / CHECKPOINTS)
    assert main(["--out", str(copied), "--resume"]) == 0
    assert "the run left no checkpoint, so it begins again" in capsys.readouterr().out


# Damaged descriptions.

NO_CONFIG = {
    "{": "is not JSON",
    "{}": "algo is missing",
    "[]": "a list where a table was expected",
    '{"algo": "iql"}': "env is missing",
    '{"algo": ["iql"], "env": "x"}': "algo is a list",
    "[" * 100_000: "is not JSON",
}


@pytest.mark.parametrize("text", NO_CONFIG, ids=range(len(NO_CONFIG)))
def test_a_damaged_configuration_is_one_line_in_every_program(
    text: str, copied: Path, capsys: pytest.CaptureFixture[str]
):
    (copied / "config.json").write_text(text)
    calls: list[Callable[[], int]] = [
        lambda: main(["--out", str(copied), "--resume"]),
        lambda: report.main([str(copied)]),
        lambda: evaluate.main([str(copied)]),
    ]
    for call in calls:
        assert call() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "config.json" in line and NO_CONFIG[text] in line and "restore it" in line


@pytest.mark.slow
def test_a_damaged_record_is_no_reason_not_to_train(
    copied: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    (copied / "run.json").write_text('{"launches": 3}')
    assert evaluate.main([str(copied)]) == 2
    assert "run.json is damaged (launches is a number); restore it or delete it" in capsys.readouterr().err
    assert main(["--out", str(copied), "--resume", "--steps", "15"]) == 0
    assert "It is called run.json.damaged now" in capsys.readouterr().out
    assert [launch["resumed_from"] for launch in launches(copied)] == [10]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda meta: [], "meta is a list"),
        (lambda meta: {**meta, "evaluated": None}, "evaluated is null"),
        (lambda meta: {"config": meta["config"]}, "evaluated is missing"),
        (lambda meta: {**meta, "log": None}, "log is null"),
        (lambda meta: {**meta, "log": {"eval.jsonl": 1.5}}, "must hold whole numbers"),
        (lambda meta: {**meta, "checksums": [3]}, "must hold whole numbers"),
        (lambda meta: {**meta, "config": 3}, "config: a number"),
    ],
)
def test_a_damaged_mark_in_a_checkpoint_is_one_line(
    change: Callable[[Any], Any], said: str, copied: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    path = copied / CHECKPOINTS / "000000010" / "meta.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"meta": change(header["meta"])}))
    line = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])
    assert f"{path.parent}: damaged checkpoint (" in line and said in line
    assert line.endswith("delete this folder to start again")


@pytest.mark.parametrize("kept", [METRICS, EVAL, CHECKPOINTS])
def test_results_without_their_settings_are_left_as_they_are(
    kept: str, copied: Path, capsys: pytest.CaptureFixture[str]
):
    for path in copied.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copied / ".screenrc.1999").touch()  # someone else's
    before = content(copied)
    line = error_of(capsys, [*SIZES, "--steps", "20", "--auto-resume", "--out", str(copied)])
    assert f"{copied} holds {kept} of a run without its config.json: restore that file" in line
    assert content(copied) == before


@pytest.mark.slow
def test_rows_that_were_edited_are_found_at_resume(
    copied: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    text = (copied / EVAL).read_bytes()
    (copied / EVAL).write_bytes(text.replace(b'"length": 200.0', b'"length": 100.0', 1))
    before = content(copied)
    line = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])
    assert f"{copied / EVAL} was edited after its checkpoint" in line
    (copied / EVAL).write_bytes(text)
    assert before.keys() >= content(copied).keys() - {"run.json"}
    assert main(["--out", str(copied), "--resume", "--steps", "20"]) == 0


# The report.


def test_a_run_that_is_named_twice_is_one_line_of_the_report(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(copied)
    out = tmp_path / "table.csv"
    assert report.main(["run", str(tmp_path), f"{copied}/", "link", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("mac ") == 1
    assert len([line for line in out.read_text().splitlines() if not line.startswith("#")]) == 2


def test_runs_of_one_setting_are_named_by_their_data_or_folder():
    parts = ("200,200 rows", "9 rows", "9 rows, styles play=1")
    made = [f"generated (mac-jax, seed 0, {words})" for words in parts]
    run = settings_from_dict({"algo": "mac", "env": "cube-single-play-singletask-task2-v0"}, Config, "here")
    runs = {Path(name): run for name in ("a/x", "a/y", "a/z")}
    first, *others = by_data = ["mac 200,200 rows", "mac 9 rows", "mac 9 rows styles play=1"]
    assert report.names_of(runs, made) == by_data
    assert report.names_of(runs, made[:1] * 3) == report.names_of(runs) == ["mac (x)", "mac (y)", "mac (z)"]
    again = runs | {Path("b/x"): run}
    assert report.names_of(again, [*made, made[0]]) == [f"{first} (a/x)", *others, f"{first} (b/x)"]


@pytest.fixture
def other_seeds(copied: Path, tmp_path: Path) -> Path:
    """A run like `copied`, whose seeds 0 and 1 are called 2 and 3 and have all diagnostics tenfold."""
    other = shutil.copytree(copied, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 2}))
    for name in (EVAL, METRICS):
        rows = [json.loads(line) for line in (other / name).read_text().splitlines()]
        for row in rows:
            row["seed"] += 2
            row |= {key: 10 * value for key, value in row.items() if key.startswith("diagnostics/")}
        (other / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return other


def test_report_pools_runs_that_differ_in_their_seeds(
    copied: Path, other_seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "table.csv"
    words = [str(copied), str(other_seeds), "--out", str(out)]
    assert report.main(words) == 0
    assert [row["seeds"] for row in csv_rows(out)] == ["2", "2"]
    assert report.main([*words, "--pool", "--diagnostics"]) == 0
    success, *found = csv_rows(out)
    assert (success["measure"], success["seeds"]) == ("success", "4")
    last = [row for row in read_rows(copied / METRICS) if "diagnostics/drift_10" in row][-2:]
    values = np.asarray([row["diagnostics/drift_10"] for row in last])
    (drift,) = [row for row in found if row["measure"] == "diagnostics/drift_10"]
    assert float(drift["value"]) == pytest.approx(5.5 * values.mean(), rel=1e-3)
    assert drift["seeds"] == "4" and float(drift["low"]) < float(drift["value"]) < float(drift["high"])
    shown = f"{5.5 * values.mean():.3g} ({values.min():.3g} to {10 * values.max():.3g})"
    assert shown in capsys.readouterr().out


def test_pooled_runs_are_compared_after_the_same_updates(
    copied: Path, other_seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One went on to update 20; the other's diagnostics are of one seed."""
    for name, factor in ((EVAL, 1.0), (METRICS, 100.0)):
        rows = [json.loads(line) for line in (copied / name).read_text().splitlines()]
        later = [row | {"step": row["step"] + 10} for row in rows]
        later = [
            {k: v * factor if k.startswith("diagnostics/") else v for k, v in row.items()} for row in later
        ]
        (copied / name).write_text("".join(json.dumps(row) + "\n" for row in rows + later))
    lines = (other_seeds / METRICS).read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["seed"] == 2]
    (other_seeds / METRICS).write_text("\n".join(kept) + "\n")
    out = tmp_path / "table.csv"
    assert report.main([str(copied), str(other_seeds), "--pool", "--diagnostics", "--out", str(out)]) == 0
    (drift,) = [row for row in csv_rows(out) if row["measure"] == "diagnostics/drift_10"]
    first = [
        row for row in read_rows(copied / METRICS) if row["step"] == 10 and "diagnostics/drift_10" in row
    ]
    a, b = (row["diagnostics/drift_10"] for row in first)
    assert float(drift["value"]) == pytest.approx((a + b + 10 * a) / 3, rel=1e-3)
    assert (drift["seeds"], drift["updates"]) == ("3", "10")
    said = capsys.readouterr().out
    assert f"compared after 10 updates, where all its runs were evaluated; {copied} was after 20" in said
    assert "not all of its 4 seeds have" in said and "drift_10" in said


@pytest.mark.parametrize("change", ["segment", "data"])
def test_runs_are_pooled_by_their_data_and_not_by_their_speed(
    change: str, copied: Path, other_seeds: Path, capsys: pytest.CaptureFixture[str]
):
    name, old, new = {
        "segment": ("config.json", '"segment": ', '"segment": 1'),
        "data": ("run.json", '"content": [', '"content": ["other",'),
    }[change]
    text = (other_seeds / name).read_text()
    assert old in text
    (other_seeds / name).write_text(text.replace(old, new))
    assert report.main([str(copied), str(other_seeds), "--pool"]) == 0
    assert capsys.readouterr().out.count("mac ") == (1 if change == "segment" else 2)


def test_report_pools_no_seed_twice(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = shutil.copytree(copied, tmp_path / "other")
    assert report.main([str(copied), str(other), "--pool"]) == 2
    assert capsys.readouterr().err == f"error: --pool: {copied} and {other} both have seed 0; leave one out\n"


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, without its head."""
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def test_a_report_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert report.main([]) == 2
    assert capsys.readouterr().err.startswith("error: RUN is missing; name folders of runs")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": [1]}, "task is a list"),
        ({"step": "abc"}, "step is a text"),
        ({"step": None}, "step is a number"),
        ({"success": None}, "success is no number"),
        ({"success": "1"}, "success is no number"),
        ({"episodes": 1.5}, "episodes is a number"),
        ({"data": 3}, "data is a number"),
        ({"measure": ["success"]}, "measure is a list"),
        ({"predicted_return": "x"}, "predicted_return is a text"),
    ],
)
def test_rows_of_wrong_types_are_named_by_their_line(
    change: dict[str, Any], said: str, copied: Path, capsys: pytest.CaptureFixture[str]
):
    first, second = (json.loads(line) for line in (copied / EVAL).read_text().splitlines())
    (copied / EVAL).write_text(f"{json.dumps(first)}\n{json.dumps(second | change)}\n")
    assert report.main([str(copied)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{copied / EVAL}, line 2: {said}" in line


@pytest.mark.parametrize("row", ['{"policy": "random"}', '{"policy": "random", "rows": [3]}'])
def test_a_damaged_line_of_evaluations_is_named(row: str, copied: Path, capsys: pytest.CaptureFixture[str]):
    (copied / evaluate.EVALUATIONS).write_text(row + "\n")
    assert report.main([str(copied)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(copied / evaluate.EVALUATIONS) in line


# Evaluation again.


def test_a_folder_of_runs_is_no_run_and_its_runs_are_named(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert evaluate.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no run" in line and line.endswith(f"name one of its runs: {copied}")
    shutil.copytree(copied, copied / "lr=1")
    shutil.rmtree(copied / CHECKPOINTS)
    assert evaluate.main([str(copied)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {copied} is a sweep: name one of its runs: {copied / 'lr=1'}"


def test_a_row_that_cannot_be_written_is_found_before_playing(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """As on a disk that may only be read: a folder has the file's name."""
    (copied / evaluate.EVALUATIONS).mkdir()
    monkeypatch.setattr(evaluate, "play_episodes", lambda *_: pytest.fail("it was played"))
    assert evaluate.main([str(copied)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Is a directory" in line and line.endswith("choose another file with --out")


def test_a_finished_run_loses_what_a_killed_process_left(copied: Path, quiet: None):
    left = copied / ".learning_curve.png.99999999.mac-unfinished"
    left.touch()
    assert main(["--out", str(copied), "--resume"]) == 0
    assert not left.exists()
