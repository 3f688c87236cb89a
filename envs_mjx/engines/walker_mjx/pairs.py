"""Pairs of a walker's solids, floor and walls that may touch, with their contact parameters; read once."""

import dataclasses
import itertools
from typing import NamedTuple

import mujoco
import numpy as np

from envs_mjx.engines.solver_parameters import IMPEDANCE_RANGE, stiffness_damping
from envs_mjx.locomotion.walkers import TORSO
from mac.errors import UserError

_BALL, _CAPSULE = int(mujoco.mjtGeom.mjGEOM_SPHERE), int(mujoco.mjtGeom.mjGEOM_CAPSULE)


class WalkerSolids(NamedTuple):
    """Balls and capsules in the frames of their bodies; a ball's half axis is 0."""

    body: np.ndarray
    pos: np.ndarray
    half: np.ndarray
    radius: np.ndarray


class ContactParams(NamedTuple):
    """Contact parameters of pairs; all arrays of P rows.

    Attributes:
        signs: factor of each dof's motion at the point, 1, -1 or 0: float[P, nv].
        margin: gap (m) below which a contact acts.
        friction: coefficient of both tangents; 0 in pairs without friction.
        invweight: of a row of the contact.
        stiffness, damping, solimp: of the reference acceleration and the impedance.
    """

    signs: np.ndarray
    margin: np.ndarray
    friction: np.ndarray
    invweight: np.ndarray
    stiffness: np.ndarray
    damping: np.ndarray
    solimp: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class WalkerPairs:
    """All pairs of solids that may touch; hashed by identity.

    Attributes:
        solids: of the walker.
        balls, capsules: solids that are balls, and capsules, that touch floor and walls alike.
        floor_params: of each solid with the floor, a row per solid; of zero weight where it may not touch.
        wall_params: the same with a wall; None where there are none.
        floor_height: m.
        couples: int[S, 2], solids that may touch each other, without friction.
        couple_params: of these.
    """

    solids: WalkerSolids
    balls: np.ndarray
    capsules: np.ndarray
    floor_params: ContactParams
    wall_params: ContactParams | None
    floor_height: float
    couples: np.ndarray
    couple_params: ContactParams


def read_pairs(model: mujoco.MjModel) -> WalkerPairs:
    """The pairs of a walker's model.

    Raises:
        UserError: if the model has solids of other kinds.
    """
    m = model
    solid = m.geom_contype | m.geom_conaffinity != 0
    moving = np.flatnonzero(solid & (m.geom_bodyid >= TORSO)).tolist()
    standing = np.flatnonzero(solid & (m.geom_bodyid < TORSO)).tolist()
    floor = [g for g in standing if m.geom_type[g] == mujoco.mjtGeom.mjGEOM_PLANE]
    walls = [g for g in standing if m.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX]
    _require_known_solids(m, moving, standing, floor, walls)
    capsule = m.geom_type[moving] == _CAPSULE
    axis = np.array([_axis(q) for q in m.geom_quat[moving]])
    index = {g: i for i, g in enumerate(moving)}
    couples = [(a, b) for a, b in itertools.combinations(moving, 2) if _may_touch(m, a, b)]
    return WalkerPairs(
        solids=WalkerSolids(
            body=m.geom_bodyid[moving].astype(np.int32),
            pos=m.geom_pos[moving].copy(),
            half=axis * np.where(capsule, m.geom_size[moving, 1], 0)[:, None],
            radius=m.geom_size[moving, 0].copy(),
        ),
        balls=np.flatnonzero(~capsule).astype(np.int32),
        capsules=np.flatnonzero(capsule).astype(np.int32),
        floor_params=_params(m, [(floor[0], g) for g in moving]),
        wall_params=_params(m, [(walls[0], g) for g in moving]) if len(walls) else None,
        floor_height=float(m.geom_pos[floor[0], 2]),
        couples=np.array([(index[a], index[b]) for a, b in couples], np.int32).reshape(-1, 2),
        couple_params=_params(m, couples),
    )


def _require_known_solids(
    m: mujoco.MjModel, moving: list[int], standing: list[int], floor: list[int], walls: list[int]
) -> None:
    kinds = set(m.geom_type[moving].tolist())
    known = kinds <= {_BALL, _CAPSULE} and len(floor) == 1 and len(floor) + len(walls) == len(standing)
    known &= bool(np.all(m.geom_quat[standing] == [1, 0, 0, 0]))
    known &= m.npair == m.nexclude == 0 and not m.geom_priority.any() and bool(np.all(m.geom_solmix == 1))
    known &= not m.geom_gap.any() and bool(np.all(m.geom_solref > 0))
    known &= all(_may_touch(m, g, h) for g in standing for h in moving)
    for array in (m.geom_size, m.geom_margin, m.geom_friction, m.geom_solref, m.geom_solimp, m.geom_condim):
        known &= len(np.unique(array[walls], axis=0)) <= 1
    if not known:
        raise UserError("engine mjx runs point, ant, humanoid and gym's walkers only; use engine c")


def _may_touch(m: mujoco.MjModel, a: int, b: int) -> bool:
    """MuJoCo's filter: bits, and not of one body nor of a body and its parent (but for the world)."""
    bits = m.geom_contype[a] & m.geom_conaffinity[b] | m.geom_contype[b] & m.geom_conaffinity[a]
    first, second = m.body_weldid[m.geom_bodyid[a]], m.body_weldid[m.geom_bodyid[b]]
    above = m.body_weldid[m.body_parentid[first]], m.body_weldid[m.body_parentid[second]]
    family = first != 0 and second != 0 and (first == above[1] or second == above[0])
    return bool(bits and first != second and not family)


def _params(m: mujoco.MjModel, couples: list[tuple[int, int]]) -> ContactParams:
    """Parameters of pairs (a, b): MuJoCo's mixture of those of their geoms."""
    a, b = np.array(couples, int).reshape(-1, 2).T
    bodies = m.geom_bodyid[a], m.geom_bodyid[b]
    solref = 0.5 * (m.geom_solref[a] + m.geom_solref[b])
    solimp = 0.5 * (m.geom_solimp[a] + m.geom_solimp[b])
    solimp[:, :2] = np.clip(solimp[:, :2], *IMPEDANCE_RANGE)
    rough = np.maximum(m.geom_condim[a], m.geom_condim[b]) > 1
    friction = np.where(rough, np.maximum(m.geom_friction[a, 0], m.geom_friction[b, 0]), 0)
    invweight = m.body_invweight0[bodies[0], 0] + m.body_invweight0[bodies[1], 0]
    edge = 2 * friction**2 * (1 + friction**2) / m.opt.impratio
    stiffness, damping = stiffness_damping(solref, solimp, m.opt.timestep)
    moved = _moved_by(m)
    return ContactParams(
        signs=moved[bodies[1]] - moved[bodies[0]],
        margin=m.geom_margin[a] + m.geom_margin[b],
        friction=friction,
        invweight=invweight * np.where(rough, edge, 1),
        stiffness=stiffness,
        damping=damping,
        solimp=solimp,
    )


def _moved_by(m: mujoco.MjModel) -> np.ndarray:
    """float[nbody, nv], 1 where a dof moves a body."""
    moved = np.zeros((m.nbody, m.nv))
    for body in range(1, m.nbody):
        moved[body] = moved[m.body_parentid[body]]
        moved[body, m.body_dofadr[body] : m.body_dofadr[body] + m.body_dofnum[body]] = 1
    return moved


def _axis(quat: np.ndarray) -> np.ndarray:
    z = np.zeros(3)
    mujoco.mju_rotVecQuat(z, np.array([0.0, 0, 1]), quat)
    return z
