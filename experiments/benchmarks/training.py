"""Measures the compiled segment, compared with a Python training loop and the machine's matmul rate."""

import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import timed_loops
from experiments.benchmarks.timed_loops import TimedLoop, Timing
from mac.algorithm import AbstractAlgorithm
from mac.config import Config
from mac.mac import MAC
from mac.run.mesh import seed_mesh
from mac.types import EnvSpec, Window

SPEC = EnvSpec("shapes of cube-single", 28, 5, None, (1,), 200, 0.05)
EXPECTED_SHARE = 0.6  # of the matmul rate; only sizes the calls
LEAST_UPDATES = 4  # per seed and call: in a run, the overhead of a call is spread over many updates


@dataclass(frozen=True)
class TrainRow:
    """Figures of one configuration, medians over repeats; the names are the columns of the CSV file.

    Columns that begin with `plain_` are of the Python training loop, those that begin with `product_` of bare
    matmuls.

    Attributes:
        updates: updates of each seed in one call.
        rate: seed-updates per second of the segment; `plain_rate` of the Python training loop.
        ratio: `rate` over `plain_rate`, median of the ratios of each repeat.
        gflop: operations of the matmuls in one update of one seed, in 10^9.
        product_gflops: the machine's matmul rate, in 10^9 operations per second.
        share: share of that rate that the segment reaches, median over repeats.
        compile_s: seconds to compile the segment; `plain_compile_s`: to compile the Python loop's update.
        peak_mb: peak memory, 10^6 bytes, measured before the Python training loop exists. It is of the whole
            process on CPU, and of the device elsewhere.
        cores: processor time over wall time while the segment ran: lower than usual on a busy machine.
    """

    width: int
    seeds: int
    batch: int
    devices: int
    updates: int
    rate: float
    plain_rate: float
    ratio: float
    gflop: float
    product_gflops: float
    share: float
    compile_s: float
    plain_compile_s: float
    peak_mb: float
    cores: float
    plain_cores: float
    product_cores: float


class Comparison(NamedTuple):
    """Timings of the compiled segment, compared with the Python training loop.

    Attributes:
        figures: figures by the names of `TrainRow`'s columns.
        segment: timings of the compiled segment.
        others: timings of the other loops that were interleaved with the segment.
    """

    figures: dict[str, Any]
    segment: list[Timing]
    others: list[list[Timing]]


def measure_training(cfg: Config, seeds: int, *, rows: int, seconds: float, repeats: int) -> TrainRow:
    """Measures training of MAC as `cfg` says.

    Args:
        rows: rows of the random dataset.
        seconds: approximate time for which each loop is measured; at least `LEAST_UPDATES` updates a call.
        repeats: calls into which this time is divided.
    """
    window = timed_loops.random_window(SPEC, rows, cfg.chunk)
    chains, speed = machine_matmuls(cfg.hidden[0], cfg.batch * cfg.candidates, seeds)
    call_s = seconds / repeats
    chains = [c.times(max(1, round(call_s * speed / c.work))) for c in chains]
    compared = compare_with_python_loop(MAC(cfg, SPEC), window, seeds, speed * call_s, repeats, chains)
    matmul = [max(timings) for timings in zip(*compared.others, strict=True)]
    return TrainRow(
        width=cfg.hidden[0],
        seeds=seeds,
        batch=cfg.batch,
        product_gflops=_median(matmul) / 1e9,
        share=median_ratio(compared.segment, matmul),
        product_cores=statistics.median(t.cores for t in matmul),
        **compared.figures,
    )


def compare_with_python_loop(
    algo: AbstractAlgorithm,
    window: Window,
    seeds: int,
    matmul_flops: float,
    repeats: int,
    others: Sequence[TimedLoop] = (),
) -> Comparison:
    """Measures training by the compiled segment, compared with a Python training loop.

    Args:
        matmul_flops: matmul operations that the machine does in the time of a call.
        repeats: calls of each loop.
        others: other loops, interleaved with these two.
    """
    mesh, flop = seed_mesh(seeds), timed_loops.update_flops(algo, window)
    updates = max(LEAST_UPDATES, round(EXPECTED_SHARE * matmul_flops / (flop * seeds)))
    work = timed_loops.Work(algo, window, seeds, updates, flop)
    segment = timed_loops.scan_segment(work, mesh)
    timed_loops.time_call(segment)
    peak = peak_bytes()  # before the Python loop adds to it
    baseline = timed_loops.python_loop(work)
    named = {f"other{i}": timed for i, timed in enumerate(others)}
    timings = timed_loops.time_interleaved({"segment": segment, "python": baseline, **named}, repeats)
    ours, python = timings["segment"], timings["python"]
    figures = {
        "devices": mesh.size,
        "updates": updates,
        "rate": _median(ours) / flop,
        "plain_rate": _median(python) / flop,
        "ratio": median_ratio(ours, python),
        "gflop": flop / 1e9,
        "compile_s": segment.compile_s,
        "plain_compile_s": baseline.compile_s,
        "peak_mb": peak / 1e6,
        "cores": statistics.median(t.cores for t in ours),
        "plain_cores": statistics.median(t.cores for t in python),
    }
    return Comparison(figures, ours, [timings[name] for name in named])


def machine_matmuls(width: int, rows: int, seeds: int) -> tuple[list[TimedLoop], float]:
    """Returns matmuls of the shapes that dominate an update, in one or two ways, and the faster way's speed.

    On a CPU each device computes the matmuls of one seed at a time, or all cores share them. The faster way
    gives the machine's rate. On an accelerator the matmuls of all seeds are computed at once.

    Args:
        width: width of hidden layers.
        rows: batch size of one matmul in one seed's update.
    """
    rows *= 1 if jax.default_backend() == "cpu" else seeds
    meshes = {mesh.size: mesh for mesh in (seed_mesh(seeds), seed_mesh(1))}
    chains = [timed_loops.matmuls(width, rows, mesh) for mesh in meshes.values()]
    return chains, max(timed_loops.time_call(c).speed for c in chains)


def _median(timings: list[Timing]) -> float:
    return statistics.median(t.speed for t in timings)


def median_ratio(timings: list[Timing], others: list[Timing]) -> float:
    """Returns the median ratio of speeds of the same repeat, whose calls saw the same noise."""
    return statistics.median(a.speed / b.speed for a, b in zip(timings, others, strict=True))


def peak_bytes() -> int:
    """Returns the peak memory so far: of the process on CPU, of the fullest device elsewhere."""
    if jax.default_backend() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())
