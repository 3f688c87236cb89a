"""The benchmark of planning measures each algorithm as it would be run, and only those that have settings."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import benchmark
from experiments.benchmarks import plans
from experiments.benchmarks.harness import as_flags
from experiments.benchmarks.plans import Args, PlanRow
from experiments.cli import arguments
from experiments.launch.settings import parse_command_line

HOPPER = "hopper-medium-replay-v2"
ROW = PlanRow(
    algo="tt", env=HOPPER, preset="laptop", batch=16, actions=1, plan_ms=123.4, step_ms=123.4, each_ms=7.75,
    physics_ms=2.5, share=0.98, compile_s=9.0, cores=1.9,
)  # fmt: skip


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def answer(monkeypatch: pytest.MonkeyPatch, fits: tuple[str, ...] = ("tt",)) -> list[list[str]]:
    """Lets processes answer at once, with no rows but for algorithms `fits`; returns their commands."""
    real = subprocess.run
    asked: list[list[str]] = []

    def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
        if command[0] != sys.executable:  # the file's header asks git
            return real(command, **kwargs)
        asked.append(command[2:])
        algo, preset = after(command, "--algos"), after(command, "--presets")
        rows = [vars(ROW) | {"algo": algo, "preset": preset}] if algo in fits else []
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n" + json.dumps(rows))

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def measured(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def test_file_and_table_hold_a_row_per_algorithm_and_preset(tmp_path: Path, monkeypatch, capsys):
    asked = answer(monkeypatch, fits=("tt", "iql"))
    out = tmp_path / "new" / "plans.csv"
    assert benchmark.main(["plans", "--algos", "tt", "iql", "cql", "--quick", "--out", str(out)]) == 0
    assert {tuple(c[:2]) for c in asked} == {("plans", "--one")}
    assert [(after(c, "--algos"), after(c, "--presets")) for c in asked] == [
        (name, preset) for name in ("tt", "iql", "cql") for preset in ("paper", "laptop")
    ]
    assert all("--quick" in c and "--out" not in c for c in asked)
    assert "# command: python experiments/benchmark.py plans --algos tt iql cql" in out.read_text()
    rows = measured(out)
    assert [row["algo"] for row in rows] == ["tt", "tt", "iql", "iql"]
    assert list(rows[0]) == list(vars(ROW)) and float(rows[0]["each_ms"]) == 7.75
    shown = capsys.readouterr().out
    assert "123" in shown and "98%" in shown


def test_nothing_measured_is_an_error(monkeypatch, capsys):
    answer(monkeypatch, fits=())
    assert benchmark.main(["plans", "--algos", "tt"]) == 2
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--algos", "tttt"],
        ["--envs", "cube"],
        ["--batches", "0"],
        ["--repeats", "0"],
        ["--longest", "nan"],
        ["--presets", "big"],
        ["--widths", "8"],
    ],
)
def test_a_senseless_flag_is_one_line(flags: list[str], capsys):
    assert benchmark.main(["plans", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert flags[0] in error or flags[1] in error


def test_flags_say_all_that_a_process_must_know():
    args = Args(algos=("tt",), presets=("laptop",), batches=(1, 2), longest=5.0, quick=True)
    assert arguments.read_flags(Args, as_flags(args), "bench") == args


def test_a_planner_is_measured_as_run_would_train_it():
    algo, env = plans.planner_of(Args(algos=("tt",), presets=("laptop",)), HOPPER)
    settings, _ = parse_command_line(["--algo", "tt", "--env", HOPPER, "--preset", "laptop"])
    assert algo.cfg == settings.hp and algo.env == env.spec  # pyright: ignore[reportAttributeAccessIssue]


def test_batches_that_would_take_too_long_are_left_out(monkeypatch, capsys):
    def row(args: Args, algo: object, env: object, batch: int) -> PlanRow:
        return PlanRow(**vars(ROW) | {"batch": batch, "plan_ms": 100.0 * batch})

    monkeypatch.setattr(plans, "measure_batch", row)
    algo, env = plans.planner_of(Args(algos=("tt",), presets=("laptop",)), HOPPER)
    rows = plans.measure_batches(Args(algos=("tt",), batches=(60, 1, 16), longest=2.0), algo, env)
    assert [row.batch for row in rows] == [1, 16]
    assert "note: tt, batch 60: its plan would take too long" in capsys.readouterr().err


def test_an_algorithm_without_settings_is_noted(capsys):
    assert plans.measure(Args(algos=("sharsa",), envs=(HOPPER,), presets=("laptop",))) == []
    assert "note: sharsa is not measured: " in capsys.readouterr().err


@pytest.mark.slow
def test_planning_is_measured(tmp_path: Path):
    out = tmp_path / "plans.csv"
    flags = ["--quick", "--algos", "tt", "--presets", "laptop", "--batches", "2", "1", "--repeats", "2"]
    subprocess.run(
        [sys.executable, benchmark.__file__, "plans", *flags, "--out", str(out)],
        check=True,
        capture_output=True,
    )
    rows = measured(out)
    assert [(row["algo"], row["batch"]) for row in rows] == [("tt", "1"), ("tt", "2")]
    for row in rows:
        assert row["env"] == HOPPER and row["actions"] == "1"
        assert all(float(row[name]) > 0 for name in ("plan_ms", "step_ms", "each_ms", "physics_ms", "share"))
