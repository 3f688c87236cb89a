"""Timed loops of `benchmark.py`: the compiled segment, a Python training loop, and bare matmuls.

One call of each loop does a known number of matmul operations. So all loops are timed alike and compared in
operations per second.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments.benchmarks.numpy_sampler import HostData
from experiments.launch.cost_estimate import product_chain, update_of
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.window import index_episodes, make_column, sum_to_go
from mac.run.cost.flops import matmul_flops
from mac.run.mesh import ALL, SEED, map_seeds, place, seed_keys, seed_mesh
from mac.run.rng_streams import Stream, stream
from mac.run.segment import init, segment
from mac.types import Batch, EnvSpec, Metrics, Window


class TimedLoop(NamedTuple):
    """`call` starts `work` operations and returns what to wait for; compiling it took `compile_s`."""

    call: Callable[[], Any]
    work: float
    compile_s: float = 0.0

    def times(self, n: int) -> "TimedLoop":
        """Returns a loop whose call is `n` calls of this one, one after the other."""
        return TimedLoop(lambda: [self.call() for _ in range(n)][-1], n * self.work, self.compile_s)


class Work(NamedTuple):
    """Work of one call of a training loop: `updates` updates of each of `seeds` seeds.

    Attributes:
        flop: operations of one update of one seed (`update_flops`).
    """

    algo: AbstractAlgorithm
    window: Window
    seeds: int
    updates: int
    flop: int

    @property
    def total(self) -> int:
        """Operations of one call."""
        return self.updates * self.seeds * self.flop


class Timing(NamedTuple):
    """Operations per second, and processor time over wall time: the cores that the machine granted."""

    speed: float
    cores: float


def time_call(timed: TimedLoop) -> Timing:
    """Times one call, to its end."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(timed.call())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Timing(timed.work / wall, cpu / wall)


def time_interleaved(loops: dict[str, TimedLoop], repeats: int) -> dict[str, list[Timing]]:
    """Times each loop `repeats` times, interleaved: A B C A B C ..."""
    timings: dict[str, list[Timing]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, timed in loops.items():
            timings[name].append(time_call(timed))
    return timings


def random_window(spec: EnvSpec, rows: int, chunk: int, seed: int = 0) -> Window:
    """Draws uniform random data with the shapes of `spec`, in episodes of 1001 states.

    A tenth of the states solves the task. Goal-conditioned data have no rewards, as in a run.
    """
    rng = np.random.default_rng(seed)
    first = np.arange(0, rows, EPISODE_ROWS)
    length = np.minimum(EPISODE_ROWS, rows - first)
    solved = rng.random(rows) < 0.1
    reward = (solved - 1.0).astype(np.float32) if spec.goal_dim is None else None
    return Window(
        obs=make_column(rng.uniform(-1, 1, (rows, spec.obs_dim)).astype(np.float32)),
        action=make_column(rng.uniform(-1, 1, (rows, spec.action_dim)).astype(np.float32)),
        reward=None if reward is None else jnp.asarray(reward),
        mask=jnp.asarray(~solved, jnp.float32) if spec.goal_dim is None else None,
        episodes=index_episodes(first, length, chunk),
        return_to_go=None if reward is None else jnp.asarray(sum_to_go(reward, first, length)),
    )


def update_flops(algo: AbstractAlgorithm, window: Window) -> int:
    """Returns the operations of all matmuls in one update of one seed, without rollouts."""
    key = jax.eval_shape(lambda: jr.key(0))
    return matmul_flops(update_of(algo), window, jax.eval_shape(algo.init, key), key)


def _updates(work: Work) -> list[int]:
    """Numbers of updates; those that begin with a rollout (`rollout_share`) are left out."""
    if work.algo.replay is None:
        return list(range(work.updates))
    # A step of the loop that is not due is one update like any other, so its number may come again.
    return [1 + number % max(work.algo.replay.every - 1, 1) for number in range(work.updates)]


def rollout_share(algo: AbstractAlgorithm, window: Window, seeds: int, rate: float) -> float:
    """Returns the share of training time in rollouts into a replay; 0 for an algorithm without one.

    Args:
        rate: seed-updates per second without rollouts.
    """
    if algo.replay is None:
        return 0.0
    mesh = seed_mesh(seeds)
    keys = place(mesh, seed_keys(0, seeds), SEED)
    window = place(mesh, window, ALL)
    state, step = init(algo, mesh, keys).without_memory(), jnp.asarray(algo.replay.every, jnp.int32)

    def roll(window: Window, keys: Key[Array, " s"], state: TrainState) -> Any:
        return map_seeds(lambda s, key: algo.rollout(s, window, step, key), state, keys)

    specs = (ALL, SEED, SEED)
    run = jax.jit(jax.shard_map(roll, mesh=mesh, in_specs=specs, out_specs=SEED))
    jax.block_until_ready(run(window, keys, state))
    began = time.perf_counter()
    jax.block_until_ready(run(window, keys, state))
    rollout_s = time.perf_counter() - began
    return rollout_s / (rollout_s + algo.replay.every * seeds / rate)


def scan_segment(work: Work, mesh: Mesh) -> TimedLoop:
    """Returns the compiled segment: one call for all updates of all seeds, without rollouts into a replay."""
    keys = place(mesh, seed_keys(0, work.seeds), SEED)
    steps = place(mesh, np.asarray(_updates(work), np.int32), ALL)
    window = place(mesh, work.window, ALL)
    state = init(work.algo, mesh, keys)
    began = time.perf_counter()
    run = segment.lower(work.algo, mesh, window, keys, steps, state).compile()
    compile_s = time.perf_counter() - began

    def call() -> Any:
        nonlocal state
        state, metrics = run(window, keys, steps, state)
        return state, metrics

    return TimedLoop(call, work.total, compile_s)


def python_loop(work: Work) -> TimedLoop:
    """Returns the Python training loop: one seed after another, batches drawn with NumPy, a jitted update.

    The network code is the same, so the difference comes from the loop: calls, transfers, and the use of the
    cores by the seeds. Calls are asynchronous, so the host draws batches while the device computes. Imagined
    steps are drawn from host memory too; rollouts are left out (`rollout_share`).
    """
    algo, host, rng = work.algo, HostData(work.window), np.random.default_rng(0)
    seeds = [jr.key(seed) for seed in range(work.seeds)]
    states = [jax.jit(algo.init)(stream(key, Stream.INIT)) for key in seeds]
    memory = jax.tree.map(np.asarray, states[0].memory)  # of zeros; what it holds takes no time
    states = [state.without_memory() for state in states]

    def draw() -> Batch:
        batch = host.draw(rng, algo.sample)
        if algo.replay is None:
            return batch
        rows = rng.integers(algo.replay.capacity, size=algo.replay.batch)
        imagined = jax.device_put(jax.tree.map(lambda x: x[rows], memory.rows))
        return dataclasses.replace(batch, imagined=imagined)

    keys = [stream(key, Stream.UPDATES) for key in seeds]

    def update(
        state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        return algo.update(state, batch, step, jr.fold_in(key, step))

    began = time.perf_counter()
    run = jax.jit(update).lower(states[0], draw(), np.int32(0), keys[0]).compile()
    compile_s = time.perf_counter() - began

    def call() -> Any:
        for seed in range(work.seeds):
            for step in range(work.updates):
                states[seed], _ = run(states[seed], draw(), np.int32(step), keys[seed])
        return states

    return TimedLoop(call, work.total, compile_s)


def matmuls(width: int, rows: int, mesh: Mesh) -> TimedLoop:
    """Returns chained matmuls of [rows, width] and [width, width] on each device of `mesh`."""
    return TimedLoop(*product_chain(width, rows, mesh))
