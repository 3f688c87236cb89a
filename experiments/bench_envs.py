"""How fast the physics engines step each environment: `python experiments/bench.py envs`.

Every environment and batch is measured in a process of its own, where the engines take turns: machines
are noisy, and what is compared must see the same noise. Actions are uniform random. An engine that
cannot run here is left out with a note.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.registry import make
from envs_mjx.scenes import FAMILIES
from experiments.measured import write_csv
from mac.errors import UserError

ONE = "--one"  # first flag: measure one environment and batch here, and print JSON
STEPS = 5  # control steps per call


@dataclass(frozen=True)
class Args:
    """Measures control steps per second of every environment, engine and batch."""

    names: tuple[str, ...] = tuple(FAMILIES)
    """scenes: cube-single ... cube-octuple, scene, puzzle-3x3 ... puzzle-4x6"""
    engines: tuple[str, ...] = ("c", "mjx")
    """physics engines, compared in turns; the first is what the others are compared with"""
    batches: tuple[int, ...] = (1, 16, 64, 256)
    """environments stepped together"""
    seconds: float = 4.0
    """seconds that each engine is measured for; large batches take longer"""
    out: Path | None = None
    """CSV file to write"""

    def check(self) -> None:
        """Raises UserError for values that make no sense."""
        for name in self.names:
            if name not in FAMILIES:
                raise UserError(f"--names {name}: there is no such scene; choose from {', '.join(FAMILIES)}")
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
        steps: control steps of all environments per second, median over turns.
        ratio: `steps` over those of the first engine.
        compile_s: seconds to trace and compile a step of the batch, nothing cached.
        state_kb: kilobytes that one environment's state takes.
        scratch_kb: kilobytes of memory that stepping takes beside, per environment.
        dropped: contacts left out, over all control steps measured.
    """

    name: str
    engine: str
    batch: int
    steps: float
    ratio: float
    compile_s: float
    state_kb: float
    scratch_kb: float
    dropped: int


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    try:
        alone = argv[:1] == [ONE]
        args = tyro.cli(Args, args=list(argv[alone:]), prog="python experiments/bench.py envs")
        args.check()
        if alone:
            print(json.dumps([vars(row) for row in measure(args, args.names[0], args.batches[0])]))
            return 0
        rows = [row for name in args.names for n in args.batches for row in in_process(args, name, n)]
        Console(width=110).print(table(rows))
        if args.out is not None:
            write_csv(args.out, rows, ["experiments/bench.py", "envs", *argv])
            print(args.out)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def in_process(args: Args, name: str, batch: int) -> list[EnvRow]:
    """The figures of one environment and batch, measured in a process of its own.

    Raises:
        UserError: it failed.
    """
    print(f"measuring {name}, batch {batch}", file=sys.stderr, flush=True)
    program = str(Path(__file__).with_name("bench.py"))
    command = [sys.executable, program, "envs", ONE, "--names", name, "--batches", str(batch)]
    command += ["--seconds", str(args.seconds), "--engines", *args.engines]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name}, batch {batch}: status {done.returncode}; see the lines above")
    return [EnvRow(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def measure(args: Args, name: str, batch: int) -> list[EnvRow]:
    """Measures every engine by turns."""
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are among the figures
    runners = []
    for engine in args.engines:
        try:
            runners.append(Runner(engine, make(f"{name}-play-oraclerep-v0", engine), batch))
        except UserError as error:
            print(f"note: {name} is not measured on engine {engine}: {error}", file=sys.stderr)
    if not runners:
        raise UserError(f"none of the engines {', '.join(args.engines)} runs {name}")
    end = time.perf_counter() + args.seconds * len(runners)
    while time.perf_counter() < end or not runners[0].seconds:
        for runner in runners:
            runner.turn()
    rates = [batch * STEPS / float(np.median(runner.seconds)) for runner in runners]
    return [
        EnvRow(
            name=name,
            engine=runner.engine,
            batch=batch,
            steps=rate,
            ratio=rate / rates[0],
            compile_s=runner.compile_s,
            state_kb=runner.state_bytes / batch / 1e3,
            scratch_kb=runner.scratch_bytes / batch / 1e3,
            dropped=runner.dropped(),
        )
        for runner, rate in zip(runners, rates, strict=True)
    ]


class Runner:
    """One engine's batch of environments, stepped under random actions for ever."""

    def __init__(self, engine: str, env: AbstractEnv, batch: int):
        self.engine, self.env, self.batch = engine, env, batch
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

    def turn(self) -> None:
        """Times one call."""
        began = time.perf_counter()
        self._run()
        self.seconds.append(time.perf_counter() - began)

    def dropped(self) -> int:
        """Contacts left out so far."""
        return int(self.state.dropped.sum())

    def _run(self) -> None:
        self.state = jax.block_until_ready(self.step(self.env, self.state, self._actions()))

    def _actions(self) -> Float[Array, "n E A"]:
        shape = (STEPS, self.batch, self.env.spec.action_dim)
        return jr.uniform(jr.key(next(self.keys)), shape, minval=-1.0, maxval=1.0)


def _advance(env: AbstractEnv, state: EnvState, actions: Float[Array, "n E A"]) -> EnvState:
    """Control steps of every environment; none ever stops."""

    def body(state: EnvState, action: Float[Array, "E A"]) -> tuple[EnvState, None]:
        state = eqx.tree_at(lambda s: s.done, state, jnp.zeros_like(state.done))
        return jax.vmap(env.step)(state, action), None

    return jax.lax.scan(body, state, actions)[0]


def table(rows: Sequence[EnvRow]) -> Table:
    """What a reader wants of the figures."""
    shown = Table(title="control steps per second of all environments together", title_justify="left")
    heads = "environment", "engine", "batch", "steps/s", "ratio", "compile s", "state kB", "scratch kB"
    for head in (*heads, "dropped"):
        shown.add_column(head, justify="left" if head in heads[:2] else "right")
    for r in rows:
        figures = f"{r.steps:,.0f}", f"{r.ratio:.2g}", f"{r.compile_s:.1f}"
        sizes = f"{r.state_kb:,.0f}", f"{r.scratch_kb:,.0f}", str(r.dropped)
        shown.add_row(r.name, r.engine, str(r.batch), *figures, *sizes)
    return shown
