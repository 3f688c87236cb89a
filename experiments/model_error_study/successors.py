"""Distributions of successors: what models of chunks draw, against the simulator repeated from one state.

In `pointmaze-teleport` a chunk that enters a teleporter ends near one of three exits, all equally likely. A
state of the held-out data and its chunk are repeated M times in the simulator and drawn M times from the
model. The two sets are compared by their energy distance and by the share of draws near each exit.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key
from rich.table import Table

from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.mazes import TELEPORT_RADIUS
from envs_mjx.registry import make
from experiments.benchmarks.harness import write_csv
from experiments.launch import saved_run
from experiments.model_error_study.open_loop import held_out, interval_text, network_of
from experiments.model_error_study.rows import SuccessorRow
from experiments.model_error_study.success_by_error import success_of
from mac.chunk_dynamics import AbstractChunkDynamics
from mac.data.chunk_sequences import check_sequences, sample_sequences
from mac.data.normalize import Normalizer
from mac.errors import UserError
from mac.run.mesh import map_seeds
from mac.run.report.stats import Curve
from mac.run.report.table import print_tables
from mac.run.rng_streams import Stream, stream
from mac.types import Window

POOL = 8192
"""Chunks of held-out data among which those at a teleporter are looked for."""
NEAR = 4.0
"""Distance (m) from an exit's centre within which a state counts as near it: a cell of the maze."""
FAR = 1e6
"""Coordinate (m) of a goal that ends no episode."""
PLACES = ("teleporter", "elsewhere")


class Chunks(NamedTuple):
    """K states of the held-out data, in the environment's units, and the chunk that follows each."""

    obs: Float[np.ndarray, "K D"]
    actions: Float[np.ndarray, "K n A"]


Repetitions = dict[tuple[Any, ...], Float[np.ndarray, "K M D"]]
"""Ends of chunks in the simulator, by maze, states and actions."""

# The two sets.


def find_chunks(
    window: Window, normalizer: Normalizer, env: MazeEnv, chunk: int, count: int, seed: int
) -> dict[str, Chunks]:
    """Draws `count` chunks that enter a teleporter before their last action, and `count` away from any.

    Args:
        window: held-out data, normalised by `normalizer`.
    Raises:
        UserError: there are not as many.
    """
    real = sample_sequences(window, 1, chunk, POOL, jr.key(seed))
    states, actions = np.asarray(normalizer.invert(real.obs)), np.asarray(real.actions)[:, :, 0]
    away = np.linalg.norm(states[:, :, None, :2] - env.maze.entrances, axis=-1).min(axis=-1)
    enters = (away[:, 1:-1] <= TELEPORT_RADIUS).any(axis=1) & (away[:, 0] > TELEPORT_RADIUS)
    picked = {"teleporter": enters, "elsewhere": (away > 2 * TELEPORT_RADIUS).all(axis=1)}
    found = {}
    for place, rows in picked.items():
        numbers = np.flatnonzero(rows)[:count]
        if len(numbers) < count:
            raise UserError(
                f"--contexts={count}: {len(numbers)} of {POOL} held-out chunks are at place {place!r}; "
                "take fewer, or more data"
            )
        found[place] = Chunks(states[numbers, 0], actions[numbers])
    return found


def simulate(env: MazeEnv, chunks: Chunks, draws: int, seed: int) -> Float[np.ndarray, "K M D"]:
    """Ends of every chunk, `draws` times, each time with a key of its own; the walker starts at rest."""

    def once(
        obs: Float[Array, " D"], actions: Float[Array, "n A"], key: Key[Array, ""]
    ) -> Float[Array, " D"]:
        k_reset, k_episode = jr.split(key)
        state = env.reset(k_reset, jnp.asarray(1))
        motion = env.engine.load(obs, jnp.zeros(env.walker.model.nv))
        state = dataclasses.replace(state, motion=motion, obs=obs, target=jnp.full(2, FAR), key=k_episode)
        return jax.lax.scan(lambda s, a: (env.step(s, a), None), state, actions)[0].obs

    keys = jr.split(stream(jr.key(seed), Stream.SUCCESSORS), (len(chunks.obs), draws))
    every = jax.jit(jax.vmap(jax.vmap(once, in_axes=(None, None, 0))))
    return np.asarray(every(jnp.asarray(chunks.obs), jnp.asarray(chunks.actions), keys))


def draw(
    dynamics: AbstractChunkDynamics, cfg: Any, nets: Any, normalizer: Normalizer, chunks: Chunks, draws: int,
    seed: int,
) -> Float[np.ndarray, "S K M D"]:  # fmt: skip
    """Ends of every chunk as each seed's model draws them, in the environment's units."""
    count, (obs, actions) = len(chunks.obs), chunks
    s = normalizer.apply(jnp.asarray(np.repeat(obs, draws, axis=0)))
    a = jnp.asarray(np.repeat(actions.reshape(count, -1), draws, axis=0))
    key = stream(jr.key(seed), Stream.SUCCESSORS)

    def one(net: Any) -> Array:
        return dynamics.successor(cfg, net, s, a, key if dynamics.draws else None)

    ends = normalizer.invert(jax.jit(lambda nets: map_seeds(one, nets))(nets))
    return np.asarray(ends).reshape(-1, count, draws, obs.shape[-1])


# Comparing them.


def energy_distance(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "L D"]) -> float:
    """Estimates 2 E|x - y| - E|x - x'| - E|y - y'| without bias; 0 of equal distributions, maybe below.

    Source: Székely and Rizzo 2013; pairs of a draw with itself are left out.
    """
    between = np.linalg.norm(x[:, None] - y[None], axis=-1).mean()
    return float(2 * between - _spread(x) - _spread(y))


def _spread(x: Float[np.ndarray, "M D"]) -> float:
    """Mean distance of two different draws."""
    count = len(x)
    return float(np.linalg.norm(x[:, None] - x[None], axis=-1).sum() / (count * (count - 1)))


def exit_shares(
    ends: Float[np.ndarray, "*K M D"], exits: Float[np.ndarray, "E 2"]
) -> Float[np.ndarray, "*K E1"]:
    """Shares of draws that are near each exit, and, last, of those near none."""
    away = np.linalg.norm(ends[..., None, :2] - exits, axis=-1)
    nearest = np.where(away.min(axis=-1) <= NEAR, away.argmin(axis=-1), len(exits))
    return np.stack([(nearest == i).mean(axis=-1) for i in range(len(exits) + 1)], axis=-1)


def total_variation(p: Float[np.ndarray, "*K E"], q: Float[np.ndarray, "*K E"]) -> Float[np.ndarray, "*K"]:
    """Half the sum of differences of two distributions' shares, in [0, 1]."""
    return 0.5 * np.abs(p - q).sum(axis=-1)


# The command.


def compare_successors(
    folders: Sequence[Path], count: int, draws: int, seed: int, out: Path, command: Sequence[str]
) -> None:
    """Measures the newest checkpoint of every run; writes `successors.csv` to `out`.

    Args:
        count, draws: chunks at each place, and repetitions of each.
    Raises:
        UserError: a run has no model of chunks, or does not play in a point's maze with teleporters.
    """
    known: Repetitions = {}
    rows = [row for folder in folders for row in successor_rows(folder, count, draws, seed, known)]
    data = "; ".join(dict.fromkeys(row.data for row in rows))
    write_csv(out / "successors.csv", rows, command, data=data)
    print_tables(successor_table(rows, data))
    print(f"  {out / 'successors.csv'}")


def successor_rows(folder: Path, count: int, draws: int, seed: int, known: Repetitions) -> list[SuccessorRow]:
    """Returns the rows of one run: one per seed and place.

    `known` are repetitions of earlier runs, to which those of this one are added.
    """
    run = saved_run.open_run(folder)
    network, algo, chunk = network_of(run.state.nets, run.title), run.algo, run.algo.sample.chunk
    env, dynamics = make(run.settings.task_id, "c"), getattr(algo, "dynamics", None)
    if not (isinstance(env, MazeEnv) and env.walker.body == "point" and len(env.maze.entrances)):
        raise UserError(f"--successors: {folder} plays in {env.spec.name}; name runs of pointmaze-teleport")
    if dynamics is None:
        raise UserError(f"--successors: {run.title} has no model of action chunks; name runs of MAC")
    store = saved_run.open_dataset(folder, run.settings, algo.env)
    window = held_out(store, run.normalizer)
    assert store.val is not None
    check_sequences(f"{folder}: --successors", store.val.length, 1, chunk)
    places = find_chunks(window, run.normalizer, env, chunk, count, seed)
    curve, cfg, rows = success_of(run), run.settings.hp, []
    for place, chunks in places.items():
        same = (env.maze.size, chunks.obs.tobytes(), chunks.actions.tobytes())
        if same not in known:
            known[same] = simulate(env, chunks, draws, seed)
        real = known[same]
        drawn = draw(dynamics, cfg, network, run.normalizer, chunks, draws, seed)
        shares, wanted = exit_shares(drawn, env.maze.exits), exit_shares(real, env.maze.exits)
        for i, number in enumerate(run.numbers):
            energies = [energy_distance(*pair) for pair in zip(drawn[i], real, strict=True)]
            row = SuccessorRow(
                run=str(folder), algo=run.settings.algo, env=run.settings.env,
                dynamics=cfg.dynamics, samples=cfg.dynamics_samples, chunk=chunk, step=run.step,
                seed=number, place=place, contexts=count, draws=draws,
                energy=float(np.mean(energies)), variation=float(total_variation(shares[i], wanted).mean()),
                shares=_words(shares[i]), real_shares=_words(wanted),
                **_returns(curve, number), data=store.provenance.label,
            )  # fmt: skip
            rows.append(row)
    return rows


def _returns(curve: Curve, number: int) -> dict[str, Any]:
    """Success and returns of the seed of that number at the last evaluation, means over tasks."""
    at = curve.seeds.index(number)
    means = {"success": curve.scores, "predicted": curve.predicted, "realised": curve.realised}
    return {name: float(table[-1, at].mean()) for name, table in means.items()} | {"episodes": curve.episodes}


def _words(shares: Float[np.ndarray, "K E1"]) -> str:
    return " ".join(f"{share:.3f}" for share in shares.mean(axis=0))


def successor_table(rows: Sequence[SuccessorRow], data: str) -> Table:
    """Returns a table with one line per run, means over seeds with 95% intervals."""
    caption = "energy distance in m; 95% intervals over seeds; value bias: predicted - realised return"
    caption += f"\ndata: {data}"
    shown = Table(title="successors of chunks", title_justify="left", caption=caption, caption_justify="left")
    columns = ("run", "dynamics", *(f"energy, {place}" for place in PLACES), "wrong exits", "success")
    for name in (*columns, "value bias"):
        shown.add_column(name, justify="left" if name in ("run", "dynamics") else "right")
    for run in dict.fromkeys(row.run for row in rows):
        here, away = ([r for r in rows if (r.run, r.place) == (run, place)] for place in PLACES)
        values = [[r.energy for r in here], [r.energy for r in away], [r.variation for r in here]]
        values += [[r.success for r in here], [r.predicted - r.realised for r in here]]
        cells = (interval_text(np.asarray(each)) for each in values)
        shown.add_row(Path(run).name, here[0].dynamics, *cells)
    return shown
