"""Scaling of one run over devices and hosts: `python experiments/benchmark.py hosts`.

Without `--measure`: the run's segment is compiled for 1 to 64 virtual devices that share the batch of each
seed. What passes between them in an update is read from the compiled program. With `--measure`: one and two
processes of this machine train the same work (strong scaling) and twice the work (weak scaling). They share
the machine's cores, so processor time per example tells more than the rate.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments.benchmarks import timed_loops
from experiments.benchmarks.harness import BENCH, as_flags, write_csv
from experiments.benchmarks.training import SPEC
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from mac.batch_axis import BATCH
from mac.config import Config
from mac.errors import UserError
from mac.mac import MAC
from mac.run import hosts, referee
from mac.run.mesh import ALL, SEED, mesh_shape, place, run_mesh, seed_keys
from mac.run.report.table import print_tables
from mac.run.segment import init, segment

PROGRAM = "python experiments/benchmark.py hosts"
WORKER = "--worker"  # first word of a process that `--measure` starts
GOALS = SPEC._replace(goal_dim=3, goal_columns=(19, 20, 21))
"""Shapes of cube-single's goal-conditioned environment: goals are the cube's position."""


@dataclass(frozen=True)
class Args:
    """Reads from compiled programs what devices exchange, or measures two processes; writes a CSV file."""

    devices: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """numbers of devices in all"""
    widths: tuple[int, ...] = (512,)
    """widths of the four hidden layers of every network"""
    seeds: int = 1
    """seeds of the run; devices that they leave over share the batch of each"""
    batch: int = 1024
    """chunks per update and seed"""
    measure: bool = False
    """measure one and two processes instead"""
    updates: int = 10
    """with --measure: updates of a call, of which the median of three is taken"""
    out: Path | None = None
    """CSV file to write"""

    def __post_init__(self):
        for name in ("seeds", "batch", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        for name in ("devices", "widths"):
            if min(getattr(self, name), default=0) < 1:
                raise UserError(f"--{name}: give at least one number, each at least 1")


@dataclass(frozen=True)
class Exchanged:
    """What one update passes between devices; names are the CSV file's columns.

    Attributes:
        seed_axis, batch_axis: devices over which seeds are spread, and that share the batch of each.
        examples: of the batch, on each device.
        collectives: operations between devices in an update.
        in_loops: of these, those within a loop of the update, which would be executed many times.
        kinds: of operations.
        payload_mb: 10^6 bytes that they combine, of each seed on a device.
        networks_mb: 10^6 bytes of the networks that gradients train, of one seed.
        ring_mb: 10^6 bytes that each device sends and receives if sums pass around a ring.
        gflop: operations of all matrix products of an update, per device.
    """

    width: int
    batch: int
    seeds: int
    devices: int
    seed_axis: int
    batch_axis: int
    examples: int
    collectives: int
    in_loops: int
    kinds: str
    payload_mb: float
    networks_mb: float
    ring_mb: float
    gflop: float


@dataclass(frozen=True)
class Scaling:
    """One measurement; names are the CSV file's columns.

    Attributes:
        work: what grows with the processes: nothing (`strong`), seeds, or the batch.
        rate: updates per second, of all seeds together.
        examples: of all batches, per second.
        cpu_us: processor time of all processes per example, microseconds.
        cores: processor time over wall time, of all processes together.
    """

    work: str
    processes: int
    seeds: int
    batch: int
    batch_axis: int
    width: int
    rate: float
    examples: float
    cpu_us: float
    cores: float


# What is exchanged.


class Collective(NamedTuple):
    """An operation between devices: its kind, bytes of its result, and the loops that it is within."""

    kind: str
    bytes: int
    loops: int


_SIZES = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f64": 8, "s64": 8}
_OPERATION = re.compile(
    r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def collectives(text: str) -> Iterator[Collective]:
    """Yields the operations between devices in the text of a compiled program."""
    for line in text.splitlines():
        if match := _OPERATION.search(line):
            shapes = re.findall(r"\b(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                _SIZES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes
            )
            name = re.search(r'op_name="([^"]*)"', line)
            yield Collective(match[2], size, name[1].count("while/body") if name else 0)


def exchanged(width: int, batch: int, seeds: int, devices: int) -> Exchanged:
    """Compiles one update of every seed for so many of this process's devices."""
    algo = MAC(Config(batch=batch, hidden=(width,) * 4), GOALS)
    shape = mesh_shape(seeds, batch, devices)
    grid = np.asarray(jax.devices()[: shape[0] * shape[1]], object).reshape(shape)
    mesh = Mesh(grid, ("seed", BATCH), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    window = timed_loops.random_window(GOALS, 2 * EPISODE_ROWS, algo.cfg.chunk)
    args = arguments(algo, mesh, window, seeds, 1)
    text = segment.lower(algo, mesh, *args).compile().as_text() or ""
    # An update is in the loops over updates and over a device's seeds; metrics are collected outside.
    found = [each for each in collectives(text) if each.loops]
    size = sum(each.bytes for each in found)
    nets = jax.eval_shape(algo.init, jax.eval_shape(lambda: jax.random.key(0))).nets
    return Exchanged(
        width, batch, seeds, shape[0] * shape[1], *shape, batch // shape[1],
        collectives=len(found),
        in_loops=sum(each.loops > 2 for each in found),
        kinds=" ".join(sorted({each.kind for each in found})) or "none",
        payload_mb=size / 1e6,
        networks_mb=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nets)) / 1e6,
        ring_mb=2 * (shape[1] - 1) / shape[1] * size / 1e6,
        gflop=timed_loops.update_flops(algo, window) * seeds / (shape[0] * shape[1]) / 1e9,
    )  # fmt: skip


def arguments(algo: MAC, mesh: Mesh, window: Any, seeds: int, updates: int) -> tuple[Any, ...]:
    """Arguments of a segment after the algorithm and the mesh, all in their places."""
    keys = place(mesh, seed_keys(0, seeds), SEED)
    steps = place(mesh, np.arange(updates, dtype=np.int32), ALL)
    return place(mesh, window, ALL), keys, steps, init(algo, mesh, keys)


# Measured.


def measure(args: Args) -> list[Scaling]:
    """Measures one process, and two with the same work, twice the seeds, and twice the batch."""
    kinds = [("strong", 1, 1, 1), ("strong", 2, 1, 1), ("seeds", 2, 2, 1), ("batch", 2, 1, 2)]
    return [
        in_processes(work, count, replace(args, seeds=seeds, batch=times * args.batch))
        for work, count, seeds, times in kinds
    ]


def in_processes(work: str, count: int, args: Args) -> Scaling:
    """Measures `count` processes of this machine, one device each.

    Raises:
        UserError: one of them failed.
    """
    port = referee.free_port()
    words = [sys.executable, str(BENCH), "hosts", WORKER]
    given = as_flags(replace(args, widths=args.widths[:1], measure=False))
    running = [
        subprocess.Popen(
            [*words, f"127.0.0.1:{port},{number},{count}", *given], stdout=subprocess.PIPE, text=True
        )
        for number in range(count)
    ]
    said = [each.communicate()[0] for each in running]
    if any(each.returncode for each in running):
        raise UserError(f"{count} processes: one failed; see the lines above")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    wall, spent = max(each["wall"] for each in found), sum(each["cpu"] for each in found)
    updates, examples = args.updates * args.seeds, args.updates * args.seeds * args.batch
    return Scaling(
        work, count, args.seeds, args.batch, found[0]["batch_axis"], args.widths[0],
        rate=updates / wall, examples=examples / wall, cpu_us=1e6 * spent / examples, cores=spent / wall,
    )  # fmt: skip


def worker(place: hosts.Place, args: Args) -> dict[str, Any]:
    """Trains as one of the processes; returns seconds of a call, and of this process's processor time."""
    jax.config.update("jax_num_cpu_devices", 1)
    if place.count > 1:
        hosts.start(place)
    algo = MAC(Config(batch=args.batch, hidden=(args.widths[0],) * 4), GOALS)
    mesh = run_mesh(args.seeds, args.batch)
    window = timed_loops.random_window(GOALS, 2 * EPISODE_ROWS, algo.cfg.chunk)
    window, keys, steps, state = arguments(algo, mesh, window, args.seeds, args.updates)
    program = segment.lower(algo, mesh, window, keys, steps, state).compile()
    taken = []
    for _ in range(4):  # the first connects the processes
        hosts.gather(b"")
        wall, spent = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(program(window, keys, steps, state))
        taken.append((time.perf_counter() - wall, time.process_time() - spent))
    wall, spent = sorted(taken[1:])[1]
    return {"wall": wall, "cpu": spent, "batch_axis": dict(mesh.shape).get(BATCH, 1)}


# The command.


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv),
        short_of_memory="take smaller --widths or a smaller --batch",
        interrupted="nothing was written",
    )


def run(argv: Sequence[str]) -> int:
    """Compiles or measures, prints a table and writes the file; returns the exit status."""
    if argv[:1] == [WORKER]:
        print(json.dumps(worker(hosts.parse_place(argv[1]), read_flags(Args, argv[2:], PROGRAM))))
        return 0
    args = read_flags(Args, argv, PROGRAM)
    if args.measure:
        rows: Sequence[Any] = measure(args)
    else:
        jax.config.update("jax_num_cpu_devices", max(args.devices))
        rows = [exchanged(w, args.batch, args.seeds, n) for w in args.widths for n in args.devices]
    print_tables(table(rows))
    if args.out is not None:
        write_csv(args.out, rows, ["experiments/benchmark.py", "hosts", *argv])
        print(args.out)
    return 0


def table(rows: Sequence[Any]) -> Table:
    """Returns a table of rows, which have the same columns."""
    shown = Table()
    for name in vars(rows[0]):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in vars(row).values()))
    return shown
