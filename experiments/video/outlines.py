"""Outlines of bodies, seen from above and from the side."""

from typing import NamedTuple

import mujoco
import numpy as np

from envs_mjx.manipulation.scenes import Scene
from envs_mjx.manipulation.tasks import CUBE_SIZE


class View(NamedTuple):
    """A view: the world axes that are drawn to the right and up, and their ranges, m."""

    name: str
    axes: tuple[int, int]
    right: tuple[float, float]
    up: tuple[float, float]


def views(scene: Scene) -> tuple[View, View]:
    """Returns the views from above and from the side, with the same range of x."""
    wide = 0.5 if scene.slides else 0.4
    x = (-0.02, 0.74)
    return View("from above", (0, 1), x, (-wide, wide)), View("from the side", (0, 2), x, (-0.02, 0.46))


class Shape(NamedTuple):
    """A convex part of a body: its corners in the body's frame, m."""

    body: int
    corners: np.ndarray


def pieces(model: mujoco.MjModel, body: str) -> list[Shape]:
    """Returns the collision boxes and capsules of `body`, as boxes; meshes are visual only."""
    number = model.body(body).id
    found = []
    for geom in np.flatnonzero(model.geom_bodyid == number):
        kind, size = model.geom_type[geom], model.geom_size[geom]
        if kind == mujoco.mjtGeom.mjGEOM_BOX:
            half = size
        elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
            half = np.array([size[0], size[0], size[1] + size[0]])
        else:
            continue
        turn = np.empty(9)
        mujoco.mju_quat2Mat(turn, model.geom_quat[geom])
        signs = np.stack(np.meshgrid(*[(-1.0, 1.0)] * 3), axis=-1).reshape(-1, 3)
        found.append(Shape(number, model.geom_pos[geom] + signs * half @ turn.reshape(3, 3).T))
    return found


def outline(points: np.ndarray) -> np.ndarray:
    """Returns the corners of the convex hull of points[n, 2], counter-clockwise."""

    def half(ordered: np.ndarray) -> list[np.ndarray]:
        kept: list[np.ndarray] = []
        for p in ordered:
            while len(kept) > 1 and np.linalg.det([kept[-1] - kept[-2], p - kept[-1]]) <= 1e-12:
                kept.pop()
            kept.append(p)
        return kept[:-1]

    ordered = points[np.lexsort((points[:, 1], points[:, 0]))]
    return np.array(half(ordered) + half(ordered[::-1]))


def cube_corners(pos: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Returns the corners, [8, 3], of a cube at `pos` with rotation matrix `turn`."""
    signs = np.stack(np.meshgrid(*[(-CUBE_SIZE / 2, CUBE_SIZE / 2)] * 3), axis=-1).reshape(-1, 3)
    return pos + signs @ turn.T
