"""OGBench's mazes: maps of walls, coordinates of cells, the five tasks, and teleporters.

Cell (i, j) is row i and column j of the map; it is a square of `UNIT` metres around `Maze.xy`. The maps
and the tasks are those of OGBench 1.2.
"""

import dataclasses
import functools

import numpy as np

from mac.errors import UserError

UNIT = 4.0
"""Side of a cell, m."""
WALL_HEIGHT = 2.0
"""Height of a wall, m."""
ORIGIN = -4.0
"""x and y (m) of the centre of cell (0, 0), so that the first free corner (1, 1) is the world's origin."""
PLACE_NOISE = 1.0
"""Starts and noisy goals are uniform in a square of this half side (m) around the centre of their cell."""
TELEPORT_RADIUS = 1.5
"""Distance (m) from the centre of an entrance within which a walker is teleported."""

Cell = tuple[int, int]

_MAPS = {
    "medium": """
        ########
        #..##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#..#
        ########""",
    "large": """
        ############
        #....#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#...#
        ############""",
    "giant": """
        ################
        #.#......##....#
        #.#.##.#.#..##.#
        #...#..#...#...#
        #.###.######.#.#
        #...#...#....#.#
        ###.#.#..#.#.###
        #...#..#...#...#
        #.#.#.######.#.#
        #.###...#...##.#
        #.....#...#....#
        ################""",
    "teleport": """
        ############
        #.....#.#..#
        ##.#...#..##
        ##.###.....#
        #....#.#.#.#
        #.##.#.#.#.#
        #.##.#.#.#.#
        #....#...#.#
        ############""",
}
_TASKS: dict[str, tuple[tuple[Cell, Cell], ...]] = {
    "medium": (((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1))),
    "large": (((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)), ((1, 1), (5, 4))),
    "giant": (((1, 1), (10, 14)), ((1, 14), (10, 1)), ((8, 14), (1, 1)), ((8, 3), (5, 12)), ((5, 9), (3, 8))),
    "teleport": (
        *(((1, 10), (7, 1)), ((1, 1), (7, 10)), ((5, 6), (7, 10))),
        *(((7, 1), (7, 10)), ((5, 6), (7, 1))),
    ),
}
_TELEPORTERS: dict[str, tuple[tuple[Cell, ...], tuple[Cell, ...]]] = {
    "teleport": (((4, 6), (5, 1)), ((1, 7), (6, 1), (6, 10))),
}
SIZES = tuple(_MAPS)


@dataclasses.dataclass(frozen=True, eq=False)
class Maze:
    """A maze; compared and hashed by identity. Treat arrays as read-only.

    Attributes:
        size: name, one of `SIZES`.
        walls: bool[rows, columns], True for walls; the rim is all walls.
        starts, goals: cell (i, j) of each task's start and goal, int[tasks, 2].
        entrances: centres (m) of the places that a walker is teleported from, float64[entrances, 2].
        exits: centres (m) of the places it is teleported to, all equally likely, float64[exits, 2].
    """

    size: str
    walls: np.ndarray
    starts: np.ndarray
    goals: np.ndarray
    entrances: np.ndarray
    exits: np.ndarray

    @staticmethod
    def xy(cells) -> np.ndarray:
        """Returns the centres (m) of cells (i, j), float64[..., 2]: x grows with the column, y with the
        row."""
        return np.asarray(cells, float)[..., ::-1] * UNIT + ORIGIN

    @staticmethod
    def cells(xy) -> np.ndarray:
        """Returns the cells (i, j) that contain points (m), int[..., 2]; the inverse of `xy`."""
        return np.floor((np.asarray(xy, float)[..., ::-1] - ORIGIN) / UNIT + 0.5).astype(int)


@functools.cache
def build_maze(size: str) -> Maze:
    """Returns the maze called `size`.

    Raises:
        UserError: if no maze has that name.
    """
    if size not in SIZES:
        raise UserError(f"unknown maze {size!r}; choose {', '.join(SIZES)}")
    rows = _MAPS[size].split()
    starts, goals = np.swapaxes(np.asarray(_TASKS[size]), 0, 1)
    entrances, exits = _TELEPORTERS.get(size, ((), ()))
    return Maze(
        size=size,
        walls=np.asarray([[cell == "#" for cell in row] for row in rows]),
        starts=starts,
        goals=goals,
        entrances=Maze.xy(np.reshape(entrances, (-1, 2))),
        exits=Maze.xy(np.reshape(exits, (-1, 2))),
    )
