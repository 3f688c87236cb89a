"""Narrow phase of two boxes, or a box and the floor, for a batch of pairs at once.

Every array ends with the axes K, B: pairs and scenes. Two boxes are separated along one of 15 axes or
touch (Gottschalk et al. 1996, "OBBTree"). Where the face of one box is the closest feature, the facing side
of the other box is clipped against it. Every corner of the clipped polygon below the face is a contact: up to
8, as in C. Where two edges are closest there is one contact.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from envs_mjx.engines.tabletop_mjx.collision.polygon_clip import SIGNS, ClippedPoints, Vec, clip
from envs_mjx.engines.tabletop_mjx.xla_stages import stage

FAR = 1.0
"""Distance (m) of a point that is not a contact."""

PREFER_FACE = 0.95
"""An edge must penetrate less than this part of what the best face does, as in C."""

_PARALLEL = 1e-3  # sine of the angle under which two edges count as parallel


class OrientedBoxes(NamedTuple):
    """Boxes: pose and half sides. For a capsule along its z axis, half sides (0, 0, half length)."""

    pos: Vec
    mat: tuple[Vec, ...]  # rows
    half: Vec


class TabletopContactPoints(NamedTuple):
    """Candidate contacts, p per pair: `dist` < 0 where there is one; normals point to the second solid."""

    dist: Float[Array, "p K B"]
    pos: Float[Array, "p 3 K B"]
    normal: Float[Array, "p 3 K B"]


def sum_of(terms: list[Array]) -> Array:
    """Sum of a list."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def inner(a: Vec, b: Vec) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def world_to_box(mat: tuple[Vec, ...], v: Vec) -> Vec:
    """`mat.T @ v`: a world vector in the frame of `mat`."""
    return tuple(mat[0][j] * v[0] + mat[1][j] * v[1] + mat[2][j] * v[2] for j in range(3))


def box_to_world(mat: tuple[Vec, ...], v: Vec) -> Vec:
    """`mat @ v`."""
    return tuple(inner(mat[i], v) for i in range(3))


def pick(index: Array, options: Vec) -> Array:
    """`options[index]`, element by element."""
    return jnp.where(index == 0, options[0], jnp.where(index == 1, options[1], options[2]))


def sign(x: Array) -> Array:
    """-1 or 1."""
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)


@stage
def floor_box(box: OrientedBoxes) -> TabletopContactPoints:
    """Contacts of the floor, z = 0, with boxes: of each two opposite corners the lower one, if below."""
    dist, points = [], []
    for s1, s2 in SIGNS:
        offset = box_to_world(box.mat, (box.half[0] * s1, box.half[1] * s2, box.half[2]))
        lower = -sign(offset[2])
        corner = [box.pos[r] + lower * offset[r] for r in range(3)]
        dist.append(jnp.where(corner[2] < 0, corner[2], FAR))
        points.append(jnp.stack([corner[0], corner[1], 0.5 * corner[2]]))
    pos = jnp.stack(points)
    up = jnp.stack([jnp.zeros_like(dist[0]), jnp.zeros_like(dist[0]), jnp.ones_like(dist[0])])
    return TabletopContactPoints(jnp.stack(dist), pos, jnp.broadcast_to(up, pos.shape))


def box_box(a: OrientedBoxes, b: OrientedBoxes) -> TabletopContactPoints:
    """Contacts of two boxes."""
    turn, seen_a, seen_b = _relative(a, b)
    best, which = _face_separation(a.half, b.half, turn, seen_a, seen_b)
    edge, i_edge, j_edge = _edge_separation(a.half, b.half, turn, seen_a)
    on_face = _face_contacts(a, b, turn, seen_a, seen_b, which)
    on_edge = _edge_contact(a, b, turn, seen_a, i_edge, j_edge)
    return _merged(best, edge, on_face, *on_edge)


@stage
def _relative(a: OrientedBoxes, b: OrientedBoxes) -> tuple[tuple[Vec, ...], Vec, Vec]:
    """Rotation of b in a's frame, and b's position as seen from a, in either frame."""
    between = tuple(b.pos[k] - a.pos[k] for k in range(3))
    turn = tuple(
        tuple(sum_of([a.mat[k][i] * b.mat[k][j] for k in range(3)]) for j in range(3)) for i in range(3)
    )
    return turn, world_to_box(a.mat, between), world_to_box(b.mat, between)


@stage
def _face_separation(
    half_a: Vec, half_b: Vec, turn: tuple[Vec, ...], seen_a: Vec, seen_b: Vec
) -> tuple[Array, Array]:
    """Largest separation along face normals, and which: 0-2 of a, 3-5 of b."""
    size = tuple(tuple(jnp.abs(x) for x in row) for row in turn)
    faces = [jnp.abs(seen_a[i]) - half_a[i] - inner(size[i], half_b) for i in range(3)]
    faces += [
        jnp.abs(seen_b[j]) - half_b[j] - sum_of([size[i][j] * half_a[i] for i in range(3)]) for j in range(3)
    ]
    best, which = faces[0], jnp.zeros_like(faces[0], jnp.int32)
    for k in range(1, 6):
        better = faces[k] > best
        best, which = jnp.where(better, faces[k], best), jnp.where(better, k, which)
    return best, which


@stage
def _edge_separation(
    half_a: Vec, half_b: Vec, turn: tuple[Vec, ...], seen: Vec
) -> tuple[Array, Array, Array]:
    """Largest separation along cross products of edges, and which edges."""
    size = tuple(tuple(jnp.abs(x) for x in row) for row in turn)
    best = jnp.full_like(seen[0], -jnp.inf)
    i_best = j_best = jnp.zeros_like(seen[0], jnp.int32)
    for i in range(3):
        i1, i2 = (i + 1) % 3, (i + 2) % 3
        for j in range(3):
            j1, j2 = (j + 1) % 3, (j + 2) % 3
            square = 1 - turn[i][j] ** 2
            gap = jnp.abs(seen[i2] * turn[i1][j] - seen[i1] * turn[i2][j])
            gap = gap - half_a[i1] * size[i2][j] - half_a[i2] * size[i1][j]
            gap = gap - half_b[j1] * size[i][j2] - half_b[j2] * size[i][j1]
            length = jnp.sqrt(jnp.maximum(square, _PARALLEL**2))
            gap = jnp.where(square > _PARALLEL**2, gap / length, -jnp.inf)
            better = gap > best
            best = jnp.where(better, gap, best)
            i_best, j_best = jnp.where(better, i, i_best), jnp.where(better, j, j_best)
    return best, i_best, j_best


@stage
def _edge_contact(
    a: OrientedBoxes, b: OrientedBoxes, turn: tuple[Vec, ...], seen: Vec, i: Array, j: Array
) -> tuple[Float[Array, "3 K B"], Float[Array, "3 K B"]]:
    """The point midway between the closest edges, of directions i of `a` and j of `b`, and the normal."""
    along_a = tuple((i == k).astype(seen[0].dtype) for k in range(3))
    along_b = tuple(pick(j, turn[k]) for k in range(3))
    normal = tuple(
        along_a[(k + 1) % 3] * along_b[(k + 2) % 3] - along_a[(k + 2) % 3] * along_b[(k + 1) % 3]
        for k in range(3)
    )
    scale = sign(inner(normal, seen)) / jnp.sqrt(jnp.maximum(inner(normal, normal), _PARALLEL**2))
    normal = tuple(scale * x for x in normal)
    on_a = tuple(jnp.where(i == k, 0, sign(normal[k]) * a.half[k]) for k in range(3))
    away = [sign(sum_of([turn[k][m] * normal[k] for k in range(3)])) for m in range(3)]
    reach = tuple(jnp.where(j == m, 0, -away[m] * b.half[m]) for m in range(3))
    on_b = tuple(seen[k] + inner(turn[k], reach) for k in range(3))
    apart = tuple(on_b[k] - on_a[k] for k in range(3))
    c, pa, pb = inner(along_a, along_b), inner(along_a, apart), inner(along_b, apart)
    rest = 1 / jnp.maximum(1 - c * c, _PARALLEL**2)
    ta, tb = (pa - c * pb) * rest, (c * pa - pb) * rest
    middle = tuple(0.5 * (on_a[k] + ta * along_a[k] + on_b[k] + tb * along_b[k]) for k in range(3))
    world = [x + y for x, y in zip(box_to_world(a.mat, middle), a.pos, strict=True)]
    return jnp.stack(world), jnp.stack(box_to_world(a.mat, normal))


@stage
def _merged(
    best: Array,
    edge: Array,
    on_face: TabletopContactPoints,
    edge_pos: Float[Array, "3 K B"],
    edge_normal: Float[Array, "3 K B"],
) -> TabletopContactPoints:
    """Contacts on the face, or the one on the edges if they are clearly closer."""
    is_edge = edge > PREFER_FACE * best
    dist = jnp.where(is_edge | (best > 0), FAR, on_face.dist)
    first = jnp.where(is_edge & (edge < 0) & (best < 0), edge, dist[0])
    normal = jnp.where(is_edge, edge_normal, on_face.normal[0])
    return TabletopContactPoints(
        jnp.concatenate([first[None], dist[1:]]),
        jnp.concatenate([jnp.where(is_edge, edge_pos, on_face.pos[0])[None], on_face.pos[1:]]),
        jnp.broadcast_to(normal, on_face.pos.shape),
    )


def _face_contacts(
    a: OrientedBoxes, b: OrientedBoxes, turn: tuple[Vec, ...], seen_a: Vec, seen_b: Vec, which: Array
) -> TabletopContactPoints:
    """Corners of the side of one box that faces the other's face number `which` (0-2 of a, 3-5 of b)."""
    of_b, axis = which >= 3, jnp.where(which >= 3, which - 3, which)
    rows, at, limit, top = _face_frame(a.half, b.half, turn, seen_a, seen_b, of_b, axis)
    outward, middle, e1, e2 = _facing_side(rows, at, limit, top)
    points = clip(middle, e1, e2, limit[0], limit[1])
    columns, origin = _world_frame(a, b, of_b, axis)
    return _to_world(points, outward, limit[2], columns, origin, of_b)


PERMUTED = [tuple((k + s) % 3 for k in range(3)) for s in (1, 2, 0)]
"""Row m: which axis of a box is axis m of the frame of its face k = 0, 1, 2; axis 2 is the normal."""


@stage
def _face_frame(
    half_a: Vec,
    half_b: Vec,
    turn: tuple[Vec, ...],
    seen_a: Vec,
    seen_b: Vec,
    of_b: Array,
    axis: Array,
) -> tuple[tuple[Vec, ...], Vec, Vec, Vec]:
    """Rotation and position of the other box in the face's frame; half sides of both."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(of_b, y, x)

    rel = tuple(tuple(choose(turn[i][j], turn[j][i]) for j in range(3)) for i in range(3))
    at = tuple(choose(seen_a[k], -seen_b[k]) for k in range(3))
    base = tuple(choose(half_a[k], half_b[k]) for k in range(3))
    top = tuple(choose(half_b[k], half_a[k]) for k in range(3))
    rows = tuple(tuple(pick(axis, tuple(rel[p][j] for p in row)) for j in range(3)) for row in PERMUTED)
    center, limit = (tuple(pick(axis, tuple(x[p] for p in row)) for row in PERMUTED) for x in (at, base))
    return rows, center, limit, top


@stage
def _facing_side(rows: tuple[Vec, ...], center: Vec, limit: Vec, top: Vec) -> tuple[Array, Vec, Vec, Vec]:
    """The side of the other box that faces the face, as the parallelogram m +- e1 +- e2.

    Returns the sign of the face's outward normal (axis 2), m, e1 and e2; their last coordinate is the
    height above the face.
    """
    outward = sign(center[2])
    facing = [jnp.abs(x) for x in rows[2]]
    first = (facing[0] >= facing[1]) & (facing[0] >= facing[2])
    j = jnp.where(first, 0, jnp.where(facing[1] >= facing[2], 1, 2))
    sides = [
        tuple(pick(j, tuple(rows[k][(m + s) % 3] for m in range(3))) for k in range(3)) for s in range(3)
    ]
    size = [pick(j, tuple(top[(m + s) % 3] for m in range(3))) for s in range(3)]
    down = -outward * sign(sides[0][2]) * size[0]
    middle = tuple(center[k] + down * sides[0][k] for k in range(3))
    e1, e2 = ((sides[s][0] * size[s], sides[s][1] * size[s], outward * sides[s][2] * size[s]) for s in (1, 2))
    return outward, (middle[0], middle[1], outward * middle[2] - limit[2]), e1, e2


@stage
def _world_frame(a: OrientedBoxes, b: OrientedBoxes, of_b: Array, axis: Array) -> tuple[list[Vec], Vec]:
    """Axes of the face's frame in the world, and where it is."""
    mat = tuple(tuple(jnp.where(of_b, b.mat[r][k], a.mat[r][k]) for k in range(3)) for r in range(3))
    origin = tuple(jnp.where(of_b, b.pos[r], a.pos[r]) for r in range(3))
    return [tuple(pick(axis, tuple(mat[r][p] for p in row)) for r in range(3)) for row in PERMUTED], origin


@stage
def _to_world(
    points: ClippedPoints, outward: Array, height: Array, columns: list[Vec], origin: Vec, of_b: Array
) -> TabletopContactPoints:
    """Points below the face as contacts, each midway between the two surfaces."""
    middle = outward * (height + 0.5 * points.w)
    pos = [
        origin[r] + columns[0][r] * points.u + columns[1][r] * points.v + columns[2][r] * middle
        for r in range(3)
    ]
    towards = jnp.where(of_b, -outward, outward)
    normal = jnp.stack([towards * columns[2][r] for r in range(3)])
    dist = jnp.where(points.inside & (points.w < 0), points.w, FAR)
    return TabletopContactPoints(dist, jnp.stack(pos, axis=1), normal[None])
