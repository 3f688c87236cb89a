"""Times of tables 4 and 5: measured once for each device, scaled, relative to MAC, or skipped."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest

from experiments import reproduce
from experiments.benchmarks import run_time
from experiments.benchmarks.run_time import RunTime
from experiments.reproduce import main
from experiments.reproduction import jobs, times
from experiments.reproduction.cells import Plan
from experiments.reproduction.render import latex
from experiments.reproduction.suites import load_suite
from experiments.reproduction.times import (
    TimeRow,
    device_folder,
    time_cells,
    time_columns,
    time_jobs,
    time_sheet,
)

DEVICE = "NVIDIA H200"
FAKE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
value = lambda flag: words[words.index(flag) + 1]
algo, out = value("--algo"), pathlib.Path(value("--out"))
with open(os.environ["FAKE_CALLS"], "a") as file:
    file.write(algo + chr(10))
if algo == os.environ.get("FAKE_HANG"):
    time.sleep(60)
if algo == "fmpc":
    sys.exit("error: --hp.lr=0: must be positive")
each = {"mac": 0.01, "mopo": 0.004, "leq": 0.002}.get(algo, 0.1)
row = dict(algo=algo, env=value("--env"), preset=value("--preset"), flags="")
row |= dict(device=os.environ["FAKE_DEVICE"], compile_s=3.0, peak_mb=200.0, skipped="")
row |= dict(batch=256, steps=1_000_000, need_mb=100.0, timed=30, update_s=each, rollout_share=0.1, cores=1.0)
row |= dict(hours=each * 1e6 / 3600, decision_ms=1000 * each, actions=1)
if algo == "mobile":
    row |= dict(skipped="needs 90.0 GB of memory, 20.0 GB are free", hours=0.0, decision_ms=0.0, timed=0)
row |= dict(command="c", date="2026-01-01", commit="abc with changes", hardware="some", jax="0")
out.write_text(json.dumps(row))
"""


class Times:
    """The command with a stand-in for the benchmark."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.out, self._calls, self.monkeypatch = folder / "out", folder / "calls", monkeypatch
        (folder / "fake.py").write_text(FAKE)
        monkeypatch.setenv("FAKE_CALLS", str(self._calls))
        monkeypatch.setattr(
            jobs, "program", lambda job: [sys.executable, str(folder / "fake.py"), *job.words[1:]]
        )
        self.on(DEVICE)

    def on(self, device: str) -> None:
        self.monkeypatch.setenv("FAKE_DEVICE", device)
        self.monkeypatch.setattr(reproduce, "this_device", lambda: device)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().split() if self._calls.exists() else []

    def run(self, *words: str) -> int:
        return main([*words, "--out", str(self.out)])

    def rows(self, name: str, selection: str = "") -> list[dict[str, str]]:
        lines = (self.out / "report" / f"{name}_paper{selection}.csv").read_text().splitlines()
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Times:
    return Times(tmp_path, monkeypatch)


def test_times_are_measured_once_for_both_tables(timed: Times, capsys: pytest.CaptureFixture[str]):
    assert timed.run("table4") == 1
    said = capsys.readouterr().out
    assert f"times are measured on {DEVICE}" in said and "must be positive" in said
    assert "other programs: 8 done, 2 failed" in said and "continue with" in said
    assert len(timed.calls) == 10
    assert timed.run("table5") == 1  # those that failed are tried again, the others are done
    assert timed.calls[10:] == ["fmpc", "fmpc"]


def test_times_stand_beside_the_papers_relative_to_mac(timed: Times, capsys: pytest.CaptureFixture[str]):
    assert timed.run("table4", "--env", "cube-double-play-singletask-task2-v0") == 1
    capsys.readouterr()
    assert timed.run("table4", "--env", "cube-double-play-singletask-task2-v0", "--report") == 0
    rows = {row["algo"]: row for row in timed.rows("table4", "_cube-double-play-singletask-task2-v0")}
    mac, mopo, mobile = rows["mac"], rows["mopo"], rows["mobile"]
    assert float(mac["value"]) == pytest.approx(2.778, abs=1e-3) and mac["relative"] == "1"
    assert (mac["timed"], mac["updates"], mac["device"]) == ("30", "1000000", DEVICE)
    assert mopo["relative"] == "0.4" and mopo["paper_relative"] == "0.4516"
    assert mobile["value"] == "nan" and "needs 90.0 GB" in mobile["skipped"]
    said = " ".join(capsys.readouterr().out.split())
    assert "relative to MAC on the same device" in said and "because not measured: 1" in said
    (page,) = (timed.out / "report").glob("*.html")
    assert "30 updates, 10 ms each, x 1,000,000" in page.read_text() and "needs 90.0 GB" in page.read_text()


def test_note_on_sizes_is_about_flags_of_the_command_line(timed: Times):
    """LEQ's rollout of 5 is the suite's own, so that its time is an estimate of the paper's."""
    for flags in ((), ("--", "--hp.hidden", "64", "64")):
        words = ["table4", "--algo", "leq", "mac", "--out", str(timed.out)]
        assert main([*words, *flags]) == 0 and main([*words, "--report", *flags]) == 0
    said, other = (
        (timed.out / "report" / f"table4_paper_leq+mac{flags}.md").read_text()
        for flags in ("", "_hp.hidden=64=64")
    )
    assert "rows of other sizes" not in said and "rows of other sizes" in other


def test_times_are_written_in_plain_digits():
    suite, plan = load_suite("table4"), Plan(Path("out"), "laptop", 4, Path("data"))
    first = TimeRow(
        "table4", "single", "shapes", "mac", "MAC", "paper", "device", 55.5, "55.5", 1.0, 5678.4, 1.0, 30.0,
        3, 1000, 0.0, 1, 200.0, 1.0, "", "", "commit", "hardware", "date",
    )  # fmt: skip
    rows = [first, dataclasses.replace(first, env="multi", value=0.0123, update_s=0.0123, timed=1, updates=1)]
    columns = time_columns(suite, rows)
    assert columns["ours, h"] == ["5,680", "0.0123"] and columns["paper, h"] == ["55.5", "55.5"]
    assert columns["measured"][1] == "1 update, 12.3 ms each, x 1"
    text = latex(time_sheet(suite, [rows[0], rows[0], rows[1]], 0, plan))
    assert text.count("addlinespace") == 1  # between scopes


def test_each_device_has_measurements_of_its_own(timed: Times):
    for device in (DEVICE, "NVIDIA A5000"):
        timed.on(device)
        assert timed.run("table5", "--algo", "mac", "leq") == 0
    assert len(timed.calls) == 8
    assert timed.run("table5", "--algo", "mac", "leq", "--report") == 0
    assert [row["device"] for row in timed.rows("table5", "_leq+mac")] == ["NVIDIA A5000"] * 4 + [DEVICE] * 4
    assert device_folder("a b") != device_folder("a-b")


def test_measurement_that_the_budget_ends_begins_anew(timed: Times, capsys: pytest.CaptureFixture[str]):
    timed.monkeypatch.setenv("FAKE_HANG", "mobile")
    words = ("table4", "--env", "cube-double", "--algo", "mopo", "mobile", "mac", "--budget")
    assert timed.run(*words, "6s") == 0
    assert "1 done, 1 ended by the budget, 4 not begun" in capsys.readouterr().out
    timed.monkeypatch.delenv("FAKE_HANG")
    assert timed.run(*words, "1h") == 0
    assert "other programs: 6 done" in capsys.readouterr().out


def test_list_of_times_names_devices_and_costs(
    timed: Times, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("experiments.reproduction.cost.Estimator.seconds_to_measure", lambda *_: 75.0)
    assert timed.run("table4", "--algo", "mac", "--env", "cube-double-play-oraclerep-v0") == 0
    capsys.readouterr()
    assert timed.run("table4", "--algo", "mac", "mopo", "--list") == 0
    said = capsys.readouterr().out
    assert (
        f"done on {DEVICE}" in said and "missing, about 1:15" in said and "4 cells: 1 done, 3 missing" in said
    )


def test_damaged_measurement_is_one_line(timed: Times, capsys: pytest.CaptureFixture[str]):
    assert timed.run("table4", "--algo", "mac", "--env", "cube-double-play-oraclerep-v0") == 0
    (path,) = timed.out.glob("times/*/mac_*.json")
    path.write_text(json.dumps({"device": DEVICE}))
    capsys.readouterr()
    assert timed.run("table4", "--report") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is missing; delete it, and it is measured again" in line


def test_times_are_of_the_papers_sizes_unless_asked_otherwise():
    suite = load_suite("table4")
    plan = Plan(Path("out"), "laptop", 4, Path("data"))
    assert {cell.preset for cell in time_cells(suite.entries, plan)} == {"paper"}
    assert {cell.seeds for cell in time_cells(suite.entries, plan)} == {1}
    other = time_cells(suite.entries, plan._replace(time_preset="laptop"))
    assert {cell.preset for cell in other} == {"laptop"}
    (leq, *_) = [cell for cell in other if cell.algo == "leq"]
    (job,) = time_jobs([leq], plan, DEVICE)
    assert job.words[-3:] == ("--", "--hp.rollout", "5")


def test_training_that_does_not_fit_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    """Nothing is compiled where networks and data alone are too large."""
    monkeypatch.setattr(run_time, "compile_update", lambda *_: pytest.fail("compiled"))
    memory = type("Memory", (), {"device": 1000})
    monkeypatch.setattr(run_time, "free_memory", lambda: memory)
    found = run_time.measure(run_time.Args(preset="laptop", rows=5000), ["--hp.hidden", "8", "8"])
    assert isinstance(found, RunTime) and "of memory, 0 MB are free" in found.skipped
    assert not found.timed and found.need_mb > 0


@pytest.mark.slow
def test_update_and_decision_are_measured_and_scaled(tmp_path: Path):
    sizes = ["--hp.hidden", "8", "8", "--hp.batch", "8", "--hp.candidates", "2", "--hp.rollout", "2"]
    args = run_time.Args(preset="laptop", rows=5000, seconds=0.2)
    found = run_time.measure(args, [*sizes, "--hp.candidates-test", "2"])
    assert found.hours == pytest.approx(found.update_s * found.steps / 3600)
    assert found.timed >= 1 and found.decision_ms > 0 and found.actions == 5 and not found.skipped
    assert times.device_folder(found.device)
