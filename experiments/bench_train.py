"""How fast training is: our segment beside a plain loop, beside the machine's matrix products."""

import resource
import statistics
import sys
from dataclasses import dataclass

import jax

from experiments import contenders
from experiments.contenders import Contender, Timing
from mac.config import Config
from mac.mac import MAC
from mac.run import segment as loop
from mac.types import EnvSpec

SPEC = EnvSpec("shapes of cube-single", 28, 5, None, (1,), 200, 0.05)
EXPECTED_SHARE = 0.6  # of the matrix-product rate; only sizes the turns
LEAST_UPDATES = 4  # per seed and turn: in a run, what a call itself costs is spread over many


@dataclass(frozen=True)
class TrainRow:
    """Figures of one configuration, medians over turns; the names are the columns of the CSV file.

    Attributes:
        updates: updates of each seed in one turn.
        rate: seed-updates per second of the segment; `plain_rate` is the plain loop's.
        ratio: of the two, turn by turn.
        gflop: operations of the matrix products in one update of one seed, in 10^9.
        product_gflops: the machine's rate of such products, in 10^9 per second.
        share: of that rate that the segment reaches, turn by turn.
        compile_s: seconds to compile the segment; `plain_compile_s` the plain loop's update.
        peak_mb: peak memory, 10^6 bytes: of the whole process on CPU, of the device elsewhere, before
            the plain loop exists.
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


def measure_training(cfg: Config, seeds: int, *, rows: int, seconds: float, rounds: int) -> TrainRow:
    """Measures training of MAC as `cfg` says.

    Args:
        rows: rows of the random dataset.
        seconds: time that each contender is measured for, about; at least `LEAST_UPDATES` updates a turn.
        rounds: turns that this time is cut into.
    """
    algo, mesh = MAC(cfg, SPEC), loop.seed_mesh(seeds)
    window = contenders.random_window(SPEC, rows, cfg.chunk)
    flop = contenders.update_flops(algo, window)
    chains = machine_products(cfg, seeds)
    turn_s, speed = seconds / rounds, max(contenders.time_turn(c).speed for c in chains)

    updates = max(LEAST_UPDATES, round(turn_s * EXPECTED_SHARE * speed / (flop * seeds)))
    work = contenders.Work(algo, window, seeds, updates, flop)
    segment = contenders.segment(work, mesh)
    contenders.time_turn(segment)
    peak = peak_bytes()  # before the plain loop adds to it
    plain = contenders.plain_loop(work)
    chains = {f"product{i}": c.times(max(1, round(turn_s * speed / c.work))) for i, c in enumerate(chains)}
    taken = contenders.take_turns({"segment": segment, "plain": plain, **chains}, rounds)

    ours, usual = taken["segment"], taken["plain"]
    product = [max(turns) for turns in zip(*(taken[name] for name in chains), strict=True)]
    return TrainRow(
        width=cfg.hidden[0],
        seeds=seeds,
        batch=cfg.batch,
        devices=mesh.size,
        updates=updates,
        rate=_median(ours) / flop,
        plain_rate=_median(usual) / flop,
        ratio=median_ratio(ours, usual),
        gflop=flop / 1e9,
        product_gflops=_median(product) / 1e9,
        share=median_ratio(ours, product),
        compile_s=segment.compile_s,
        plain_compile_s=plain.compile_s,
        peak_mb=peak / 1e6,
        cores=statistics.median(t.cores for t in ours),
        plain_cores=statistics.median(t.cores for t in usual),
        product_cores=statistics.median(t.cores for t in product),
    )


def machine_products(cfg: Config, seeds: int) -> list[Contender]:
    """Products of the shapes that dominate an update, those of the candidates, in one or two ways.

    On a CPU each device computes them for one seed at a time, or all cores share them: the better of
    the two is the machine's rate. On an accelerator they are computed for all seeds at once.
    """
    rows = cfg.batch * cfg.candidates * (1 if jax.default_backend() == "cpu" else seeds)
    meshes = {mesh.size: mesh for mesh in (loop.seed_mesh(seeds), loop.seed_mesh(1))}
    return [contenders.products(cfg.hidden[0], rows, mesh) for mesh in meshes.values()]


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
