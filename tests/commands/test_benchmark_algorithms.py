"""The benchmark of all algorithms measures each as it would be trained, and only those that have settings."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from baselines import REGISTRY
from experiments import benchmark
from experiments.benchmarks import algorithms, envs
from experiments.benchmarks.algorithms import AlgoRow, Args
from experiments.benchmarks.harness import as_flags
from experiments.cli import arguments
from experiments.launch import hparams
from experiments.launch.settings import parse_command_line

REWARD, GOALS = Args.envs
ROW = AlgoRow(
    algo="iql", env=REWARD, preset="laptop", seeds=4, devices=2, batch=128, updates=7, rate=525.0,
    plain_rate=400.0, ratio=1.3125, gflop=0.242, rollout_share=0.0, compile_s=9.5, plain_compile_s=8.0,
    peak_mb=900.0, cores=1.98, plain_cores=1.9,
)  # fmt: skip


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def answer(monkeypatch: pytest.MonkeyPatch, fits: tuple[str, ...] = tuple(REGISTRY)) -> list[list[str]]:
    """Lets processes answer at once, with no rows but for algorithms `fits`; returns their commands."""
    real = subprocess.run
    asked: list[list[str]] = []

    def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
        if command[0] != sys.executable:  # the file's header asks git
            return real(command, **kwargs)
        asked.append(command[2:])
        algo, seeds = after(command, "--algos"), int(after(command, "--seeds"))
        env = GOALS if algo == "gciql" else REWARD
        rows = [vars(ROW) | {"algo": algo, "seeds": seeds, "env": env}] if algo in fits else []
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n" + json.dumps(rows))

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def measured(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def test_every_algorithm_and_number_of_seeds_gets_a_process(monkeypatch):
    asked = answer(monkeypatch)
    assert benchmark.main(["algos", "--preset", "paper", "--quick"]) == 0
    assert {tuple(c[:2]) for c in asked} == {("algos", "--one")}
    assert [(after(c, "--algos"), after(c, "--seeds")) for c in asked] == [
        (name, seeds) for name in REGISTRY for seeds in ("1", "4")
    ]
    assert all(after(c, "--preset") == "paper" and "--quick" in c and "--out" not in c for c in asked)


def test_file_and_tables_hold_the_rows(tmp_path: Path, monkeypatch, capsys):
    answer(monkeypatch)
    out = tmp_path / "new" / "algos.csv"
    assert benchmark.main(["algos", "--algos", "iql", "gciql", "--seeds", "2", "--out", str(out)]) == 0
    assert "# command: python experiments/benchmark.py algos --algos iql gciql" in out.read_text()
    rows = measured(out)
    assert [(row["algo"], row["env"], row["seeds"]) for row in rows] == [
        ("iql", REWARD, "2"), ("gciql", GOALS, "2"),
    ]  # fmt: skip
    assert list(rows[0]) == list(vars(ROW)) and float(rows[0]["ratio"]) == pytest.approx(1.312)
    shown = capsys.readouterr().out
    assert shown.index(REWARD) < shown.index("iql") < shown.index(GOALS) < shown.index("gciql")
    assert "525" in shown and "1.31" in shown


def test_an_algorithm_without_settings_is_left_out(monkeypatch, capsys):
    asked = answer(monkeypatch, fits=("iql",))
    assert benchmark.main(["algos", "--algos", "cql", "iql"]) == 0
    assert [after(c, "--algos") for c in asked] == ["cql", "iql", "iql"], "asked once is enough"
    assert benchmark.main(["algos", "--algos", "cql"]) == 2
    assert "nothing was measured" in capsys.readouterr().err


def test_a_failed_process_is_named(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert benchmark.main(["algos", "--algos", "iql", "--seeds", "3"]) == 2
    assert "error: iql, seeds 3: status 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--algos", "iqk"],
        ["--envs", "cube"],
        ["--seeds", "0"],
        ["--repeats", "0"],
        ["--rows", "10"],
        ["--seconds", "nan"],
        ["--preset", "big"],
        ["--widths", "8"],
    ],
)
def test_a_senseless_flag_is_one_line(flags: list[str], capsys):
    assert benchmark.main(["algos", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert flags[0] in error or flags[1] in error


@pytest.mark.parametrize(
    "args",
    [
        Args(),
        Args(algos=("iql", "fql"), seeds=(1, 16), preset="paper", seconds=0.5, quick=True),
        envs.Args(names=("hopper",), batches=(8,), engines=("c",)),
        benchmark.Args(envs=(3, 4), engine="c", quick=True),
    ],
)
def test_flags_say_all_that_a_process_must_know(args):
    assert arguments.read_flags(type(args), as_flags(args), "bench") == args


@pytest.mark.parametrize(("name", "env"), [("iql", REWARD), ("gciql", GOALS)])
def test_an_algorithm_is_measured_as_run_would_train_it(name: str, env: str):
    subject = algorithms.find_case(Args(algos=(name,), seeds=(1,), preset="laptop"))
    assert subject is not None and subject.env.name == env and subject.preset == "laptop"
    settings, _ = parse_command_line(["--algo", name, "--env", env, "--preset", "laptop", "--seeds", "1"])
    assert subject.hp == settings.hp
    assert subject.algo == REGISTRY[name].algorithm(settings.hp, subject.env, settings.steps)


def test_settings_that_say_only_a_part_do_not_count(monkeypatch, capsys):
    part = {"algo": "iql", "env": "*", "source": "a test", "hp": {"batch": 8}}
    monkeypatch.setattr(hparams, "load_rows", lambda path: [part])
    assert algorithms.find_case(Args(algos=("iql",), preset="laptop")) is None
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and all(note.startswith("note: iql is not measured: ") for note in notes)


@pytest.mark.slow
def test_algorithms_with_and_without_goals_are_measured(tmp_path: Path):
    out = tmp_path / "algos.csv"
    flags = ["--quick", "--algos", "iql", "sharsa", "--seeds", "2", "--preset", "laptop"]
    flags += ["--seconds", "0.2", "--repeats", "2", "--rows", "3000"]
    subprocess.run(
        [sys.executable, benchmark.__file__, "algos", *flags, "--out", str(out)],
        check=True,
        capture_output=True,
    )
    rows = measured(out)
    assert [(row["algo"], row["seeds"], row["env"]) for row in rows] == [
        ("iql", "2", REWARD), ("sharsa", "2", GOALS),
    ]  # fmt: skip
    for row in rows:
        figures = {name: value for name, value in row.items() if name not in ("algo", "env", "preset")}
        assert row["preset"] == "laptop" and all(float(value) > 0 for value in figures.values())
