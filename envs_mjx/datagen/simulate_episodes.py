"""Simulates experts: whole episodes, many at once, in compiled segments of control steps.

Every random number of an episode comes from the seed, its index and the attempt. All batches have the same
number of lanes, because XLA rounds a batch of another size differently and contacts amplify that. So an
episode is the same bit for bit whatever its lane, the other episodes and the threads.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from envs_mjx.datagen.data_policy import AbstractScript, Events, Rows

EPISODE_ROWS = 1001
"""Rows of an episode, except in a few mazes (`dataset_spec.episode_rows`): 1000 transitions and the final
state, whose action means nothing."""
STRETCH = 50
"""Control steps per compiled call; divides the transitions of an episode."""


class Job(NamedTuple):
    """One episode to be simulated.

    Attributes:
        split: 0 for training data, 1 for validation data; their episodes are counted separately.
        index: number of the episode within its split.
        attempt: number of earlier attempts at this episode that were rejected.
    """

    split: int
    index: int
    attempt: int = 0


class Lane(eqx.Module):
    """One running episode of a batch.

    Attributes:
        play: state of environment and expert, see `AbstractScript`.
        key: source of all randomness of the episode.
        active: whether it continues. A lane that is empty, or whose episode is unhealthy, is frozen, and its
            rows mean nothing.
    """

    play: Any
    key: Key[Array, ""]
    active: Bool[Array, ""]


class Wave(NamedTuple):
    """Simulated episodes on the host, axis 0 in the order of `jobs`.

    Attributes:
        rows, events: arrays [jobs, rows of an episode, ...]; nothing happens in an episode's last row.
        healthy: episodes that may be kept (see `Decision.healthy`).
        dropped: contacts that the engine dropped in each episode.
    """

    jobs: tuple[Job, ...]
    rows: Rows
    events: Events
    healthy: np.ndarray
    dropped: np.ndarray


class Stopped(Exception):
    """Raised by a simulation that was asked to stop before its end."""


class Simulator:
    """Simulator of one script's episodes; `run` may be called from several threads."""

    def __init__(self, script: AbstractScript, *, seed: int, lanes: int):
        """Creates a simulator of `lanes` episodes at a time, all drawn from `seed`."""
        self.script, self.seed, self.lanes = script, seed, lanes
        # With engine `c` on the CPU even if an accelerator exists: the physics runs there, with the same
        # bits.
        self.device = jax.local_devices(backend="cpu" if script.engine == "c" else None)[0]

    def run(
        self,
        jobs: Sequence[Job],
        tick: Callable[[int], None] = lambda rows: None,
        stop: threading.Event | None = None,
    ) -> Wave:
        """Simulates at most `lanes` episodes.

        Args:
            tick: called with the number of rows that each segment of control steps adds.
            stop: set it, and the simulation ends within a segment.
        Raises:
            Stopped: if `stop` was set.
        """
        script, count = self.script, len(jobs)
        last, record = script.rows - 1, _Record(script, count)
        with jax.default_device(self.device):
            padded = np.asarray([*jobs, *[Job(0, 0)] * (self.lanes - count)], np.int32)
            seed, filled = jnp.asarray(self.seed), jnp.arange(self.lanes) < count
            lanes = _begin(script, seed, jnp.asarray(padded), filled)
            for t in range(0, last, STRETCH):
                if stop is not None and stop.is_set():
                    raise Stopped
                lanes, (rows, events) = _stretch(script, lanes, jnp.asarray(t))
                record.add(rows, events, t)
                tick(STRETCH * int(np.asarray(lanes.active).sum()))
            rows, healthy = _last_row(script, lanes)
            record.add(jax.tree.map(lambda x: x[None], rows), None, last)
        tick(int(np.asarray(healthy).sum()))
        dropped = np.asarray(script.dropped(lanes.play))[:count]
        return Wave(tuple(jobs), record.rows, record.events, np.asarray(healthy)[:count], dropped)


class _Record:
    """Host arrays of a batch, filled in segment by segment."""

    def __init__(self, script: AbstractScript, count: int):
        def empty(*tail: int, dtype: type = np.float32) -> np.ndarray:
            return np.zeros((count, script.rows, *tail), dtype)

        kinds, sizes = {"button_states": bool}, script.widths
        self.rows = Rows(**{n: empty(size, dtype=kinds.get(n, np.float32)) for n, size in sizes.items()})
        self.events = Events(empty(dtype=bool), empty(dtype=bool))
        self.count = count

    def add(self, rows: Rows, events: Events | None, begin: int) -> None:
        """Stores `[time, lane, ...]` from time `begin` on."""
        pairs = [*zip(self.rows, rows, strict=True)]
        pairs += zip(self.events, events, strict=True) if events is not None else []
        for mine, part in pairs:
            steps = len(part)
            mine[:, begin : begin + steps] = np.swapaxes(np.asarray(part), 0, 1)[: self.count]


@eqx.filter_jit
def _begin(
    script: AbstractScript, seed: Int[Array, ""], jobs: Int[Array, "lanes 3"], active: Bool[Array, " lanes"]
) -> Lane:
    """Starts all episodes."""

    def one(job: Int[Array, " 3"], active: Bool[Array, ""]) -> Lane:
        key = jr.key(seed)
        for part in job:
            key = jr.fold_in(key, part)
        own, world, expert = jr.split(key, 3)
        return Lane(script.begin(world, expert), own, active)

    return jax.vmap(one)(jobs, active)


@eqx.filter_jit
def _stretch(script: AbstractScript, lanes: Lane, begin: Int[Array, ""]) -> tuple[Lane, tuple[Rows, Events]]:
    """Simulates `STRETCH` control steps of every lane, the first of them number `begin`."""

    def body(lanes: Lane, t: Int[Array, ""]) -> tuple[Lane, tuple[Rows, Events]]:
        return jax.vmap(lambda lane: _advance(script, lane, t))(lanes)

    return jax.lax.scan(body, lanes, begin + jnp.arange(STRETCH))


@eqx.filter_jit
def _last_row(script: AbstractScript, lanes: Lane) -> tuple[Rows, Bool[Array, " lanes"]]:
    """Returns the record of each lane's final state, which needs no physics, and whether to keep the
    episode."""

    def one(lane: Lane) -> tuple[Rows, Bool[Array, ""]]:
        last = script.decide(lane.play, jr.fold_in(lane.key, script.rows - 1))
        return last.row, lane.active & last.healthy

    return jax.vmap(one)(lanes)


def _advance(script: AbstractScript, lane: Lane, t: Int[Array, ""]) -> tuple[Lane, tuple[Rows, Events]]:
    """Takes control step `t` of a lane, and records it."""
    act, retarget = jr.split(jr.fold_in(lane.key, t))
    row, play, done, healthy = script.decide(lane.play, act)
    active = lane.active & healthy
    play, (done, hit) = script.advance(play, jnp.asarray(row.actions), done, active, retarget)
    return Lane(play, lane.key, active), (row, Events(done & active, hit & active))
