"""Timed loops of `benchmark.py`: the compiled segment, a Python training loop, and bare matmuls.

Each contender is a turn that does a known number of operations (those of matrix products), so all
of them are timed alike and compared as operations per second.
"""

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
from experiments.benchmarks.host_sampler import HostData
from experiments.launch.cost_estimate import product_chain
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.sampler import sample
from mac.data.window import index_episodes, make_column
from mac.run import segment as loop
from mac.run.cost.flops import product_flops
from mac.run.rng_streams import Stream, stream
from mac.types import Batch, EnvSpec, Metrics, Window


class TimedLoop(NamedTuple):
    """`turn` starts `work` operations and returns what to wait for; compiling it took `compile_s`."""

    turn: Callable[[], Any]
    work: float
    compile_s: float = 0.0

    def times(self, n: int) -> "TimedLoop":
        """A contender whose turn is `n` turns of this one, one after the other."""
        return TimedLoop(lambda: [self.turn() for _ in range(n)][-1], n * self.work, self.compile_s)


class Work(NamedTuple):
    """What both ways to train do in one turn: `updates` updates of each of `seeds` seeds.

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
        """Operations of a turn."""
        return self.updates * self.seeds * self.flop


class Timing(NamedTuple):
    """Operations per second, and processor time over wall time: the cores that the machine granted."""

    speed: float
    cores: float


def time_turn(contender: TimedLoop) -> Timing:
    """Runs one turn to its end."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(contender.turn())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Timing(contender.work / wall, cpu / wall)


def take_turns(contenders: dict[str, TimedLoop], rounds: int) -> dict[str, list[Timing]]:
    """Timings of each contender, `rounds` of them, taken in turns: A B C A B C ..."""
    taken: dict[str, list[Timing]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(time_turn(contender))
    return taken


def random_window(spec: EnvSpec, rows: int, chunk: int, seed: int = 0) -> Window:
    """Uniform random data with the shapes of `spec`, in episodes of 1001 rows; a tenth solves the task.

    With goals there are no rewards, as in a run: the goals decide what is solved.
    """
    rng = np.random.default_rng(seed)
    first = np.arange(0, rows, EPISODE_ROWS)
    length = np.minimum(EPISODE_ROWS, rows - first)
    solved = rng.random(rows) < 0.1
    return Window(
        obs=make_column(rng.uniform(-1, 1, (rows, spec.obs_dim)).astype(np.float32)),
        action=make_column(rng.uniform(-1, 1, (rows, spec.action_dim)).astype(np.float32)),
        reward=jnp.asarray(solved - 1.0, jnp.float32) if spec.goal_dim is None else None,
        mask=jnp.asarray(~solved, jnp.float32) if spec.goal_dim is None else None,
        episodes=index_episodes(first, length, chunk),
    )


def update_flops(algo: AbstractAlgorithm, window: Window) -> int:
    """Operations of all matrix products in one update of one seed."""

    def update(window: Window, state: TrainState, key: Key[Array, ""]) -> Any:
        return algo.update(state, sample(window, algo.sample, key), jnp.zeros((), jnp.int32), key)

    key = jax.eval_shape(lambda: jr.key(0))
    return product_flops(update, window, jax.eval_shape(algo.init, key), key)


def segment(work: Work, mesh: Mesh) -> TimedLoop:
    """Our training: one compiled call for all updates of all seeds."""
    keys = loop.place(mesh, loop.seed_keys(0, work.seeds), loop.SEED)
    steps = loop.place(mesh, np.arange(work.updates, dtype=np.int32), loop.ALL)
    window = loop.place(mesh, work.window, loop.ALL)
    state = loop.init(work.algo, mesh, keys)
    began = time.perf_counter()
    run = loop.segment.lower(work.algo, mesh, window, keys, steps, state).compile()
    compile_s = time.perf_counter() - began

    def turn() -> Any:
        nonlocal state
        state, metrics = run(window, keys, steps, state)
        return state, metrics

    return TimedLoop(turn, work.total, compile_s)


def plain_loop(work: Work) -> TimedLoop:
    """The usual training: seeds in turn, batches drawn with NumPy, one jitted update per call.

    The network code is the same, so the difference is the loop's: calls, transfers, and how the
    seeds share the cores. Calls are asynchronous, so the host draws while the device computes.
    """
    algo, host, rng = work.algo, HostData(work.window), np.random.default_rng(0)
    seeds = [jr.key(seed) for seed in range(work.seeds)]
    states = [jax.jit(algo.init)(stream(key, Stream.INIT)) for key in seeds]
    keys = [stream(key, Stream.UPDATES) for key in seeds]

    def update(
        state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        return algo.update(state, batch, step, jr.fold_in(key, step))

    began = time.perf_counter()
    run = jax.jit(update).lower(states[0], host.draw(rng, algo.sample), np.int32(0), keys[0]).compile()
    compile_s = time.perf_counter() - began

    def turn() -> Any:
        for seed in range(work.seeds):
            for step in range(work.updates):
                states[seed], _ = run(states[seed], host.draw(rng, algo.sample), np.int32(step), keys[seed])
        return states

    return TimedLoop(turn, work.total, compile_s)


def products(width: int, rows: int, mesh: Mesh) -> TimedLoop:
    """Chained products of [rows, width] and [width, width] on each device of `mesh`."""
    return TimedLoop(*product_chain(width, rows, mesh))
