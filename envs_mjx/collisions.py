"""Collision model of engine `mjx`: which solids stand for a scene's geoms, and which pairs may touch.

Boxes, planes and the capsules of handles collide as in C. What MuJoCo C treats as general convex shapes
is replaced by boxes: a button's cap by a box of the same height and cross-section area (a press meets only
its flat top, where the two agree; a capsule would be round there), the four boxes around a button's rod by
the box they fill (the cap covers the hole), meshes of the gripper by boxes around their slices, wrist
capsules and cylinder by boxes of the same cross-section. Kept are all pairs that experts, random or learned
policies were seen to bring into contact, and their neighbours: everything of the gripper and wrist with
buttons, furniture and cubes; cubes with everything; pads with each other and the floor. Left out are the
arm above the wrist, which touches nothing, fingers with the floor, which the workspace keeps apart, and parts
of furniture with each other, which end stops stand for.
"""

import dataclasses
import itertools
import re
from typing import NamedTuple

import mujoco
import numpy as np
from scipy.spatial import ConvexHull

from envs_mjx.assets import ARM
from envs_mjx.mjx_model import Attached, Constants, attach_geoms, quat_mat
from envs_mjx.scenes import Scene

_SLICES = {"base": 3, "follower": 3}
"""Gripper meshes that are far from filling one box are cut along z of their body; the others are one box."""

_GRIPPER = re.compile(r"/robotiq/(?:(?:left|right)_)?(\w+)$")


class Solids(NamedTuple):
    """Boxes or capsules: frames in moving bodies, half sides (capsule: 0, 0, half length) and radius.

    `geom` is the geom whose friction and solver parameters each has.
    """

    frames: Attached
    half: np.ndarray
    radius: np.ndarray
    geom: np.ndarray


class Pairs(NamedTuple):
    """What a contact needs to know of its pair of solids, one row per pair.

    Attributes:
        signs: float[P, nv], +1 where a dof moves the second solid only, -1 the first only, else 0.
        felt: +1 or -1 where the second or first solid belongs to the sensing pad, else 0.
        friction, invweight: coefficient of sliding, sum of the bodies' inverse weights.
        solref, solimp: float[P, 2] and [P, 5].
    """

    signs: np.ndarray
    felt: np.ndarray
    friction: np.ndarray
    invweight: np.ndarray
    solref: np.ndarray
    solimp: np.ndarray


class Stops(NamedTuple):
    """Ends of slides where furniture meets furniture: `count` contacts at one joint position each.

    `side` is +1 for a stop at the lower end and -1 at the upper.
    """

    slide: np.ndarray
    side: np.ndarray
    at: np.ndarray
    count: np.ndarray
    invweight: np.ndarray
    solref: np.ndarray
    solimp: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class CollisionModel:
    """Solids and pairs; hashed by identity.

    Box pairs are products of runs of boxes (start, end, start, end), so that a broad phase needs no
    gather. Rows of `pairs`: boxes on the floor, then box pairs, then capsule pairs.
    """

    boxes: Solids
    capsules: Solids
    on_floor: tuple[int, int]
    box_products: tuple[tuple[int, int, int, int], ...]
    capsule_products: tuple[tuple[int, int, int, int], ...]
    pairs: Pairs
    stops: Stops

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of floor, box and capsule pairs."""
        floor = self.on_floor[1] - self.on_floor[0]
        sizes = [
            sum((b - a) * (d - c) for a, b, c, d in x) for x in (self.box_products, self.capsule_products)
        ]
        return floor, sizes[0], sizes[1]


def collision_model(scene: Scene, constants: Constants) -> CollisionModel:
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
    right, cube, link, moving, wall, end = (starts[k] for k in (1, 2, 3, 5, 9, 10))
    handles = len(capsules.geom)
    among = ((c, c + 1, c + 1, link) for c in range(cube, link))
    box_products = _nonempty(
        (0, right, right, cube),
        *among,
        (0, cube, cube, link),
        (cube, link, link, end),
        (0, cube, moving, wall),
        (link, moving, moving, wall),
    )
    capsule_products = _nonempty((0, handles, 0, moving))
    return CollisionModel(
        boxes=boxes,
        capsules=capsules,
        on_floor=(0, link),
        box_products=box_products,
        capsule_products=capsule_products,
        pairs=_pairs(scene, constants, boxes, capsules, link, box_products, capsule_products),
        stops=_stops(m, constants, of("cap"), of("button box"), of("moving"), of("standing")),
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
    constants: Constants,
    center: np.ndarray,
    half: np.ndarray,
    radius: np.ndarray | None = None,
) -> Solids:
    """Solids centred at `center` in the frames of `geoms`."""
    frames = attach_geoms(m, np.asarray(geoms, int), constants)
    pos = frames.pos + np.einsum("nij,nj->ni", frames.mat, center.reshape(-1, 3))
    radius = np.zeros(len(geoms)) if radius is None else radius
    return Solids(frames._replace(pos=pos), half.reshape(-1, 3), radius, np.asarray(geoms, int))


def _join(runs: list[Solids]) -> Solids:
    frames = Attached(*(np.concatenate(x) for x in zip(*(r.frames for r in runs), strict=True)))
    rest = (np.concatenate(x) for x in zip(*(r[1:] for r in runs), strict=True))
    return Solids(frames, *rest)


def _boxes(m: mujoco.MjModel, geoms: list[int], constants: Constants) -> Solids:
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
            half[i] = *(2 * [size[0] * np.sqrt(np.pi) / 2]), size[1] + round_end
    return _solids(m, geoms, constants, np.zeros((len(geoms), 3)), half, radius)


def _links(m: mujoco.MjModel, geoms: list[int], constants: Constants) -> Solids:
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


def _caps(m: mujoco.MjModel, geoms: list[int], constants: Constants) -> Solids:
    """The discs of each button as one box."""
    bodies = list(dict.fromkeys(m.geom_bodyid[geoms].tolist()))
    first, center, half = [], [], []
    for body in bodies:
        own = [g for g in geoms if m.geom_bodyid[g] == body]
        turn = quat_mat(m.geom_quat[own[0]])
        z = [(m.geom_pos[g] - m.geom_pos[own[0]]) @ turn[:, 2] for g in own]
        low = min(a - m.geom_size[g, 1] for a, g in zip(z, own, strict=True))
        high = max(a + m.geom_size[g, 1] for a, g in zip(z, own, strict=True))
        side = max(m.geom_size[g, 0] for g in own) * np.sqrt(np.pi) / 2
        first.append(own[0])
        center.append([0, 0, (low + high) / 2])
        half.append([side, side, (high - low) / 2])
    return _solids(m, first, constants, np.array(center), np.array(half))


def _button_boxes(m: mujoco.MjModel, geoms: list[int], constants: Constants) -> Solids:
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


def product_pairs(products: tuple[tuple[int, int, int, int], ...]) -> np.ndarray:
    """int[P, 2], the pairs of solids of all products, in the order of their broadcast differences."""
    runs = [
        np.stack(np.meshgrid(np.arange(a, b), np.arange(c, d), indexing="ij"), -1) for a, b, c, d in products
    ]
    return np.concatenate([r.reshape(-1, 2) for r in runs]) if runs else np.zeros((0, 2), int)


def _pairs(
    scene: Scene,
    constants: Constants,
    boxes: Solids,
    capsules: Solids,
    on_floor: int,
    box_products: tuple[tuple[int, int, int, int], ...],
    capsule_products: tuple[tuple[int, int, int, int], ...],
) -> Pairs:
    m = scene.model
    floor = int(np.flatnonzero(m.geom_type == mujoco.mjtGeom.mjGEOM_PLANE)[0])
    with_boxes, with_capsules = product_pairs(box_products), product_pairs(capsule_products)
    geoms = [np.stack([np.full(on_floor, floor), boxes.geom[:on_floor]], 1), boxes.geom[with_boxes]]
    geoms += [np.stack([capsules.geom[with_capsules[:, 0]], boxes.geom[with_capsules[:, 1]]], 1)]
    pairs = np.concatenate(geoms)
    bodies = m.geom_bodyid[pairs]
    moved = _moved(constants)[constants.body_of[bodies]]
    rows = [_contact_parameters(m, a, b) for a, b in pairs.tolist()]
    friction, solref, solimp = (np.array([r[k] for r in rows]) for k in range(3))
    felt = (bodies == scene.pad_body).astype(float)
    return Pairs(
        signs=moved[:, 1] - moved[:, 0],
        felt=felt[:, 1] - felt[:, 0],
        friction=friction,
        invweight=m.body_invweight0[bodies, 0].sum(1),
        solref=solref,
        solimp=solimp,
    )


def _moved(c: Constants) -> np.ndarray:
    """float[moving bodies + 1, nv], which dofs move each body; the last row is the world's."""
    hinges, cubes = len(c.hinges.parent), len(c.cube_dof)
    moved = np.zeros((hinges + cubes + len(c.slide_dof) + 1, c.nv))
    moved[:hinges, :hinges] = c.hinges.ancestors
    for i, at in enumerate(c.cube_dof):
        moved[hinges + i, at : at + 6] = 1
    for i, at in enumerate(c.slide_dof):
        moved[hinges + cubes + i, at] = 1
    return moved


def _contact_parameters(m: mujoco.MjModel, a: int, b: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Sliding friction, solref and solimp of a contact of two geoms ("Contact parameters" in MuJoCo's
    documentation): of the geom with priority, else the larger friction and a weighted mean.
    """
    if m.geom_priority[a] != m.geom_priority[b]:
        g = a if m.geom_priority[a] > m.geom_priority[b] else b
        return float(m.geom_friction[g, 0]), m.geom_solref[g], m.geom_solimp[g]
    share = m.geom_solmix[a] / (m.geom_solmix[a] + m.geom_solmix[b])
    mix = [share * x[a] + (1 - share) * x[b] for x in (m.geom_solref, m.geom_solimp)]
    return float(max(m.geom_friction[a, 0], m.geom_friction[b, 0])), mix[0], mix[1]


def _stops(
    m: mujoco.MjModel,
    c: Constants,
    caps: list[int],
    holders: list[int],
    moving: list[int],
    standing: list[int],
) -> Stops:
    """Where a button's cap meets its box, and where drawer and window meet their frames."""
    data = mujoco.MjData(m)
    mujoco.mj_kinematics(m, data)
    slides = len(c.hinges.parent) + len(c.cube_dof)
    rows: list[tuple] = []
    for mine, others in ((caps, holders), (moving, standing)):
        for a in mine:
            slide = c.body_of[m.geom_bodyid[a]] - slides
            for b in others:
                for side, at in _ends(m, data, a, b, c.slides.axis[slide]):
                    weight = m.body_invweight0[m.geom_bodyid[[a, b]], 0].sum()
                    rows.append((slide, side, at, 4, weight, *_contact_parameters(m, a, b)[1:]))
    low, high = c.limits[len(c.hinges.parent) :].T
    near = [r for r in rows if low[r[0]] - 0.02 <= r[2] <= high[r[0]] + 0.02]
    first = {(r[0], r[1]): min((o[2] * -o[1], o[2]) for o in near if o[:2] == r[:2])[1] for r in near}
    kept = []
    for (slide, side), at in first.items():
        same = [r for r in near if r[:2] == (slide, side) and abs(r[2] - at) < 1e-4]
        kept.append((slide, side, at, sum(r[3] for r in same), *same[0][4:]))
    empty = np.zeros((0,)), np.zeros((0, 2)), np.zeros((0, 5))
    if not kept:
        return Stops(np.zeros(0, int), empty[0], empty[0], empty[0], empty[0], empty[1], empty[2])
    slide, side, at, count, weight, solref, solimp = (np.array(x) for x in zip(*kept, strict=True))
    return Stops(slide, side.astype(float), at, count.astype(float), weight, solref, solimp)


def _ends(
    m: mujoco.MjModel, data: mujoco.MjData, a: int, b: int, axis: np.ndarray
) -> list[tuple[int, float]]:
    """Joint positions at which geom a, carried along `axis`, meets geom b, if it is not beside it."""
    spans = []
    turn = np.stack([axis, *np.linalg.svd(axis[None])[2][1:]])
    for g in (a, b):
        half = m.geom_size[g].copy()
        if m.geom_type[g] == mujoco.mjtGeom.mjGEOM_CYLINDER:
            half = np.array([half[0], half[0], half[1]])
        center, reach = turn @ data.geom_xpos[g], np.abs(turn @ data.geom_xmat[g].reshape(3, 3)) @ half
        spans.append((center - reach, center + reach))
    (low_a, high_a), (low_b, high_b) = spans
    if np.any(np.minimum(high_a, high_b)[1:] - np.maximum(low_a, low_b)[1:] < 1e-3):
        return []
    if low_a[0] >= high_b[0] - 1e-3:
        return [(1, float(high_b[0] - low_a[0]))]
    if high_a[0] <= low_b[0] + 1e-3:
        return [(-1, float(low_b[0] - high_a[0]))]
    return []
