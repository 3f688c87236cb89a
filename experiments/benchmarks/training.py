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
from mac.run import segment as loop
from mac.types import EnvSpec, Window

SPEC = EnvSpec("shapes of cube-single", 28, 5, None, (1,), 200, 0.05)
EXPECTED_SHARE = 0.6  # of the matrix-product rate; only sizes the turns
LEAST_UPDATES = 4  # per seed and turn: in a run, what a call itself costs is spread over many


@dataclass(frozen=True)
class TrainRow:
    """Figures of one configuration, medians over turns; the names are the columns of the CSV file.

    Attributes:
        updates: updates of each seed in one turn.
        rate: seed-updates per second of the segment; `plain_rate` is the Python loop's.
        ratio: of the two, turn by turn.
        gflop: operations of the matrix products in one update of one seed, in 10^9.
        product_gflops: the machine's rate of such products, in 10^9 per second.
        share: of that rate that the segment reaches, turn by turn.
        compile_s: seconds to compile the segment; `plain_compile_s` the Python loop's update.
        peak_mb: peak memory, 10^6 bytes: of the whole process on CPU, of the device elsewhere, before
            the Python loop exists.
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


class Compared(NamedTuple):
    """Two ways to train the same, timed in turns with each other.

    Attributes:
        figures: what is known of them, by the names and with the meanings of `TrainRow`'s columns.
        segment: turns of the compiled segment.
        beside: turns of what took turns with them.
    """

    figures: dict[str, Any]
    segment: list[Timing]
    beside: list[list[Timing]]


def measure_training(cfg: Config, seeds: int, *, rows: int, seconds: float, rounds: int) -> TrainRow:
    """Measures training of MAC as `cfg` says.

    Args:
        rows: rows of the random dataset.
        seconds: time that each contender is measured for, about; at least `LEAST_UPDATES` updates a turn.
        rounds: turns that this time is cut into.
    """
    window = timed_loops.random_window(SPEC, rows, cfg.chunk)
    chains, speed = machine_products(cfg.hidden[0], cfg.batch * cfg.candidates, seeds)
    turn_s = seconds / rounds
    chains = [c.times(max(1, round(turn_s * speed / c.work))) for c in chains]
    taken = compare(MAC(cfg, SPEC), window, seeds, speed * turn_s, rounds, chains)
    product = [max(turns) for turns in zip(*taken.beside, strict=True)]
    return TrainRow(
        width=cfg.hidden[0],
        seeds=seeds,
        batch=cfg.batch,
        product_gflops=_median(product) / 1e9,
        share=median_ratio(taken.segment, product),
        product_cores=statistics.median(t.cores for t in product),
        **taken.figures,
    )


def compare(
    algo: AbstractAlgorithm,
    window: Window,
    seeds: int,
    products: float,
    rounds: int,
    beside: Sequence[TimedLoop] = (),
) -> Compared:
    """Measures training by our segment compared with a Python training loop.

    Args:
        products: operations of matrix products that the machine does in the time of a turn.
        rounds: turns of each.
        beside: what else takes turns with them.
    """
    mesh, flop = loop.seed_mesh(seeds), timed_loops.update_flops(algo, window)
    updates = max(LEAST_UPDATES, round(EXPECTED_SHARE * products / (flop * seeds)))
    work = timed_loops.Work(algo, window, seeds, updates, flop)
    segment = timed_loops.segment(work, mesh)
    timed_loops.time_turn(segment)
    peak = peak_bytes()  # before the Python loop adds to it
    plain = timed_loops.plain_loop(work)
    others = {f"beside{i}": c for i, c in enumerate(beside)}
    taken = timed_loops.take_turns({"segment": segment, "plain": plain, **others}, rounds)
    ours, usual = taken["segment"], taken["plain"]
    figures = {
        "devices": mesh.size,
        "updates": updates,
        "rate": _median(ours) / flop,
        "plain_rate": _median(usual) / flop,
        "ratio": median_ratio(ours, usual),
        "gflop": flop / 1e9,
        "compile_s": segment.compile_s,
        "plain_compile_s": plain.compile_s,
        "peak_mb": peak / 1e6,
        "cores": statistics.median(t.cores for t in ours),
        "plain_cores": statistics.median(t.cores for t in usual),
    }
    return Compared(figures, ours, [taken[name] for name in others])


def machine_products(width: int, rows: int, seeds: int) -> tuple[list[TimedLoop], float]:
    """Products of the shapes that dominate an update, in one or two ways, and the speed of the better one.

    On a CPU each device computes them for one seed at a time, or all cores share them: the better of
    the two is the machine's rate. On an accelerator they are computed for all seeds at once.

    Args:
        width: of hidden layers.
        rows: that one seed's update sends through them at a time.
    """
    rows *= 1 if jax.default_backend() == "cpu" else seeds
    meshes = {mesh.size: mesh for mesh in (loop.seed_mesh(seeds), loop.seed_mesh(1))}
    chains = [timed_loops.products(width, rows, mesh) for mesh in meshes.values()]
    return chains, max(timed_loops.time_turn(c).speed for c in chains)


def _median(turns: list[Timing]) -> float:
    return statistics.median(t.speed for t in turns)


def median_ratio(turns: list[Timing], others: list[Timing]) -> float:
    """Median over rounds of the ratio of speeds within a round, which saw the same noise."""
    return statistics.median(a.speed / b.speed for a, b in zip(turns, others, strict=True))


def peak_bytes() -> int:
    """Peak memory so far: of the process on CPU, of the fullest device elsewhere."""
    if jax.default_backend() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())
