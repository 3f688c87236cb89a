"""Makes an OGBench `play` dataset: the scripted expert in our cube environment, on engine `c`.

Writes the pair of files that `ogbench.make_env_and_datasets(name, dataset_path=...)` reads: episodes
of 1001 rows, each row the state before its action. Episodes are simulated in groups, one compiled
call per stretch of control steps. Every random number of an episode comes from the seed and the
episode's index, and groups always have the same size, because XLA rounds a batch of another size
differently and contacts amplify that: so episode i of a seed is the same bit for bit, whatever the
number of threads and of episodes.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx import oracles
from envs_mjx.cube import SUCCESS_RADIUS, CubeEnv
from envs_mjx.engine import Physics
from envs_mjx.engine_c import CEngine
from envs_mjx.registry import parse
from envs_mjx.scenes import build_scene
from mac.errors import UserError

EPISODE_ROWS = 1001
"""Rows of an episode: 1000 transitions and the final state, whose action means nothing."""

_STRETCH = 50  # control steps per compiled call; divides EPISODE_ROWS - 1
_GROUP = 64  # episodes simulated together; places left over in the last group cost no physics


class Collected(NamedTuple):
    """What `collect` made: rows of the two files, targets the expert was given, and targets it hit."""

    train_rows: int
    val_rows: int
    targets: int
    hits: int


class Rows(NamedTuple):
    """What a dataset holds of each state; leading axes, if any, are time and episodes."""

    observations: Float[Array, "*batch D"]
    actions: Float[Array, "*batch A"]
    qpos: Float[Array, "*batch nq"]
    qvel: Float[Array, "*batch nv"]


class Actor(NamedTuple):
    """One episode under way: the environment, the expert's intent, and its score so far."""

    physics: Physics
    target: oracles.Target
    plan: oracles.Plan
    p_stack: Float[Array, ""]
    targets: Int[Array, ""]
    hits: Int[Array, ""]


def collect(
    dataset: str,
    rows: int,
    path: Path,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> Collected:
    """Makes `path` (training rows) and `<stem>-val.npz` beside it (a tenth as many episodes, at least 1).

    Both appear complete or not at all, the validation file first. Memory: all rows in float32 (300 B a
    row for one cube).

    Args:
        dataset: name such as `cube-single-play-v0`.
        rows: training rows wanted, rounded up to whole episodes of 1001.
        path: file to write, ending in `.npz`; its folder is created.
        seed: same seed, same data.
        progress: called with rows simulated so far and rows in total, both files together.
        threads: host threads for the physics, every available core if None; it does not change the data.
    Raises:
        UserError: for a bad name, size or path, a file that exists, a folder that cannot be written,
            or a disk without room.
    """
    if rows < 1:
        raise UserError(f"rows={rows}: a dataset needs at least one row; ask for 1001 or more")
    family = parse(dataset).family
    train = -(-rows // EPISODE_ROWS)
    episodes = train + max(train // 10, 1)
    scene = build_scene(family)
    env = CubeEnv(dataset, scene, CEngine(scene, threads))
    _check_target(path, bytes_needed=4 * sum(_widths(env).values()) * episodes * EPISODE_ROWS)
    record = _Recorder(env, episodes, progress)
    # On the CPU even where there is an accelerator: the physics is there, and so are the same bits.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        targets, hits = _simulate(env, family, seed, record)
    _write_pair(path, _schema(record.data, slice(0, train)), _schema(record.data, slice(train, episodes)))
    return Collected(train * EPISODE_ROWS, (episodes - train) * EPISODE_ROWS, targets, hits)


def val_path(path: Path) -> Path:
    """Where OGBench looks for the validation file of the training file `path`."""
    return path.with_name(path.name.removesuffix(".npz") + "-val.npz")


def start(env: CubeEnv, family: str, key: Key[Array, ""]) -> Actor:
    """Begins an episode: scene, first target, first plan, and how fond the episode is of stacking."""
    scene, stack, target, plan = jr.split(key, 4)
    physics = env.reset_collect(scene)
    readings = env.readings(physics)
    first = oracles.choose_target(target, readings, oracles.FIRST_P_STACK)
    return Actor(
        physics=physics,
        target=first,
        plan=oracles.build_plan(plan, readings, first),
        p_stack=oracles.stack_probability(stack, family),
        targets=jnp.zeros((), jnp.int32),
        hits=jnp.zeros((), jnp.int32),
    )


def advance(env: CubeEnv, actor: Actor, key: Key[Array, ""], active: Bool[Array, ""]) -> tuple[Actor, Rows]:
    """One control step, and the row it adds; after a plan's last step the expert gets a new target.

    Where not `active` the physics stands still, and the rows mean nothing.
    """
    row, plan, done = decide(env, actor)
    physics = env.advance(actor.physics, row.actions, active)
    readings = env.readings(physics)
    new_target, new_plan = jr.split(key)
    target = oracles.choose_target(new_target, readings, actor.p_stack)
    fresh = (target, oracles.build_plan(new_plan, readings, target))
    target, plan = jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, (actor.target, plan))
    hit = done & (jnp.linalg.norm(readings.cube_pos[actor.target.cube] - actor.target.pos) <= SUCCESS_RADIUS)
    score = actor.targets + done.astype(jnp.int32), actor.hits + hit.astype(jnp.int32)
    return Actor(physics, target, plan, actor.p_stack, *score), row


def decide(env: CubeEnv, actor: Actor) -> tuple[Rows, oracles.Plan, Bool[Array, ""]]:
    """The row of the current state and the expert's action in it; the plan after it; whether it ends."""
    physics = actor.physics
    action, plan, done = oracles.act(actor.plan, env.readings(physics))
    return Rows(env.observe(physics), action, physics.qpos, physics.qvel), plan, done


@eqx.filter_jit
def _begin(env: CubeEnv, family: str, keys: Key[Array, " E"]) -> Actor:
    return jax.vmap(lambda key: start(env, family, key))(jax.vmap(lambda k: jr.fold_in(k, 0))(keys))


@eqx.filter_jit
def _stretch(
    env: CubeEnv, actors: Actor, keys: Key[Array, " E"], active: Bool[Array, " E"], begin: Int[Array, ""]
) -> tuple[Actor, Rows]:
    """`_STRETCH` control steps of every episode, the first of them number `begin`."""

    def body(actors: Actor, t: Int[Array, ""]) -> tuple[Actor, Rows]:
        return jax.vmap(lambda *one: advance(env, one[0], jr.fold_in(one[1], t), one[2]))(
            actors, keys, active
        )

    # Number 0 of each episode's keys began it.
    return jax.lax.scan(body, actors, 1 + begin + jnp.arange(_STRETCH))


@eqx.filter_jit
def _last_row(env: CubeEnv, actors: Actor) -> Rows:
    """The row of each episode's final state, on a time axis of length 1; it needs no physics."""
    return jax.tree.map(lambda x: x[None], jax.vmap(lambda actor: decide(env, actor)[0])(actors))


def _widths(env: CubeEnv) -> dict[str, int]:
    """Numbers per row of each field of `Rows`."""
    model = env.scene.model
    sizes = env.spec.obs_dim, env.spec.action_dim, int(model.nq), int(model.nv)
    return dict(zip(Rows._fields, sizes, strict=True))


class _Recorder:
    """The rows of all episodes, filled in group by group, and how many there are so far."""

    def __init__(self, env: CubeEnv, episodes: int, progress: Callable[[int, int], None] | None):
        shapes = {name: (episodes, EPISODE_ROWS, width) for name, width in _widths(env).items()}
        self.data = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
        self.episodes = episodes
        self._progress = progress
        self._done = 0

    def add(self, rows: Rows, episodes: slice, begin: int) -> None:
        """Stores rows `[time, group, ...]` of `episodes` that begin at time `begin`."""
        count, steps = episodes.stop - episodes.start, len(rows.actions)
        for name, part in rows._asdict().items():
            self.data[name][episodes, begin : begin + steps] = np.swapaxes(np.asarray(part), 0, 1)[:count]
        self._done += count * steps
        if self._progress is not None:
            self._progress(self._done, self.episodes * EPISODE_ROWS)


def _simulate(env: CubeEnv, family: str, seed: int, record: _Recorder) -> tuple[int, int]:
    """Fills `record`; returns how many targets the expert was given and how many it hit."""
    targets = hits = 0
    for first in range(0, record.episodes, _GROUP):
        index = jnp.arange(first, first + _GROUP)
        keys = jax.vmap(lambda i: jr.fold_in(jr.key(seed), i))(index)
        active = index < record.episodes
        episodes = slice(first, min(first + _GROUP, record.episodes))
        actors = _begin(env, family, keys)
        for t in range(0, EPISODE_ROWS - 1, _STRETCH):
            actors, rows = _stretch(env, actors, keys, active, jnp.asarray(t))
            record.add(rows, episodes, t)
        record.add(_last_row(env, actors), episodes, EPISODE_ROWS - 1)
        targets += int(actors.targets[active].sum())
        hits += int(actors.hits[active].sum())
    return targets, hits


def _schema(data: dict[str, np.ndarray], episodes: slice) -> dict[str, np.ndarray]:
    """OGBench's arrays: rows of all episodes end to end; `terminals` marks the last row of each."""
    part = {name: x[episodes].reshape(-1, x.shape[-1]) for name, x in data.items()}
    terminals = np.arange(len(part["actions"])) % EPISODE_ROWS == EPISODE_ROWS - 1
    return {**part, "terminals": terminals}


def _check_target(path: Path, bytes_needed: int) -> None:
    """Finds out before an hour of simulation, not after, that the files cannot be written."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: a dataset file must end in .npz")
    if path.exists():
        raise UserError(f"{path} exists; delete it to make the data anew, or choose another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _part(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write into {path.parent}: {error.strerror}; choose another folder"
        ) from error
    free = shutil.disk_usage(path.parent).free
    if free < 1.05 * bytes_needed:
        raise UserError(
            f"{path.parent} has {free / 1e6:.0f} MB free, the dataset takes {bytes_needed / 1e6:.0f} MB; "
            "free some space or ask for fewer rows"
        )


def _write_pair(path: Path, train: dict[str, np.ndarray], val: dict[str, np.ndarray]) -> None:
    """Both files, each complete on disk before either gets its name; the training file is last."""
    parts = {}
    try:
        for final, arrays in ((val_path(path), val), (path, train)):
            parts[_part(final)] = final
            with open(_part(final), "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
        for part, final in parts.items():
            os.replace(part, final)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space or choose another folder"
        ) from error
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Where `path` is written until it is complete; one name per process."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")
