"""Constraint rows of one walker: its contacts, in a buffer of fixed size, and limits of its joints.

The deepest contacts get the slots. Contacts dropped because the buffer is full are counted, not lost
silently.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from mujoco import mjx

from envs_mjx.engines.solver_parameters import IMPEDANCE_RANGE, impedance, stiffness_damping
from envs_mjx.engines.walker_mjx import sphere_capsule
from envs_mjx.engines.walker_mjx.near_walls import HALF, NEAR
from envs_mjx.engines.walker_mjx.pairs import ContactParams, WalkerPairs
from envs_mjx.locomotion.walkers import TORSO

Walls = tuple[Float[Array, "4 3"], Bool[Array, " 4"]] | None
"""Centres of the nearby cells (m), and which of them are walls; None on a plane."""


class WalkerContactCapacity(NamedTuple):
    """Capacities of the contact buffer: with floor and walls, and of the walker with itself."""

    rough: int
    smooth: int


class ConstraintRows(NamedTuple):
    """Rows of the constraint problem; weight 0 where a row is not in use."""

    jacobian: Float[Array, "rows nv"]
    aref: Float[Array, " rows"]
    weight: Float[Array, " rows"]


class _Points(NamedTuple):
    """Points where solids may touch; `along` is a direction that the first tangent follows (0: none)."""

    gap: Float[Array, " n"]
    pos: Float[Array, "n 3"]
    normal: Float[Array, "n 3"]
    along: Float[Array, "n 3"]
    row: Int[Array, " n"]


class _Solids(NamedTuple):
    centre: Float[Array, "n 3"]
    half: Float[Array, "n 3"]
    radius: Float[Array, " n"]


def contact_rows(
    pairs: WalkerPairs,
    slots: WalkerContactCapacity,
    data: mjx.Data,
    walls: Walls,
) -> tuple[ConstraintRows, Int[Array, ""]]:
    """Returns the rows of all contacts after `kinematics` and `com_pos`, and the number of contacts dropped
    because the buffer was full.
    """
    at = _place(pairs, data)
    points, table = _on_surroundings(pairs, at, walls)
    rough, lost = _rows(points, table, slots.rough, data)
    if not len(pairs.couples):
        return rough, lost
    smooth, more = _rows(_each_other(pairs, at), pairs.couple_params, slots.smooth, data, pyramid=False)
    return joined(rough, smooth), lost + more


def any_contact(pairs: WalkerPairs, data: mjx.Data, walls: Walls) -> Bool[Array, ""]:
    """Returns whether there is a contact after `kinematics`; the arguments are those of `contact_rows`."""
    at = _place(pairs, data)
    points, table = _on_surroundings(pairs, at, walls)
    found = jnp.any(_depth(points, table) < 0)
    if not len(pairs.couples):
        return found
    return found | jnp.any(_depth(_each_other(pairs, at), pairs.couple_params) < 0)


def joined(*rows: ConstraintRows) -> ConstraintRows:
    """Concatenates rows."""
    return ConstraintRows(*(jnp.concatenate(x) for x in zip(*rows, strict=True)))


def _place(pairs: WalkerPairs, data: mjx.Data) -> _Solids:
    s, dtype = pairs.solids, data.qpos.dtype
    mat = data.xmat[s.body]
    turned = jnp.einsum("nij,nkj->nki", mat, jnp.asarray(np.stack([s.pos, s.half], axis=1), dtype))
    return _Solids(data.xpos[s.body] + turned[:, 0], turned[:, 1], jnp.asarray(s.radius, dtype))


def _all(points: list[_Points]) -> _Points:
    return _Points(*(jnp.concatenate(x) for x in zip(*points, strict=True)))


def _on_surroundings(pairs: WalkerPairs, at: _Solids, walls: Walls) -> tuple[_Points, ContactParams]:
    """Contacts with floor and walls, and the table of their parameters."""
    points = [_on_floor(pairs, at)]
    tables = [pairs.floor_params]
    if walls is not None and pairs.wall_params is not None:
        points.append(_on_walls(pairs, at, *walls))
        tables.append(pairs.wall_params)
    return _all(points), ContactParams(*(np.concatenate(columns) for columns in zip(*tables, strict=True)))


def _on_floor(pairs: WalkerPairs, at: _Solids) -> _Points:
    """Contacts with the floor: a ball's one point; both ends of a capsule, with the tangent along its
    axis."""
    balls, capsules = pairs.balls, pairs.capsules
    half = at.half[capsules]
    rows = np.concatenate([balls, capsules, capsules])
    centre = jnp.concatenate([at.centre[balls], at.centre[capsules] + half, at.centre[capsules] - half])
    found = jax.vmap(lambda c, r: sphere_capsule.ball_floor(c, r, pairs.floor_height))(
        centre, at.radius[rows]
    )
    along = jnp.concatenate([jnp.zeros_like(at.half[balls]), half, half])
    return _Points(*found, along, jnp.asarray(rows, jnp.int32))


def _on_walls(
    pairs: WalkerPairs, at: _Solids, centre: Float[Array, "4 3"], is_wall: Bool[Array, " 4"]
) -> _Points:
    """Contacts of every solid with every wall: one point of a ball, two of a capsule."""
    first = len(pairs.solids.body)  # row of the table

    def placed(
        t: sphere_capsule.WalkerContactPoints, wall: Float[Array, " 3"], is_wall: Bool[Array, ""]
    ) -> sphere_capsule.WalkerContactPoints:
        return t._replace(gap=jnp.where(is_wall, t.gap, sphere_capsule.FAR), pos=t.pos + wall)

    def at_wall(
        wall: Float[Array, " 3"], is_wall: Bool[Array, ""]
    ) -> tuple[sphere_capsule.WalkerContactPoints, sphere_capsule.WalkerContactPoints]:
        b, c = pairs.balls, pairs.capsules
        balls = jax.vmap(lambda x, r: sphere_capsule.ball_wall(x - wall, r, HALF))(at.centre[b], at.radius[b])
        capsules = jax.vmap(lambda x, h, r: sphere_capsule.capsule_wall(x - wall, h, r, HALF))(
            at.centre[c], at.half[c], at.radius[c]
        )
        return placed(balls, wall, is_wall), placed(capsules, wall, is_wall)

    found = jax.vmap(at_wall)(centre, is_wall)
    rows = [np.tile(pairs.balls, NEAR), np.tile(np.repeat(pairs.capsules, 2), NEAR)]
    flat = [
        sphere_capsule.WalkerContactPoints(t.gap.reshape(-1), t.pos.reshape(-1, 3), t.normal.reshape(-1, 3))
        for t in found
    ]
    numbers = [jnp.asarray(first + r, jnp.int32) for r in rows]
    return _all([_Points(*t, jnp.zeros_like(t.pos), r) for t, r in zip(flat, numbers, strict=True)])


def _each_other(pairs: WalkerPairs, at: _Solids) -> _Points:
    a, b = (_Solids(*(x[side] for x in at)) for side in pairs.couples.T)
    found = jax.vmap(sphere_capsule.capsule_capsule)(*a, *b)
    return _Points(*found, jnp.zeros_like(found.pos), jnp.arange(len(pairs.couples), dtype=jnp.int32))


def _rows(
    points: _Points, table: ContactParams, room: int, data: mjx.Data, pyramid: bool = True
) -> tuple[ConstraintRows, Int[Array, ""]]:
    """Rows of the deepest `room` points: four edges of a pyramid each, or one normal."""
    dtype = data.qpos.dtype
    depth = _depth(points, table)
    lost = jnp.maximum(jnp.sum(depth < 0, dtype=jnp.int32) - room, 0)
    if len(depth) > room:
        chosen = jax.lax.top_k(-depth, room)[1]
        points, depth = _Points(*(x[chosen] for x in points)), depth[chosen]
    columns: list[Any] = [jnp.asarray(column, dtype)[points.row] for column in table]
    p = ContactParams(*columns)
    solimp: Any = p.solimp
    frame = jax.vmap(frame_of)(points.normal, points.along)
    jacobian = jnp.einsum("sri,sdi->srd", frame, _motions(points.pos, data)) * p.signs[:, None]
    if pyramid:
        slip = p.friction[:, None, None] * jnp.repeat(jacobian[:, 1:], 2, axis=1)
        jacobian = jacobian[:, :1] + slip * jnp.array([1, -1, 1, -1], dtype)[:, None]
    else:
        jacobian = jacobian[:, :1]
    d = impedance(solimp[..., None], depth[:, None])[:, 0]
    weight = jnp.where(depth < 0, 1 / jnp.maximum(p.invweight * (1 - d) / d, mujoco.mjMINVAL), 0)
    aref = -p.damping[:, None] * (jacobian @ data.qvel) - (p.stiffness * d * depth)[:, None]
    edges = jacobian.shape[1]
    return ConstraintRows(
        jacobian.reshape(-1, data.qvel.size), aref.reshape(-1), jnp.repeat(weight, edges)
    ), lost


def _depth(points: _Points, table: ContactParams) -> Float[Array, " n"]:
    """Gap minus margin (m): negative where there is a contact."""
    return points.gap - jnp.asarray(table.margin, points.gap.dtype)[points.row]


def _motions(pos: Float[Array, "n 3"], data: mjx.Data) -> Float[Array, "n nv 3"]:
    """Returns the translation of points of the walker per dof."""
    turn, slide = data.cdof[:, :3], data.cdof[:, 3:]
    arm = pos - data.subtree_com[TORSO]
    return jnp.cross(turn[None], arm[:, None]) + slide[None]


def frame_of(normal: Float[Array, " 3"], along: Float[Array, " 3"]) -> Float[Array, "3 3"]:
    """Normal and two tangents: the first along a capsule's axis if it has one, else along y, or along z
    where the normal is within 60 degrees of y.
    """
    steep = jnp.abs(normal[1]) >= 0.5
    fallback = jnp.where(steep, jnp.array([0.0, 0, 1]), jnp.array([0.0, 1, 0])).astype(normal.dtype)
    given = along - (along @ normal) * normal
    upright = given @ given <= 1e-12 * (along @ along)
    tangent = jnp.where(upright, fallback - (fallback @ normal) * normal, given)
    tangent = tangent / jnp.sqrt(tangent @ tangent)
    return jnp.stack([normal, tangent, jnp.cross(normal, tangent)])


@dataclasses.dataclass(frozen=True, eq=False)
class WalkerJointLimits:
    """Hinges with limits; hashed by identity."""

    qpos: np.ndarray
    dof: np.ndarray
    range: np.ndarray
    margin: np.ndarray
    invweight: np.ndarray
    stiffness: np.ndarray
    damping: np.ndarray
    solimp: np.ndarray


def read_joint_limits(m: mujoco.MjModel) -> WalkerJointLimits:
    """Limits of a model's hinges and slides."""
    joints = np.flatnonzero(m.jnt_limited)
    solimp = m.jnt_solimp[joints].copy()
    solimp[:, :2] = np.clip(solimp[:, :2], *IMPEDANCE_RANGE)
    stiffness, damping = stiffness_damping(m.jnt_solref[joints], solimp, m.opt.timestep)
    dof = m.jnt_dofadr[joints]
    return WalkerJointLimits(
        qpos=m.jnt_qposadr[joints],
        dof=dof,
        range=m.jnt_range[joints].copy(),
        margin=m.jnt_margin[joints].copy(),
        invweight=m.dof_invweight0[dof].copy(),
        stiffness=stiffness,
        damping=damping,
        solimp=solimp,
    )


def joint_limit_rows(
    limits: WalkerJointLimits, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]
) -> ConstraintRows:
    """One row per hinge: the nearer of its two ends."""
    dtype = qpos.dtype
    low, high = (jnp.asarray(side, dtype) for side in limits.range.T)
    q, v = qpos[limits.qpos], qvel[limits.dof]
    below, above = q - low, high - q
    sign = jnp.where(below < above, 1.0, -1.0).astype(dtype)
    depth = jnp.minimum(below, above) - jnp.asarray(limits.margin, dtype)
    d = impedance(jnp.asarray(limits.solimp, dtype)[..., None], depth[:, None])[:, 0]
    invweight = jnp.asarray(limits.invweight, dtype)
    weight = jnp.where(depth < 0, 1 / jnp.maximum(invweight * (1 - d) / d, mujoco.mjMINVAL), 0)
    push = jnp.asarray(limits.stiffness, dtype) * d * depth
    aref = -jnp.asarray(limits.damping, dtype) * sign * v - push
    joints = np.arange(len(limits.dof), dtype=np.int32)
    jacobian = jnp.zeros((len(joints), qvel.size), dtype).at[joints, limits.dof].set(sign)
    return ConstraintRows(jacobian, aref, weight)
