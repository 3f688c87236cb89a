"""Measures the stepping speed of the physics engines: `python experiments/benchmark.py envs`.

Every environment and batch is measured in a process of its own, where calls of the engines are interleaved:
machines are noisy, and compared measurements must see the same noise. The mazes of one walker share a
process, because the cost of a step should not depend on the size of the maze. Actions are uniform random. An
engine that cannot run on this machine is left out with a note.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.locomotion.walkers import GYM, MAZES
from envs_mjx.manipulation.scenes import FAMILIES
from envs_mjx.registry import make
from experiments.benchmarks.harness import compile_for_real, measure_in_process, write_csv
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from mac.errors import UserError
from mac.run.report.table import print_tables

PROGRAM = "python experiments/benchmark.py envs"
ONE = "--one"  # first flag: measure one environment and batch here, and print JSON
STEPS = 5  # control steps per call
_PLANES = tuple(name for name in GYM if "-" not in name)
NAMES = (*FAMILIES, *MAZES, *_PLANES)
"""Scenes and walkers."""


@dataclass(frozen=True)
class Args:
    """Measures control steps per second of every environment, engine and batch."""

    names: tuple[str, ...] = tuple(FAMILIES)
    """scenes and walkers: cube-single ... puzzle-4x6, pointmaze-medium ... humanoidmaze-giant, hopper,
    walker2d, halfcheetah; by default the scenes"""
    engines: tuple[str, ...] = ("c", "mjx")
    """physics engines; the others are compared with the first"""
    batches: tuple[int, ...] = (1, 16, 64, 256)
    """environments stepped together"""
    seconds: float = 4.0
    """seconds for which each engine is measured; large batches take longer"""
    out: Path | None = None
    """CSV file to write"""

    def check(self) -> None:
        """Raises UserError for values out of range."""
        for name in self.names:
            if name not in NAMES:
                raise UserError(f"--names {name}: unknown scene or walker; choose from {', '.join(NAMES)}")
        if min(self.batches, default=0) < 1:
            raise UserError(f"--batches={self.batches}: give at least one number, each at least 1")
        if not self.engines:
            raise UserError("--engines: give at least one")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"--seconds={self.seconds}: must be positive and finite")


@dataclass(frozen=True)
class EnvRow:
    """Figures of one environment, engine and batch; the names are the columns of the CSV file.

    Attributes:
        steps: control steps of all environments per second, median over calls.
        ratio: `steps` divided by those of the first engine.
        maze_ratio: `steps` divided by those of the same engine in the walker's first maze; 1 elsewhere.
        compile_s: seconds to trace and compile a step of the batch, nothing cached.
        state_kb: kilobytes that one environment's state takes.
        scratch_kb: kilobytes of temporary memory that stepping takes, per environment.
        dropped: contacts dropped because the contact buffer was full, over all control steps measured.
    """

    name: str
    engine: str
    batch: int
    steps: float
    ratio: float
    maze_ratio: float
    compile_s: float
    state_kb: float
    scratch_kb: float
    dropped: int


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv), short_of_memory="take smaller --batches", interrupted="nothing was written"
    )


def run(argv: Sequence[str]) -> int:
    """Measures, prints the table, writes the file; returns the exit status."""
    measure_in_process = argv[:1] == [ONE]
    args = read_flags(Args, argv[measure_in_process:], PROGRAM)
    args.check()
    if measure_in_process:
        print(json.dumps([vars(row) for row in measure(args, args.names, args.batches[0])]))
        return 0
    rows = [row for group in groups(args.names) for n in args.batches for row in in_process(args, group, n)]
    print_tables(table(rows))
    if args.out is not None:
        write_csv(args.out, rows, ["experiments/benchmark.py", "envs", *argv])
        print(args.out)
    return 0


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups the names that are measured in one process: mazes of one walker, everything else alone."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        key = name.split("maze-")[0] if name in MAZES else name
        found[key] = (*found.get(key, ()), name)
    return list(found.values())


def in_process(args: Args, names: Sequence[str], batch: int) -> list[EnvRow]:
    """Measures some environments at one batch size, in a process of its own.

    Raises:
        UserError: the measurement failed.
    """
    what = f"{', '.join(names)}, batch {batch}"
    rows = measure_in_process(what, ["envs", ONE], replace(args, names=tuple(names), batches=(batch,)))
    return [EnvRow(**row) for row in rows]


def dataset(name: str) -> str:
    """Returns the name of an environment of a scene or walker."""
    if name in MAZES:
        return f"{name}-navigate-oraclerep-v0"
    return f"{name}-medium-v2" if name in _PLANES else f"{name}-play-oraclerep-v0"


def measure(args: Args, names: Sequence[str], batch: int) -> list[EnvRow]:
    """Measures every engine in every environment, calls interleaved."""
    compile_for_real()
    runners = []
    for name in names:
        for engine in args.engines:
            try:
                runners.append(Runner(name, engine, make(dataset(name), engine), batch))
            except UserError as error:
                print(f"note: {name} is not measured on engine {engine}: {error}", file=sys.stderr)
    if not runners:
        raise UserError(f"none of the engines {', '.join(args.engines)} runs {', '.join(names)}")
    end = time.perf_counter() + args.seconds * len(runners)
    while time.perf_counter() < end or not runners[0].seconds:
        for runner in runners:
            runner.time_call()
    rates = {(r.name, r.engine): batch * STEPS / float(np.median(r.seconds)) for r in runners}
    return [row_of(runner, rates) for runner in runners]


def row_of(runner: "Runner", rates: dict[tuple[str, str], float]) -> EnvRow:
    """Returns the figures of one runner, given the steps per second of all runners of its process."""
    rate, batch = rates[runner.name, runner.engine], runner.batch
    return EnvRow(
        name=runner.name,
        engine=runner.engine,
        batch=batch,
        steps=rate,
        ratio=rate / next(r for (name, _), r in rates.items() if name == runner.name),
        maze_ratio=rate / next(r for (_, engine), r in rates.items() if engine == runner.engine),
        compile_s=runner.compile_s,
        state_kb=runner.state_bytes / batch / 1e3,
        scratch_kb=runner.scratch_bytes / batch / 1e3,
        dropped=runner.dropped(),
    )


class Runner:
    """Batch of environments on one engine, stepped under random actions."""

    def __init__(self, name: str, engine: str, env: AbstractEnv, batch: int):
        self.name, self.engine, self.env, self.batch = name, engine, env, batch
        self.seconds: list[float] = []
        tasks = jnp.arange(batch) % len(env.spec.tasks) + 1
        reset = eqx.filter_jit(lambda env, keys: jax.vmap(env.reset)(keys, tasks))
        self.state: EnvState = reset(env, jr.split(jr.key(0), batch))
        self.keys = iter(range(sys.maxsize))
        began = time.perf_counter()
        self.step = eqx.filter_jit(_advance).lower(env, self.state, self._actions()).compile()
        self.compile_s = time.perf_counter() - began
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        memory = self.step.compiled.memory_analysis()
        self.scratch_bytes = int(getattr(memory, "temp_size_in_bytes", 0))
        self._run()

    def time_call(self) -> None:
        """Times one call."""
        began = time.perf_counter()
        self._run()
        self.seconds.append(time.perf_counter() - began)

    def dropped(self) -> int:
        """Returns the contacts dropped so far."""
        return int(self.state.dropped.sum())

    def _run(self) -> None:
        self.state = jax.block_until_ready(self.step(self.env, self.state, self._actions()))

    def _actions(self) -> Float[Array, "n E A"]:
        shape = (STEPS, self.batch, self.env.spec.action_dim)
        return jr.uniform(jr.key(next(self.keys)), shape, minval=-1.0, maxval=1.0)


def _advance(env: AbstractEnv, state: EnvState, actions: Float[Array, "n E A"]) -> EnvState:
    """Takes control steps of every environment; episodes never end."""

    def body(state: EnvState, action: Float[Array, "E A"]) -> tuple[EnvState, None]:
        state = eqx.tree_at(lambda s: s.done, state, jnp.zeros_like(state.done))
        return jax.vmap(env.step)(state, action), None

    return jax.lax.scan(body, state, actions)[0]


def table(rows: Sequence[EnvRow]) -> Table:
    """Returns a table of the main figures."""
    shown = Table(title="control steps per second of all environments together", title_justify="left")
    heads = "environment", "engine", "batch", "steps/s", "ratio", "of maze", "compile s", "state kB"
    heads = *heads, "scratch kB"
    for head in (*heads, "dropped"):
        shown.add_column(head, justify="left" if head in heads[:2] else "right")
    for r in rows:
        figures = f"{r.steps:,.0f}", f"{r.ratio:.2g}", f"{r.maze_ratio:.2g}", f"{r.compile_s:.1f}"
        sizes = f"{r.state_kb:,.0f}", f"{r.scratch_kb:,.0f}", str(r.dropped)
        shown.add_row(r.name, r.engine, str(r.batch), *figures, *sizes)
    return shown
