"""The command that runs published tables: lists, cells, budgets, failures, and continuing."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.reproduce import main
from experiments.reproduction import cells, cost, runner
from experiments.reproduction.cells import Plan, cells_of, progress
from experiments.reproduction.cost import Cost, Estimator
from experiments.reproduction.model_errors import study_cell
from experiments.reproduction.runner import Budget, read_budget
from experiments.reproduction.suites import load_suite
from mac.errors import UserError
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL
from tests.helpers.command_line import SIZES, write_data
from tests.helpers.fake_runs import SUITE, TASKS, Fake

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, finished, monkeypatch)


def test_cells_run_once_and_are_skipped_when_done(fake: Fake, capsys: pytest.CaptureFixture[str]):
    assert fake.run() == 0
    assert fake.calls == [[1, False], [2, False], [3, False]]
    said = capsys.readouterr().out
    assert "cells: 3 done, 1 not available" in said and "continue" not in said
    assert "not_here on cube-single-play-singletask-task2-v0: this version does not have" in said
    assert fake.run() == 0
    assert len(fake.calls) == 3
    assert fake.states() == ["done"] * 3


def test_failed_cell_is_reported_and_the_rest_goes_on(fake: Fake, capsys: pytest.CaptureFixture[str]):
    fake.does(task1="fail")
    assert fake.run() == 1
    said = capsys.readouterr().out
    assert "cells: 2 done, 1 failed, 1 not available" in said
    assert said.count("--hp.lr=0: must be positive") == 2  # when it fails, and at the end
    assert fake.states() == ["failed", "done", "done"]
    fake.does()
    assert fake.run() == 0
    assert fake.states() == ["done"] * 3
    assert not list((fake.out / cells.FAILURES).iterdir())


def test_cells_that_failed_before_come_last(fake: Fake):
    fake.does(task1="fail", task2="fail", task3="fail")
    assert fake.run("--env", TASKS[0]) == 1
    fake.does()
    assert fake.run() == 0
    assert [task for task, _ in fake.calls] == [1, 2, 3, 1]


def test_budget_stops_the_running_cell_and_begins_no_other(fake: Fake, capsys: pytest.CaptureFixture[str]):
    fake.does(task1="hang")
    began = time.monotonic()
    assert fake.run("--budget", "5s") == 0
    assert time.monotonic() - began < 20
    said = capsys.readouterr().out
    assert "1 stopped by the budget, 2 not begun" in said
    assert f"continue with: python experiments/reproduce.py {fake.suite}" in said
    assert fake.states() == ["cut", "missing", "missing"]
    fake.does()
    assert fake.run() == 0
    assert fake.calls == [[1, False], [1, True], [2, False], [3, False]]


def test_process_that_does_not_stop_is_killed_in_time(fake: Fake):
    fake.does(task1="hang for ever")
    began = time.monotonic()
    assert fake.run("--budget", "4s") == 0
    assert time.monotonic() - began < 20
    assert fake.states()[0] == "cut"


def test_cell_of_another_process_is_left_alone(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(runner, "PATIENCE", 0.0)
    assert fake.run("--env", TASKS[1]) == 0
    (fake.out / f"mac_{TASKS[1]}_laptop_s2" / EVAL).unlink()
    with lock_folder(fake.out / f"mac_{TASKS[1]}_laptop_s2"):
        assert fake.states()[1] == "running"
        assert fake.run() == 0
    assert [task for task, _ in fake.calls] == [2, 1, 3]
    assert "1 in another process" in capsys.readouterr().out


def test_interrupt_stops_the_cell_and_says_how_to_continue(fake: Fake, tmp_path: Path):
    """SIGTERM ends the command after its child has stopped."""
    fake.does(task1="hang")
    code = (
        "import sys; from experiments.reproduction import runner; from experiments.reproduce import main; "
        f"runner.program = lambda: [sys.executable, {str(tmp_path / 'fake.py')!r}]; "
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, str(fake.suite), "--out", str(fake.out), "--seeds", "2"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    config = fake.out / f"mac_{TASKS[0]}_laptop_s2" / "config.json"
    while not (config.exists() and TASKS[0] in config.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err
    assert f"continue with: python experiments/reproduce.py {fake.suite}" in err
    assert fake.states()[0] == "cut"


def test_folder_with_another_run_is_no_cell(fake: Fake, finished: Path):
    fake.out.mkdir()
    os.symlink(finished, fake.out / f"mac_{TASKS[0]}_laptop_s2")  # of task 2
    (cell, *_) = cells_of(load_suite(str(fake.suite)).entries, fake.plan)
    state = progress(cell, fake.plan)
    assert state.status == "unusable" and "holds another run (mac, cube-single" in state.reason


def test_other_flags_make_another_cell():
    plan = Plan(Path("out"), "paper", 4, Path("data"))
    plain = plan.cell(TASKS[0], "mac")
    other = plan._replace(flags=("--hp.lr", "1e-3")).cell(TASKS[0], "mac")
    assert plain.name == f"mac_{TASKS[0]}_paper_s4"
    assert other.name.startswith(plain.name) and other.name != plain.name
    assert cells.cell_settings(other, Path("data")).hp.lr == 1e-3


def test_table_1_and_table_12_share_their_cells():
    plan = Plan(Path("out"), "paper", 4, Path("data"))
    first, second = (set(cells_of(load_suite(name).entries, plan)) for name in ("table1", "table12"))
    assert first == second and len(first) == 60


def test_every_cell_of_this_version_has_settings_of_the_paper():
    """Each is available, but for algorithms that this version may lack."""
    plan = Plan(Path("out"), "paper", 4, Path("data"))
    for name in ("table1", "table2_default", "table3", "table15"):
        for cell in cells_of(load_suite(name).entries, plan):
            state = progress(cell, plan)
            assert state.status == "missing" or "does not have the algorithm" in state.reason, (cell, state)


def test_list_says_what_is_done_and_what_the_rest_costs(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert fake.run("--env", TASKS[0]) == 0
    fake.does(task2="fail")
    assert fake.run("--env", TASKS[1]) == 1
    capsys.readouterr()
    assert fake.run("--list") == 0
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if " mac " in line}
    assert lines[TASKS[0]].endswith("done")
    assert "failed, about" in lines[TASKS[1]] and lines[TASKS[1]].endswith("must be positive")
    assert "missing, about" in lines[TASKS[2]]
    assert lines[TASKS[2]].endswith("*")  # as long as the finished cell took
    assert "4 cells: 1 done, 1 missing, 1 failed, 1 not available" in said
    assert "left: 2 cells, about" in said
    assert len(fake.calls) == 2


def test_list_of_all_suites_estimates_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counted: list[int] = []
    monkeypatch.setattr(cost, "matmuls_of_update", lambda *args: counted.append(1) or 1e9)
    assert main(["--list", "--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert "table2 " in said and "225 missing, about " in said
    assert "this time only" in said and counted
    first = len(counted)
    assert main(["--list", "--out", str(tmp_path / "none")]) == 0
    assert "this time only" not in capsys.readouterr().out
    assert len(counted) == first and not (tmp_path / "none").exists()


def test_counts_are_kept_until_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost.OperationCounts().get("mac", lambda: 2.0) == 2
    assert cost.OperationCounts().get("mac", lambda: 3.0) == 2
    monkeypatch.setattr(cost, "source_digest", lambda: "another")
    assert not cost.OperationCounts().kept
    (tmp_path / "mac-jax" / "operations.json").write_text("[")  # damaged: counted anew
    assert cost.OperationCounts().get("mac", lambda: 3.0) == 3


def test_study_of_dynamics_models_has_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cost, "product_rate", lambda: 1e11)
    suite, plan = load_suite("figure2"), Plan(out=tmp_path, preset="laptop", seeds=2, data_dir=tmp_path)
    study = study_cell(suite, suite.entries[0], plan)
    assert cost.Estimator(plan).seconds_of_study(study) > cost.COMPILING


def test_cut_cell_is_estimated_by_its_own_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 of 400 updates took 50 s, so that the rest takes 150 s; a finished cell counts more."""
    monkeypatch.setattr(cost, "seconds_spent", lambda folder: 50.0)
    plan = Plan(tmp_path, "paper", 4, Path("data"))
    first, second = (plan.cell(task, "mac") for task in TASKS[:2])
    estimator, cut = Estimator(plan), cells.Progress("cut", 100, 400)
    estimator.learn(first, cut)
    assert estimator.cost(first, cut) == (150.0, True)
    estimator.learn(second, cells.Progress("done", 200, 200))
    assert estimator.cost(first, cut) == (75.0, True)


def test_commands_of_the_page_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each is called in an empty folder, with a stand-in for the runs and for the estimates."""
    begun: list[cells.Cell] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "begin", lambda cell, *_: begun.append(cell))
    monkeypatch.setattr(Estimator, "cost", lambda *_: Cost(60.0, False))
    page = (ROOT / "docs" / "reproduce.md").read_text()
    commands = re.findall(r"^python experiments/reproduce.py (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:  # the report finds nothing that is finished
        assert main(command.split()) == (2 if "--report" in command else 0), command
    assert {(cell.algo, cell.preset, cell.seeds) for cell in begun} == {
        (algo, "laptop", 4) for algo in ("mac", "fql")
    }
    assert len({cell.env for cell in begun}) == 5 and len(begun) == 10
    assert "--out=runs/reproduce does not exist" in capsys.readouterr().err


def test_cost_without_a_finished_cell_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        "table2_default",
        "--env",
        "cube-single",
        "--algo",
        "iql",
        "--list",
        "--out",
        str(tmp_path / "none"),
    ]
    assert main([*words, "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if " iql " in line]
    assert "missing, about" in line and not line.endswith("*")
    assert "operations of an update" in said


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("9m", 540), ("1.5h", 5400)])
def test_budget_is_a_duration(text: str, seconds: float):
    assert read_budget(text) == seconds


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "SUITE is missing"),
        ([], "table15, figure2, figure3, figure8"),
        (["tabel2"], "did you mean 'table2'"),
        (["table2", "--budget", "9"], "--budget 9: write a duration"),
        (["table2", "--budget", "0m"], "--budget 0m"),
        (["table2", "--seeds", "0"], "--seeds=0"),
        (["table2", "--algo", "mc"], "'mc' is not known"),
        (["table2", "--env", "cube-singl"], "did you mean 'cube-single'"),
        (["table2", "--presets", "paper"], "did you mean --preset"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_budget_keeps_a_reserve_for_the_last_checkpoint():
    now = [0.0]
    budget = Budget(540, lambda: now[0])
    assert budget.may_start and not budget.must_stop
    now[0] = 470.0
    assert not budget.may_start and not budget.must_stop
    now[0] = 480.0
    assert budget.must_stop and not budget.is_over
    now[0] = 540.0
    assert budget.is_over
    assert Budget(None).may_start and not Budget(None).is_over


def test_record_of_failures_that_cannot_be_read_is_named(fake: Fake):
    (fake.out / cells.FAILURES / f"mac_{TASKS[0]}_laptop_s2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot read .*failures.*; delete it"):
        fake.states()


@pytest.mark.slow
def test_command_killed_five_times_ends_as_if_never_killed(tmp_path: Path):
    """The real run.py: each kill of the command stops its child, and the next call continues."""
    (tmp_path / "suite.toml").write_text(SUITE)
    data = write_data(tmp_path)[1]
    sizes = [word for word in SIZES if word not in ("--preset", "laptop")]
    sizes = [word for i, word in enumerate(sizes) if "--seeds" not in sizes[max(i - 1, 0) : i + 1]]
    flags = [*sizes, "--data.path", data, "--steps", "3000", "--run.eval-every", "1500"]
    flags += ["--run.checkpoint-every", "100"]

    def words(out: str) -> list[str]:
        chosen = [str(tmp_path / "suite.toml"), "--env", TASKS[1], "--algo", "mac", "--seeds", "2"]
        return [*chosen, "--out", str(tmp_path / out), "--data-dir", str(tmp_path), "--", *flags]

    reached = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "experiments/reproduce.py", *words("killed")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None:
            logs = list((tmp_path / "killed").glob("mac_*/metrics.jsonl"))
            lines = logs[0].read_bytes().splitlines()[:-1] if logs else []
            if lines and json.loads(lines[-1])["step"] > reached + 250:
                reached = json.loads(lines[-1])["step"]
                break
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert main(words("killed")) == 0
    assert main(words("straight")) == 0
    (killed,), (straight,) = ((tmp_path / name).glob("mac_*") for name in ("killed", "straight"))
    for name in (EVAL, "metrics.jsonl"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    reports = []
    for name in ("killed", "straight"):
        before, _, flags_after = " ".join(words(name)).partition(" -- ")
        assert main([*before.split(), "--report", "--", *flags_after.split()]) == 0
        (path,) = (tmp_path / name / "report").glob("*_s2_*.csv")
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        reports.append([row | {"seconds": "", "commit": ""} for row in csv.DictReader(lines)])
    assert reports[0] == reports[1]
