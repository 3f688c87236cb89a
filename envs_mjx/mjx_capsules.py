"""Where a capsule and a box touch, for a batch of pairs at once; arrays end with the axes K, B.

The closest point of the capsule is a contact, and where part of its axis runs above the closest face of the
box, so is the farther end of that part: a finger lies against a handle at two points, as in C.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from envs_mjx.mjx_boxes import FAR, PERMUTED, Solid, Touch, Vec, add, inner, into, out, pick, sign, stretch
from envs_mjx.mjx_stage import stage

_APART = 1e-3  # of the capsule's half length; contacts nearer to each other are one
_PROJECTIONS = 8


def capsule_box(capsule: Solid, radius: Array, box: Solid) -> Touch:
    """Contacts of a capsule (of half length `capsule.half[2]`) with a box, two candidates."""
    start, axis, over = _over_face(capsule, box)
    begin, twice = tuple(x - v for x, v in zip(over.at, over.along, strict=True)), [2 * v for v in over.along]
    t0, t1 = (2 * t - 1 for t in stretch(begin[:2], tuple(twice[:2]), over.half[:2]))
    lower, t = _lower_end(over, t0, t1)
    for _ in range(_PROJECTIONS):
        t = _projected(start, axis, box.half, t)
    return _contacts(capsule, box, radius, start, axis, over, t0, t1, lower, t)


class _Over(NamedTuple):
    """A capsule's axis `at + t along`, t in [-1, 1], in the frame of the closest face of a box.

    Axis 2 is the face's normal up to the sign `outward`; `half` are the box's half sides and `columns` the
    frame's axes in the world.
    """

    at: Vec
    along: Vec
    half: Vec
    outward: Array
    columns: list[Vec]


@stage
def _over_face(capsule: Solid, box: Solid) -> tuple[Vec, Vec, _Over]:
    """The capsule's axis in the box's frame, and in that of the face with the largest gap."""
    start = into(box.mat, tuple(capsule.pos[k] - box.pos[k] for k in range(3)))
    axis = into(box.mat, tuple(capsule.mat[k][2] * capsule.half[2] for k in range(3)))
    gaps = [jnp.abs(start[k]) - jnp.abs(axis[k]) - box.half[k] for k in range(3)]
    first = (gaps[0] >= gaps[1]) & (gaps[0] >= gaps[2])
    k = jnp.where(first, 0, jnp.where(gaps[1] >= gaps[2], 1, 2))
    at, along, half = (
        tuple(pick(k, tuple(x[p] for p in row)) for row in PERMUTED) for x in (start, axis, box.half)
    )
    columns = [tuple(pick(k, tuple(box.mat[r][p] for p in row)) for r in range(3)) for row in PERMUTED]
    return start, axis, _Over(at, along, half, sign(at[2]), columns)


@stage
def _lower_end(over: _Over, t0: Array, t1: Array) -> tuple[Array, Array]:
    """Lower end of the part above the face, and where to start looking for the closest point."""
    rising = over.outward * over.along[2] > 0
    lower = jnp.where(rising, t0, t1)
    return lower, jnp.where(t0 <= t1, lower, 0)


@stage
def _projected(start: Vec, axis: Vec, half: Vec, t: Array) -> Array:
    """One alternating projection: to the box and back to the axis."""
    foot = tuple(jnp.clip(start[m] + t * axis[m], -half[m], half[m]) for m in range(3))
    back = inner(axis, tuple(foot[m] - start[m] for m in range(3)))
    return jnp.clip(back / jnp.maximum(inner(axis, axis), 1e-12), -1, 1)


@stage
def _contacts(
    capsule: Solid,
    box: Solid,
    radius: Array,
    start: Vec,
    axis: Vec,
    over: _Over,
    t0: Array,
    t1: Array,
    lower: Array,
    t: Array,
) -> Touch:
    meets = t0 <= t1
    point = tuple(start[m] + t * axis[m] for m in range(3))
    foot = tuple(jnp.clip(point[m], -box.half[m], box.half[m]) for m in range(3))
    away = tuple(foot[m] - point[m] for m in range(3))
    distance = jnp.sqrt(inner(away, away))
    inside = meets & (distance <= 1e-9)  # the axis itself is in the box
    normal = tuple(x / jnp.maximum(distance, 1e-9) for x in away)
    gap = jnp.where(distance > 1e-9, distance - radius, FAR)
    middle = tuple(foot[m] - 0.5 * gap * normal[m] for m in range(3))
    pos = [x + y for x, y in zip(out(box.mat, middle), box.pos, strict=True)]
    normal = out(box.mat, normal)
    face_normal = tuple(-over.outward * x for x in over.columns[2])
    far_t = jnp.where(jnp.abs(t0 - t) > jnp.abs(t1 - t), t0, t1)
    (gap0, pos0), (gap1, pos1) = (_on_face(over, box, radius, x) for x in (lower, far_t))
    first = jnp.where(inside, gap0, gap)
    second = jnp.where(meets & (jnp.abs(far_t - t) > _APART), gap1, FAR)
    dist = jnp.stack([first, second])
    pos = jnp.stack([jnp.where(inside, f, n) for f, n in zip(pos0, pos, strict=True)])
    normal = jnp.stack([jnp.where(inside, f, n) for f, n in zip(face_normal, normal, strict=True)])
    return Touch(
        jnp.where(dist < 0, dist, FAR),
        jnp.stack([pos, jnp.stack(pos1)]),
        jnp.stack([normal, jnp.stack(face_normal)]),
    )


def _on_face(over: _Over, box: Solid, radius: Array, t: Array) -> tuple[Array, list[Array]]:
    """Gap and contact point between the face and the capsule at `t` of its axis."""
    height = over.outward * (over.at[2] + t * over.along[2]) - over.half[2]
    gap = height - radius
    local = (
        over.at[0] + t * over.along[0],
        over.at[1] + t * over.along[1],
        over.outward * (over.half[2] + 0.5 * gap),
    )
    return gap, [box.pos[r] + add([over.columns[m][r] * local[m] for m in range(3)]) for r in range(3)]
