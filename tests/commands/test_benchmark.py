"""The benchmark compares equal work, in turns, and writes what it measured where it says."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments import benchmark
from experiments.benchmarks import timed_loops, training
from experiments.benchmarks.evaluation import measure_evaluation
from experiments.benchmarks.timed_loops import TimedLoop
from experiments.launch.cost_estimate import product_chain
from mac.config import Config
from mac.mac import MAC
from mac.run.cost.flops import matmul_flops
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.segment import segment

CHUNK = 3
TINY = Config(batch=4, hidden=(8, 8), chunk=CHUNK, candidates=2, rollout=2, flow_steps=2)
ROW = training.TrainRow(
    width=256, seeds=4, batch=256, devices=2, updates=3, rate=5.25, plain_rate=4.0, ratio=1.3125, gflop=25.0,
    product_gflops=180.0, share=0.72, compile_s=9.5, plain_compile_s=8.0, peak_mb=900.0, cores=1.98,
    plain_cores=1.9, product_cores=2.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def window():
    return timed_loops.random_window(training.SPEC, 2 * EPISODE_ROWS, CHUNK)


def test_a_segment_does_the_work_that_it_is_credited_with(window):
    algo, mesh, steps = MAC(TINY, training.SPEC), seed_mesh(1), jnp.arange(3)
    keys = seed_keys(0, 2)
    state = jax.eval_shape(lambda k: jax.vmap(algo.init)(k), keys)
    counted = matmul_flops(lambda *args: segment(algo, mesh, *args), window, keys, steps, state)
    assert counted == 3 * 2 * timed_loops.update_flops(algo, window)


def test_products_are_counted_and_done():
    chain, work = product_chain(4, 6, seed_mesh(1))
    np.testing.assert_allclose(
        chain(), np.ones((6, 4)), rtol=1e-6
    )  # rows of ones, times columns that sum to 1
    assert work == 20 * 6 * 4 * (2 * 4)  # 20 products of 24 entries, each a dot product of length 4


def test_contenders_time_interleaved():
    order: list[str] = []
    named = {name: TimedLoop(lambda name=name: order.append(name), 1.0).times(2) for name in "ab"}
    taken = timed_loops.time_interleaved(named, repeats=3)
    assert "".join(order) == "aabb" * 3
    assert {name: len(turns) for name, turns in taken.items()} == {"a": 3, "b": 3}


def test_speed_is_work_over_wall_time(monkeypatch):
    wall, cpu = iter([10.0, 12.0]), iter([1.0, 4.0])
    monkeypatch.setattr(timed_loops.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(timed_loops.time, "process_time", lambda: next(cpu))
    timing = timed_loops.time_call(TimedLoop(lambda: None, 5.0).times(2))
    assert timing == (10.0 / 2.0, 3.0 / 2.0)


def test_each_configuration_gets_a_process(monkeypatch, capsys):
    asked = []

    def run(command, **_):
        asked.append(command[2:])
        return subprocess.CompletedProcess(command, 0, stdout="a warning\n" + json.dumps(vars(ROW)))

    monkeypatch.setattr(subprocess, "run", run)
    assert benchmark.main(["--widths", "8", "16", "--seeds", "1", "2", "--batch", "32"]) == 0
    assert [c[0] for c in asked] == ["--one-train"] * 4
    sizes = [(c[c.index("--widths") + 1], c[c.index("--seeds") + 1]) for c in asked]
    assert sizes == [("8", "1"), ("8", "2"), ("16", "1"), ("16", "2")]
    assert all(c[c.index("--batch") + 1] == "32" for c in asked)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert benchmark.main(["--widths", "8", "--seeds", "3"]) == 2
    assert "width 8, seeds 3" in capsys.readouterr().err


def test_ratios_are_taken_repeat_by_repeat():
    # A machine that slows down tenfold from turn to turn: the ratio is 2 in every one.
    ours = [timed_loops.Timing(s, 1.0) for s in (200.0, 20.0, 2.0)]
    usual = [timed_loops.Timing(s, 1.0) for s in (100.0, 10.0, 1.0)]
    assert training.median_ratio(ours, usual) == 2.0


def test_file_holds_the_rows_and_their_origin(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "in_process", lambda kind, args: vars(ROW) | {"width": args.widths[0]})
    out = tmp_path / "new" / "bench.csv"
    assert benchmark.main(["--widths", "256", "512", "--seeds", "4", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    notes = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    assert notes["command"].startswith("python experiments/benchmark.py --widths 256 512")
    assert {"date", "commit", "hardware", "jax"} < set(notes)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["width"] for row in rows] == ["256", "512"]
    assert {name: float(value) for name, value in rows[0].items()} == pytest.approx(vars(ROW), rel=1e-3)
    shown = capsys.readouterr().out
    assert "1.31" in shown and "72%" in shown


@pytest.mark.parametrize(
    "flags",
    [["--seeds", "0"], ["--widths", "-8"], ["--rows", "10"], ["--seconds", "nan"], ["--repeats", "0"]],
)
def test_a_senseless_flag_is_one_line(flags: list[str], capsys):
    assert benchmark.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flags[0] in error and flags[1] in error


@pytest.mark.slow
def test_every_configuration_is_measured(tmp_path: Path):
    out = tmp_path / "bench.csv"
    flags = ["--quick", "--seeds", "1", "2", "--widths", "16", "--seconds", "0.2", "--repeats", "2"]
    command = [sys.executable, benchmark.__file__, *flags, "--rows", "3000", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    rows = list(csv.DictReader(line for line in out.read_text().splitlines() if not line.startswith("#")))
    assert [(row["width"], row["seeds"]) for row in rows] == [("16", "1"), ("16", "2")]
    for row in rows:
        assert all(float(value) > 0 for value in row.values())


@pytest.mark.slow
def test_evaluations_are_measured():
    row = measure_evaluation(TINY, envs=2, engine="c")
    assert (row.width, row.envs, row.engine) == (8, 2, "c")
    assert min(row.total_s, row.policy_s, row.physics_s) > 0
    # An untrained policy goes to the time limit of 200 control steps.
    assert row.env_steps * row.total_s == pytest.approx(2 * 200)
