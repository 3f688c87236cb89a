"""Frames and inertia of bodies that move as one, read from a compiled model."""

from typing import NamedTuple

import mujoco
import numpy as np

WORLD = -1


class AttachedFrames(NamedTuple):
    """Frames fixed to moving bodies: `body` counts hinges, then cubes, then slides, then the world."""

    body: np.ndarray
    pos: np.ndarray
    mat: np.ndarray


def pose_of(m: mujoco.MjModel, body: int | np.integer) -> tuple[np.ndarray, np.ndarray]:
    return m.body_pos[body], quat_mat(m.body_quat[body])


def frames_of(m: mujoco.MjModel, moving: np.ndarray) -> tuple[np.ndarray, AttachedFrames]:
    """Moving body that carries each body (-1: none), and the body's pose in it (-1: in the world)."""
    index = {int(b): i for i, b in enumerate(moving)}
    body = np.full(m.nbody, WORLD)
    pos, mat = np.zeros((m.nbody, 3)), np.tile(np.eye(3), (m.nbody, 1, 1))
    for b in range(1, m.nbody):
        if b in index:
            body[b] = index[b]
        else:
            up = m.body_parentid[b]
            shift, turn = pose_of(m, b)
            body[b], pos[b], mat[b] = body[up], pos[up] + mat[up] @ shift, mat[up] @ turn
    return body, AttachedFrames(body, pos, mat)


def attach_frames(
    bodies: np.ndarray, pos: np.ndarray, quat: np.ndarray, frame: AttachedFrames
) -> AttachedFrames:
    """Returns frames given in model bodies as frames in moving bodies."""
    mat = np.array([quat_mat(q) for q in quat]).reshape(-1, 3, 3)
    shift = np.einsum("nij,nj->ni", frame.mat[bodies], pos)
    return AttachedFrames(frame.body[bodies], frame.pos[bodies] + shift, frame.mat[bodies] @ mat)


def welded_inertia(
    m: mujoco.MjModel, moving: np.ndarray, body_of: np.ndarray, frame: AttachedFrames
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mass, centre of mass and inertia about it of every moving body with all that is welded to it."""
    mass, com, inertia = np.zeros(len(moving)), np.zeros((len(moving), 3)), np.zeros((len(moving), 3, 3))
    for i in range(len(moving)):
        parts = np.flatnonzero((body_of == i) & (m.body_mass > 0))
        centers = frame.pos[parts] + np.einsum("nij,nj->ni", frame.mat[parts], m.body_ipos[parts])
        mass[i] = m.body_mass[parts].sum()
        com[i] = m.body_mass[parts] @ centers / mass[i]
        for b, center in zip(parts, centers, strict=True):
            turn = frame.mat[b] @ quat_mat(m.body_iquat[b])
            r = center - com[i]
            inertia[i] += turn @ np.diag(m.body_inertia[b]) @ turn.T
            inertia[i] += m.body_mass[b] * (r @ r * np.eye(3) - np.outer(r, r))
    return mass, com, inertia


def quat_mat(quat: np.ndarray) -> np.ndarray:
    """Rotation matrix of a unit quaternion (wxyz)."""
    mat = np.empty(9)
    mujoco.mju_quat2Mat(mat, np.asarray(quat, float))
    return mat.reshape(3, 3)


def cross_mat(v: np.ndarray) -> np.ndarray:
    """The matrix K with K x = v cross x."""
    return np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
