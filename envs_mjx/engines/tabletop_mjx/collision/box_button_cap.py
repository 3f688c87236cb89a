"""Narrow phase of a pad and the cap of a button, for a batch of pairs; arrays end with the axes K, B.

A cap is a flat cylinder, a pad a box. MuJoCo C finds the direction of least penetration. Where it is the
cap's axis, the corners of the pad's facing side that are below the cap's face and within it become contacts;
the face is a regular polygon of 16 sides. The normal is the pad's. If the two are more than 5 degrees apart,
the normal is the cap's, and only the deepest contact is kept. Presses from the side are left to boxes.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from envs_mjx.engines.tabletop_mjx.collision.box_box import (
    FAR,
    OrientedBoxes,
    TabletopContactPoints,
    box_box,
    box_to_world,
    inner,
    pick,
    sign,
    sum_of,
    world_to_box,
)
from envs_mjx.engines.tabletop_mjx.collision.polygon_clip import (
    ClippedPoints,
    Vec,
    ends,
    inside_interval,
    rectangle_outline,
)
from envs_mjx.engines.tabletop_mjx.xla_stages import stage

SIDE_OF_RADIUS = math.sqrt(math.pi) / 2
"""Half side of the square that has a disc's area, as a part of the disc's radius."""

_ALIGNED = math.cos(0.0889)  # of the angle under which C takes two faces as parallel
_SIDES = [math.pi / 8 * (k + 0.5) for k in range(8)]  # directions of the polygon's sides, of each two one


def pad_cap(pad: OrientedBoxes, cap: OrientedBoxes) -> TabletopContactPoints:
    """Contacts of boxes `pad` with cylinders along z, given as the boxes `cap` of equal cross-section."""
    radius = cap.half[0] / SIDE_OF_RADIUS
    turn, seen = _relative(pad, cap)
    on_top = _on_top(pad.half, cap.half[2], radius, turn, seen)
    side, normal, middle, e1, e2, slope = _facing_side(pad.half, cap.half[2], turn, seen)
    points = _clip(middle, e1, e2, radius)
    return _merged(_contacts(points, side, normal, slope, cap), box_box(pad, cap), on_top)


@stage
def _relative(pad: OrientedBoxes, cap: OrientedBoxes) -> tuple[tuple[Vec, ...], Vec]:
    """The pad's axes (columns) and position in the cap's frame."""
    turn = tuple(
        tuple(sum_of([cap.mat[k][i] * pad.mat[k][j] for k in range(3)]) for j in range(3)) for i in range(3)
    )
    return turn, world_to_box(cap.mat, tuple(pad.pos[k] - cap.pos[k] for k in range(3)))


def _facing(turn: tuple[Vec, ...]) -> Array:
    """Returns the axis of the pad that is nearest to the cap's."""
    size = [jnp.abs(x) for x in turn[2]]
    first = (size[0] >= size[1]) & (size[0] >= size[2])
    return jnp.where(first, 0, jnp.where(size[1] >= size[2], 1, 2))


@stage
def _on_top(half: Vec, height: Array, radius: Array, turn: tuple[Vec, ...], seen: Vec) -> Array:
    """Returns whether the two penetrate least along the cap's axis, compared with the pad's other axes and
    with horizontal directions across its edges and to its middle.
    """
    facing = _facing(turn)
    deep = jnp.abs(seen[2]) - height - sum_of([jnp.abs(turn[2][j]) * half[j] for j in range(3)])
    aside = []
    for j in range(3):
        axis = tuple(turn[i][j] for i in range(3))
        flat = jnp.sqrt(jnp.maximum(axis[0] ** 2 + axis[1] ** 2, 1e-12))
        gap = jnp.abs(inner(seen, axis)) - half[j] - height * jnp.abs(axis[2]) - radius * flat
        aside.append(jnp.where(facing == j, -jnp.inf, gap))
        aside.append(_beside((-axis[1] / flat, axis[0] / flat), half, radius, turn, seen))
    away = jnp.sqrt(jnp.maximum(seen[0] ** 2 + seen[1] ** 2, 1e-12))
    aside.append(_beside((seen[0] / away, seen[1] / away), half, radius, turn, seen))
    return (deep < 0) & (deep >= jnp.stack(aside).max(axis=0))


def _beside(along: Vec, half: Vec, radius: Array, turn: tuple[Vec, ...], seen: Vec) -> Array:
    """Separation along a horizontal direction."""
    reach = [jnp.abs(along[0] * turn[0][j] + along[1] * turn[1][j]) * half[j] for j in range(3)]
    return jnp.abs(along[0] * seen[0] + along[1] * seen[1]) - radius - sum_of(reach)


@stage
def _facing_side(
    half: Vec, height: Array, turn: tuple[Vec, ...], seen: Vec
) -> tuple[Array, Vec, Vec, Vec, Vec, Array]:
    """The pad's side that faces the cap, as the parallelogram m +- e1 +- e2 with the height above the cap's
    face as last coordinate.

    Returns +1 where the pad is above the cap and -1 below, the side's outward normal, m, e1, e2 and the
    cosine between the two normals.
    """
    side, j = sign(seen[2]), _facing(turn)
    axes = [tuple(pick(j, tuple(turn[i][(m + s) % 3] for m in range(3))) for i in range(3)) for s in range(3)]
    size = [pick(j, tuple(half[(m + s) % 3] for m in range(3))) for s in range(3)]
    towards = -side * sign(axes[0][2])
    normal = tuple(towards * x for x in axes[0])
    center = tuple(seen[k] + size[0] * normal[k] for k in range(3))
    e1, e2 = ((a[0] * s, a[1] * s, side * a[2] * s) for a, s in zip(axes[1:], size[1:], strict=True))
    return side, normal, (*center[:2], side * center[2] - height), e1, e2, jnp.abs(axes[0][2])


def _clip(middle: Vec, e1: Vec, e2: Vec, radius: Array) -> ClippedPoints:
    """Corners of the parallelogram within the polygon, and where its sides cross it: at most 8."""
    corners, sides = rectangle_outline(middle, e1, e2)
    start, along = (tuple(math.cos(t) * x[0] + math.sin(t) * x[1] for t in _SIDES) for x in (corners, sides))
    bound = math.cos(math.pi / 16) * radius
    return ends(corners, sides, *inside_interval(start, along, (bound,) * len(_SIDES)))


@stage
def _contacts(
    points: ClippedPoints, side: Array, normal: Vec, slope: Array, cap: OrientedBoxes
) -> TabletopContactPoints:
    """Points below the cap's face as contacts, each midway between the two surfaces."""
    aligned = slope > _ALIGNED
    upright = (jnp.zeros_like(side), jnp.zeros_like(side), -side)
    normal = tuple(jnp.where(aligned, n, u) for n, u in zip(normal, upright, strict=True))
    depth = points.w * jnp.where(aligned, slope, 1)
    face = (points.u, points.v, jnp.broadcast_to(side * cap.half[2], points.u.shape))
    middle = tuple(f - 0.5 * depth * n for f, n in zip(face, normal, strict=True))
    pos = [x + y for x, y in zip(box_to_world(cap.mat, middle), cap.pos, strict=True)]
    dist = jnp.where(points.inside & (depth < 0), depth, FAR)
    dist = jnp.where(aligned | (dist == dist.min(axis=0)), dist, FAR)
    return TabletopContactPoints(dist, jnp.stack(pos, axis=1), jnp.stack(box_to_world(cap.mat, normal))[None])


@stage
def _merged(top: TabletopContactPoints, other: TabletopContactPoints, on_top: Array) -> TabletopContactPoints:
    """Returns `top` where the pad presses on the cap's face, else `other`."""
    more = len(other.dist) - len(top.dist)
    dist = jnp.pad(top.dist, [(0, more), (0, 0), (0, 0)], constant_values=FAR)
    pos = jnp.pad(top.pos, [(0, more), (0, 0), (0, 0), (0, 0)])
    return TabletopContactPoints(
        jnp.where(on_top, dist, other.dist),
        jnp.where(on_top, pos, other.pos),
        jnp.where(on_top, top.normal, other.normal),
    )
