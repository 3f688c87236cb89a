"""`experiments/generate_data.py`: how much it makes, where, what it says, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from envs_mjx.datagen import simulate_episodes
from envs_mjx.datagen.dataset_spec import LANES, DatasetSpec
from envs_mjx.datagen.simulate_episodes import Simulator
from envs_mjx.experts import STYLES
from envs_mjx.manipulation import scenes
from envs_mjx.registry import parse
from experiments import generate_data, run
from experiments.generate_data import dataset_name, default_dataset_folder, episodes_of, main
from experiments.launch import dataset
from experiments.launch.settings import DataConfig
from mac.errors import UserError
from tests.helpers.fake_expert import instant  # noqa: F401

ROOT = Path(__file__).parents[2]
ROWS = simulate_episodes.EPISODE_ROWS


def test_rows_are_rounded_up_to_episodes() -> None:
    # A unit counts transitions, 1000 per episode, as in OGBench's names; a plain number rows, 1001.
    expected = {"1M": 1000, "100k": 100, "1m": 1000, "100M": 100_000, "1B": 10**6, "1.5M": 1500, "0.5k": 1}
    expected |= {
        "200_200": 200,
        "200200": 200,
        "200_201": 201,
        "1": 1,
        "1e6": 1000,
        "1001": 1,
        "1002": 2,
        "1000000": 1000,
    }
    assert {text: episodes_of(text, "--rows") for text in expected} == expected


def test_rows_are_counted_in_episodes_of_the_dataset() -> None:
    assert episodes_of("1M", "--rows", 2001) == 500 and episodes_of("4002", "--rows", 2001) == 2
    assert (
        default_dataset_folder(DatasetSpec("pointmaze-giant-stitch-v0", 3, 9)).name == "generated-603-seed0"
    )


@pytest.mark.parametrize("text", ["1Q", "", "M", "-5", "0", "0k", "1,000", "2.5", "ten", "1 M M", "inf", "٣"])
def test_other_numbers_of_rows_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--rows={text}: .*number"):
        episodes_of(text, "--rows")


def test_environment_and_style_make_a_dataset_name() -> None:
    assert dataset_name("puzzle-4x5", None) == "puzzle-4x5-play-v0"
    assert dataset_name("scene", "noisy") == "scene-noisy-v0"
    assert dataset_name("pointmaze-giant", None) == "pointmaze-giant-navigate-v0"
    assert dataset_name("antmaze-medium", "explore") == "antmaze-medium-explore-v0"
    assert dataset_name("cube-triple-noisy-v0", None) == "cube-triple-noisy-v0"
    assert dataset_name("cube-triple-noisy-singletask-v0", "noisy") == "cube-triple-noisy-v0"


@pytest.mark.usefixtures("instant")
def test_a_pair_of_files_is_found_by_run_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--env", "cube-single", "--rows", "2002", "--seed", "7"]) == 0
    data = DataConfig(rows=2002, seed=7)
    path = dataset.generated_file(data, "cube-single-play-v0")
    assert dataset.search(data, parse("cube-single-play-singletask-task2-v0")) == path
    assert dataset.count_rows(path) == 2002


@pytest.mark.usefixtures("instant")
def test_processes_share_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first part by a flag, the second as a step of SLURM; in the end it is that of one process."""
    words = ["--env", "cube-single", "--rows", "4004", "--shard-rows", "1001", "--out"]
    assert main([*words, str(tmp_path / "parts"), "--part", "1/2"]) == 0
    said = capsys.readouterr().out
    assert "part         1/2: 2 of the 4 pairs of files\n" in said and "waits for    part 2/2 of" in said
    assert "wrote        part 1/2, 2,002 + 2,002 rows" in said and not list(
        (tmp_path / "parts").glob("*.json")
    )
    step = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0}
    for name, value in step.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    assert main([*words, str(tmp_path / "parts")]) == 0
    said = capsys.readouterr().out
    assert "part         2/2: 2 of the 4 pairs of files\n" in said and "waits" not in said
    assert "wrote        4,004 + 4,004 rows" in said
    assert main([*words, str(tmp_path / "whole"), "--part", "1/1"]) == 0
    made, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("parts", "whole")
    )
    assert made == whole and len(whole) == 9


@pytest.mark.usefixtures("instant")
def test_refused_parts_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--env", "cube-single", "--rows", "2002", "--shard-rows", "1001", "--out", str(tmp_path)]
    assert main([*words, "--part", "3/3"]) == 0
    assert "fewer pairs of files than parts" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main([*words, "--part", "1/2"]) == 0
    before = sorted(tmp_path.rglob("*"))
    for other in (["--part", "1/3"], ["--part", "2/2", "--seed", "1"]):
        assert main([*words, *other]) == 2
        assert sorted(tmp_path.rglob("*")) == before
    assert main([*words, "--part", "2/2"]) == 0
    assert main([*words, "--part", "2/2", "--seed", "1"]) == 2
    assert len(list(tmp_path.iterdir())) == 5  # two pairs of files and the record
    assert capsys.readouterr().err.count("\n") == 3


@pytest.mark.usefixtures("instant")
def test_training_on_an_unfinished_dataset_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--env", "cube-single", "--rows", "2002", "--shard-rows", "1001", "--out", str(tmp_path)]
    noted = []
    for part in ("1/2", "2/2"):
        assert main([*words, "--part", part]) == 0
        assert run.main(["--data.path", str(tmp_path), "--dry-run"]) == 0
        noted.append("this dataset is unfinished" in capsys.readouterr().out)
    assert noted == [True, False]


@pytest.mark.usefixtures("instant")
def test_shards_are_found_by_run_py_when_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--env", "cube-single", "--rows", "3003", "--shard-rows", "1001"]) == 0
    path = default_dataset_folder(DatasetSpec("cube-single-play-v0", 3, 1))
    assert dataset.search(DataConfig(rows=3003), parse("cube-single-play-v0")) == path
    assert dataset.count_rows(path) == 3003
    (path / "cube-single-play-v0.json").unlink()
    assert dataset.search(DataConfig(rows=3003), parse("cube-single-play-v0")) is None


@pytest.mark.usefixtures("instant")
def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--env", "cube-single", "--rows", "12012", "--out", str(tmp_path / "d"), "--engine", "c"]
    for _ in range(2):  # the second time there is nothing to do
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert "12 for training, 1 for validation" in out and "3 of 4" not in out
        assert "39 of 52 targets" in out and "3 episodes that failed" in out
        assert "wrote        12,012 + 1,001 rows" in out


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    good = {"--env": "puzzle-3x3", "--rows": "1k", "--out": str(tmp_path / "d")}
    for change, message in (
        ({"--env": "puzzle-5x5"}, "no such environment; choose puzzle-"),
        ({"--env": "hopper"}, "no such environment"),
        ({"--env": "cube-single-play-v0", "--style": "noisy"}, "contradicts"),
        ({"--style": "lazy"}, "'lazy'"),
        ({"--style": "navigate"}, "datasets of puzzle-3x3 are play or noisy"),
        ({"--env": "pointmaze-giant", "--style": "explore"}, "are navigate or stitch"),
        ({"--env": "antmaze-medium"}, "needs a trained expert"),
        ({"--env": "antmaze-medium", "--expert": str(tmp_path)}, "no trained expert found"),
        ({"--rows": "1Q"}, "--rows=1Q"),
        ({"--shard-rows": "0"}, "--shard-rows=0"),
        ({"--seed": "-1"}, "seed=-1"),
        ({"--rows": "100B", "--shard-rows": "1"}, "too many files"),
        ({"--seed": "x"}, "--seed: 'x' is not a whole number"),
        ({"--threads": "0"}, "--threads=0"),
        ({"--lanes": "0"}, "--lanes=0"),
        ({"--noise": "-1"}, "--noise=-1.0: must be at least 0 and finite"),
        ({"--noise": "nan"}, "--noise=nan"),
        ({"--mix": "play=0.5,noisy=0.4"}, "--mix=play=0.5,noisy=0.4: shares must be positive and sum to 1"),
        ({"--mix": "navigate=1"}, "puzzle-3x3-play-v0 cannot have style 'navigate'"),
        ({"--engine": "bullet"}, "'bullet'"),
        ({"--out": str(tmp_path / "file" / "d")}, "choose another --out"),
        ({"--out": "/proc/d"}, "choose another --out"),
        ({"--colour": "red"}, "unknown flag --colour"),
        ({"--row": "5"}, "did you mean --rows?"),
    ):
        argv = [word for pair in (good | change).items() for word in pair]
        assert message in error_of(argv, capsys)
    assert error_of(["--env", "scene"], capsys) == "error: --rows is missing; see --help"
    assert error_of(["--seed", "1"], capsys) == "error: --env is missing; see --help"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_help_names_every_flag_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for flag in ("env", "rows", "style", "expert", "seed", "out", "shard-rows", "engine", "threads", "lanes"):
        assert f" --{flag} " in said
    for choices in (scenes.FAMILIES, STYLES, LANES):
        assert all(choice in said for choice in choices)


@pytest.mark.usefixtures("instant")
def test_a_folder_with_other_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--env", "cube-single", "--rows", "1k", "--out", str(tmp_path)]
    assert main(argv) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "seed=0, asked is seed=1" in error_of([*argv, "--seed", "1"], capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_in_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--env", "cube-single", "--rows", "1k", "--out", str(tmp_path)]

    def meanwhile(*args: object, **named: object) -> None:
        assert "another process" in error_of(argv, capsys)
        raise UserError("the other")

    monkeypatch.setattr(generate_data, "generate", meanwhile)
    assert "the other" in error_of(argv, capsys)


def test_too_many_lanes_for_the_memory_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(Simulator, "run", exhausted)
    argv = ["--env", "cube-single", "--rows", "1k", "--out", str(tmp_path), "--lanes", "9"]
    assert "fewer --lanes" in error_of(argv, capsys)


COMMAND = """
import sys, time
from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.simulate_episodes import Simulator
from experiments.generate_data import main
from tests.helpers import fake_expert

def slow(self, jobs, tick, stop):
    print("simulating", flush=True)
    time.sleep(0.3)
    return fake_expert.run(self, jobs, tick, stop)

Simulator.run = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_says_how_to_continue(number: signal.Signals, tmp_path: Path) -> None:
    argv = [
        "--env",
        "cube-single",
        "--rows",
        "130130",
        "--shard-rows",
        "65065",
        "--out",
        str(tmp_path / "a b"),
    ]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", COMMAND, *argv]
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=os.environ)

    process = start()
    assert process.stdout
    for _ in filter(lambda line: line == "simulating\n", process.stdout):
        if (tmp_path / "a b" / ".cube-single-play-v0.collect" / "journal.jsonl").exists():
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, (out, err)
    assert "Traceback" not in err and f"generate_data.py {' '.join(argv[:-1])} '{argv[-1]}'" in err
    out, err = start().communicate(timeout=120)
    assert "continuing" in out and "130,130 + 12,012 rows" in out, err
    meta = json.loads((tmp_path / "a b" / "cube-single-play-v0.json").read_text())
    assert meta["collected"]["targets"] == 4 * 142
    with np.load(tmp_path / "a b" / "cube-single-play-v0-001.npz") as file:
        assert file["terminals"].sum() == 65
