"""The GPU benchmark keeps to its budget, loses nothing, and continues where it ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks.gpu import command, device_rates, parts, programs, training_rates
from experiments.benchmarks.gpu.processes import Processes
from experiments.benchmarks.gpu.records import Records
from experiments.benchmarks.gpu.schedule import (
    RESERVE,
    Budget,
    Outcome,
    Part,
    in_order,
    read_budget,
    run_parts,
)
from experiments.benchmarks.gpu.summary import markdown_table, roofline_ms, summary
from mac.errors import UserError
from mac.run.io.folder_lock import lock
from mac.run.io.logger import METRICS
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.segment import init

ORIGIN = {
    "card": "NVIDIA H100",
    "commit": "abc",
    "jax": "0.10.2",
    "command": "python experiments/benchmark.py",
}
MACHINE = {
    "backend": "gpu", "card": "NVIDIA H100", "cards": 1, "driver": "580", "card_memory": "81559 MiB",
    "host": "a CPU", "versions": {"jax": "0.10.2"}, "variables": {}, "git": None,
}  # fmt: skip


class FakeRunner:
    """Runs parts on a clock of its own; each takes the seconds given, and ends with the status given."""

    def __init__(self, seconds: Mapping[str, float], statuses: Mapping[str, Any] | None = None):
        self.seconds, self.statuses, self.now = seconds, statuses or {}, 0.0
        self.ran: list[tuple[str, float]] = []

    def run(self, part: Part, seconds: float) -> Outcome:
        self.ran.append((part.name, seconds))
        taken = self.seconds[part.name]
        if taken > seconds:
            self.now += seconds
            return Outcome("partial" if part.grace else "overran", seconds, {"step": 1} if part.grace else {})
        self.now += taken
        return Outcome(self.statuses.get(part.name, "done"), taken, {"figure": 1})

    def start(self, part: Part) -> "FakeBackground":
        return FakeBackground(self, self.now + self.seconds[part.name])

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.ran]


class FakeBackground:
    def __init__(self, runner: FakeRunner, end: float):
        self.runner, self.end = runner, end

    def wait(self, seconds: float) -> Outcome | None:
        if self.end > self.runner.now + seconds:
            self.runner.now += seconds
            return None
        self.runner.now = max(self.runner.now, self.end)
        return Outcome("done", 1.0, {"rows": 3})

    def stop(self) -> Outcome:
        return Outcome("partial")


def call(
    folder: Path, todo: list[Part], runner: FakeRunner, seconds: float, origin: dict[str, str] = ORIGIN
) -> Records:
    """One call of the command with parts of its own."""
    records = Records(folder / "results.jsonl", origin)
    runner.now, runner.ran = 0.0, []
    run_parts(todo, records, Budget(seconds, clock=lambda: runner.now), runner, lambda line: None)
    return records


def statuses(records: Records) -> dict[str, str]:
    return {row["part"]: row["status"] for row in records.rows}


@pytest.mark.parametrize(("text", "seconds"), [("540", 540), ("9m", 540), ("90s", 90), ("1.5h", 5400)])
def test_budgets_are_seconds_minutes_or_hours(text: str, seconds: float):
    assert read_budget(text) == seconds


@pytest.mark.parametrize(
    "flags", [["--budget", "9 minutes"], ["--budget", "5"], ["--only", "x"], ["--rows", "5"]]
)
def test_a_senseless_flag_is_one_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert benchmark.main(["gpu", "--out", str(tmp_path / "o"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0] in error and not (tmp_path / "o").exists()


def test_a_machine_without_a_gpu_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "accelerator_in_sight", lambda: False)
    assert benchmark.main(["gpu", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error == "error: no GPU found on this machine; --tiny rehearses the command on a CPU\n"
    assert not (tmp_path / "o").exists()


def test_a_gpu_that_jax_does_not_use_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"JAX computes on the CPU.*doctor\.py"):
        command.check_machine(Outcome("done", 1.0, MACHINE | {"backend": "cpu"}), False, tmp_path)
    with pytest.raises(UserError, match="JAX does not start here"):
        command.check_machine(Outcome("failed", reason="no driver"), True, tmp_path)


A, B, C = Part("a", 10, 40), Part("b", 50, 60), Part("c", 10, 40)


def test_parts_that_do_not_fit_are_left_out_and_say_so(tmp_path: Path):
    runner = FakeRunner({"a": 30, "b": 50, "c": 10})
    records = call(tmp_path, [A, B, C], runner, 60 + RESERVE)
    assert runner.names == ["a", "c"] and runner.now == 40
    assert records.last_reason("b") == "takes about 50 s, 30 s were left"


def test_next_call_does_what_is_missing(tmp_path: Path):
    runner = FakeRunner({"a": 30, "b": 50, "c": 10})
    call(tmp_path, [A, B, C], runner, 60 + RESERVE)
    assert statuses(call(tmp_path, [A, B, C], runner, 60 + RESERVE)) == dict.fromkeys("abc", "done")
    assert runner.names == ["b"]
    call(tmp_path, [A, B, C], runner, 60 + RESERVE)
    assert runner.names == []


def test_a_part_that_overruns_later_gets_twice_the_time(tmp_path: Path):
    runner = FakeRunner({"a": 50, "b": 1, "c": 1})
    assert statuses(call(tmp_path, [A, B, C], runner, 500)) == {"a": "overran", "b": "done", "c": "done"}
    assert runner.ran[0] == ("a", 40)
    assert statuses(call(tmp_path, [A, B, C], runner, 500))["a"] == "done"
    assert runner.ran == [("a", 80)]


def test_what_failed_is_tried_again_after_all_else(tmp_path: Path):
    runner = FakeRunner({"a": 1, "b": 1, "c": 1}, {"a": "failed"})
    records = call(tmp_path, [A], runner, 500)
    assert [part.name for part in in_order([A, B, C], records)] == ["b", "c", "a"]


def test_no_part_takes_more_than_the_budget_has_left(tmp_path: Path):
    rest = Part("rest", 10, 0, grace=20, rest=True)
    runner = FakeRunner({"a": 30, "rest": 10**9})
    records = call(tmp_path, [rest, A], runner, 100 + RESERVE)
    assert runner.ran == [("a", 40), ("rest", 100 - 30 - 20)]
    assert statuses(records)["rest"] == "partial" and not records.done("rest")
    call(tmp_path, [rest, A], runner, 100 + RESERVE)
    assert runner.ran == [("rest", 80)]


def test_what_needs_background_work_waits_for_it(tmp_path: Path):
    data = Part("data", 0, 900, background=True)
    rest = Part("rest", 10, 0, after=("data",), rest=True)
    runner = FakeRunner({"data": 70, "a": 30, "rest": 10**9})
    call(tmp_path, [data, A, rest], runner, 100 + RESERVE)
    assert runner.ran[-1] == ("rest", 30)


def test_unfinished_background_work_goes_on_in_the_next_call(tmp_path: Path):
    data = Part("data", 0, 900, background=True)
    rest = Part("rest", 10, 0, after=("data",), rest=True)
    runner = FakeRunner({"data": 400, "a": 30, "rest": 10**9})
    records = call(tmp_path, [data, A, rest], runner, 100 + RESERVE)
    assert statuses(records) == {"a": "done", "rest": "skipped", "data": "partial"}
    assert runner.now <= 100


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path):
    class Interrupted(FakeRunner):
        def run(self, part: Part, seconds: float) -> Outcome:
            if part.name == "b":
                raise KeyboardInterrupt
            return super().run(part, seconds)

    data = Part("data", 0, 900, background=True)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, [data, A, B], Interrupted({"data": 400, "a": 30}), 500)
    assert statuses(Records(tmp_path / "results.jsonl", ORIGIN)) == {"a": "done", "data": "partial"}


def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path):
    runner = FakeRunner({"a": 1, "b": 1})
    call(tmp_path, [A, B], runner, 500)
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    call(tmp_path, [A, B], runner, 500)
    assert runner.names == ["b"]
    assert len(path.read_text().splitlines()) == 2


def test_figures_of_another_card_do_not_count(tmp_path: Path):
    runner = FakeRunner({"a": 1})
    call(tmp_path, [A], runner, 500)
    call(tmp_path, [A], runner, 500, ORIGIN | {"card": "NVIDIA H200"})
    assert runner.names == ["a"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


# Processes.

WORKER = """
import json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    name = line.strip()
    if name == "dies":
        sys.exit("RESOURCE_EXHAUSTED: Out of memory")
    answer = {"result": {"pid": os.getpid(), "variable": os.environ.get("MARK")}}
    if name.startswith("sleeps"):
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            answer = {"result": {"status": "partial", "step": 7}}
    if name == "wrong":
        answer = {"error": "--this is wrong"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def processes(tmp_path: Path):
    with contextlib.closing(Processes([sys.executable, "-c", WORKER], tmp_path / "log.txt", {})) as made:
        yield made


def test_parts_share_a_process_unless_they_want_their_own(processes: Processes):
    one, other = (processes.run(Part(name, 1, 9), 30.0).result["pid"] for name in "ab")
    own = processes.run(Part("own", 1, 9, own_process=True, environment={"MARK": "x"}), 30.0).result
    assert one == other != own["pid"] and own["variable"] == "x"


def test_a_part_that_kills_its_process_harms_no_other(processes: Processes):
    outcome = processes.run(Part("dies", 1, 9), 30.0)
    assert outcome.status == "failed" and outcome.reason == "status 1: RESOURCE_EXHAUSTED: Out of memory"
    assert processes.run(Part("wrong", 1, 9), 30.0)[::3] == ("failed", "--this is wrong")
    assert processes.run(Part("a", 1, 9), 30.0).status == "done"


def test_a_process_that_takes_too_long_is_killed(processes: Processes):
    pid = processes.run(Part("a", 1, 9), 30.0).result["pid"]
    outcome = processes.run(Part("sleeps", 1, 9), 0.3)
    assert outcome.status == "overran"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert processes.run(Part("a", 1, 9), 30.0).result["pid"] != pid


def test_a_part_with_grace_ends_in_order(processes: Processes):
    assert processes.run(Part("a", 1, 9), 30.0).status == "done"  # Python has started
    outcome = processes.run(Part("sleeps", 1, 9, grace=20.0), 0.5)
    assert (outcome.status, outcome.result) == ("partial", {"step": 7})


def test_background_parts_run_beside_others(processes: Processes):
    background = processes.start(Part("sleeps in the background", 1, 9, grace=20.0))
    assert processes.run(Part("a", 1, 9), 30.0).status == "done"
    assert background.wait(0.0) is None
    time.sleep(0.3)
    assert background.stop().status == "partial"


def test_a_folder_stays_locked_until_the_last_worker_ends(tmp_path: Path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    lock(descriptor, tmp_path)
    processes = Processes([sys.executable, "-c", WORKER], tmp_path / "log.txt", {}, descriptor)
    background = processes.start(Part("sleeps", 1, 9))
    os.close(descriptor)  # as when the parent is killed
    again = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UserError, match="another process"):
        lock(again, tmp_path)
    background.stop()
    lock(again, tmp_path)
    os.close(again)


# Parts and their results.


def test_every_part_has_a_name_of_its_own_and_a_measurement():
    from experiments.benchmarks.gpu.worker import _KINDS

    for tiny in (False, True):
        names = [part.name for part in parts.all_parts(tiny)]
        assert len(set(names)) == len(names)
        assert {name.split()[0] for name in names} <= set(_KINDS)
        assert names[-1] == "paper"


def test_segments_of_every_kind_come_before_their_variants():
    names = [part.name for part in parts.all_parts(False)]
    assert names.index("evaluation mjx") < names.index("determinism resumed")
    assert names.index("determinism resumed") < names.index("segment reward S=1 bf16")
    wanted = {f"segment {mode} S={n} tf32" for mode, n in [("reward", 1), ("reward", 4), ("reward", 8)]}
    wanted |= {f"segment goals S={n} float32" for n in (1, 4)}
    wanted |= {f"steps {engine} {n}" for engine in ("mjx", "warp") for n in (75, 300, 1024, 4096)}
    assert wanted <= set(names)


def test_kernels_of_a_chain_are_as_many_as_asked():
    x = jnp.arange(8.0)
    chain = device_rates.chained_kernels(3)
    assert jax.make_jaxpr(chain)(x).pretty_print().count("optimization_barrier") == 3
    assert chain(jnp.zeros(1))[0] == pytest.approx(3.0, abs=1e-3)


def test_rates_are_measured_at_tiny_sizes():
    assert device_rates.measure_bandwidth(True)["gb_per_s"] > 0
    assert all(value > 0 for value in device_rates.measure_matmuls(True).values())


def test_a_test_report_names_what_did_not_pass():
    text = """<testsuites><testsuite><testcase classname="tests.a" name="one"/>
    <testcase classname="tests.a" name="two"><failure message="assert 1\n== 2">...</failure></testcase>
    <testcase classname="tests.b" name="three"><skipped message="needs 7 GB"/></testcase>
    </testsuite></testsuites>"""
    found = programs.read_test_report(text)
    assert found["passed"] == 1
    assert found["not_passed"] == {
        "tests.a.two": "failure: assert 1 == 2",
        "tests.b.three": "skipped: needs 7 GB",
    }


def test_the_roofline_is_the_slower_of_matmuls_and_memory(tmp_path: Path):
    records = Records(tmp_path / "results.jsonl", ORIGIN)
    segment = {"variant": "tf32", "seeds": 4, "gflop": 100.0, "gb": 3.0}
    assert roofline_ms(records, segment) is None
    records.add("rate matmuls", Outcome("done", 1.0, {"large_tf32": 400.0, "large_bf16": 800.0}))
    records.add("rate memory", Outcome("done", 1.0, {"gb_per_s": 3000.0}))
    assert roofline_ms(records, segment) == 1.0  # both take 1 ms
    assert roofline_ms(records, segment | {"gb": 6.0}) == 2.0
    assert roofline_ms(records, segment | {"gflop": 300.0, "variant": "bf16"}) == 1.5


def test_the_summary_has_every_result_and_what_is_missing(tmp_path: Path):
    records = Records(tmp_path / "results.jsonl", ORIGIN)
    records.add("machine", Outcome("done", 1.0, MACHINE))
    segment = {
        "mode": "reward", "seeds": 4, "variant": "tf32", "ms_per_update": 8.0, "seed_updates_per_s": 500.0,
        "gflop": 100.0, "gb": 3.0, "compile_s": 40.0, "scratch_gb": 0.4, "finite": True, "estimate_ms": 6.0,
    }  # fmt: skip
    records.add("segment reward S=4 tf32", Outcome("done", 1.0, segment))
    paper = {"updates": 5000, "updates_now": 5000, "seeds": 4, "seconds": {}, "updates_per_s": 140.0,
             "minutes_for_1m": 119.0, "success": {"5000": 0.25}}  # fmt: skip
    records.add("paper", Outcome("partial", 60.0, paper))
    records.add("b", Outcome("skipped", reason="takes about 50 s, 30 s were left"))
    text = summary(records, [A, B, Part("paper", 1, 1)])
    for words in (
        "NVIDIA H100 81559 MiB, driver 580",
        "| reward | 4 | tf32 | 8 | 500 |",
        "-25%",
        "| 5,000 |",
    ):
        assert words in text
    assert "| a | not tried |  |" in text and "| b | skipped | takes about 50 s, 30 s were left |" in text
    assert "| paper | partial |" in text


def test_numbers_of_a_table_have_three_digits():
    row = [0.0123456, 12345.6, 3, True, None, "text"]
    assert markdown_table("abcdef", [row]).splitlines()[-1] == "| 0.0123 | 12,346 | 3 | yes | – | text |"


@pytest.mark.slow
def test_a_segment_begins_with_the_states_of_its_seeds():
    algo = training_rates.subject("reward", 1, "tf32", True).algo
    ours = training_rates.fresh_state(algo, "reward", 1, True)
    alone = init(algo, seed_mesh(1), seed_keys(0, 1))
    assert jax.tree.structure(ours) == jax.tree.structure(alone)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), ours, alone)


def test_a_run_that_was_killed_tells_of_its_checkpoint(finished: Path, copied: Path):
    found = programs.describe_run(finished)
    assert found["updates"] == found["updates_now"] == 10 and list(found["success"]) == [10]
    record = json.loads((copied / "run.json").read_text())
    for name in ("step", "seconds"):
        del record["launches"][-1][name]
    (copied / "run.json").write_text(json.dumps(record))
    assert programs.describe_run(copied)["updates"] == 10


# The whole command, at tiny sizes.


def run_tiny(out: Path, *flags: str) -> subprocess.Popen[str]:
    words = [benchmark.__file__, "gpu", "--tiny", "--out", str(out), *flags]
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lines_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_call_is_continued_by_the_next(tmp_path: Path):
    """The second call does the rest; the training run goes on after Ctrl-C, until the next budget ends."""
    out = tmp_path / "o"
    killed = run_tiny(out, "--only", "rate", "tests", "data", "segment")
    log, metrics = out / "work" / "log.txt", out / "work" / programs.RUN / METRICS
    wait_for(lambda: log.exists() and "--- segment" in log.read_text(), killed)
    killed.kill()
    killed.communicate()
    before = lines_of(out)
    assert "rate matmuls" in before

    second = run_tiny(out, "--only", "rate", "tests", "data", "determinism resumed")
    shown = second.communicate()[0]
    assert second.returncode == 0, shown
    after = lines_of(out)
    assert {row["status"] for row in after.values()} == {"done"}
    assert after["rate matmuls"] == before["rate matmuls"]
    assert after["determinism resumed"]["result"]["same_bits"]

    stopped = run_tiny(out, "--only", "paper")
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, stopped)
    stopped.send_signal(signal.SIGINT)
    shown = stopped.communicate()[0]
    assert stopped.returncode == 130 and "the same command continues" in shown, shown
    reached = programs.describe_run(out / "work" / programs.RUN)["updates"]
    assert reached > 0

    began = time.monotonic()
    last = run_tiny(out, "--budget", "90s", "--only", "paper")
    shown = last.communicate()[0]
    assert last.returncode == 0 and time.monotonic() - began < 95, shown
    row = lines_of(out)["paper"]
    assert row["status"] == "partial" and row["result"]["updates"] >= reached
    assert "## Paper run" in (out / "summary.md").read_text()
