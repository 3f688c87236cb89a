"""A run goes on with the data and the normaliser that it was trained with, or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs_mjx.registry import make
from experiments import run as program
from experiments.evaluate import main as evaluate
from experiments.launch import saved_run
from experiments.launch.settings import read_settings
from experiments.model_error import main as model_error
from experiments.run import main
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.train import TrainJob, TrainResult
from tests.helpers.command_line import arrays, content, error_of

NEEDED = ("config.json", "run.json", "normalizer.json", "metrics.jsonl", "eval.jsonl")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[TrainJob]:
    """Jobs that would have been trained."""
    jobs: list[TrainJob] = []

    def train(job: TrainJob, *_: Any, **__: Any) -> TrainResult:
        jobs.append(job)
        return TrainResult(0, interrupted=2)

    monkeypatch.setattr(program, "train", train)
    return jobs


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None) -> Path:
    """A copy of a finished run with its data, beside each other; the working folder."""
    shutil.copytree(finished.parent, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    change(Path("run/config.json"), lambda values: values["data"].update(path="small.npz", dir="."))
    move_launches(Path("run"), tmp_path / "w")
    return Path("run")


def change(path: Path, edit: Any) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def move_launches(run: Path, here: Path) -> None:
    """As if the run had been started in `here`, with the stores there."""

    def edit(values: dict[str, Any]) -> None:
        for launch in values["launches"]:
            launch["folder"] = str(here)
            launch["data"]["store"] = str(here / "stores" / Path(launch["data"]["store"]).name)

    change(run / "run.json", edit)
    change(meta_of(run), lambda values: values["meta"]["data"].pop("store"))


def meta_of(run: Path) -> Path:
    (path,) = (run / CHECKPOINTS).glob("*/meta.json")
    return path


def rewrite(path: str, seed: int) -> None:
    found = arrays(3 if "val" not in path else 1)
    found["observations"] = np.random.default_rng(seed).normal(size=found["observations"].shape)
    np.savez(path, **found)  # pyright: ignore[reportArgumentType]


RESUME = ["--out", "run", "--resume", "--steps", "20"]


# Data.


@pytest.mark.parametrize("what", ["content", "path", "validation gone", "validation changed"])
def test_resume_with_other_data_is_refused_and_nothing_changes(
    folder: Path, what: str, tried: list[TrainJob], capsys: pytest.CaptureFixture[str]
):
    flags, parts = [], ["run was trained on local file small.npz (rows ", "--data.path ", " has the former"]
    if what == "content":
        rewrite("small.npz", 5)
    elif what == "path":
        rewrite("other.npz", 5)
        flags, parts = ["--data.path", "other.npz"], [*parts, "other.npz is local file other.npz (rows "]
    elif what == "validation gone":
        os.unlink("small-val.npz")
        parts += ["the same training rows, but no validation rows"]
    else:
        rewrite("small-val.npz", 5)
        parts += ["the same training rows, but other validation rows"]
    before = {name: (folder / name).read_bytes() for name in NEEDED}
    line = error_of(capsys, [*RESUME, *flags])
    assert all(part in line for part in parts), line
    assert before == {name: (folder / name).read_bytes() for name in NEEDED} and not tried


@pytest.mark.parametrize("what", ["moved", "renamed", "touched", "packed"])
def test_a_run_goes_on_with_the_same_rows_wherever_they_are(folder: Path, what: str, tried: list[TrainJob]):
    flags = []
    if what == "touched":
        os.utime("small.npz", ns=(1, 1))
    elif what == "packed":
        np.savez_compressed("small.npz", **dict(np.load("small.npz")))
    else:
        stem = "small" if what == "moved" else "doll"
        os.mkdir("there")
        for end in (".npz", "-val.npz"):
            os.rename(f"small{end}", f"there/{stem}{end}")
        flags = ["--data.path", f"there/{stem}.npz"]
    normalizer = (folder / "normalizer.json").read_bytes()
    assert main([*RESUME, *flags]) == 130
    assert len(tried) == 1 and (folder / "normalizer.json").read_bytes() == normalizer


def test_the_former_data_are_where_the_refusal_says(
    folder: Path, tried: list[TrainJob], capsys: pytest.CaptureFixture[str]
):
    rewrite("small.npz", 5)
    line = error_of(capsys, RESUME)
    store = line.split("--data.path ")[1].split(" ")[0]
    assert main([*RESUME, "--data.path", store]) == 130 and len(tried) == 1


def test_a_run_without_a_checkpoint_may_begin_with_other_data(folder: Path, tried: list[TrainJob]):
    shutil.rmtree(folder / CHECKPOINTS)
    before = saved_run.trained_on(folder).content
    rewrite("small.npz", 5)
    assert main(RESUME) == 130
    now = saved_run.trained_on(folder).content
    assert now is not None and now != before


def test_measuring_on_other_data_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--steps", "0", "--trajectories", "4", "--horizon", "10", "--policy", "run", "--out", "o"]
    rewrite("small.npz", 5)
    assert model_error(flags) == 0  # by the run's own copy
    shutil.rmtree("stores")
    capsys.readouterr()
    assert model_error(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "was trained on local file small.npz" in line and "put the former back" in line


def test_measuring_needs_the_store_alone(folder: Path):
    for name in ("small.npz", "small-val.npz"):
        os.unlink(name)
    store = saved_run.open_dataset(
        folder,
        read_settings(folder),
        make("cube-single-play-singletask-task2-v0").spec,
    )
    assert store.content == saved_run.trained_on(folder).content


def test_a_run_goes_on_from_another_folder(
    folder: Path, tried: list[TrainJob], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    here = Path.cwd()
    os.mkdir("sub")
    monkeypatch.chdir("sub")
    flags = ["--out", "../run", "--resume", "--steps", "20"]
    assert main(flags) == 130
    assert tried[0].config["data"]["path"] == str(here / "small.npz") and os.listdir() == []
    os.rename(here / "small.npz", here / "gone.npz")
    change(here / "run" / "config.json", lambda values: values["data"].update(path="small.npz"))
    line = error_of(capsys, flags)
    assert "small.npz) is needed and was not found" in line and str(here) in line and "--data.path" in line


def test_of_two_datasets_of_a_name_the_runs_own_is_taken(
    folder: Path, tried: list[TrainJob], monkeypatch: pytest.MonkeyPatch
):
    here = Path.cwd()
    os.mkdir("sub")
    monkeypatch.chdir("sub")
    rewrite("small.npz", 5)
    assert main(["--out", "../run", "--resume", "--steps", "20"]) == 130
    assert tried[0].config["data"]["path"] == str(here / "small.npz")


def test_a_launch_records_what_it_trains_on(folder: Path):
    (launch,) = json.loads((folder / "run.json").read_text())["launches"]
    kept = json.loads(meta_of(folder).read_text())["meta"]
    assert launch["data"]["content"] == kept["data"]["content"] and len(kept["data"]["content"]) == 2
    assert kept["normalizer"] == json.loads((folder / "normalizer.json").read_text())


# The normaliser.

EDITS = {
    "a number": (lambda v: v["center"].__setitem__(2, -1.0), "is not the normaliser that the checkpoint"),
    "nan": (lambda v: v["center"].__setitem__(2, float("nan")), "center[2] is nan"),
    "zero": (lambda v: v["half_range"].__setitem__(1, 0.0), "is not the normaliser that the checkpoint"),
    "negative": (lambda v: v["half_range"].__setitem__(1, -3.0), "half_range[1] is -3.0"),
    "short": (lambda v: v["center"].pop(), "expected 28 numbers"),
    "text": (lambda v: v.update(center="x"), "holds no normaliser"),
    "missing": (lambda v: v.pop("center"), "holds no normaliser"),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_normaliser_is_refused(
    folder: Path, what: str, tried: list[TrainJob], capsys: pytest.CaptureFixture[str]
):
    edit, said = EDITS[what]
    change(folder / "normalizer.json", edit)
    before = content(folder)
    lines = [error_of(capsys, RESUME)]
    assert evaluate(["run"]) == 2
    lines += capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and content(folder) == before
    for line in lines:
        assert said in line and "normalizer.json" in line and "delete it: the checkpoint has a copy" in line


def test_a_missing_normaliser_is_that_of_the_checkpoint(folder: Path, tried: list[TrainJob]):
    want = (folder / "normalizer.json").read_bytes()
    (folder / "normalizer.json").unlink()
    found = saved_run.open_run(folder).normalizer
    assert saved_run.plain_normalizer(found) == json.loads(want) and not (folder / "normalizer.json").exists()
    assert main(RESUME) == 130
    assert (folder / "normalizer.json").read_bytes() == want


def of_before(run: Path) -> None:
    """As an earlier version left it."""
    for key in ("data", "normalizer"):
        change(meta_of(run), lambda values, key=key: values["meta"].pop(key))

    def edit(values: dict[str, Any]) -> None:
        for key in ("content", "store"):
            del values["launches"][-1]["data"][key]

    change(run / "run.json", edit)


def test_a_run_of_an_earlier_version_keeps_its_normaliser(
    folder: Path, tried: list[TrainJob], capsys: pytest.CaptureFixture[str]
):
    of_before(folder)
    change(folder / "normalizer.json", EDITS["a number"][0])
    assert main(RESUME) == 130
    assert "note: run: saved by an earlier version" in capsys.readouterr().out
    assert tried[0].normalizer.center[2] == -1.0
    (folder / "normalizer.json").unlink()
    line = error_of(capsys, RESUME)
    assert "normalizer.json is missing" in line and "restore it" in line


@pytest.mark.usefixtures("quiet")
def test_a_sweep_goes_on_with_its_own_data_only(
    tmp_path: Path, data: list[str], tried: list[TrainJob], capsys: pytest.CaptureFixture[str], finished: Path
):
    """Its checkpoints are those of a single run here, in the folder of each configuration."""
    shutil.copytree(finished.parent, tmp_path / "w")
    run, flags = tmp_path / "w" / "run", ["--sweep", "hp.lr=0.1,0.2"]
    config = json.loads((run / "config.json").read_text())
    for name in ("lr=0.1", "lr=0.2"):
        shutil.copytree(run / CHECKPOINTS, tmp_path / "s" / name / CHECKPOINTS)
        shutil.copy(run / "normalizer.json", tmp_path / "s" / name)
    (tmp_path / "s" / "config.json").write_text(json.dumps(config | {"sweep": flags[1:]}))
    np.savez(tmp_path / "other.npz", **arrays(2))  # pyright: ignore[reportArgumentType]
    resume = ["--out", str(tmp_path / "s"), "--resume", "--steps", "20"]
    others = ["--data.path", str(tmp_path / "other.npz"), "--data.dir", str(tmp_path)]
    line = error_of(capsys, [*resume, *others])
    assert "lr=0.1 was trained on local file small.npz" in line and not tried
    assert main(resume) == 130 and len(tried) == 1
