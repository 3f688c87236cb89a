"""Narrow phase of a capsule and a box, for a batch of pairs at once; arrays end with the axes K, B.

The closest point of the capsule is a contact. A second one is the farther end of the part of its axis that
runs along the box, if it penetrates too: a finger lies against a handle at two points, as in C.
"""

import jax.numpy as jnp
from jaxtyping import Array

from envs_mjx.engines.tabletop_mjx.collision.box_box import (
    FAR,
    OrientedBoxes,
    TabletopContactPoints,
    box_to_world,
    inner,
    pick,
    sign,
    world_to_box,
)
from envs_mjx.engines.tabletop_mjx.collision.polygon_clip import Vec
from envs_mjx.engines.tabletop_mjx.xla_stages import stage

_APART = 1e-3  # of the capsule's half length; contacts nearer to each other are one
_PROJECTIONS = 8


def capsule_box(capsule: OrientedBoxes, radius: Array, box: OrientedBoxes) -> TabletopContactPoints:
    """Contacts of a capsule (of half length `capsule.half[2]`) with a box, two candidates."""
    start, axis = _axis(capsule, box)
    t0, t1 = _beside(start, axis, box.half)
    t = _nearer(start, axis, box.half, t0, t1)
    for _ in range(_PROJECTIONS):
        t = _projected(start, axis, box.half, t)
    farther = jnp.where(jnp.abs(t0 - t) > jnp.abs(t1 - t), t0, t1)
    first, second = (_sphere(start, axis, radius, box, x) for x in (t, farther))
    twice = jnp.where(jnp.abs(farther - t) > _APART, second[0], FAR)
    return TabletopContactPoints(*(jnp.stack(x) for x in zip(first, (twice, *second[1:]), strict=True)))


@stage
def _axis(capsule: OrientedBoxes, box: OrientedBoxes) -> tuple[Vec, Vec]:
    """The capsule's axis in the box's frame: middle and half."""
    start = world_to_box(box.mat, tuple(capsule.pos[k] - box.pos[k] for k in range(3)))
    return start, world_to_box(box.mat, tuple(capsule.mat[k][2] * capsule.half[2] for k in range(3)))


@stage
def _beside(start: Vec, axis: Vec, half: Vec) -> tuple[Array, Array]:
    """The part t0 to t1 of the axis, in [-1, 1], between the two faces of the box that it runs towards."""
    size = [jnp.abs(x) for x in axis]
    first = (size[0] >= size[1]) & (size[0] >= size[2])
    k = jnp.where(first, 0, jnp.where(size[1] >= size[2], 1, 2))
    x, v, bound = (pick(k, y) for y in (start, axis, half))
    inverse = sign(v) / jnp.maximum(jnp.abs(v), 1e-9)
    ends = (-bound - x) * inverse, (bound - x) * inverse
    return jnp.clip(jnp.minimum(*ends), -1, 1), jnp.clip(jnp.maximum(*ends), -1, 1)


def _foot(start: Vec, axis: Vec, half: Vec, t: Array) -> tuple[Vec, Vec]:
    """Point of the axis, and the closest point of the box."""
    point = tuple(start[m] + t * axis[m] for m in range(3))
    return point, tuple(jnp.clip(point[m], -half[m], half[m]) for m in range(3))


@stage
def _nearer(start: Vec, axis: Vec, half: Vec, t0: Array, t1: Array) -> Array:
    """The one of two points of the axis that is nearer to the box."""
    away = []
    for t in (t0, t1):
        point, foot = _foot(start, axis, half, t)
        apart = tuple(p - f for p, f in zip(point, foot, strict=True))
        away.append(inner(apart, apart))
    return jnp.where(away[0] <= away[1], t0, t1)


@stage
def _projected(start: Vec, axis: Vec, half: Vec, t: Array) -> Array:
    """One alternating projection: to the box and back to the axis."""
    _, foot = _foot(start, axis, half, t)
    back = inner(axis, tuple(foot[m] - start[m] for m in range(3)))
    return jnp.clip(back / jnp.maximum(inner(axis, axis), 1e-12), -1, 1)


@stage
def _sphere(start: Vec, axis: Vec, radius: Array, box: OrientedBoxes, t: Array) -> tuple[Array, Array, Array]:
    """Contact of the box with a ball around the axis at `t`: gap, position and normal."""
    point, foot = _foot(start, axis, box.half, t)
    away = tuple(f - p for f, p in zip(foot, point, strict=True))
    distance = jnp.sqrt(inner(away, away))
    inside = distance < 1e-7
    depth = [jnp.abs(point[m]) - box.half[m] for m in range(3)]
    first = (depth[0] >= depth[1]) & (depth[0] >= depth[2])
    k = jnp.where(first, 0, jnp.where(depth[1] >= depth[2], 1, 2))
    through = tuple(jnp.where(k == m, -sign(point[m]), 0) for m in range(3))
    normal = tuple(
        jnp.where(inside, n, a / jnp.where(inside, 1, distance)) for n, a in zip(through, away, strict=True)
    )
    gap = jnp.where(inside, pick(k, tuple(depth)), distance) - radius
    middle = tuple(point[m] + (radius + 0.5 * gap) * normal[m] for m in range(3))
    world = [x + y for x, y in zip(box_to_world(box.mat, middle), box.pos, strict=True)]
    return jnp.where(gap < 0, gap, FAR), jnp.stack(world), jnp.stack(box_to_world(box.mat, normal))
