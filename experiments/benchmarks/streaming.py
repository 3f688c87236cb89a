"""Measures the cost of rotating windows, compared with data that stay on the device.

    python experiments/benchmarks/streaming.py --rows 100_100_000 --dir /data/scratch

Makes a store of random codes of the requested size, unless one exists. Trains MAC of the laptop preset over
its rotating windows and, interleaved, over one resident window. Both run the same compiled program.
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from baselines import REGISTRY
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from envs_mjx.registry import make
from experiments.benchmarks.harness import write_csv
from experiments.benchmarks.timed_loops import TimedLoop, Timing, time_call, time_interleaved
from experiments.benchmarks.training import median_ratio, peak_bytes
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.launch.dataset import check_writable
from experiments.launch.settings import parse_command_line
from mac.algorithm import AbstractAlgorithm
from mac.data.normalize import fit_minmax
from mac.data.quantize import LARGEST
from mac.data.store import ACTION, EPISODES, OBS, Store, is_store, save_checks, save_meta
from mac.data.window_feed import Resident, Rotating, WindowFeed, plan_rotation
from mac.errors import UserError
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from mac.types import EnvSpec

PROGRAM = "python experiments/benchmarks/streaming.py"
SHARD_EPISODES = 1000


@dataclass(frozen=True)
class Args:
    """Measures training over rotating windows of a large store, compared with one resident window."""

    dir: Path = Path("data")
    """folder for the store, which is kept only with --keep"""
    rows: int = 100_100_000
    """rows of the store"""
    env: str = "puzzle-4x5-play-oraclerep-v0"
    """environment whose shapes are used"""
    seeds: int = 2
    """seeds that train together"""
    window: int = 1_001_000
    """most rows of a window"""
    updates: int = 1000
    """updates per window"""
    windows: int = 2
    """windows per timed call"""
    repeats: int = 3
    """timed calls of each"""
    keep: bool = False
    """leave the store in its folder"""
    out: Path | None = None
    """CSV file to write"""

    def __post_init__(self):
        for name in ("seeds", "window", "updates", "windows", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.rows < EPISODE_ROWS:
            raise UserError(f"--rows={self.rows}: must be at least {EPISODE_ROWS}, an episode")


@dataclass(frozen=True)
class FeedRow:
    """Figures of one measurement, medians over repeats; the names are the columns of the CSV file.

    Attributes:
        gigabytes: size of the store's rows; `window_mb`: of a window's rows, in 10^6 bytes.
        resident_rate: seed-updates per second on one window; `rotating_rate`: on rotating windows.
        ratio: `rotating_rate` over `resident_rate`, median of the ratios of each repeat.
        cpu_ratio: the same for seed-updates per second of processor time.
        wait_share: share of the time on rotating windows that training waited for a window.
        window_s: seconds to read a window and move it to the device, alone.
        peak_mb: peak memory of the process on CPU, of the device elsewhere, 10^6 bytes.
    """

    rows: int
    gigabytes: float
    window_mb: float
    seeds: int
    updates: int
    resident_rate: float
    rotating_rate: float
    ratio: float
    cpu_ratio: float
    wait_share: float
    window_s: float
    peak_mb: float


class Trainer(NamedTuple):
    """Training that continues from call to call, and the windows that feed it."""

    timed: TimedLoop
    feed: WindowFeed


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(read_flags(Args, argv, PROGRAM), argv),
        short_of_memory="take a smaller --window",
        interrupted="the store is left in --dir",
    )


def run(args: Args, argv: Sequence[str]) -> int:
    """Measures, prints, writes the file; returns the exit status."""
    check_writable(args.dir, "--dir")
    settings, _ = parse_command_line(["--env", args.env, "--preset", "laptop", "--seeds", str(args.seeds)])
    spec = make(args.env, "c").spec
    folder = args.dir / f"random-{args.env}-{args.rows}"
    if not is_store(folder):
        began = time.perf_counter()
        make_store(folder, spec, args.rows)
        print(f"store        {folder}, made in {time.perf_counter() - began:.0f} s", flush=True)
    row = measure(args, Store.open(folder), REGISTRY["mac"].algorithm(settings.hp, spec, settings.steps))
    for name, value in vars(row).items():
        print(f"{name:<14} {value:,.4g}" if isinstance(value, float) else f"{name:<14} {value:,}")
    if args.out:
        write_csv(args.out, [row], ["experiments/benchmarks/streaming.py", *argv])
    if not args.keep:
        shutil.rmtree(folder)
    return 0


def measure(args: Args, store: Store, algo: AbstractAlgorithm) -> FeedRow:
    """Trains on rotating windows and, interleaved, on one resident window."""
    mesh = seed_mesh(args.seeds)

    def put(tree: Any) -> Any:
        return place(mesh, tree, ALL)

    plan = plan_rotation(
        store,
        fit_minmax(store.statistics_obs),
        algo.sample,
        rows=args.window,
        updates=args.updates,
        seed=0,
    )
    began = time.perf_counter()
    first = jax.block_until_ready(plan.window(0, put))
    window_s = time.perf_counter() - began
    rotating = trainer(args, algo, mesh, Rotating(plan, put, last=2**31 - 1))
    resident = trainer(args, algo, mesh, Resident(first, put))
    for training in (resident, rotating):
        time_call(training.timed)  # caches warm, threads started
    waited = rotating.feed.waiting
    timings = time_interleaved({"resident": resident.timed, "rotating": rotating.timed}, args.repeats)
    waited = rotating.feed.waiting - waited
    rotating.feed.close()
    one, many = timings["resident"], timings["rotating"]
    size = sum(split.obs.nbytes + split.action.nbytes for split in store.train)
    return FeedRow(
        rows=store.rows,
        gigabytes=size / 1e9,
        window_mb=size / store.rows * plan.room.rows / 1e6,
        seeds=args.seeds,
        updates=args.updates,
        resident_rate=statistics.median(t.speed for t in one),
        rotating_rate=statistics.median(t.speed for t in many),
        ratio=median_ratio(many, one),
        cpu_ratio=median_ratio([per_cpu(t) for t in many], [per_cpu(t) for t in one]),
        wait_share=waited / sum(rotating.timed.work / t.speed for t in many),
        window_s=window_s,
        peak_mb=peak_bytes() / 1e6,
    )


def per_cpu(timing: Timing) -> Timing:
    """Returns the timing with its speed per second of processor time."""
    return Timing(timing.speed / timing.cores, timing.cores)


def trainer(args: Args, algo: AbstractAlgorithm, mesh: Any, feed: WindowFeed) -> Trainer:
    """Returns training over `feed` as `mac.run.train` does it: metrics are read one segment late."""
    keys = place(mesh, seed_keys(0, args.seeds), SEED)
    state = init(algo, mesh, keys)
    program: Callable[..., Any] | None = None
    step, pending = 0, None

    def call() -> Any:
        nonlocal state, step, pending, program
        for _ in range(args.windows):
            window = feed.at(step)
            steps = place(mesh, np.arange(step, step + args.updates, dtype=np.int32), ALL)
            program = program or segment.lower(algo, mesh, window, keys, steps, state).compile()
            state, metrics = program(window, keys, steps, state)
            jax.device_get(pending)
            pending, step = metrics, step + args.updates
        return state

    return Trainer(TimedLoop(call, args.windows * args.updates * args.seeds, 0.0), feed)


def make_store(folder: Path, spec: EnvSpec, rows: int) -> None:
    """Writes a store of random uint16 codes, in shards of a thousand episodes of equal content."""
    rng, episodes = np.random.default_rng(0), rows // EPISODE_ROWS
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    widths = {OBS: spec.obs_dim, ACTION: spec.action_dim}
    most = min(episodes, SHARD_EPISODES) * EPISODE_ROWS
    numbers = {name: rng.integers(0, LARGEST + 1, (most, w), np.uint16) for name, w in widths.items()}
    train = {}
    for i, first in enumerate(range(0, episodes, SHARD_EPISODES)):
        count = min(SHARD_EPISODES, episodes - first)
        rows = count * EPISODE_ROWS
        train[f"train-{i:03d}"] = write_split(
            part / f"train-{i:03d}", numbers[OBS][:rows], numbers[ACTION][:rows]
        )
    val = write_split(part / "val", *(rng.uniform(-1, 1, (10 * EPISODE_ROWS, w)) for w in widths.values()))
    maps = {
        name: {"low": [-1.0] * width, "step": [2 / LARGEST] * width}
        for name, width in (("obs", spec.obs_dim), ("action", spec.action_dim))
    }
    meta = {"env": spec.name, "dtype": "uint16", "codec": maps, "notes": ["random codes"], "statistics": None}
    columns = [spec.obs_dim, spec.action_dim]
    save_meta(part, meta | {"columns": columns, "train": train, "val": val, "sources": []})
    part.rename(folder)


def write_split(folder: Path, obs: np.ndarray, action: np.ndarray) -> int:
    """Writes the arrays of a split, as float32 unless they are codes; returns its rows."""
    folder.mkdir(parents=True)
    stored = [rows if rows.dtype == np.uint16 else rows.astype(np.float32) for rows in (obs, action)]
    for name, rows in zip((OBS, ACTION), stored, strict=True):
        np.save(folder / name, rows)
    first = np.arange(len(obs) // EPISODE_ROWS) * EPISODE_ROWS
    length = np.full(len(first), EPISODE_ROWS)
    np.save(folder / EPISODES, np.stack([first, length], axis=1))
    save_checks(folder, length, stored)
    return len(obs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
