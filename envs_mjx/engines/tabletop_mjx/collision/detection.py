"""Contacts of a batch of scenes: broad phase, narrow phase, and a contact buffer of fixed size.

Arrays end with the batch axis B. A scene has hundreds of pairs of solids that may touch and a handful that
do. The broad phase computes for every pair the largest gap between its world-aligned bounding boxes along the
world's axes; solids whose gap is positive cannot touch. The pairs with the smallest gaps, as many as
`TabletopContactCapacity` allows, go to the narrow phase. The deepest of their points become contacts.
Overflow is counted, not lost silently: pairs whose bounding boxes overlap, and points that penetrate.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from envs_mjx.engines.solver_parameters import impedance, stiffness_damping
from envs_mjx.engines.tabletop_mjx.batched_linalg import sum_leading
from envs_mjx.engines.tabletop_mjx.collision import box_box, box_button_cap
from envs_mjx.engines.tabletop_mjx.collision.box_box import OrientedBoxes, TabletopContactPoints
from envs_mjx.engines.tabletop_mjx.collision.box_capsule import capsule_box
from envs_mjx.engines.tabletop_mjx.collision.collision_model import CollisionModel
from envs_mjx.engines.tabletop_mjx.collision.pairs import TabletopSolids, cartesian_pairs
from envs_mjx.engines.tabletop_mjx.dynamics import MotionAxes, Poses, attached_poses, const, cross
from envs_mjx.engines.tabletop_mjx.xla_stages import stage


class TabletopContactCapacity(NamedTuple):
    """Capacities of a scene's buffers of pairs and contact points."""

    boxes: int
    capsules: int
    contacts: int


class Contacts(NamedTuple):
    """Contact points, one per slot of the buffer: `dist` < 0 where the slot is used.

    Attributes:
        pair: row of `CollisionModel.pairs`.
        dropped: contacts dropped because the contact buffer was full.
    """

    dist: Float[Array, "k B"]
    pos: Float[Array, "k 3 B"]
    normal: Float[Array, "k 3 B"]
    pair: Int[Array, "k B"]
    dropped: Int[Array, " B"]


def detect_contacts(model: CollisionModel, slots: TabletopContactCapacity, at: Poses) -> Contacts:
    """Finds the contacts of scenes whose moving bodies are `at`."""
    boxes = attached_poses(model.boxes.frames, at)
    found, lost, start = [_on_floor(model, boxes)], [], model.on_floor[1] - model.on_floor[0]
    kinds = (
        (model.box_products, slots.boxes, model.boxes, lambda a, b: box_box.box_box(a[0], b[0])),
        (model.cap_products, CAP_PAIRS, model.boxes, lambda a, b: box_button_cap.pad_cap(a[0], b[0])),
        (model.capsule_products, slots.capsules, model.capsules, lambda a, b: capsule_box(a[0], a[1], b[0])),
    )
    for products, room, first, narrow in kinds:
        if products:
            poses = boxes if first is model.boxes else attached_poses(first.frames, at)
            pairs = cartesian_pairs(products)
            more, missed = _near((poses, first), (boxes, model.boxes), products, pairs, room, narrow)
            found, lost = [*found, _Found(more.touch, more.pair + start)], [*lost, missed]
            start += len(pairs)
    return _deepest(found, slots.contacts, lost)


class _Found(NamedTuple):
    """Candidates of some pairs: p points per pair; there may be one normal per pair."""

    touch: TabletopContactPoints
    pair: Int[Array, "n B"]


_Shape = tuple[OrientedBoxes, Array]  # a solid, and its radius if it is a capsule

CAP_PAIRS = 8
"""Capacity for pairs of a pad and a button's cap: four pads over two buttons each."""


def _on_floor(model: CollisionModel, boxes: Poses) -> _Found:
    first, last = model.on_floor
    solid = _solid(Poses(boxes.pos[first:last], boxes.mat[first:last]), model.boxes.half[first:last])
    batch = boxes.pos.shape[-1]
    rows = jnp.broadcast_to(jnp.arange(last - first)[:, None], (last - first, batch))
    return _Found(box_box.floor_box(solid), rows)


def _solid(at: Poses, half: np.ndarray | Array) -> OrientedBoxes:
    half = const(half, at.pos) if isinstance(half, np.ndarray) else half
    half = jnp.broadcast_to(half, at.pos.shape)
    return OrientedBoxes(
        tuple(at.pos[:, k] for k in range(3)),
        tuple(tuple(at.mat[:, i, j] for j in range(3)) for i in range(3)),
        tuple(half[:, k] for k in range(3)),
    )


def _near(
    first: tuple[Poses, TabletopSolids],
    second: tuple[Poses, TabletopSolids],
    products: tuple[tuple[int, int, int, int], ...],
    pairs: np.ndarray,
    room: int,
    narrow: Callable[[_Shape, _Shape], TabletopContactPoints],
) -> tuple[_Found, Int[Array, " B"]]:
    """Narrow phase of the nearest `room` pairs of some Cartesian products, numbered as in `pairs`."""
    batch = second[0].pos.shape[-1]
    if len(pairs) <= room:
        rows = jnp.broadcast_to(jnp.arange(len(pairs))[:, None], (len(pairs), batch))
        a, b = _take_rows(*first, pairs[:, 0]), _take_rows(*second, pairs[:, 1])
        missed = jnp.zeros(batch, jnp.int32)
    else:
        gap = _gaps(products, first, second)
        rows = _smallest(gap, room)
        missed = jnp.maximum(jnp.sum(gap < 0, axis=0, dtype=jnp.int32) - room, 0)
        chosen = jnp.asarray(pairs)[rows]
        a, b = _take(*first, chosen[..., 0]), _take(*second, chosen[..., 1])
    return _Found(narrow(a, b), rows), missed


def _gaps(
    products: tuple[tuple[int, int, int, int], ...],
    first: tuple[Poses, TabletopSolids],
    second: tuple[Poses, TabletopSolids],
) -> Float[Array, "P B"]:
    """Gap of the bounding boxes of each pair, the largest over the world's axes."""
    (pos_a, reach_a), (pos_b, reach_b) = (_bounds(*x) for x in (first, second))
    gaps = []
    for a0, a1, b0, b1 in products:
        along = [
            jnp.abs(pos_a[a0:a1, None, k] - pos_b[None, b0:b1, k])
            - reach_a[a0:a1, None, k]
            - reach_b[None, b0:b1, k]
            for k in range(3)
        ]
        gap = jnp.maximum(jnp.maximum(along[0], along[1]), along[2])
        gaps.append(gap.reshape(-1, gap.shape[-1]))
    return jnp.concatenate(gaps)


def _bounds(at: Poses, solids: TabletopSolids) -> tuple[Float[Array, "n 3 B"], Float[Array, "n 3 B"]]:
    """Centre and half extent of world-aligned bounding boxes."""
    half = const(solids.half, at.pos)
    reach = sum(jnp.abs(at.mat[:, :, j]) * half[:, None, j] for j in range(3))
    return at.pos, reach + const(solids.radius[:, None], at.pos)


def _smallest(x: Float[Array, "n B"], k: int) -> Int[Array, "k B"]:
    """Row numbers of the k smallest entries of every column."""
    return jax.lax.top_k(-x.T, k)[1].T


def _take_rows(at: Poses, solids: TabletopSolids, rows: np.ndarray) -> tuple[OrientedBoxes, Array]:
    """Solids of fixed row numbers."""
    pos, mat = (jnp.concatenate([x[r : r + 1] for r in rows]) for x in at)
    radius = jnp.broadcast_to(const(solids.radius[rows], pos), (len(rows), pos.shape[-1]))
    return _solid(Poses(pos, mat), solids.half[rows]), radius


def _take(at: Poses, solids: TabletopSolids, rows: Int[Array, "k B"]) -> tuple[OrientedBoxes, Array]:
    """Solids of row numbers that differ between scenes."""
    n, batch = at.pos.shape[0], at.pos.shape[-1]
    fixed = const(np.concatenate([solids.half, solids.radius[:, None]], axis=1), at.pos)
    table = [at.pos, at.mat.reshape(n, 9, batch), jnp.broadcast_to(fixed, (n, 4, batch))]
    values = jnp.take_along_axis(jnp.concatenate(table, axis=1), rows[:, None], axis=0)
    pos, mat, half, radius = jnp.split(values, (3, 12, 15), axis=1)
    return _solid(Poses(pos, mat.reshape(-1, 3, 3, batch)), half), radius[:, 0]


def _deepest(found: list[_Found], room: int, lost: list[Int[Array, " B"]]) -> Contacts:
    """The deepest `room` of all candidates."""
    dist = [f.touch.dist.reshape(-1, f.pair.shape[-1]) for f in found]
    pos = [jnp.moveaxis(f.touch.pos, 1, 2).reshape(-1, 3, f.pair.shape[-1]) for f in found]
    normal = [jnp.moveaxis(f.touch.normal, 1, 2).reshape(-1, 3, f.pair.shape[-1]) for f in found]
    pair = [jnp.broadcast_to(f.pair, f.touch.dist.shape).reshape(-1, f.pair.shape[-1]) for f in found]
    dist, pos, normal, pair = (jnp.concatenate(x) for x in (dist, pos, normal, pair))
    active = jnp.sum(dist < 0, axis=0, dtype=jnp.int32)
    dropped = sum(lost, jnp.maximum(active - room, 0))
    if dist.shape[0] <= room:
        return Contacts(dist, pos, normal, pair, dropped)
    rows = _smallest(dist, room)
    wide = rows[:, None]
    values = jnp.concatenate([dist[:, None], pos, normal], axis=1)
    values = jnp.take_along_axis(values, wide, axis=0)
    return Contacts(
        values[:, 0], values[:, 1:4], values[:, 4:], jnp.take_along_axis(pair, rows, axis=0), dropped
    )


class ConeRows(NamedTuple):
    """Contacts as rows of a constraint problem: normal, then two tangents.

    Attributes:
        frame: unit vectors of the rows in the world.
        jacobian, aref: rows of the acceleration's constraint J a - aref; zero in unused slots.
        weight: inverse regulariser of the normal row; that of the tangents is `impratio` times it.
        friction: coefficient of sliding.
        sensor_sign: sign with which the contact's force acts on the sensing pad.
    """

    frame: Float[Array, "3 k 3 B"]
    jacobian: Float[Array, "3 k nv B"]
    aref: Float[Array, "3 k B"]
    weight: Float[Array, "k B"]
    friction: Float[Array, "k B"]
    sensor_sign: Float[Array, "k B"]


@dataclasses.dataclass(frozen=True, eq=False)
class PairTable:
    """Parameters of every pair in one table: signs, then seven numbers and solimp."""

    rows: np.ndarray
    nv: int


def pair_table(model: CollisionModel, timestep: float) -> PairTable:
    p = model.pairs
    stiffness, damping = stiffness_damping(p.solref, p.solimp, timestep)
    columns = [p.sensor_sign, p.friction, p.invweight, stiffness, damping]
    return PairTable(np.concatenate([p.signs, np.stack(columns, 1), p.solimp], axis=1), p.signs.shape[1])


def cone_rows(
    table: PairTable,
    contacts: Contacts,
    motions: MotionAxes,
    qvel: Float[Array, "nv B"],
) -> ConeRows:
    """Constraint rows of contacts."""
    values = jnp.moveaxis(jnp.asarray(table.rows, qvel.dtype)[contacts.pair], -1, 1)
    parts = jnp.split(values, [table.nv + k for k in range(6)], axis=1)
    signs, sensor_sign, friction, invweight, stiffness, damping, solimp = parts
    sensor_sign, friction, invweight, stiffness, damping = (
        x[:, 0] for x in (sensor_sign, friction, invweight, stiffness, damping)
    )
    used = (contacts.dist < 0).astype(qvel.dtype)
    frame = _frame(contacts.normal)
    signs = signs * used[:, None]
    moved = _moved(contacts.pos, motions)
    jacobian = _along(frame, moved, signs)
    speed = sum_leading([jacobian[:, :, i] * qvel[i] for i in range(qvel.shape[0])])
    d = impedance(solimp, contacts.dist)
    weight = used / jnp.maximum(invweight * (1 - d) / d, 1e-15)
    push = jnp.stack([stiffness * d * contacts.dist * used, jnp.zeros_like(d), jnp.zeros_like(d)])
    return ConeRows(jnp.stack(frame), jacobian, -damping * speed - push, weight, friction, sensor_sign)


@stage
def _moved(pos: Float[Array, "k 3 B"], motions: MotionAxes) -> list[Float[Array, "k nv B"]]:
    """Jacobian of every contact point's motion: x, y and z components."""
    arm = [pos[:, None, r] - motions.origin[None, :, r] for r in range(3)]
    turn = [motions.angular[None, :, r] for r in range(3)]
    slide = [motions.linear[None, :, r] for r in range(3)]
    return [
        slide[r] + turn[(r + 1) % 3] * arm[(r + 2) % 3] - turn[(r + 2) % 3] * arm[(r + 1) % 3]
        for r in range(3)
    ]


@stage
def _along(
    frame: list[Float[Array, "k 3 B"]], moved: list[Float[Array, "k nv B"]], signs: Float[Array, "k nv B"]
) -> Float[Array, "3 k nv B"]:
    """Components of the relative motion along the contacts' frames."""
    return jnp.stack([signs * sum_leading([f[:, None, r] * moved[r] for r in range(3)]) for f in frame])


@stage
def _frame(normal: Float[Array, "k 3 B"]) -> list[Float[Array, "k 3 B"]]:
    """Normal and two tangents, the first along y, or along z where the normal is."""
    steep = jnp.abs(normal[:, 1]) >= 0.5
    zero = jnp.zeros_like(normal[:, 0])
    y = jnp.where(steep, normal[:, 2], normal[:, 1])[:, None]
    axis = jnp.stack([zero, jnp.where(steep, 0, 1.0), jnp.where(steep, 1.0, 0)], axis=1).astype(normal.dtype)
    tangent = axis - y * normal
    tangent = tangent / jnp.sqrt(1 - y * y)
    return [normal, tangent, cross(normal, tangent)]
