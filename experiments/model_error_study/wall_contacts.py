"""Error of models where a walker touches walls, and where it does not: contacts change motions abruptly."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.random as jr
import mujoco
import numpy as np
from jaxtyping import Bool, Float
from rich.table import Table

from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.walkers import TORSO, Walker
from envs_mjx.registry import TaskId, make
from experiments.benchmarks.harness import write_csv
from experiments.launch import saved_run
from experiments.model_error_study.open_loop import (
    check_horizon,
    held_out,
    interval_text,
    network_of,
    open_loop_errors,
)
from experiments.model_error_study.rows import WallRow
from mac.data.chunk_sequences import sample_sequences
from mac.errors import UserError
from mac.run.report.table import print_tables

PLACES = ("touches a wall", "touches none")


def touching(walker: Walker, qpos: Float[np.ndarray, "*B nq"]) -> Bool[np.ndarray, "*B"]:
    """True where the walker in these positions touches a wall, by MuJoCo's collisions with its margins.

    Args:
        qpos: generalised coordinates of the walker's model, m and rad.
    """
    model, data = walker.model, mujoco.MjData(walker.model)
    wall = (model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    body = model.geom_bodyid >= TORSO
    found = []
    for positions in qpos.reshape(-1, model.nq):
        data.qpos[:] = positions
        mujoco.mj_fwdPosition(model, data)
        pairs = data.contact.geom
        found.append(bool((wall[pairs].any(axis=1) & body[pairs].any(axis=1)).any()))
    return np.asarray(found, bool).reshape(qpos.shape[:-1])


def compare_walls(
    folders: Sequence[Path], horizon: int, trajectories: int, seed: int, out: Path, command: Sequence[str]
) -> None:
    """Measures the newest checkpoint of every run; writes `walls.csv` to `out`.

    Raises:
        UserError: a run has no model of chunks, or does not play a point or an ant in a maze.
    """
    rows = [row for folder in folders for row in wall_rows(folder, horizon, trajectories, seed)]
    data = "; ".join(dict.fromkeys(row.data for row in rows))
    write_csv(out / "walls.csv", rows, command, data=data)
    print_tables(wall_table(rows, data))
    print(f"  {out / 'walls.csv'}")


def maze_of(task: TaskId, folder: Path) -> MazeEnv:
    """Returns the maze that the run in `folder` plays in.

    Raises:
        UserError: it plays elsewhere, or observations do not hold the positions of all joints.
    """
    env = make(task, "c")
    if isinstance(env, MazeEnv) and env.walker.body in ("point", "ant"):
        return env
    raise UserError(
        f"--walls: {folder} plays in {env.spec.name}; name runs of pointmaze or antmaze, whose observations "
        "hold the positions of all joints"
    )


def wall_rows(folder: Path, horizon: int, trajectories: int, seed: int) -> list[WallRow]:
    """Returns the rows of one run: one per seed, horizon and place."""
    run = saved_run.open_run(folder)
    network, chunk = network_of(run.state.nets, run.title), run.algo.sample.chunk
    env = maze_of(run.settings.task_id, folder)
    store = saved_run.open_dataset(folder, run.settings, run.algo.env)
    real = held_out(store, run.normalizer)
    check_horizon(f"{folder}: --horizon", horizon, chunk, store)
    errors = open_loop_errors(network, real, chunk, horizon, trajectories, seed, run.algo)
    # The same trajectories with all their states: starts depend on the horizon, not on the chunk.
    states = jax.jit(sample_sequences, static_argnums=(1, 2, 3))(real, 1, horizon, trajectories, jr.key(seed))
    qpos = np.asarray(run.normalizer.invert(states.obs))[..., : env.walker.model.nq]
    touched = np.logical_or.accumulate(touching(env.walker, qpos), axis=1)
    rows = []
    for column, steps in enumerate(errors.horizons):
        for place, picked in zip(PLACES, (touched[:, steps], ~touched[:, steps]), strict=True):
            if picked.any():
                rows += [
                    WallRow(
                        run=str(folder), algo=run.settings.algo, env=run.settings.env, chunk=chunk,
                        step=run.step, seed=number, place=place, horizon=steps,
                        error=float(errors.model[i, column, picked].mean()),
                        still=float(errors.still[column, picked].mean()),
                        trajectories=int(picked.sum()), data=store.provenance.label,
                    )
                    for i, number in enumerate(run.numbers)
                ]  # fmt: skip
    return rows


def wall_table(rows: Sequence[WallRow], data: str) -> Table:
    """Returns a table of the first and the last horizon of each run, means over seeds with 95% intervals."""
    caption = (
        "squared error of the normalised state, and its share of that of a constant state; 95% intervals"
    )
    caption += f" over seeds\ndata: {data}"
    shown = Table(title="errors at walls", title_justify="left", caption=caption, caption_justify="left")
    for name in ("run", "trajectory", "steps", "trajectories", "error", "of constant state"):
        shown.add_column(name, justify="left" if name in ("run", "trajectory") else "right")
    for run in dict.fromkeys(row.run for row in rows):
        own = [row for row in rows if row.run == run]
        for steps in sorted({own[0].horizon, own[-1].horizon}):
            for place in PLACES:
                here = [row for row in own if (row.horizon, row.place) == (steps, place)]
                if here:
                    share = [row.error / max(row.still, 1e-30) for row in here]
                    cells = (interval_text([row.error for row in here]), interval_text(share))
                    shown.add_row(Path(run).name, place, str(steps), str(here[0].trajectories), *cells)
    return shown
