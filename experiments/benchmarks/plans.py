"""Measures the time that planning takes: `python experiments/benchmark.py plans`.

Each algorithm has the hyperparameters that `run.py` would give it, and untrained networks, whose plans take
as long as those of trained ones. Every algorithm and preset is measured in a process of its own, for several
numbers of episodes that plan together, as an evaluation's do.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from baselines import REGISTRY
from envs_mjx.base import AbstractEnv
from envs_mjx.registry import make
from envs_mjx.registry import parse as parse_env
from experiments.benchmarks.evaluation import physics_loop
from experiments.benchmarks.harness import compile_for_real, measure_in_process, write_csv
from experiments.benchmarks.timed_loops import TimedLoop, time_call
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.launch.settings import PRESETS, parse_command_line
from mac.algorithm import AbstractAlgorithm
from mac.data.normalize import Normalizer
from mac.errors import UserError, unknown_name
from mac.run.evaluate import Policies, episode_keys, no_past, select_actions
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.report.table import print_tables
from mac.run.segment import init

PROGRAM = "python experiments/benchmark.py plans"
ONE = "--one"  # first flag: measure one algorithm and preset here, and print JSON
PLANNERS = ("tt", "tap", "diffuser", "hd_da")
QUICK: dict[str, Any] = {"hidden": (16, 16), "beams": 4}


@dataclass(frozen=True)
class Args:
    """Measures milliseconds per plan and per executed step; prints tables and writes a CSV file."""

    algos: tuple[str, ...] = tuple(name for name in PLANNERS if name in REGISTRY)
    """algorithms, names in `baselines.REGISTRY`"""
    presets: tuple[str, ...] = PRESETS[1:]
    """settings to measure: paper, laptop"""
    batches: tuple[int, ...] = (1, 16, 60)
    """numbers of episodes that plan together"""
    envs: tuple[str, ...] = ("hopper-medium-replay-v2", "pointmaze-medium-navigate-oraclerep-v0")
    """environments; each algorithm takes the first that it has settings for"""
    repeats: int = 3
    """plans that are timed; figures are medians over them"""
    longest: float = 60.0
    """seconds; a batch whose plan would take longer, judging by the batch before, is left out"""
    out: Path | None = None
    """CSV file to write"""
    quick: bool = False
    """tiny networks and searches, to test that everything runs; the figures mean nothing"""

    def __post_init__(self):
        for name in self.algos:
            if name not in REGISTRY:
                raise unknown_name("--algos", name, REGISTRY)
        for name in self.presets:
            if name not in PRESETS[1:]:
                raise unknown_name("--presets", name, PRESETS[1:])
        for name in self.envs:
            parse_env(name)
        for flag in ("algos", "presets", "batches", "envs"):
            if not getattr(self, flag):
                raise UserError(f"--{flag}: give at least one")
        if min(self.batches) < 1:
            raise UserError(f"--batches={self.batches}: each must be at least 1")
        if self.repeats < 1:
            raise UserError(f"--repeats={self.repeats}: must be at least 1")
        if not self.longest > 0:
            raise UserError(f"--longest={self.longest}: must be positive")


@dataclass(frozen=True)
class PlanRow:
    """Figures of one algorithm, preset and batch, medians over repeats; names are the CSV's columns.

    Attributes:
        env: environment of the shapes and settings.
        batch: episodes that plan together.
        actions: actions that are executed of each plan.
        plan_ms: milliseconds of one call that plans for all episodes.
        step_ms: milliseconds of planning per executed step of all episodes.
        each_ms: milliseconds of planning per executed step of one episode.
        physics_ms: milliseconds of one step of the simulation of all episodes, with random actions.
        share: planning's part of an evaluation, which consists of planning and physics.
        compile_s: seconds by which the first plan takes longer than the second.
        cores: processor time over wall time of planning.
    """

    algo: str
    env: str
    preset: str
    batch: int
    actions: int
    plan_ms: float
    step_ms: float
    each_ms: float
    physics_ms: float
    share: float
    compile_s: float
    cores: float


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(argv), short_of_memory="take smaller --batches", interrupted="nothing was written"
    )


def run(argv: Sequence[str]) -> int:
    """Measures, prints the tables, writes the file; returns the exit status.

    Raises:
        UserError: a flag out of range, no algorithm that fits, or a file that cannot be written.
    """
    if argv[:1] == [ONE]:
        print(json.dumps([vars(row) for row in measure(read_flags(Args, argv[1:], PROGRAM))]))
        return 0
    args = read_flags(Args, argv, PROGRAM)
    rows: list[PlanRow] = []
    for algo in args.algos:
        for preset in args.presets:
            one = replace(args, algos=(algo,), presets=(preset,))
            rows += [PlanRow(**row) for row in measure_in_process(f"{algo}, {preset}", ["plans", ONE], one)]
    if not rows:
        raise UserError("nothing was measured, for the reasons above; choose other --algos or --envs")
    print_tables(table(rows))
    if args.out is not None:
        write_csv(args.out, rows, ["experiments/benchmark.py", "plans", *argv])
        print(args.out)
    return 0


def measure(args: Args) -> list[PlanRow]:
    """Measures the first algorithm and preset for all batches; prints notes if it has no settings."""
    reasons = []
    for name in args.envs:
        try:
            algo, env = planner_of(args, name)
        except UserError as error:
            reasons.append(f"note: {args.algos[0]} is not measured: {error}")
            continue
        return measure_batches(args, algo, env)
    print("\n".join(reasons), file=sys.stderr)
    return []


def planner_of(args: Args, name: str) -> tuple[AbstractAlgorithm, AbstractEnv]:
    """Returns the first algorithm as `run.py` would train it, and its environment.

    Raises:
        UserError: it has no settings, or is not for such an environment.
    """
    algo, env = args.algos[0], make(name, "c")
    settings, _ = parse_command_line(["--algo", algo, "--env", name, "--preset", args.presets[0]])
    hp = settings.hp
    if args.quick:
        known = {field.name for field in fields(hp)}
        hp = replace(hp, **{key: value for key, value in QUICK.items() if key in known})
    return REGISTRY[algo].algorithm(hp, env.spec, settings.steps), env


def measure_batches(args: Args, algo: AbstractAlgorithm, env: AbstractEnv) -> list[PlanRow]:
    """Measures all batches, from the smallest on."""
    compile_for_real()
    rows: list[PlanRow] = []
    for batch in sorted(args.batches):
        if rows and rows[-1].plan_ms * batch / rows[-1].batch > 1000 * args.longest:
            print(f"note: {args.algos[0]}, batch {batch}: its plan would take too long", file=sys.stderr)
            break
        rows.append(measure_batch(args, algo, env, batch))
    return rows


def measure_batch(args: Args, algo: AbstractAlgorithm, env: AbstractEnv, batch: int) -> PlanRow:
    """Measures one batch."""
    plan, actions, compile_s = plan_loop(algo, batch)
    timings = [time_call(plan) for _ in range(args.repeats)]
    plan_ms = 1000 / float(np.median([timing.speed for timing in timings]))
    physics = physics_loop(env, batch)
    time_call(physics)
    physics_ms = 1000 / max(time_call(physics).speed for _ in range(3))
    step_ms = plan_ms / actions
    return PlanRow(
        algo=args.algos[0],
        env=env.spec.name,
        preset=args.presets[0],
        batch=batch,
        actions=actions,
        plan_ms=plan_ms,
        step_ms=step_ms,
        each_ms=step_ms / batch,
        physics_ms=physics_ms,
        share=step_ms / (step_ms + physics_ms),
        compile_s=compile_s,
        cores=float(np.median([timing.cores for timing in timings])),
    )


def plan_loop(algo: AbstractAlgorithm, batch: int) -> tuple[TimedLoop, int, float]:
    """Returns a loop of one plan for each of `batch` episodes of one seed, how many actions it gives, and the
    seconds to compile it."""
    state = init(algo, seed_mesh(1), seed_keys(0, 1))
    width = algo.env.obs_dim
    policies = Policies(algo, Normalizer(jnp.zeros(width), jnp.ones(width)), state.for_acting())
    shape = 1, batch
    numbers = jnp.arange(batch)
    _, keys = episode_keys(seed_keys(0, 1), jnp.ones_like(numbers), numbers)
    obs = jnp.zeros((*shape, width))
    goal = None if algo.env.goal_dim is None else jnp.zeros((*shape, algo.env.goal_dim))
    past = no_past(algo, shape)
    if past is not None:
        past = replace(past, valid=jnp.ones_like(past.valid))
    decide, decision = eqx.filter_jit(select_actions), jnp.zeros(shape, jnp.int32)

    def plan() -> Any:
        return decide(policies, obs, goal, keys, decision, past)

    began = time.perf_counter()
    actions = jax.block_until_ready(plan()).shape[2]
    first = time.perf_counter() - began
    return TimedLoop(plan, 1.0), actions, max(first - 1 / time_call(TimedLoop(plan, 1.0)).speed, 0.0)


def table(rows: Sequence[PlanRow]) -> Table:
    """Returns a table of the main figures."""
    title = (
        "milliseconds per plan and per executed step of all episodes, and planning's share of an evaluation"
    )
    shown = Table("algorithm", "environment", "preset", title=title, title_justify="left")
    for head in ("batch", "actions", "plan ms", "step ms", "each ms", "physics ms", "share", "compile s"):
        shown.add_column(head, justify="right")
    for r in rows:
        figures = (f"{x:.3g}" for x in (r.plan_ms, r.step_ms, r.each_ms, r.physics_ms))
        last = f"{r.share:.0%}", f"{r.compile_s:.1f}"
        shown.add_row(r.algo, r.env, r.preset, str(r.batch), str(r.actions), *figures, *last)
    return shown
