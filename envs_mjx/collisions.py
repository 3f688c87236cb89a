"""Collision model that MJX-JAX can run: few geoms, boxes and planes only, a fixed contact budget.

MJX-JAX 3.17 has no cylinder-box and cylinder-mesh colliders, allocates every contact slot of every
geom pair statically, and runs every pair at each step. OGBench's cube scenes use a small part of
their 254 or more pairs: cubes meet the floor, the walls, each other and the finger pads; pads meet
each other and the floor; the links of the arm touch nothing. The functions here keep those pairs.
Dynamics do not change: the links of the arm and gripper carry explicit inertias.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable

import mujoco
import numpy as np
from mujoco import mjx

from mac.errors import UserError

CONTACT_CAPS = {1: 24, 2: 32, 3: 40, 4: 44, 8: 90}
"""Contact slots by number of cubes: 1.3 times the most that C MuJoCo was seen to use."""

_LITE_PAIRS = (
    ("cube", "cube"),
    ("cube", "floor"),
    ("cube", "wall"),
    ("cube", "left pad"),
    ("cube", "right pad"),
    ("left pad", "right pad"),
    ("left pad", "floor"),
    ("right pad", "floor"),
)
_PAIRS = {"lite": _LITE_PAIRS, "finger": (*_LITE_PAIRS, ("cube", "finger"))}

_UNUSED = ("tex_data", "mesh_vert", "mesh_normal", "mesh_face", "mesh_graph", "mesh_texcoord")


def contact_cap(cubes: int) -> int:
    """Contact slots for a scene of `cubes` cubes: the smallest listed count that covers it."""
    return next((cap for n, cap in sorted(CONTACT_CAPS.items()) if n >= cubes), 12 * cubes)


def collision_model(model: mujoco.MjModel, level: str = "lite") -> mujoco.MjModel:
    """A copy of a compiled cube scene that collides only the classes of geom that matter.

    `lite` keeps cubes, floor, walls and finger pads; `finger` adds the gripper's palm and links
    against cubes, as the bounding boxes of their meshes. The followers, which carry the pads, stay
    out: their boxes stick out beside the pads and would push a cube about in every grasp (0.04 rad
    of the fingers within one control step). Every other geom becomes visual. Each pair of classes
    that may touch owns one bit, set in the contype of one and the conaffinity of the other.

    Raises:
        UserError: if `level` is unknown or the model has no cube.
    """
    if level not in _PAIRS:
        raise UserError(f"collision level {level!r} is unknown; choose one of {', '.join(_PAIRS)}")
    edited = copy.copy(model)
    classes = [_geom_class(model, g) for g in range(model.ngeom)]
    if "cube" not in classes:
        raise UserError("this MuJoCo model has no body named object_<i>; engine mjx runs cube scenes only")
    if level == "finger":
        for g in _members(classes, "finger"):
            _mesh_to_box(edited, g)
    edited.geom_contype[:] = edited.geom_conaffinity[:] = 0
    for bit, (first, second) in enumerate(_PAIRS[level]):
        edited.geom_contype[_members(classes, first)] |= 1 << bit
        edited.geom_conaffinity[_members(classes, second)] |= 1 << bit
    for body in range(edited.nbody):  # C filters by body first
        geoms = edited.geom_bodyid == body
        edited.body_contype[body] = np.bitwise_or.reduce(edited.geom_contype[geoms], initial=0)
        edited.body_conaffinity[body] = np.bitwise_or.reduce(edited.geom_conaffinity[geoms], initial=0)
    return edited


def put_collision_model(model: mujoco.MjModel, max_contacts: int) -> mjx.Model:
    """The `mjx.Model` of a collision model, without visual geoms, meshes and textures.

    What is dropped would be computed at each step (poses of visual geoms) or hashed at each call
    (mesh vertices are static metadata of an `mjx.Model`). `max_contacts` is the number of contact
    slots; at each step the deepest contacts fill them.

    Raises:
        UserError: if `max_contacts` is not positive.
    """
    if max_contacts < 1:
        raise UserError(f"max_contacts={max_contacts} must be at least 1")
    full = mjx.put_model(model, impl="jax")
    empty = {f: getattr(full, f)[:0] for f in _UNUSED if hasattr(full, f)}
    keep = np.flatnonzero(np.asarray(model.geom_contype | model.geom_conaffinity))
    return _limit_contacts(_keep_geoms(full.replace(**empty), keep), max_contacts)


def _geom_class(model: mujoco.MjModel, geom: int) -> str:
    """Class of a geom by its own and its body's name; empty for geoms that never collide."""
    name, body = model.geom(geom).name, model.body(model.geom_bodyid[geom]).name
    if not (model.geom_contype[geom] or model.geom_conaffinity[geom]):
        return ""
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE:
        return "floor"
    if name.startswith("wall_"):
        return "wall"
    if re.fullmatch(r"object_\d+", body):
        return "cube"
    if pad := re.search(r"(left|right)_pad\d$", name):
        return f"{pad[1]} pad"
    is_mesh = model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH
    return "finger" if is_mesh and re.search(r"/robotiq/.*(?<!_follower)$", body) else ""


def _members(classes: list[str], name: str) -> list[int]:
    return [g for g, c in enumerate(classes) if c == name]


def _mesh_to_box(model: mujoco.MjModel, geom: int) -> None:
    """Replaces a mesh geom by the box around it, in place."""
    center, half = model.geom_aabb[geom, :3].copy(), model.geom_aabb[geom, 3:].copy()
    shift = np.empty(3)
    mujoco.mju_rotVecQuat(shift, center, model.geom_quat[geom])
    model.geom_pos[geom] += shift
    model.geom_type[geom] = mujoco.mjtGeom.mjGEOM_BOX
    model.geom_size[geom] = half
    model.geom_aabb[geom, :3] = 0
    model.geom_rbound[geom] = np.linalg.norm(half)
    model.geom_dataid[geom] = -1
    model.geom_sameframe[geom] = mujoco.mjtSameFrame.mjSAMEFRAME_NONE


def _keep_geoms(model: mjx.Model, keep: np.ndarray) -> mjx.Model:
    """The model with the geoms `keep` only (ascending ids), renumbered from 0."""
    names: Iterable[str] = (f.name for f in dataclasses.fields(model))
    fields = {f: getattr(model, f)[keep] for f in names if f.startswith("geom_") or f == "name_geomadr"}
    bodies = np.asarray(model.geom_bodyid)[keep]
    count = np.bincount(bodies, minlength=model.nbody)
    first = np.where(count > 0, np.searchsorted(bodies, np.arange(model.nbody)), -1)
    return model.replace(
        ngeom=len(keep), body_geomnum=count.astype(np.int32), body_geomadr=first.astype(np.int32), **fields
    )


def _limit_contacts(model: mjx.Model, max_contacts: int) -> mjx.Model:
    """The model with MJX's custom numeric `max_contact_points` and no other numeric.

    The others must go: MJX 3.17 reads `numeric_data[id]` instead of `numeric_data[numeric_adr[id]]`,
    so a numeric of more than one value ahead of it silently changes the limit.
    """
    return model.replace(
        nnumeric=1,
        numeric_adr=np.zeros(1, np.int32),
        numeric_data=np.array([max_contacts], np.float64),
        name_numericadr=np.array([len(model.names)], np.int32),
        names=model.names + b"max_contact_points\x00",
    )
