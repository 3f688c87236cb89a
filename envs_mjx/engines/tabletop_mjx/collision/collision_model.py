"""Collision model of engine `mjx`: the solids that replace a scene's geoms, and the pairs that may touch.

Boxes, planes and the capsules of handles collide as in C. General convex shapes of MuJoCo C are replaced by
boxes. A button's cap becomes a box of the same height and cross-section area; for pads, which press buttons,
it stays the cylinder of C, since a pad's corner often is within one of the two only. The four boxes around a
button's rod become the box they fill (the cap covers the hole). Meshes of the gripper become boxes around
their slices; wrist capsules and cylinder become boxes of the same cross-section. Kept are all pairs that
experts, random or learned policies were seen to bring into contact, and their neighbours. These are
everything of the gripper and wrist with buttons, furniture and cubes; cubes with everything; pads with each
other and the floor. Omitted are the arm above the wrist, which touches nothing; fingers with the floor, which
the workspace keeps apart; and parts of furniture with each other, which joint limits replace.
"""

import dataclasses
import itertools
import re

import mujoco
import numpy as np
from scipy.spatial import ConvexHull

from envs_mjx.engines.tabletop_mjx.collision.box_button_cap import SIDE_OF_RADIUS
from envs_mjx.engines.tabletop_mjx.collision.pairs import (
    SlideStops,
    TabletopPairs,
    TabletopSolids,
    pairs_of,
    stops_of,
)
from envs_mjx.engines.tabletop_mjx.model import SceneConstants, attach_geoms
from envs_mjx.engines.tabletop_mjx.welded_bodies import AttachedFrames, quat_mat
from envs_mjx.manipulation.assets import ARM
from envs_mjx.manipulation.scenes import Scene

_SLICES = {"base": 3, "follower": 3}
"""Gripper meshes that are far from filling one box are cut along z of their body; the others are one box."""

_GRIPPER = re.compile(r"/robotiq/(?:(?:left|right)_)?(\w+)$")


@dataclasses.dataclass(frozen=True, eq=False)
class CollisionModel:
    """Solids and pairs; hashed by identity.

    Pairs are Cartesian products of runs of boxes (start, end, start, end), so that a broad phase needs no
    gather: of boxes, of pads with caps, and of capsules with boxes. Rows of `pairs`: boxes on the floor, then
    these.
    """

    boxes: TabletopSolids
    capsules: TabletopSolids
    on_floor: tuple[int, int]
    box_products: tuple[tuple[int, int, int, int], ...]
    cap_products: tuple[tuple[int, int, int, int], ...]
    capsule_products: tuple[tuple[int, int, int, int], ...]
    pairs: TabletopPairs
    stops: SlideStops


def collision_model(scene: Scene, constants: SceneConstants) -> CollisionModel:
    """Solids and pairs of a scene."""
    m = scene.model
    classes = [_geom_class(m, g) for g in range(m.ngeom)]

    def of(*names: str) -> list[int]:
        return [g for name in names for g in range(m.ngeom) if classes[g] == name]

    runs = [
        _boxes(m, of("left pad"), constants),
        _boxes(m, of("right pad"), constants),
        _boxes(m, of("cube"), constants),
        _links(m, of("link"), constants),
        _boxes(m, of("wrist"), constants),
        _boxes(m, of("moving"), constants),
        _caps(m, of("cap"), constants),
        _boxes(m, of("standing"), constants),
        _button_boxes(m, of("button box"), constants),
        _boxes(m, of("wall"), constants),
    ]
    boxes, capsules = _join(runs), _boxes(m, of("handle"), constants)
    starts = np.cumsum([0, *(len(r.geom) for r in runs)]).tolist()
    right, cube, link, moving, cap, standing, wall, end = (starts[k] for k in (1, 2, 3, 5, 6, 7, 9, 10))
    handles = len(capsules.geom)
    among = ((c, c + 1, c + 1, link) for c in range(cube, link))
    box_products = _nonempty(
        (0, right, right, cube),
        *among,
        (0, cube, cube, link),
        (cube, link, link, end),
        (0, cube, moving, cap),
        (0, cube, standing, wall),
        (link, moving, moving, wall),
    )
    cap_products = _nonempty((0, cube, cap, standing))
    capsule_products = _nonempty((0, handles, 0, moving))
    return CollisionModel(
        boxes=boxes,
        capsules=capsules,
        on_floor=(0, link),
        box_products=box_products,
        cap_products=cap_products,
        capsule_products=capsule_products,
        pairs=pairs_of(
            scene, constants, boxes, capsules, link, box_products + cap_products, capsule_products
        ),
        stops=stops_of(m, constants, of("cap"), of("button box"), of("moving"), of("standing")),
    )


def _nonempty(*products: tuple[int, int, int, int]) -> tuple[tuple[int, int, int, int], ...]:
    return tuple(p for p in products if p[0] < p[1] and p[2] < p[3])


def _geom_class(m: mujoco.MjModel, geom: int) -> str:
    """Class of a geom by its own, its body's and its parent body's name; empty for what never collides."""
    if not (m.geom_contype[geom] or m.geom_conaffinity[geom]):
        return ""
    body = m.geom_bodyid[geom]
    name, of = m.geom(geom).name, m.body(body).name
    kind = m.geom_type[geom]
    if name.startswith("wall_"):
        return "wall"
    if re.fullmatch(r"object_\d+", of):
        return "cube"
    if pad := re.search(r"(left|right)_pad\d$", name):
        return f"{pad[1]} pad"
    if _GRIPPER.search(of):
        return "link"
    if re.search(r"wrist_[23]_link$", of):
        return "wrist"
    if re.fullmatch(r"button_\d+", of):
        return "cap" if kind == mujoco.mjtGeom.mjGEOM_CYLINDER and m.geom_size[geom, 0] > 0.01 else ""
    if re.fullmatch(r"buttonbox_\d+", of):
        return "button box"
    if of.startswith(ARM):
        return ""
    if kind == mujoco.mjtGeom.mjGEOM_CAPSULE and m.body_dofnum[body]:
        return "handle"
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return "moving" if m.body_dofnum[body] else "standing"
    return ""


def _solids(
    m: mujoco.MjModel,
    geoms: list[int],
    constants: SceneConstants,
    center: np.ndarray,
    half: np.ndarray,
    radius: np.ndarray | None = None,
) -> TabletopSolids:
    """Solids centred at `center` in the frames of `geoms`."""
    frames = attach_geoms(m, np.asarray(geoms, int), constants)
    pos = frames.pos + np.einsum("nij,nj->ni", frames.mat, center.reshape(-1, 3))
    radius = np.zeros(len(geoms)) if radius is None else radius
    return TabletopSolids(frames._replace(pos=pos), half.reshape(-1, 3), radius, np.asarray(geoms, int))


def _join(runs: list[TabletopSolids]) -> TabletopSolids:
    frames = AttachedFrames(*(np.concatenate(x) for x in zip(*(r.frames for r in runs), strict=True)))
    rest = (np.concatenate(x) for x in zip(*(r[1:] for r in runs), strict=True))
    return TabletopSolids(frames, *rest)


def _boxes(m: mujoco.MjModel, geoms: list[int], constants: SceneConstants) -> TabletopSolids:
    """Boxes as they are, handles' capsules as capsules, other capsules and cylinders as boxes of equal
    cross-section and volume.
    """
    half, radius = np.zeros((len(geoms), 3)), np.zeros(len(geoms))
    for i, g in enumerate(geoms):
        size, kind = m.geom_size[g], m.geom_type[g]
        if kind == mujoco.mjtGeom.mjGEOM_BOX:
            half[i] = size
        elif kind == mujoco.mjtGeom.mjGEOM_CAPSULE and _geom_class(m, g) == "handle":
            half[i, 2], radius[i] = size[1], size[0]
        else:
            round_end = 2 / 3 * size[0] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0
            half[i] = *(2 * [size[0] * SIDE_OF_RADIUS]), size[1] + round_end
    return _solids(m, geoms, constants, np.zeros((len(geoms), 3)), half, radius)


def _links(m: mujoco.MjModel, geoms: list[int], constants: SceneConstants) -> TabletopSolids:
    """Boxes around the gripper's meshes, or around slices of them."""
    found: list[tuple[int, np.ndarray, np.ndarray]] = []
    for g in geoms:
        match = _GRIPPER.search(m.body(m.geom_bodyid[g]).name)
        slices = _SLICES.get(match[1], 0) if match else 0
        if not slices:
            found.append((g, m.geom_aabb[g, :3], m.geom_aabb[g, 3:]))
            continue
        turn = quat_mat(m.geom_quat[g])
        mesh = m.geom_dataid[g]
        start, count = m.mesh_vertadr[mesh], m.mesh_vertnum[mesh]
        corners = m.mesh_vert[start : start + count]
        in_body = corners[ConvexHull(corners).vertices] @ turn.T + m.geom_pos[g]
        for low, high in _slice_boxes(in_body, slices):
            # boxes along the body's axes: `_solids` takes them in the geom's frame
            found.append((g, turn.T @ ((low + high) / 2 - m.geom_pos[g]), (high - low) / 2))
    geoms = [g for g, _, _ in found]
    center, half = (np.array([x[k] for x in found]) for k in (1, 2))
    solids = _solids(m, geoms, constants, center, half)
    for i, g in enumerate(geoms):
        match = _GRIPPER.search(m.body(m.geom_bodyid[g]).name)
        if match and match[1] in _SLICES:
            solids.frames.mat[i] = constants.frame_of.mat[m.geom_bodyid[g]]
    return solids


def _slice_boxes(points: np.ndarray, slices: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Corners of boxes around equal slices, along z, of the convex hull of `points`."""
    edges = np.linspace(points[:, 2].min(), points[:, 2].max(), slices + 1)
    boxes = []
    for low, high in itertools.pairwise(edges):
        inside = [points[(points[:, 2] >= low - 1e-9) & (points[:, 2] <= high + 1e-9)]]
        for z in (low, high):  # every segment across the plane lies in the hull
            above, below = points[points[:, 2] > z], points[points[:, 2] < z]
            t = (z - below[None, :, 2]) / (above[:, None, 2] - below[None, :, 2])
            cut = below[None] + t[..., None] * (above[:, None] - below[None])
            inside.append(cut.reshape(-1, 3))
        hull = np.concatenate(inside)
        boxes.append((hull.min(0), hull.max(0)))
    return boxes


def _caps(m: mujoco.MjModel, geoms: list[int], constants: SceneConstants) -> TabletopSolids:
    """The discs of each button as one box."""
    bodies = list(dict.fromkeys(m.geom_bodyid[geoms].tolist()))
    first, center, half = [], [], []
    for body in bodies:
        own = [g for g in geoms if m.geom_bodyid[g] == body]
        turn = quat_mat(m.geom_quat[own[0]])
        z = [(m.geom_pos[g] - m.geom_pos[own[0]]) @ turn[:, 2] for g in own]
        low = min(a - m.geom_size[g, 1] for a, g in zip(z, own, strict=True))
        high = max(a + m.geom_size[g, 1] for a, g in zip(z, own, strict=True))
        side = max(m.geom_size[g, 0] for g in own) * SIDE_OF_RADIUS
        first.append(own[0])
        center.append([0, 0, (low + high) / 2])
        half.append([side, side, (high - low) / 2])
    return _solids(m, first, constants, np.array(center), np.array(half))


def _button_boxes(m: mujoco.MjModel, geoms: list[int], constants: SceneConstants) -> TabletopSolids:
    """The boxes around each button's rod as the one box that they fill but for the rod's hole."""
    bodies = list(dict.fromkeys(m.geom_bodyid[geoms].tolist()))
    first, center, half = [], [], []
    for body in bodies:
        own = [g for g in geoms if m.geom_bodyid[g] == body]
        low = np.min([m.geom_pos[g] - m.geom_size[g] for g in own], axis=0)
        high = np.max([m.geom_pos[g] + m.geom_size[g] for g in own], axis=0)
        first.append(own[0])
        center.append((low + high) / 2 - m.geom_pos[own[0]])
        half.append((high - low) / 2)
    return _solids(m, first, constants, np.array(center), np.array(half))
