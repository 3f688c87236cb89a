"""Constants of a scene's moving bodies for engine `mjx`, read once from the compiled model.

OGBench's scenes move in three ways only: the hinges of the arm and gripper (one tree), cubes that are free,
and slides (buttons, drawer, window) on static bodies. Everything welded to a moving body is merged into it;
everything else is static. So a step touches as many bodies as there are joints, not the 38 to 120 of the
model.
"""

import dataclasses
from typing import NamedTuple

import mujoco
import numpy as np

from envs_mjx.engines.tabletop_mjx.welded_bodies import (
    WORLD,
    AttachedFrames,
    attach_frames,
    cross_mat,
    frames_of,
    pose_of,
    welded_inertia,
)
from envs_mjx.manipulation.scenes import Scene
from mac.errors import UserError


class Hinges(NamedTuple):
    """The tree of hinges; n bodies, one joint each, in the order of dofs, parents before children.

    A body's rotation in its parent is `turn[0] + sin(q) turn[1] + (1 - cos(q)) turn[2]`.

    Attributes:
        parent: index of the parent, -1 for the static base.
        ancestors: bool[n, n], whether column j is row i or above it.
        levels: index arrays of bodies whose parents are in the level before, or the base.
        turn, offset: float[n, 3, 3, 3] and [n, 3], rotation and position in the parent's frame.
        anchor: float[n, 3], a point of the joint's axis in the body's own frame.
        axis: float[n, 3], the axis in the body's own frame.
        base_pos, base_mat: pose of the static base.
        mass, com, inertia: of the body and all welded to it; com in its frame, inertia about the com.
    """

    parent: np.ndarray
    ancestors: np.ndarray
    levels: tuple[np.ndarray, ...]
    turn: np.ndarray
    offset: np.ndarray
    anchor: np.ndarray
    axis: np.ndarray
    base_pos: np.ndarray
    base_mat: np.ndarray
    mass: np.ndarray
    com: np.ndarray
    inertia: np.ndarray


class Slides(NamedTuple):
    """Bodies on slides: pose of each at joint position 0, and the axis in the world."""

    pos: np.ndarray
    mat: np.ndarray
    axis: np.ndarray


class EqualityConstants(NamedTuple):
    """Equality constraints, all within the tree: pairs of points kept together, and joints geared 1:1.

    Attributes:
        bodies, anchors: int[c, 2] and float[c, 2, 3], the two points of each pair.
        joints: int[g, 2], dofs whose difference is kept at `gap` (float[g]).
        invweight, solref, solimp: float[c + g, ...].
    """

    bodies: np.ndarray
    anchors: np.ndarray
    joints: np.ndarray
    gap: np.ndarray
    invweight: np.ndarray
    solref: np.ndarray
    solimp: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SceneConstants:
    """All numbers of the smooth dynamics and of joint constraints, in float64; hashed by identity.

    Dofs are those of the model: hinges first, then cubes (6 each) and slides as `cube_dof`, `slide_dof`
    say. `damping` is that of unlocked slides.
    """

    nq: int
    nv: int
    timestep: float
    gravity: np.ndarray
    impratio: float
    tolerance: float
    ls_tolerance: float
    hinges: Hinges
    slides: Slides
    linkage: EqualityConstants
    sites: AttachedFrames
    still_mass: float  # of the arm's static parts, and mass times centre
    still_moment: np.ndarray
    body_of: np.ndarray  # model body -> moving body, -1 for static ones
    frame_of: AttachedFrames  # pose of every model body in its moving body, or in the world
    joint_qpos: np.ndarray  # of hinges and slides, in the order of `joint_dof`
    joint_dof: np.ndarray
    cube_qpos: np.ndarray
    cube_dof: np.ndarray
    slide_qpos: np.ndarray
    slide_dof: np.ndarray
    fixed_mass: np.ndarray  # float[nv], mass matrix's constant part: armature, slides, cubes
    fixed_force: np.ndarray  # float[nv], gravity on cubes and slides
    stiffness: np.ndarray
    rest: np.ndarray
    damping: np.ndarray
    moment: np.ndarray  # float[nu, nv]
    gain: np.ndarray
    bias: np.ndarray  # float[nu, 3]
    ctrl_range: np.ndarray
    force_range: np.ndarray
    limits: np.ndarray  # float[joints, 2], -inf and inf where there is none
    joint_invweight: np.ndarray
    joint_solref: np.ndarray
    joint_solimp: np.ndarray
    friction_loss: np.ndarray  # float[joints]
    friction_solref: np.ndarray
    friction_solimp: np.ndarray


def read_constants(scene: Scene) -> SceneConstants:
    """Reads the constants of a scene.

    Raises:
        UserError: if the model has joints, equalities or actuators other than OGBench's scenes have.
    """
    m = scene.model
    _require_known_parts(m)
    data = mujoco.MjData(m)
    mujoco.mj_kinematics(m, data)
    hinge, free, slide = (np.flatnonzero(m.jnt_type == kind) for kind in (3, 0, 2))
    jointed = np.concatenate([hinge, free, slide])
    bodies = m.jnt_bodyid[jointed]
    body_of, frame = frames_of(m, bodies)
    mass, com, inertia = welded_inertia(m, bodies, body_of, frame)
    n, f = len(hinge), len(free)
    joints = np.concatenate([hinge, slide])
    dof, cube_dof = m.jnt_dofadr[joints], m.jnt_dofadr[free]
    slide_dof = m.jnt_dofadr[slide]
    fixed_mass, fixed_force = m.dof_armature.copy(), np.zeros(m.nv)
    axis = data.xaxis[slide]
    fixed_mass[slide_dof] += mass[n + f :]
    fixed_force[slide_dof] = mass[n + f :] * (axis @ m.opt.gravity)
    for c, at in enumerate(cube_dof):
        fixed_mass[at : at + 3] += mass[n + c]
        fixed_mass[at + 3 : at + 6] += np.diag(inertia[n + c])
        fixed_force[at : at + 3] = mass[n + c] * m.opt.gravity
    at = m.jnt_qposadr[joints]
    limited = m.jnt_limited[joints].astype(bool)[:, None]
    start = data.xpos[m.jnt_bodyid[slide]]
    still = (body_of == WORLD) & (m.body_rootid == m.body_rootid[m.jnt_bodyid[hinge[0]]])
    return SceneConstants(
        nq=m.nq,
        nv=m.nv,
        timestep=m.opt.timestep,
        gravity=m.opt.gravity.copy(),
        impratio=m.opt.impratio,
        tolerance=m.opt.tolerance,
        ls_tolerance=m.opt.ls_tolerance,
        hinges=_hinges(m, data, hinge, mass[:n], com[:n], inertia[:n]),
        slides=Slides(start.copy(), data.xmat[m.jnt_bodyid[slide]].reshape(-1, 3, 3).copy(), axis.copy()),
        linkage=_linkage(m, body_of, frame),
        sites=attach_frames(
            m.site_bodyid[scene.sites], m.site_pos[scene.sites], m.site_quat[scene.sites], frame
        ),
        still_mass=float(m.body_mass[still].sum()),
        still_moment=m.body_mass[still] @ data.xipos[still],
        body_of=body_of,
        frame_of=frame,
        joint_qpos=at.copy(),
        joint_dof=dof.copy(),
        cube_qpos=m.jnt_qposadr[free].copy(),
        cube_dof=cube_dof.copy(),
        slide_qpos=m.jnt_qposadr[slide].copy(),
        slide_dof=slide_dof.copy(),
        fixed_mass=fixed_mass,
        fixed_force=fixed_force,
        stiffness=m.jnt_stiffness[joints].copy(),
        rest=m.qpos_spring[at].copy(),
        damping=m.dof_damping.copy(),
        limits=np.where(limited, m.jnt_range[joints], [-np.inf, np.inf]),
        joint_invweight=m.dof_invweight0[dof].copy(),
        joint_solref=m.jnt_solref[joints].copy(),
        joint_solimp=m.jnt_solimp[joints].copy(),
        friction_loss=m.dof_frictionloss[dof].copy(),
        friction_solref=m.dof_solref[dof].copy(),
        friction_solimp=m.dof_solimp[dof].copy(),
        **_actuators(m),
    )


def _require_known_parts(m: mujoco.MjModel) -> None:
    kinds = {int(k) for k in m.jnt_type}
    known = kinds <= {0, 2, 3} and m.njnt == len(np.unique(m.jnt_bodyid)) and m.nmocap <= m.nbody
    known &= bool(np.all(np.isin(m.eq_type, (mujoco.mjtEq.mjEQ_CONNECT, mujoco.mjtEq.mjEQ_JOINT))))
    known &= not m.na and m.ntendon == int(np.sum(m.actuator_trntype == mujoco.mjtTrn.mjTRN_TENDON))
    known &= not (m.tendon_stiffness.any() or m.tendon_damping.any() or m.tendon_frictionloss.any())
    known &= m.opt.integrator == mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    known &= m.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC and not m.opt.disableflags
    if not known:
        raise UserError("engine mjx runs OGBench's tabletop scenes only; use engine c for this model")


def attach_geoms(m: mujoco.MjModel, geoms: np.ndarray, constants: SceneConstants) -> AttachedFrames:
    """Returns frames of geoms in their moving bodies; in the world for static geoms."""
    bodies = m.geom_bodyid[geoms]
    return attach_frames(bodies, m.geom_pos[geoms], m.geom_quat[geoms], constants.frame_of)


def _hinges(
    m: mujoco.MjModel,
    data: mujoco.MjData,
    hinge: np.ndarray,
    mass: np.ndarray,
    com: np.ndarray,
    inertia: np.ndarray,
) -> Hinges:
    bodies = m.jnt_bodyid[hinge]
    index = {int(b): i for i, b in enumerate(bodies)}
    parent, depth = np.full(len(hinge), WORLD), np.zeros(len(hinge), int)
    turn, offset = np.zeros((len(hinge), 3, 3, 3)), np.zeros((len(hinge), 3))
    ancestors = np.eye(len(hinge), dtype=bool)
    base = m.body_parentid[bodies[0]]
    for i, b in enumerate(bodies):
        shift, turned, up = *pose_of(m, b), m.body_parentid[b]
        while up != base and up not in index:
            pos, mat = pose_of(m, up)
            shift, turned, up = pos + mat @ shift, mat @ turned, m.body_parentid[up]
        if up in index:
            parent[i] = index[up]
            depth[i] = depth[parent[i]] + 1
            ancestors[i] |= ancestors[parent[i]]
        k = cross_mat(m.jnt_axis[hinge[i]])
        turn[i] = turned, turned @ k, turned @ k @ k
        offset[i] = shift + turned @ m.jnt_pos[hinge[i]]
    levels = tuple(np.flatnonzero(depth == d) for d in range(depth.max() + 1))
    return Hinges(
        parent=parent,
        ancestors=ancestors,
        levels=levels,
        turn=turn,
        offset=offset,
        anchor=m.jnt_pos[hinge].copy(),
        axis=m.jnt_axis[hinge].copy(),
        base_pos=data.xpos[base].copy(),
        base_mat=data.xmat[base].reshape(3, 3).copy(),
        mass=mass,
        com=com,
        inertia=inertia,
    )


def _linkage(m: mujoco.MjModel, body_of: np.ndarray, frame: AttachedFrames) -> EqualityConstants:
    connect = np.flatnonzero(m.eq_type == mujoco.mjtEq.mjEQ_CONNECT)
    gear = np.flatnonzero(m.eq_type == mujoco.mjtEq.mjEQ_JOINT)
    pairs = np.stack([m.eq_obj1id[connect], m.eq_obj2id[connect]], axis=1)
    local = np.stack([m.eq_data[connect, :3], m.eq_data[connect, 3:6]], axis=1)
    dofs = m.jnt_dofadr[np.stack([m.eq_obj1id[gear], m.eq_obj2id[gear]], axis=1)]
    points = frame.pos[pairs] + np.einsum("cpij,cpj->cpi", frame.mat[pairs], local)
    order = np.concatenate([connect, gear])
    weight = [m.body_invweight0[pairs, 0].sum(1), m.dof_invweight0[dofs].sum(1)]
    return EqualityConstants(
        bodies=body_of[pairs],
        anchors=points,
        joints=dofs,
        gap=m.eq_data[gear, 0] + (m.qpos0[dofs[:, 0]] - m.qpos0[dofs[:, 1]]),
        invweight=np.concatenate(weight),
        solref=m.eq_solref[order].copy(),
        solimp=m.eq_solimp[order].copy(),
    )


def _actuators(m: mujoco.MjModel) -> dict[str, np.ndarray]:
    moment = np.zeros((m.nu, m.nv))
    for u in range(m.nu):
        target = m.actuator_trnid[u, 0]
        if m.actuator_trntype[u] == mujoco.mjtTrn.mjTRN_TENDON:
            at = slice(m.tendon_adr[target], m.tendon_adr[target] + m.tendon_num[target])
            moment[u, m.jnt_dofadr[m.wrap_objid[at]]] = m.wrap_prm[at]
        else:
            moment[u, m.jnt_dofadr[target]] = 1.0
    free, unlimited = [-np.inf, np.inf], np.array
    ctrl = m.actuator_ctrllimited.astype(bool)[:, None]
    force = m.actuator_forcelimited.astype(bool)[:, None]
    return {
        "moment": moment * m.actuator_gear[:, :1],
        "gain": m.actuator_gainprm[:, 0].copy(),
        "bias": m.actuator_biasprm[:, :3].copy(),
        "ctrl_range": np.where(ctrl, m.actuator_ctrlrange, unlimited(free)),
        "force_range": np.where(force, m.actuator_forcerange, unlimited(free)),
    }
