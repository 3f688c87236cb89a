"""Narrow phase of a walker's balls and capsules with floor, walls and each other, by MuJoCo's rules.

Each function is for one pair of solids. `WalkerContactPoints.normal` points away from the wall, or from the
first solid to the second. A pair always gives its maximum number of points; those that do not exist are `FAR`
apart. MJX's own functions differ from C in three ways. Contacts between a capsule and a box end at distance 0
instead of the pair's margin, and have other points on edges and corners. The tangents of a steep capsule on a
plane do not follow the capsule, on which friction pyramids depend. The points of two nearly parallel capsules
are wrong.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

FAR = 1e6
"""Distance (m) of a point that does not exist."""
_AXES = np.arange(3, dtype=np.int32)
_TINY = 1e-15  # MuJoCo's mjMINVAL

# The edges of a box: the axis that each is parallel to, and the signs of its middle along the others.
_EDGES = [(axis, corner) for corner in range(8) for axis in range(3) if not corner >> axis & 1]
_EDGE_AXIS = np.array([axis for axis, _ in _EDGES], np.int32)
_EDGE_SIGN = np.array(
    [[0 if k == axis else 2 * (c >> k & 1) - 1 for k in range(3)] for axis, c in _EDGES], np.int32
)


class WalkerContactPoints(NamedTuple):
    """Points of contact: gap (m, negative in penetration), middle (m), normal."""

    gap: Float[Array, "*n"]
    pos: Float[Array, "*n 3"]
    normal: Float[Array, "*n 3"]


def ball_floor(centre: Float[Array, " 3"], radius: Float[Array, ""], height: float) -> WalkerContactPoints:
    """A ball on the horizontal plane at `height`."""
    gap = centre[2] - height - radius
    up = jnp.array([0.0, 0, 1], centre.dtype)
    return WalkerContactPoints(gap, centre - (radius + 0.5 * gap) * up, up)


def ball_ball(
    a: Float[Array, " 3"], b: Float[Array, " 3"], radius_a: Float[Array, ""], radius_b: Float[Array, ""]
) -> WalkerContactPoints:
    """Two balls."""
    distance, normal = _length(b - a)
    normal = jnp.where(distance == 0, jnp.array([1.0, 0, 0], a.dtype), normal)
    gap = distance - radius_a - radius_b
    return WalkerContactPoints(gap, a + (radius_a + 0.5 * gap) * normal, normal)


def capsule_capsule(
    a: Float[Array, " 3"],
    half_a: Float[Array, " 3"],
    radius_a: Float[Array, ""],
    b: Float[Array, " 3"],
    half_b: Float[Array, " 3"],
    radius_b: Float[Array, ""],
) -> WalkerContactPoints:
    """Two capsules of centres `a`, `b` and half axes `half_a`, `half_b`; a ball's half axis is 0.

    C finds two points where axes are parallel to 1e-15; this function finds one.
    """
    apart = a - b
    aa, ab, bb = half_a @ half_a, -(half_a @ half_b), half_b @ half_b
    u, v = -(half_a @ apart), half_b @ apart
    det = aa * bb - ab * ab
    crossing = det >= _TINY
    x = jnp.where(crossing, (bb * u - ab * v) / jnp.where(crossing, det, 1), 0)
    x = jnp.clip(x, -1, 1)
    y = jnp.clip((v - ab * x) / jnp.maximum(bb, _TINY), -1, 1)
    x = jnp.clip((u - ab * y) / jnp.maximum(aa, _TINY), -1, 1)
    return ball_ball(a + x * half_a, b + y * half_b, radius_a, radius_b)


def ball_wall(
    centre: Float[Array, " 3"], radius: Float[Array, ""], half: tuple[float, ...]
) -> WalkerContactPoints:
    """A ball at `centre` relative to an upright box of half sides `half`; positions are relative too."""
    sides = jnp.asarray(half, centre.dtype)
    foot = jnp.clip(centre, -sides, sides)
    distance, out = _length(centre - foot)
    inside = distance <= _TINY
    depth = sides - jnp.abs(centre)
    nearest = jnp.argmin(depth) == _AXES
    through = jnp.where(nearest, jnp.where(centre > 0, 1.0, -1.0), 0.0).astype(centre.dtype)
    normal = jnp.where(inside, through, out)
    gap = jnp.where(inside, -jnp.min(depth), distance) - radius
    return WalkerContactPoints(gap, centre - (radius + 0.5 * gap) * normal, normal)


def capsule_wall(
    centre: Float[Array, " 3"], axis: Float[Array, " 3"], radius: Float[Array, ""], half: tuple[float, ...]
) -> WalkerContactPoints:
    """A capsule of half axis `axis` at a box, two points: balls at two places of the axis. The first is
    nearest to the box; the second is as far from it as the axis runs along the box.
    """
    first, second = _two_places(centre, axis, jnp.asarray(half, centre.dtype))
    balls = [ball_wall(centre + t * axis, radius, half) for t in (first, jnp.nan_to_num(second))]
    balls[1] = balls[1]._replace(gap=jnp.where(jnp.isnan(second), FAR, balls[1].gap))
    return WalkerContactPoints(*(jnp.stack(x) for x in zip(*balls, strict=True)))


class _End(NamedTuple):
    """The end of an axis that is nearest to a face. Then its squared distance (inf if neither end faces the
    box), and the axis of the face that it is beyond (none if it is inside the box).
    """

    t: Float[Array, ""]
    square: Float[Array, ""]
    beyond: Bool[Array, " 3"]


class _Edge(NamedTuple):
    """The edge nearest to an axis: place on the axis, on the edge (-1 to 1), and squared distance. Then the
    nearest corner (-1 or 1, 0 for the inside of the edge), and the edge's row in the tables.
    """

    t: Float[Array, ""]
    x: Float[Array, ""]
    square: Float[Array, ""]
    corner: Float[Array, ""]
    row: Int[Array, ""]


def _two_places(
    centre: Float[Array, " 3"], axis: Float[Array, " 3"], half: Float[Array, " 3"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Places on the axis, in [-1, 1]; the second is nan where there is none."""
    end, edge = _nearest_end(centre, axis, half), _nearest_edge(centre, axis, half)
    on_edge = edge.square < end.square - _TINY
    step = jnp.where(edge.corner != 0, _from_corner(axis, half, edge), _from_edge(axis, half, edge))
    step = jnp.where(on_edge, step, _from_face(centre, axis, half, end))
    first = jnp.where(on_edge, edge.t, end.t)
    return first, first + step


def _nearest_end(centre: Float[Array, " 3"], axis: Float[Array, " 3"], half: Float[Array, " 3"]) -> _End:
    ends = jnp.array([-1.0, 1.0], centre.dtype)
    tips = centre + ends[:, None] * axis
    beyond = jnp.abs(tips) > half
    square = jnp.sum((tips - jnp.clip(tips, -half, half)) ** 2, axis=1)
    square = jnp.where(jnp.sum(beyond, axis=1) <= 1, square, jnp.inf)
    last = square[1] < square[0]
    return _End(
        jnp.where(last, 1.0, -1.0).astype(axis.dtype), jnp.min(square), jnp.where(last, *beyond[::-1])
    )


def _nearest_edge(centre: Float[Array, " 3"], axis: Float[Array, " 3"], half: Float[Array, " 3"]) -> _Edge:
    length = half[_EDGE_AXIS]
    apart = _EDGE_SIGN * half - centre  # from the capsule's centre to the edges' middles
    along = axis[_EDGE_AXIS]
    u, v = -length * (-centre[_EDGE_AXIS]), apart @ axis
    aa, ab, bb = length * length, -length * along, axis @ axis
    det = aa * bb - ab * ab
    crossing = jnp.abs(det) >= _TINY
    line = (bb * u - ab * v) / jnp.where(crossing, det, 1)
    free = (v - ab * jnp.clip(line, -1, 1)) / jnp.maximum(bb, _TINY)
    t = jnp.clip(free, -1, 1)
    back = (u - ab * t) / aa
    x = jnp.clip(back, -1, 1)
    # As in C, an edge whose line passes nearest beyond a corner counts as that corner, even if the end of
    # the axis is nearest to the inside of the edge.
    corner = jnp.where((jnp.abs(free) > 1) & (jnp.abs(back) > 1), back, jnp.where(jnp.abs(line) > 1, line, 0))
    onto = jnp.where(_EDGE_AXIS[:, None] == _AXES, (x * length)[:, None], 0)
    square = jnp.where(crossing, jnp.sum((apart - t[:, None] * axis + onto) ** 2, axis=1), jnp.inf)
    row = jnp.argmin(square)
    return _Edge(t[row], x[row], square[row], jnp.sign(corner[row]), row)


def _from_corner(axis: Float[Array, " 3"], half: Float[Array, " 3"], edge: _Edge) -> Float[Array, ""]:
    """From the place nearest to a corner: along the edge or the face that the axis follows."""
    sign = jnp.asarray(_EDGE_SIGN)[edge.row]
    corner = jnp.where(sign == 0, edge.corner > 0, sign > 0)
    inward = corner != (axis > 0)
    count = jnp.sum(inward)
    odd = jnp.where(count == 1, inward, ~inward)  # the axis along which the capsule goes its own way
    ahead = jnp.where(count == 1, 1.0, -1.0)
    room = 2 * half / jnp.maximum(jnp.abs(axis), _TINY)
    along_edge = jnp.sum(jnp.where(odd, axis, 0)) ** 2 > 0.5 * (axis @ axis)
    by_edge = jnp.minimum(1 - ahead * edge.t, jnp.sum(jnp.where(odd, room, 0)))
    by_face = -jnp.minimum(1 + ahead * edge.t, jnp.min(jnp.where(odd, jnp.inf, room)))
    step = ahead * jnp.where(along_edge, by_edge, by_face)
    return jnp.where((count == 1) | (count == 2), step, jnp.nan).astype(axis.dtype)


def _from_edge(axis: Float[Array, " 3"], half: Float[Array, " 3"], edge: _Edge) -> Float[Array, ""]:
    """From the place nearest to the inside of an edge: over the face that the axis leans to."""
    own = jnp.asarray(_EDGE_AXIS)[edge.row] == _AXES
    sign = jnp.asarray(_EDGE_SIGN)[edge.row]
    up = axis > 0
    inward = ~own & ((sign > 0) != up)
    steep = jnp.argmax(jnp.where(own, -1, jnp.abs(axis))) == _AXES
    forward = jnp.any(inward & steep)
    room = 1 / jnp.maximum(jnp.abs(axis), _TINY)
    step = jnp.where(forward, 1 - edge.t, 1 + edge.t)
    step = jnp.minimum(step, jnp.sum(jnp.where(steep, 2 * half * room, 0)))
    same = jnp.any(own & up) == forward
    rest = jnp.where(same, 1 - edge.x, 1 + edge.x)
    step = jnp.minimum(step, jnp.sum(jnp.where(own, half * room, 0)) * rest)
    return jnp.where(jnp.sum(inward) == 1, jnp.where(forward, step, -step), jnp.nan).astype(axis.dtype)


def _from_face(
    centre: Float[Array, " 3"], axis: Float[Array, " 3"], half: Float[Array, " 3"], end: _End
) -> Float[Array, ""]:
    """From an end: as far as the axis runs over the face."""
    tip, back = centre + end.t * axis, -end.t / jnp.where(axis == 0, _TINY, axis)
    leaves = jnp.concatenate([(half - tip) * back, (-half - tip) * back])
    counts = (leaves > 0) & ~jnp.concatenate([end.beyond, end.beyond])
    step = jnp.minimum(jnp.min(jnp.where(counts, leaves, jnp.inf)), 2)
    return jnp.where(jnp.any(end.beyond), -end.t * step, jnp.nan).astype(axis.dtype)


def _length(x: Float[Array, " 3"]) -> tuple[Float[Array, ""], Float[Array, " 3"]]:
    """Length and direction; the direction of 0 is 0."""
    length = jnp.sqrt(x @ x)
    return length, x / jnp.where(length > 0, length, 1)
