"""Estimates the cost of a run before it starts: sizes, memory, time."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from envs_mjx.base import AbstractEnv
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.cgroup_limits import cores
from mac.data.sampler import sample
from mac.formatting import counted
from mac.free_memory import Memory, free_memory
from mac.ops.replay import ReplaySpec, draw
from mac.run.cost.flops import Operations, operations, sum_operations
from mac.run.cost.hlo_bytes import program_bytes
from mac.run.mesh import ALL, SEED, place, seed_mesh
from mac.run.report.timing import duration
from mac.types import Column, EnvSpec, EpisodeIndex, Window

# Measured on two cores of an AMD EPYC with AVX-512; see docs/benchmarks.md for the commands.
COLLECT_RATE = 800.0  # rows per second and core of the scripted expert
EVAL_RATE = 800.0  # control steps per second and core, policy included
PAPER_ROWS = 100_000_000  # of the datasets with goals in the MAC paper
TRAIN_SHARE = 0.65  # share of the measured matrix-product rate that training reaches


class CostEstimate(NamedTuple):
    """Sizes of a run. Bytes are for all seeds.

    Attributes:
        params: numbers in each network, of one seed.
        parts: operations of one update of one seed, by the algorithm's named scopes; `rollouts` is its share
            of those that fill the imagined replay.
        state_bytes: networks, targets and optimiser.
        replay_bytes: imagined transitions (`AbstractAlgorithm.replay`).
        window_bytes: the dataset, or as much of it as is held at a time.
        args: abstract arguments of `update`, the function that one update of one seed is.
    """

    params: dict[str, int]
    parts: dict[str, Operations]
    state_bytes: int
    replay_bytes: int
    window_bytes: int
    update: Callable[..., Any]
    args: tuple[Any, ...]
    seeds: int


class Compiled(NamedTuple):
    """Facts of the compiled update of one seed, for the device that it was compiled for.

    Attributes:
        scratch: bytes of temporary memory.
        traffic: bytes that it reads and writes (`program_bytes`).
    """

    scratch: int
    traffic: int


class TrainingMemory(NamedTuple):
    """Bytes that training takes.

    Attributes:
        data: the dataset, or as much of it as is held at a time; each device has it.
        state: networks, targets and optimiser, of all seeds.
        scratch: temporary memory of one seed's update.
        seeds: how many there are.
        replay: imagined transitions, of all seeds.
        devices: accelerators among which the seeds are shared out; a CPU is one.
        together: how many seeds are updated at a time, on all devices.
    """

    data: int
    state: int
    scratch: int
    seeds: int
    devices: int
    together: int
    replay: int = 0

    @property
    def peak(self) -> int:
        """The most that one device holds."""
        own = self.state + self.replay + self.together * self.scratch
        return self.data + -(-own // self.devices)


def make_plan(
    algo: AbstractAlgorithm, spec: EnvSpec, rows: int, seeds: int, dtype: str = "float32", held: int = 1
) -> CostEstimate:
    """Sizes of a run, from shapes alone: nothing is compiled or computed and no data is read.

    Args:
        rows: of a window, which is the whole dataset where that stays on the device.
        dtype: how rows are stored.
        held: windows that are on the device at a time.
    """

    def column(width: int) -> Column:
        return Column(jnp.zeros((rows, width), dtype), jnp.zeros(width), jnp.ones(width))

    def window() -> Window:
        reward = jnp.zeros(rows) if spec.goal_dim is None else None
        table, one = jnp.zeros(-(-rows // EPISODE_ROWS), jnp.int32), jnp.zeros((), jnp.int32)
        return Window(
            obs=column(spec.obs_dim),
            action=column(spec.action_dim),
            reward=reward,
            mask=reward,
            episodes=EpisodeIndex(table, table, table, table, one, one),
            return_to_go=reward if algo.sample.return_to_go else None,
        )

    key = jax.eval_shape(lambda: jr.key(0))
    state = jax.eval_shape(algo.init, key)

    data = jax.eval_shape(window)

    update = update_of(algo)
    return CostEstimate(
        params=parameter_counts(state.nets),
        parts=operations(update, data, state, key) | _rollouts(algo, data, state, key),
        state_bytes=seeds * _bytes(state.without_memory()),
        replay_bytes=seeds * _bytes(state.memory),
        # Each device has its own, except that those of a CPU read the same rows.
        window_bytes=held * _bytes(data),
        update=update,
        args=(data, state, key),
        seeds=seeds,
    )


def parameter_counts(nets: Any) -> dict[str, int]:
    """Numbers in each network of `nets`, by its field; absent networks and static fields have none."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nets):
        name = jax.tree_util.keystr(path[:1], simple=True)
        counts[name] = counts.get(name, 0) + int(np.prod(leaf.shape))
    return counts


def update_of(algo: AbstractAlgorithm) -> Callable[[Window, TrainState, Array], Any]:
    """One update of one seed with everything but rollouts: of a window, a state and a key."""

    def update(window: Window, state: TrainState, key: Array) -> Any:
        batch = sample(window, algo.sample, key)
        if spec := algo.replay:
            rings, first = jax.tree.map(lambda x: x[None], state.memory), jnp.zeros((), jnp.int32)
            drawn = draw(rings, first, key, spec.batch, room=spec.rows)
            batch = dataclasses.replace(batch, imagined=drawn)
        with algo.numerics.matmuls():
            return algo.update(state.without_memory(), batch, jnp.zeros((), jnp.int32), key)

    return update


def _rollouts(algo: AbstractAlgorithm, window: Any, state: Any, key: Any) -> dict[str, Operations]:
    """An update's share of the operations that fill the imagined replay."""
    if not (spec := algo.replay):
        return {}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    whole = sum_operations(operations(algo.rollout, state.without_memory(), window, step, key))
    return {"rollouts": Operations(*(count // spec.every for count in whole))}


def compile_update(plan: CostEstimate) -> Compiled:
    """Compiles one update of one seed; nothing is computed."""
    compiled = jax.jit(plan.update).lower(*plan.args).compile()
    scratch = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)
    return Compiled(int(scratch), program_bytes(compiled.as_text() or ""))


def memory_of(plan: CostEstimate, scratch: int) -> TrainingMemory:
    """Returns the memory that training takes on this backend; `scratch` is of one seed."""
    on_cpu, devices = jax.default_backend() == "cpu", seed_mesh(plan.seeds).size
    return TrainingMemory(
        data=plan.window_bytes,
        state=plan.state_bytes,
        replay=plan.replay_bytes,
        scratch=scratch,
        seeds=plan.seeds,
        devices=1 if on_cpu else devices,
        # On an accelerator the seeds run together, on a CPU one after the other on each core.
        together=devices if on_cpu else plan.seeds,
    )


def product_chain(width: int, rows: int, mesh: Mesh) -> tuple[Callable[[], Array], int]:
    """A call that multiplies [rows, width] by [width, width] many times on each device of `mesh`, and
    its number of operations in all.
    """
    length, devices = 20, mesh.size
    x = place(mesh, jnp.ones((devices * rows, width)), SEED)
    w = place(mesh, jnp.full((width, width), 1.0 / width), ALL)
    chain = jax.jit(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=length)[0])
    chain(x, w).block_until_ready()
    return lambda: chain(x, w), length * 2 * x.size * width


def product_rate(width: int = 256, seconds: float = 0.3) -> float:
    """This machine's rate of float32 matrix products, operations per second, all cores."""
    chain, work = product_chain(width, 2048, seed_mesh(1))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        chain().block_until_ready()
        best = min(best, time.perf_counter() - began)
    return work / best


def seconds_to_train(plan: CostEstimate, updates: int) -> float:
    """Estimate for `updates` seed-updates on this machine."""
    return updates * sum_operations(plan.parts).matmuls / (TRAIN_SHARE * product_rate())


def seconds_to_collect(rows: int) -> float:
    """Estimate for generating `rows` rows (validation rows included) on all cores."""
    return rows / (COLLECT_RATE * cores())


def seconds_to_evaluate(evaluations: int, episodes: int, spec: EnvSpec) -> float:
    """Estimate for evaluations of `episodes` episodes each, all of them going to the time limit."""
    return evaluations * episodes * spec.max_steps / (EVAL_RATE * cores())


def environment_bytes(env: AbstractEnv) -> int:
    """Bytes that one environment of an evaluation carries from step to step; nothing is computed."""
    state = jax.eval_shape(env.reset, jax.eval_shape(lambda: jr.key(0)), jnp.asarray(env.spec.tasks[0]))
    return _bytes(state)


def describe_evaluation(env: AbstractEnv, episodes: int, batch: int) -> str:
    """A line for `--dry-run`: `episodes` of all seeds and tasks, at most `batch` (0: all) at a time."""
    together, size = min(batch or episodes, episodes), environment_bytes(env)
    return (
        f"evaluation   {counted(episodes, 'episode')}, {together:,} at a time (--eval.batch), "
        f"each {size / 1e3:,.1f} kB between steps: {mega(together * size)}"
    )


def cost_lines(plan: CostEstimate, algo: AbstractAlgorithm, spec: EnvSpec, rows: int) -> list[str]:
    """Lines for `--dry-run`; compiles an update."""
    batch, compiled = algo.sample, compile_update(plan)
    imagined = f" and {algo.replay.batch} imagined" if algo.replay else ""
    params = ", ".join(f"{name} {count:,}" for name, count in plan.params.items())
    return [
        f"shapes       observation {spec.obs_dim}, action {spec.action_dim}, "
        f"chunk {batch.chunk} x {spec.action_dim}, batch {batch.batch}{imagined}, seeds {plan.seeds}, "
        f"data {rows:,} x {spec.obs_dim + spec.action_dim}",
        f"parameters   {sum(plan.params.values()):,} per seed ({params})",
        *work_lines(plan.parts, compiled.traffic),
        *memory_lines(memory_of(plan, compiled.scratch), free_memory(), algo.replay),
    ]


def data_note(preset: str, spec: EnvSpec, rows: int, remedy: str) -> str | None:
    """Returns a note if the data are smaller than those of the paper's tables, else None.

    Args:
        rows: of the data that the run trains on.
        remedy: how to get as many as the paper has.
    """
    if preset != "paper" or spec.goal_dim is None or rows >= PAPER_ROWS:
        return None
    return f"tables 1 and 12 of the paper are of {PAPER_ROWS:,} rows, this run of {rows:,}; {remedy}"


def describe_time(parts: dict[str, float]) -> str:
    """One line: the total, and the parts that are not negligible; compiling is left out."""
    shown = ", ".join(f"{name} {duration(s)}" for name, s in parts.items() if s >= 1)
    return f"about {duration(sum(parts.values()))} ({shown}), and compiling" if shown else "compiling, mostly"


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# In words.


def work_lines(parts: dict[str, Operations], traffic: int) -> list[str]:
    """Operations of one update of one seed, by part, and the bytes that it moves."""
    whole = sum_operations(parts)
    lines = [
        f"arithmetic   {whole.flops / 1e9:,.4g} GFLOP per update and seed: matmuls "
        f"{whole.matmuls / 1e9:,.4g}, elementwise {whole.elementwise / 1e9:,.3g}; "
        f"and {whole.transcendental / 1e9:,.3g} G of tanh, roots and the like"
    ]
    for name, part in sorted(parts.items(), key=lambda item: -item[1].flops):
        lines.append(f"  {name:<12} {part.flops / 1e9:10,.3f} GFLOP {part.flops / max(whole.flops, 1):6.1%}")
    lines.append(
        f"traffic      {mega(traffic)} read and written per update and seed, as compiled for this device: "
        f"{whole.flops / max(traffic, 1):,.0f} FLOP per byte"
    )
    return lines


def memory_lines(need: TrainingMemory, free: Memory, replay: ReplaySpec | None = None) -> list[str]:
    """Describes the memory that training takes, here and on an accelerator, and if it suffices.

    Args:
        replay: sizes of the imagined replay, if there is one.
    """
    where = "in all" if need.devices == 1 else f"on each of {need.devices} devices"
    smaller = "a smaller --hp.batch"
    if need.devices * need.peak < 2 * need.replay:
        smaller = "a smaller --hp.rollout-starts or --hp.rollouts-kept"
    lines = [
        f"memory       {mega(need.peak)} {where}{_verdict(need.peak, free.device, smaller)}",
        f"  data         {mega(need.data):>10}",
        f"  networks     {mega(need.state):>10}  of {need.seeds} seeds, with targets and optimiser",
        f"  scratch      {mega(need.together * need.scratch):>10}  of {need.together} at a time",
    ]
    if replay:
        each = f"{replay.capacity:,} imagined transitions of each seed"
        lines.insert(3, f"  replay       {mega(need.replay):>10}  {each}")
    if free.shared:
        alone = need._replace(devices=1, together=need.seeds)
        lines.append(f"  one accelerator, which updates all seeds at a time, takes about {mega(alone.peak)}")
    return lines


def mega(size: float) -> str:
    """Bytes as MB or, if there are many, as GB."""
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _verdict(need: int, free: int | None, smaller: str) -> str:
    if free is None:
        return "; how much is free is not known here"
    if need <= free:
        return f", of {mega(free)} free: enough"
    return f", but only {mega(free)} are free: NOT ENOUGH; take fewer --seeds or {smaller}"
