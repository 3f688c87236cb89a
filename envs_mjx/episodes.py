"""Simulates a scripted expert: whole episodes, many at once, in compiled stretches of control steps.

Every random number of an episode comes from the seed, its index and the attempt, and batches always
have the same number of lanes, because XLA rounds a batch of another size differently and contacts
amplify that. So an episode is the same bit for bit whatever its lane, its companions and the threads.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx import experts
from envs_mjx.arm import ACTION_DIM, build_arm
from envs_mjx.engine import AbstractEngine
from envs_mjx.readings import obs_dim
from envs_mjx.scenes import Scene
from envs_mjx.world import Tabletop, World

EPISODE_ROWS = 1001
"""Rows of an episode: 1000 transitions and the final state, whose action means nothing."""
STRETCH = 50
"""Control steps per compiled call; divides the transitions of an episode."""


class Job(NamedTuple):
    """One episode to be simulated.

    Attributes:
        split: 0 for training data, 1 for validation data; their episodes are counted separately.
        index: number of the episode within its split.
        attempt: how many times this episode was thrown away before.
    """

    split: int
    index: int
    attempt: int = 0


class Rows(NamedTuple):
    """What a dataset holds of each state; leading axes, if any, are episodes and time."""

    observations: Float[Array | np.ndarray, "*batch D"]
    actions: Float[Array | np.ndarray, "*batch A"]
    qpos: Float[Array | np.ndarray, "*batch nq"]
    qvel: Float[Array | np.ndarray, "*batch nv"]
    button_states: Bool[Array | np.ndarray, "*batch buttons"]


class Events(NamedTuple):
    """What happened in a control step: whether the expert was through with a target, and had hit it."""

    done: Bool[Array | np.ndarray, "*batch"]
    hit: Bool[Array | np.ndarray, "*batch"]


class Lane(eqx.Module):
    """One episode under way.

    Attributes:
        key: source of all randomness of the episode.
        active: whether it goes on; the physics of a lane that is empty, or whose episode has turned out
            unhealthy, stands still, and its rows mean nothing.
    """

    world: World
    expert: experts.Expert
    key: Key[Array, ""]
    active: Bool[Array, ""]


class Wave(NamedTuple):
    """Simulated episodes on the host, axis 0 in the order of `jobs`.

    Attributes:
        rows, events: arrays [jobs, EPISODE_ROWS, ...]; nothing happens in an episode's last row.
        healthy: which episodes may be kept (see `experts.healthy`).
        dropped: contacts that the engine left out in each episode, see `engine.Physics`.
    """

    jobs: tuple[Job, ...]
    rows: Rows
    events: Events
    healthy: np.ndarray
    dropped: np.ndarray


class Stopped(Exception):
    """A simulation was asked to stop before its end."""


class Simulator:
    """A scripted expert of one `style` in one scene; `run` may be called from several threads."""

    def __init__(self, style: str, scene: Scene, engine: AbstractEngine, *, seed: int, lanes: int):
        """A simulator of `lanes` episodes at a time, all drawn from `seed`."""
        self.style, self.seed, self.lanes = style, seed, lanes
        self.table = Tabletop(engine, scene, build_arm(scene))
        # On the CPU even where there is an accelerator if the physics is there, and so are the same bits.
        self.device = jax.local_devices(backend="cpu" if engine.name == "c" else None)[0]

    def run(
        self,
        jobs: Sequence[Job],
        tick: Callable[[int], None] = lambda rows: None,
        stop: threading.Event | None = None,
    ) -> Wave:
        """Simulates at most `lanes` episodes.

        Args:
            tick: called with the number of rows that each stretch of control steps adds.
            stop: set it, and the simulation ends within a stretch.
        Raises:
            Stopped: `stop` was set.
        """
        table, style, count = self.table, self.style, len(jobs)
        record = _Record(widths(table.scene), count)
        with jax.default_device(self.device):
            padded = np.asarray([*jobs, *[Job(0, 0)] * (self.lanes - count)], np.int32)
            seed, filled = jnp.asarray(self.seed), jnp.arange(self.lanes) < count
            lanes = _begin(table, style, seed, jnp.asarray(padded), filled)
            for t in range(0, EPISODE_ROWS - 1, STRETCH):
                if stop is not None and stop.is_set():
                    raise Stopped
                lanes, (rows, events) = _stretch(table, style, lanes, jnp.asarray(t))
                record.add(rows, events, t)
                tick(STRETCH * int(np.asarray(lanes.active).sum()))
            rows, healthy = _last_row(table, style, lanes)
            record.add(jax.tree.map(lambda x: x[None], rows), None, EPISODE_ROWS - 1)
        tick(int(np.asarray(healthy).sum()))
        dropped = np.asarray(lanes.world.physics.dropped)[:count]
        return Wave(tuple(jobs), record.rows, record.events, np.asarray(healthy)[:count], dropped)


def widths(scene: Scene) -> dict[str, int]:
    """Numbers per row of each field of `Rows`."""
    sizes = obs_dim(scene), ACTION_DIM, int(scene.model.nq), int(scene.model.nv), scene.buttons
    return dict(zip(Rows._fields, sizes, strict=True))


class _Record:
    """Host arrays of a wave, filled in stretch by stretch."""

    def __init__(self, sizes: dict[str, int], count: int):
        def empty(*tail: int, dtype: type = np.float32) -> np.ndarray:
            return np.zeros((count, EPISODE_ROWS, *tail), dtype)

        kinds = {"button_states": bool}
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
    table: Tabletop,
    style: str,
    seed: Int[Array, ""],
    jobs: Int[Array, "lanes 3"],
    active: Bool[Array, " lanes"],
) -> Lane:
    """Scenes, first targets and first plans."""

    def one(job: Int[Array, " 3"], active: Bool[Array, ""]) -> Lane:
        key = jr.key(seed)
        for part in job:
            key = jr.fold_in(key, part)
        own, scene, expert = jr.split(key, 3)
        world = table.reset_collect(scene)
        return Lane(world, experts.begin(style, table.scene, expert, table.readings(world)), own, active)

    return jax.vmap(one)(jobs, active)


@eqx.filter_jit
def _stretch(
    table: Tabletop, style: str, lanes: Lane, begin: Int[Array, ""]
) -> tuple[Lane, tuple[Rows, Events]]:
    """`STRETCH` control steps of every lane, the first of them number `begin`."""

    def body(lanes: Lane, t: Int[Array, ""]) -> tuple[Lane, tuple[Rows, Events]]:
        return jax.vmap(lambda lane: advance(table, style, lane, t))(lanes)

    return jax.lax.scan(body, lanes, begin + jnp.arange(STRETCH))


@eqx.filter_jit
def _last_row(table: Tabletop, style: str, lanes: Lane) -> tuple[Rows, Bool[Array, " lanes"]]:
    """The row of each lane's final state, which needs no physics, and whether its episode may be kept."""

    def one(lane: Lane) -> tuple[Rows, Bool[Array, ""]]:
        row, lane, _ = decide(table, style, lane, jr.fold_in(lane.key, EPISODE_ROWS - 1))
        return row, lane.active

    return jax.vmap(one)(lanes)


def decide(
    table: Tabletop, style: str, lane: Lane, key: Key[Array, ""]
) -> tuple[Rows, Lane, Bool[Array, ""]]:
    """The row of the current state with the expert's action in it; the lane with the expert one action
    further; whether the expert is through with its target.
    """
    seen, physics = table.readings(lane.world), lane.world.physics
    action, expert, done = experts.act(style, table.scene, lane.expert, seen, key)
    row = Rows(table.observe(lane.world), action, physics.qpos, physics.qvel, lane.world.buttons)
    active = lane.active & experts.healthy(table.scene, seen)
    return row, Lane(lane.world, expert, lane.key, active), done


def advance(table: Tabletop, style: str, lane: Lane, t: Int[Array, ""]) -> tuple[Lane, tuple[Rows, Events]]:
    """Control step `t` of a lane: its row, the physics, and a new target where the old one is done with."""
    act, retarget = jr.split(jr.fold_in(lane.key, t))
    row, lane, done = decide(table, style, lane, act)
    world = table.advance(lane.world, jnp.asarray(row.actions), lane.active)
    seen = table.readings(world)
    hit = done & experts.achieved(table.scene, lane.expert.target, seen)
    fresh = experts.retarget(style, table.scene, lane.expert, seen, retarget)
    expert = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, lane.expert)
    done, hit = done & lane.active, hit & lane.active
    return Lane(world, expert, lane.key, lane.active), (row, Events(done, hit))
