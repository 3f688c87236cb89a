"""A parallelogram clipped by a rectangle, for a batch of pairs at once; arrays end with the axes K, B."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from envs_mjx.engines.tabletop_mjx.xla_stages import stage

Vec = tuple[Array, ...]


class ClippedPoints(NamedTuple):
    """Candidates in a face's frame: in the face, height above it, and whether they are valid corners."""

    u: Float[Array, "p K B"]
    v: Float[Array, "p K B"]
    w: Float[Array, "p K B"]
    inside: Bool[Array, "p K B"]


SIGNS = ((-1, -1), (1, -1), (1, 1), (-1, 1))


def clip(m: Vec, e1: Vec, e2: Vec, a: Array, b: Array) -> ClippedPoints:
    """Corners of the parallelogram m +- e1 +- e2 within |u| <= a, |v| <= b: 12 candidates, at most 8 inside.

    On each side the segment inside the rectangle gives its start, and its end unless that is the next side's
    start. Then follow the corners of the rectangle that lie under the parallelogram.
    """
    corners, sides = rectangle_outline(m, e1, e2)
    t0, t1 = inside_interval(corners[:2], sides[:2], (a, b))
    parts = ends(corners, sides, t0, t1), _under(m, e1, e2, a, b)
    return ClippedPoints(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))


@stage
def rectangle_outline(m: Vec, e1: Vec, e2: Vec) -> tuple[Vec, Vec]:
    """Returns the four corners, and the sides that start there."""
    corners = [jnp.stack([m[k] + s1 * e1[k] + s2 * e2[k] for s1, s2 in SIGNS]) for k in range(3)]
    sides = [jnp.stack([2 * e1[k], 2 * e2[k], -2 * e1[k], -2 * e2[k]]) for k in range(3)]
    return tuple(corners), tuple(sides)


@stage
def inside_interval(start: Vec, along: Vec, bounds: Vec) -> tuple[Array, Array]:
    """The part t0 to t1 of [0, 1] where |start + t along| <= bounds in every coordinate; none if t0 > t1."""
    t0, t1 = jnp.zeros_like(start[0]), jnp.ones_like(start[0])
    for x, v, bound in zip(start, along, bounds, strict=True):
        flat = jnp.abs(v) < 1e-9
        inverse = 1 / jnp.where(flat, 1, v)
        near, far = (-bound - x) * inverse, (bound - x) * inverse
        t0 = jnp.where(flat, jnp.where(jnp.abs(x) > bound, 2, t0), jnp.maximum(t0, jnp.minimum(near, far)))
        t1 = jnp.where(flat, t1, jnp.minimum(t1, jnp.maximum(near, far)))
    return t0, t1


@stage
def ends(corners: Vec, sides: Vec, t0: Array, t1: Array) -> ClippedPoints:
    """Both ends of these parts of the sides; an end that is the next side's beginning is left out."""
    meets = t0 <= t1
    points = [jnp.concatenate([c + t0 * s, c + t1 * s]) for c, s in zip(corners, sides, strict=True)]
    return ClippedPoints(*points, inside=jnp.concatenate([meets, meets & (t1 < 1)]))


@stage
def _under(m: Vec, e1: Vec, e2: Vec, a: Array, b: Array) -> ClippedPoints:
    """Corners of the rectangle, inside if the parallelogram is over them."""
    area = e1[0] * e2[1] - e1[1] * e2[0]
    flat = jnp.abs(area) < 1e-12
    inverse = 1 / jnp.where(flat, 1, area)
    u, v = (jnp.stack([s[k] * bound for s in SIGNS]) for k, bound in ((0, a), (1, b)))
    x = ((u - m[0]) * e2[1] - (v - m[1]) * e2[0]) * inverse
    y = ((v - m[1]) * e1[0] - (u - m[0]) * e1[1]) * inverse
    inside = (jnp.abs(x) < 1) & (jnp.abs(y) < 1) & ~flat
    return ClippedPoints(u, v, m[2] + x * e1[2] + y * e2[2], inside)
