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

from envs_mjx.action_noise import disturb
from envs_mjx.datagen.data_policy import AbstractDataPolicy, StepRecords, TargetEvents

EPISODE_ROWS = 1001
"""Rows of an episode, except in a few mazes (`dataset_spec.episode_rows`): 1000 transitions and the final
state, whose action means nothing."""
SEGMENT_STEPS = 50
"""Control steps per compiled call; divides the transitions of an episode."""


class EpisodeJob(NamedTuple):
    """One episode to be simulated.

    Attributes:
        split: 0 for training data, 1 for validation data; their episodes are counted separately.
        index: number of the episode within its split.
        attempt: number of earlier attempts at this episode that were rejected.
    """

    split: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    attempt: int = 0


class RunningEpisode(eqx.Module):
    """One running episode of a batch.

    Attributes:
        state: state of environment and expert, see `AbstractDataPolicy`.
        key: source of all randomness of the episode.
        active: whether it continues. A lane that is empty, or whose episode is unhealthy, is frozen, and its
            rows mean nothing.
    """

    state: Any
    key: Key[Array, ""]
    active: Bool[Array, ""]


class EpisodeBatch(NamedTuple):
    """Simulated episodes on the host, axis 0 in the order of `jobs`.

    Attributes:
        rows, events: arrays [jobs, rows of an episode, ...]; nothing happens in an episode's last row.
        healthy: episodes that may be kept (see `ExpertDecision.healthy`).
        dropped: contacts that the engine dropped in each episode.
    """

    jobs: tuple[EpisodeJob, ...]
    rows: StepRecords
    events: TargetEvents
    healthy: np.ndarray
    dropped: np.ndarray


class SimulationStopped(Exception):
    """Raised by a simulation that was asked to stop before its end."""


class Simulator:
    """Simulator of one script's episodes; `run` may be called from several threads."""

    def __init__(self, policy: AbstractDataPolicy, *, seed: int, lanes: int, noise: float = 0.0):
        """Creates a simulator of `lanes` episodes at a time, all drawn from `seed`.

        `noise` is the standard deviation of noise on executed actions; those that are recorded have none.
        """
        self.policy, self.seed, self.lanes, self.noise = policy, seed, lanes, noise
        # With engine `c` on the CPU even if an accelerator exists: the physics runs there, with the same
        # bits.
        self.device = jax.local_devices(backend="cpu" if policy.engine == "c" else None)[0]

    def run(
        self,
        jobs: Sequence[EpisodeJob],
        tick: Callable[[int], None] = lambda rows: None,
        stop: threading.Event | None = None,
    ) -> EpisodeBatch:
        """Simulates at most `lanes` episodes.

        Args:
            tick: called with the number of rows that each segment of control steps adds.
            stop: set it, and the simulation ends within a segment.
        Raises:
            SimulationStopped: if `stop` was set.
        """
        policy, count = self.policy, len(jobs)
        last, record = policy.rows - 1, _Record(policy, count)
        with jax.default_device(self.device):
            padded = np.asarray([*jobs, *[EpisodeJob(0, 0)] * (self.lanes - count)], np.int32)
            seed, filled = jnp.asarray(self.seed), jnp.arange(self.lanes) < count
            lanes = _begin(policy, seed, jnp.asarray(padded), filled)
            for t in range(0, last, SEGMENT_STEPS):
                if stop is not None and stop.is_set():
                    raise SimulationStopped
                lanes, (rows, events) = _simulate_segment(policy, lanes, jnp.asarray(t), self.noise)
                record.add(rows, events, t)
                tick(SEGMENT_STEPS * int(np.asarray(lanes.active).sum()))
            rows, healthy = _last_row(policy, lanes)
            record.add(jax.tree.map(lambda x: x[None], rows), None, last)
        tick(int(np.asarray(healthy).sum()))
        dropped = np.asarray(policy.dropped(lanes.state))[:count]
        return EpisodeBatch(tuple(jobs), record.rows, record.events, np.asarray(healthy)[:count], dropped)


class _Record:
    """Host arrays of a batch, filled in segment by segment."""

    def __init__(self, policy: AbstractDataPolicy, count: int):
        def empty(*tail: int, dtype: type = np.float32) -> np.ndarray:
            return np.zeros((count, policy.rows, *tail), dtype)

        kinds, sizes = {"button_states": bool}, policy.widths
        self.rows = StepRecords(
            **{n: empty(size, dtype=kinds.get(n, np.float32)) for n, size in sizes.items()}
        )
        self.events = TargetEvents(empty(dtype=bool), empty(dtype=bool))
        self.count = count

    def add(self, rows: StepRecords, events: TargetEvents | None, begin: int) -> None:
        """Stores `[time, lane, ...]` from time `begin` on."""
        pairs = [*zip(self.rows, rows, strict=True)]
        pairs += zip(self.events, events, strict=True) if events is not None else []
        for mine, part in pairs:
            steps = len(part)
            mine[:, begin : begin + steps] = np.swapaxes(np.asarray(part), 0, 1)[: self.count]


@eqx.filter_jit
def _begin(
    policy: AbstractDataPolicy,
    seed: Int[Array, ""],
    jobs: Int[Array, "lanes 3"],
    active: Bool[Array, " lanes"],
) -> RunningEpisode:
    """Starts all episodes."""

    def one(job: Int[Array, " 3"], active: Bool[Array, ""]) -> RunningEpisode:
        key = jr.key(seed)
        for part in job:
            key = jr.fold_in(key, part)
        own, world, expert = jr.split(key, 3)
        return RunningEpisode(policy.begin(world, expert), own, active)

    return jax.vmap(one)(jobs, active)


@eqx.filter_jit
def _simulate_segment(
    policy: AbstractDataPolicy, lanes: RunningEpisode, begin: Int[Array, ""], noise: float
) -> tuple[RunningEpisode, tuple[StepRecords, TargetEvents]]:
    """Simulates `SEGMENT_STEPS` control steps of every lane, the first of them number `begin`."""

    def body(
        lanes: RunningEpisode, t: Int[Array, ""]
    ) -> tuple[RunningEpisode, tuple[StepRecords, TargetEvents]]:
        return jax.vmap(lambda lane: _advance(policy, lane, t, noise))(lanes)

    return jax.lax.scan(body, lanes, begin + jnp.arange(SEGMENT_STEPS))


@eqx.filter_jit
def _last_row(policy: AbstractDataPolicy, lanes: RunningEpisode) -> tuple[StepRecords, Bool[Array, " lanes"]]:
    """Returns the record of each lane's final state, which needs no physics, and whether to keep the
    episode."""

    def one(lane: RunningEpisode) -> tuple[StepRecords, Bool[Array, ""]]:
        last = policy.decide(lane.state, jr.fold_in(lane.key, policy.rows - 1))
        return last.row, lane.active & last.healthy

    return jax.vmap(one)(lanes)


def _advance(
    policy: AbstractDataPolicy, lane: RunningEpisode, t: Int[Array, ""], noise: float
) -> tuple[RunningEpisode, tuple[StepRecords, TargetEvents]]:
    """Takes control step `t` of a lane, and records it, with the action that the expert intended."""
    act, retarget, *disturbance = jr.split(jr.fold_in(lane.key, t), 3 if noise else 2)
    row, state, done, healthy = policy.decide(lane.state, act)
    active = lane.active & healthy
    executed = disturb(jnp.asarray(row.actions), noise, *(disturbance or (None,)))
    state, (done, hit) = policy.advance(state, executed, done, active, retarget)
    return RunningEpisode(state, lane.key, active), (row, TargetEvents(done & active, hit & active))
