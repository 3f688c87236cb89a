"""Kinematics, inertia and forces of OGBench's scenes, for a batch of scenes at once.

MuJoCo's smooth dynamics ("Computation" chapter of its documentation; Featherstone 2008 for the
composite-body and Newton-Euler recursions) for the bodies that `model.py` lists. Every array ends with the
contiguous batch axis B. So each operation is one loop over scenes and compiles to vector instructions on a
CPU and to coalesced loads on a GPU. Sums along the tree are matmuls with the matrix of ancestors. Motions and
forces are written about one point near the fingers, the origin; a motion is (angular, linear), a force
(torque, force).
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from envs_mjx.engines.tabletop_mjx.model import Hinges, SceneConstants
from envs_mjx.engines.tabletop_mjx.welded_bodies import AttachedFrames


class Poses(NamedTuple):
    """Poses of all moving bodies, hinges first, then cubes, then slides."""

    pos: Float[Array, "n 3 B"]
    mat: Float[Array, "n 3 3 B"]


class MotionAxes(NamedTuple):
    """Motion axes of every dof: it moves a point x of its bodies by `linear + angular x (x - origin)`."""

    angular: Float[Array, "nv 3 B"]
    linear: Float[Array, "nv 3 B"]
    origin: Float[Array, "nv 3 B"]


class SmoothDynamics(NamedTuple):
    """The scene without its constraints: `mass acc = force`.

    Attributes:
        hinge_mass: mass matrix of the hinges; that of the other dofs is `SceneConstants.fixed_mass`.
        force: applied, passive and bias forces.
        slope: minus the derivative of each dof's force by its velocity, as implicitfast keeps it.
        motions: of all dofs.
        velocity, drift: velocity of each hinge's body and its acceleration at zero `acc`, about the origin.
        center: centre of mass of arm and gripper.
    """

    hinge_mass: Float[Array, "h h B"]
    force: Float[Array, "nv B"]
    slope: Float[Array, "nv B"]
    motions: MotionAxes
    velocity: Float[Array, "h 6 B"]
    drift: Float[Array, "h 6 B"]
    center: Float[Array, "3 B"]


def const(x: np.ndarray, like: Float[Array, "..."]) -> Float[Array, "..."]:
    """A host array as constants of `like`'s dtype, with a batch axis of 1."""
    return jnp.asarray(x, like.dtype)[..., None]


def mat_mat(a: Float[Array, "*#n 3 3 #B"], b: Float[Array, "*#n 3 3 #B"]) -> Float[Array, "*#n 3 3 #B"]:
    return sum(a[..., :, k, None, :] * b[..., k, None, :, :] for k in range(3))  # pyright: ignore[reportReturnType]


def mat_vec(a: Float[Array, "*#n 3 3 #B"], v: Float[Array, "*#n 3 #B"]) -> Float[Array, "*#n 3 #B"]:
    return sum(a[..., :, k, :] * v[..., k, None, :] for k in range(3))  # pyright: ignore[reportReturnType]


def dot(a: Float[Array, "*#n 3 #B"], b: Float[Array, "*#n 3 #B"]) -> Float[Array, "*#n #B"]:
    return sum(a[..., k, :] * b[..., k, :] for k in range(3))  # pyright: ignore[reportReturnType]


def cross(a: Float[Array, "*#n 3 #B"], b: Float[Array, "*#n 3 #B"]) -> Float[Array, "*#n 3 #B"]:
    (a0, a1, a2), (b0, b1, b2) = ([x[..., k, :] for k in range(3)] for x in (a, b))
    return jnp.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], axis=-2)


def poses(c: SceneConstants, qpos: Float[Array, "nq B"]) -> Poses:
    """Forward kinematics of all moving bodies."""
    tree = _tree_poses(c.hinges, qpos[: len(c.hinges.parent)])
    cubes = qpos[c.cube_qpos[:, None] + np.arange(7)]
    travel = qpos[c.slide_qpos][:, None]
    slides = const(c.slides.pos, qpos) + const(c.slides.axis, qpos) * travel
    still = jnp.broadcast_to(const(c.slides.mat, qpos), (len(slides), 3, 3, qpos.shape[-1]))
    return Poses(
        jnp.concatenate([tree.pos, cubes[:, :3], slides]),
        jnp.concatenate([tree.mat, quat_to_mat(cubes[:, 3:]), still]),
    )


def _tree_poses(h: Hinges, q: Float[Array, "h B"]) -> Poses:
    sin, versin = jnp.sin(q)[:, None, None], (1 - jnp.cos(q))[:, None, None]
    turn = [const(h.turn[:, k], q) for k in range(3)]
    local = turn[0] + sin * turn[1] + versin * turn[2]
    shift = const(h.offset, q) - mat_vec(local, const(h.anchor, q))
    found: list[Poses] = []
    for depth, level in enumerate(h.levels):
        if depth == 0:
            above = Poses(const(h.base_pos[None], q), const(h.base_mat[None], q))
        else:
            place = [list(h.levels[depth - 1]).index(h.parent[i]) for i in level]
            above = Poses(*(_rows(x, place) for x in found[-1]))
        mat = mat_mat(above.mat, _rows(local, level))
        pos = above.pos + mat_vec(above.mat, _rows(shift, level))
        found.append(Poses(pos, mat))
    order = np.argsort(np.concatenate(h.levels))
    return Poses(*(_rows(jnp.concatenate(parts), order) for parts in zip(*found, strict=True)))


def _rows(x: Float[Array, "n ..."], rows: Iterable[int] | np.ndarray) -> Float[Array, "m ..."]:
    """`x[rows]` for fixed row numbers, by slices: XLA's gather on CPU costs more."""
    rows = [int(r) for r in rows]
    if rows == list(range(x.shape[0])):
        return x
    if len(set(rows)) == 1:
        return x[rows[0] : rows[0] + 1]
    return jnp.concatenate([x[r : r + 1] for r in rows])


def quat_to_mat(quat: Float[Array, "*n 4 B"]) -> Float[Array, "*n 3 3 B"]:
    """Rotation matrix of a quaternion (wxyz) of any length."""
    w, x, y, z = (quat[..., k, :] for k in range(4))
    s = 2 / (w * w + x * x + y * y + z * z)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
        [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)],
        [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-2) for row in rows], axis=-3)


def attached_poses(frames: AttachedFrames, at: Poses) -> Poses:
    """World poses of frames fixed to moving bodies, or to the world."""
    pos, mat = const(frames.pos, at.pos), const(frames.mat, at.pos)
    carried = frames.body >= 0
    if not carried.any():
        batch = at.pos.shape[-1:]
        return Poses(*(jnp.broadcast_to(x, (*x.shape[:-1], *batch)) for x in (pos, mat)))
    batch = at.pos.shape[-1]
    world = (
        jnp.zeros((1, 3, batch), pos.dtype),
        jnp.broadcast_to(const(np.eye(3)[None], pos), (1, 3, 3, batch)),
    )
    bodies = np.where(carried, frames.body, at.pos.shape[0])
    base_pos, base_mat = (_rows(jnp.concatenate([x, w]), bodies) for x, w in zip(at, world, strict=True))
    return Poses(base_pos + mat_vec(base_mat, pos), mat_mat(base_mat, mat))


def smooth_dynamics(
    c: SceneConstants,
    at: Poses,
    qpos: Float[Array, "nq B"],
    qvel: Float[Array, "nv B"],
    ctrl: Float[Array, "nu B"],
    damping: Float[Array, "nv B"],
) -> SmoothDynamics:
    """Inertia and forces. `damping` is that of every dof."""
    h, n = c.hinges, len(c.hinges.parent)
    motions = _motions(c, at)
    inertia = _inertia(h, Poses(at.pos[:n], at.mat[:n]), motions.origin[0])
    up = jnp.asarray(h.ancestors, qpos.dtype)
    s = jnp.concatenate([motions.angular[:n], motions.linear[:n]], axis=1)
    rate = qvel[:n, None]
    velocity = _over_tree(up, s * rate)
    drift = _over_tree(up, _motion_cross(velocity, s) * rate)
    pulled = drift - const(np.concatenate([np.zeros(3), c.gravity])[None], qpos)
    momentum = _times(inertia, velocity)
    force = _times(inertia, pulled) + _force_cross(velocity, momentum)
    bias = jnp.sum(s * _over_tree(up.T, force), axis=1)
    hinge_mass = _composite_mass(c, up, inertia, s)
    joints = jnp.stack([qpos[i] for i in c.joint_qpos])
    springs = const(c.stiffness, qpos) * (joints - const(c.rest, qpos))
    driven, slope = _actuation(c, qpos, qvel, ctrl)
    other = const(c.fixed_force, qpos) - damping * qvel + driven
    other = _subtract_joints(c, other, springs)
    pad = jnp.zeros((c.nv - n, qpos.shape[-1]), qpos.dtype)
    moment = jnp.sum(inertia.offset, axis=0) + h.mass.sum() * motions.origin[0]
    center = (moment + const(c.still_moment, qpos)) / (h.mass.sum() + c.still_mass)
    force = other - jnp.concatenate([bias, pad])
    return SmoothDynamics(hinge_mass, force, damping + slope, motions, velocity, drift, center)


def _subtract_joints(
    c: SceneConstants, force: Float[Array, "nv B"], springs: Float[Array, "joints B"]
) -> Float[Array, "nv B"]:
    """Subtracts forces of hinges and slides; between these stand the cubes' dofs."""
    n, cubes = len(c.hinges.parent), 6 * len(c.cube_dof)
    pad = jnp.zeros((cubes, springs.shape[-1]), springs.dtype)
    return force - jnp.concatenate([springs[:n], pad, springs[n:]])


def _motions(c: SceneConstants, at: Poses) -> MotionAxes:
    h, n, cubes = c.hinges, len(c.hinges.parent), len(c.cube_dof)
    axis = mat_vec(at.mat[:n], const(h.axis, at.pos))
    anchor = at.pos[:n] + mat_vec(at.mat[:n], const(h.anchor, at.pos))
    origin = anchor[int(h.levels[-1][0])][None]
    batch = at.pos.shape[-1]
    zero = jnp.zeros((1, 3, batch), axis.dtype)
    angular, linear, center = [axis], [cross(axis, origin - anchor)], [jnp.repeat(origin, n, axis=0)]
    unit = jnp.broadcast_to(const(np.eye(3), axis), (3, 3, batch))
    for cube in range(cubes):
        mat, pos = at.mat[n + cube], at.pos[n + cube][None]
        angular += [jnp.repeat(zero, 3, axis=0), jnp.swapaxes(mat, 0, 1)]
        linear += [unit, jnp.repeat(zero, 3, axis=0)]
        center += [jnp.repeat(pos, 6, axis=0)]
    slides = len(c.slide_dof)
    if slides:
        still = jnp.broadcast_to(const(c.slides.axis, axis), (slides, 3, batch))
        angular, linear = [*angular, jnp.repeat(zero, slides, axis=0)], [*linear, still]
        center += [jnp.repeat(zero, slides, axis=0)]
    return MotionAxes(*(jnp.concatenate(x) for x in (angular, linear, center)))


class _Inertia(NamedTuple):
    """Inertia of bodies about the origin: rotational part, mass times offset of the com, and mass."""

    turn: Float[Array, "n 3 3 B"]
    offset: Float[Array, "n 3 B"]
    mass: Float[Array, "n 1 1"]


def _inertia(h: Hinges, at: Poses, origin: Float[Array, "3 B"]) -> _Inertia:
    r = at.pos + mat_vec(at.mat, const(h.com, origin)) - origin[None]
    own = mat_mat(mat_mat(at.mat, const(h.inertia, origin)), jnp.swapaxes(at.mat, 1, 2))
    mass = const(h.mass[:, None], origin)
    eye = const(np.eye(3)[None], origin)
    spread = dot(r, r)[:, None, None] * eye - r[:, :, None] * r[:, None]
    return _Inertia(own + mass[:, None] * spread, mass * r, mass)


def _times(inertia: _Inertia, v: Float[Array, "n 6 B"]) -> Float[Array, "n 6 B"]:
    w, u = v[:, :3], v[:, 3:]
    torque = mat_vec(inertia.turn, w) + cross(inertia.offset, u)
    return jnp.concatenate([torque, inertia.mass * u + cross(w, inertia.offset)], axis=1)


def _motion_cross(v: Float[Array, "n 6 B"], s: Float[Array, "n 6 B"]) -> Float[Array, "n 6 B"]:
    w, u = v[:, :3], v[:, 3:]
    return jnp.concatenate([cross(w, s[:, :3]), cross(w, s[:, 3:]) + cross(u, s[:, :3])], axis=1)


def _force_cross(v: Float[Array, "n 6 B"], f: Float[Array, "n 6 B"]) -> Float[Array, "n 6 B"]:
    w, u = v[:, :3], v[:, 3:]
    return jnp.concatenate([cross(w, f[:, :3]) + cross(u, f[:, 3:]), cross(w, f[:, 3:])], axis=1)


def _over_tree(matrix: Float[Array, "m n"], x: Float[Array, "n ..."]) -> Float[Array, "m ..."]:
    """Sums along the tree by a matmul: over ancestors, or with the transposed matrix over descendants."""
    # Highest: a GPU's default would round to TF32, and rne's terms cancel.
    flat = jnp.dot(matrix, x.reshape(x.shape[0], -1), precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(-1, *x.shape[1:])


def _composite_mass(
    c: SceneConstants, up: Float[Array, "h h"], inertia: _Inertia, s: Float[Array, "h 6 B"]
) -> Float[Array, "h h B"]:
    """Mass matrix of the tree: the inertia of all that a hinge carries, moved by it and its ancestors."""
    h = c.hinges
    carried = (h.ancestors.T @ h.mass)[:, None]
    total = _Inertia(_over_tree(up.T, inertia.turn), _over_tree(up.T, inertia.offset), const(carried, s))
    force = _times(total, s)
    table = sum(s[:, None, k] * force[None, :, k] for k in range(6))  # row: who moves, column: who is moved
    above = const(h.ancestors.T, s)  # [i, j]: i is j or an ancestor of it
    strictly = const(h.ancestors & ~np.eye(len(h.parent), dtype=bool), s)
    armature = const(np.diag(c.fixed_mass[: len(h.parent)]), s)
    return above * table + strictly * jnp.swapaxes(table, 0, 1) + armature


def _actuation(
    c: SceneConstants, qpos: Float[Array, "nq B"], qvel: Float[Array, "nv B"], ctrl: Float[Array, "nu B"]
) -> tuple[Float[Array, "nv B"], Float[Array, "nv B"]]:
    """Actuator forces on dofs, and minus their derivatives by velocity.

    As in C's implicitfast an actuator whose force is clamped has no derivative, and no derivative couples
    dofs that are not on one path to the root: the two drivers, which one tendon pulls.
    """
    moment = jnp.asarray(c.moment, qpos.dtype)
    hinges = len(c.hinges.parent)
    (gain,), bias = const(c.gain[None], qpos), const(c.bias, qpos)
    low, high = const(c.ctrl_range[:, 0], qpos), const(c.ctrl_range[:, 1], qpos)
    length = _over_tree(moment[:, :hinges], qpos[:hinges])
    rate = _over_tree(moment[:, :hinges], qvel[:hinges])
    force = gain * jnp.clip(ctrl, low, high) + bias[:, 0] + bias[:, 1] * length + bias[:, 2] * rate
    low, high = const(c.force_range[:, 0], qpos), const(c.force_range[:, 1], qpos)
    slope = jnp.where((force <= low) | (force >= high), 0, -bias[:, 2])
    return _over_tree(moment.T, jnp.clip(force, low, high)), _over_tree(moment.T**2, slope)
