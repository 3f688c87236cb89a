"""The walls that a walker may touch: at most four, however large its maze.

A body that reaches less than half a cell from its torso touches nothing outside the square of one cell's side
around the torso. That square overlaps four cells: two by two. `reach` bounds the distance of any part of a
walker from its torso, so four boxes that follow it replace the whole maze exactly.
"""

import itertools

import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float

from envs_mjx.locomotion.mazes import ORIGIN, UNIT, WALL_HEIGHT, Maze
from envs_mjx.locomotion.walkers import TORSO
from mac.errors import UserError

NEAR = 4
"""Cells that a square of one cell's side overlaps."""
HALF = (UNIT / 2, UNIT / 2, WALL_HEIGHT / 2)
"""Half sides of a wall, m."""
_CORNERS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.int32)


def near_walls(maze: Maze, xy: Float[Array, " 2"]) -> tuple[Float[Array, "4 3"], Bool[Array, " 4"]]:
    """Returns the centres (m) of the four cells around a torso at `xy` (m), and which of them are walls.

    Outside of the maze there are no walls.
    """
    cell = jnp.floor((xy - ORIGIN) / UNIT).astype(jnp.int32) + _CORNERS  # column, row
    padded = jnp.asarray(np.pad(maze.walls, 1))  # a rim without walls
    column, row = jnp.clip(cell + 1, 0, np.array(padded.shape[::-1], np.int32) - 1).T
    centre = cell.astype(xy.dtype) * UNIT + ORIGIN
    height = jnp.full((NEAR, 1), WALL_HEIGHT / 2, xy.dtype)
    return jnp.concatenate([centre, height], axis=1), padded[row, column]


def reach(model: mujoco.MjModel) -> float:
    """Returns an upper bound of the distance (m) from the torso's origin to any point of the walker. Contact
    margins are included, and joint limits ignored.
    """
    away = np.full(model.nbody, np.nan)
    away[TORSO] = 0.0
    for body in range(TORSO + 1, model.nbody):
        away[body] = away[model.body_parentid[body]] + _arm(model, body)
    solid = np.flatnonzero((model.geom_bodyid >= TORSO) & (model.geom_contype | model.geom_conaffinity > 0))
    margin = model.geom_margin[solid] + model.geom_margin.max()
    far = away[model.geom_bodyid[solid]] + np.linalg.norm(model.geom_pos[solid], axis=1)
    return float((far + model.geom_rbound[solid] + margin).max())


def _arm(model: mujoco.MjModel, body: int) -> float:
    """Largest distance between the origins of a body on hinges and of its parent: a chain of rods from one
    to the other through the anchors of its joints.
    """
    first = model.body_jntadr[body]
    joints = range(first, first + model.body_jntnum[body])
    if any(model.jnt_type[j] != mujoco.mjtJoint.mjJNT_HINGE for j in joints):
        raise UserError("engine mjx runs walkers whose limbs turn on hinges; use engine c for this model")
    anchors = [model.jnt_pos[j] for j in joints]
    if not anchors:
        return float(np.linalg.norm(model.body_pos[body]))
    turned = np.zeros(3)
    mujoco.mju_rotVecQuat(turned, anchors[0], model.body_quat[body])
    between = sum(np.linalg.norm(b - a) for a, b in itertools.pairwise(anchors))
    return float(np.linalg.norm(model.body_pos[body] + turned) + between + np.linalg.norm(anchors[-1]))


def require_reach(model: mujoco.MjModel) -> None:
    """Refuses a walker that could touch a wall outside the four.

    Raises:
        UserError: if it may reach farther than half a cell.
    """
    far = reach(model)
    if far > UNIT / 2:
        raise UserError(
            f"the walker reaches {far:.2f} m, which is more than half a cell of the maze; use engine c"
        )
