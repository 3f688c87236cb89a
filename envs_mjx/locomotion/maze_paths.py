"""Shortest paths in a maze over its cells, as tables that are looked up in traced code.

Source: OGBench (Park et al. 2025): its maze environments' sub-goals, and its datasets' distributions of
starts and goals.
"""

import dataclasses
import functools
from collections import deque

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from envs_mjx.locomotion.mazes import ORIGIN, PLACE_NOISE, UNIT, Maze, build_maze

STYLES = ("navigate", "stitch", "explore")
"""Kinds of datasets: from goal to goal; to one nearby goal, and stay there; in random directions."""
NEAR = 4
"""Cells between start and goal of a `stitch` episode, along the shortest path."""
_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))  # in OGBench's order, which decides ties


@dataclasses.dataclass(frozen=True, eq=False)
class MazePaths:
    """Tables of one maze; compared and hashed by identity. Cells are numbered row by row, walls included.

    Attributes:
        maze: the maze.
        free: numbers of cells without a wall, ascending, int[F].
        vertices: free cells that are not in a straight corridor, int[V]: ends, corners, crossings.
        next: `next[goal, cell]` is the cell to head for, int[cells, cells]: the neighbour nearest to the
            goal. It is the cell itself where no neighbour is nearer: in the goal's cell, or without a path.
        near: goals at a distance of `NEAR` cells from each cell, padded, int[cells, W].
        n_near: number of these goals; if there are none, the cell itself is the only goal.
    """

    maze: Maze
    free: np.ndarray
    vertices: np.ndarray
    next: np.ndarray
    near: np.ndarray
    n_near: np.ndarray

    def cell(self, xy: Float[Array, " 2"]) -> Int[Array, ""]:
        """Returns the number of the cell that contains a point (m)."""
        column, row = jnp.floor((xy - ORIGIN) / UNIT + 0.5).astype(jnp.int32)
        return row * self.maze.walls.shape[1] + column

    def centre(self, cell: Int[Array, ""]) -> Float[Array, " 2"]:
        """Returns the centre (m) of a cell."""
        row, column = jnp.divmod(cell, self.maze.walls.shape[1])
        return jnp.stack([column, row]).astype(jnp.float32) * UNIT + ORIGIN

    def place(self, key: Key[Array, ""], cell: Int[Array, ""]) -> Float[Array, " 2"]:
        """Draws a point (m) around the centre of a cell, as starts and goals are."""
        return self.centre(cell) + jr.uniform(key, (2,), minval=-PLACE_NOISE, maxval=PLACE_NOISE)

    def toward(self, xy: Float[Array, " 2"], goal: Float[Array, " 2"]) -> Float[Array, " 2"]:
        """Returns the unit vector to the centre of the next cell. In the goal's cell this is its centre, not
        the goal: OGBench's experts reach the goal through their noise."""
        ahead = self.centre(jnp.asarray(self.next)[self.cell(goal), self.cell(xy)]) - xy
        return ahead / (jnp.linalg.norm(ahead) + 1e-6)

    def draw_start(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """Draws the start cell of an episode: any free one."""
        return jr.choice(key, jnp.asarray(self.free))

    def draw_goal(self, key: Key[Array, ""], style: str, start: Int[Array, ""]) -> Int[Array, ""]:
        """Draws the goal's cell: near `start` in style `stitch`, else any of the vertices."""
        if style != "stitch":
            return jr.choice(key, jnp.asarray(self.vertices))
        which = jr.randint(key, (), 0, jnp.asarray(self.n_near)[start])
        return jnp.asarray(self.near)[start, which]


@functools.cache
def build_maze_paths(size: str) -> MazePaths:
    """Computes the tables of the maze called `size`.

    Raises:
        UserError: if no maze has that name.
    """
    maze = build_maze(size)
    is_free = ~maze.walls
    cells = np.arange(is_free.size)
    distance = np.stack([_distances(is_free, int(cell)) for cell in cells])
    near = [np.flatnonzero(row == NEAR) for row in distance]
    near = [found if len(found) else np.asarray([cell]) for found, cell in zip(near, cells, strict=True)]
    return MazePaths(
        maze,
        free=np.flatnonzero(is_free).astype(np.int32),
        vertices=np.flatnonzero(is_free & ~_straight(is_free)).astype(np.int32),
        next=np.stack([_downhill(row.reshape(is_free.shape)) for row in distance]).astype(np.int32),
        near=np.stack([np.resize(found, max(map(len, near))) for found in near]).astype(np.int32),
        n_near=np.asarray([len(found) for found in near], np.int32),
    )


def _straight(is_free: np.ndarray) -> np.ndarray:
    """Returns True for cells with exactly two free neighbours, opposite each other; the rim is all walls."""
    up, left, down, right = (np.roll(is_free, (-i, -j), (0, 1)) for i, j in _NEIGHBOURS)
    return (up & down & ~left & ~right) | (left & right & ~up & ~down)


def _distances(is_free: np.ndarray, start: int) -> np.ndarray:
    """Returns the steps from a cell to each cell, int[cells]; -1 without a path. A walker may be on top of a
    wall, so distances from walls count too."""
    found = np.full(is_free.shape, -1)
    first = divmod(start, is_free.shape[1])
    found[first] = 0
    queue = deque([first])
    while queue:
        i, j = queue.popleft()
        for a, b in ((i + di, j + dj) for di, dj in _NEIGHBOURS):
            if 0 <= a < len(is_free) and 0 <= b < is_free.shape[1] and is_free[a, b] and found[a, b] < 0:
                found[a, b] = found[i, j] + 1
                queue.append((a, b))
    return found.reshape(-1)


def _downhill(distance: np.ndarray) -> np.ndarray:
    """Returns for each cell the free neighbour at the least distance, or itself if none is nearer.

    A cell without a path to the goal has distance -1, so no neighbour is nearer and a walker there stays.
    """
    best, number = distance.copy(), np.arange(distance.size).reshape(distance.shape)
    ahead = number.copy()
    for i, j in _NEIGHBOURS:
        neighbour, cell = (np.roll(x, (-i, -j), (0, 1)) for x in (distance, number))
        nearer = (neighbour < best) & (neighbour >= 0)
        best, ahead = np.where(nearer, neighbour, best), np.where(nearer, cell, ahead)
    return ahead.reshape(-1)
