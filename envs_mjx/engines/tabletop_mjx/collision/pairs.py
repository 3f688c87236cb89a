"""Pairs of solids that may touch, with their contact parameters, and the end stops of slides."""

from typing import NamedTuple

import mujoco
import numpy as np

from envs_mjx.engines.tabletop_mjx.model import SceneConstants
from envs_mjx.engines.tabletop_mjx.welded_bodies import AttachedFrames
from envs_mjx.manipulation.scenes import Scene


class TabletopSolids(NamedTuple):
    """Boxes or capsules: frames in moving bodies, half sides (capsule: 0, 0, half length) and radius.

    `geom` is the geom whose friction and solver parameters each has.
    """

    frames: AttachedFrames
    half: np.ndarray
    radius: np.ndarray
    geom: np.ndarray


class TabletopPairs(NamedTuple):
    """Contact parameters of pairs of solids, one row per pair.

    Attributes:
        signs: float[P, nv], +1 where a dof moves the second solid only, -1 the first only, else 0.
        sensor_sign: +1 or -1 where the second or first solid belongs to the sensing pad, else 0.
        friction, invweight: coefficient of sliding, sum of the bodies' inverse weights.
        solref, solimp: float[P, 2] and [P, 5].
    """

    signs: np.ndarray
    sensor_sign: np.ndarray
    friction: np.ndarray
    invweight: np.ndarray
    solref: np.ndarray
    solimp: np.ndarray


class SlideStops(NamedTuple):
    """Ends of slides where furniture meets furniture: `count` contacts at one joint position each.

    `side` is +1 for a stop at the lower end and -1 at the upper.
    """

    slide: np.ndarray
    side: np.ndarray
    at: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]
    invweight: np.ndarray
    solref: np.ndarray
    solimp: np.ndarray


def cartesian_pairs(products: tuple[tuple[int, int, int, int], ...]) -> np.ndarray:
    """Returns int[P, 2], the pairs of solids of all Cartesian products, in the order of their broadcast
    differences."""
    runs = [
        np.stack(np.meshgrid(np.arange(a, b), np.arange(c, d), indexing="ij"), -1) for a, b, c, d in products
    ]
    return np.concatenate([r.reshape(-1, 2) for r in runs]) if runs else np.zeros((0, 2), int)


def pairs_of(
    scene: Scene,
    constants: SceneConstants,
    boxes: TabletopSolids,
    capsules: TabletopSolids,
    on_floor: int,
    box_products: tuple[tuple[int, int, int, int], ...],
    capsule_products: tuple[tuple[int, int, int, int], ...],
) -> TabletopPairs:
    m = scene.model
    floor = int(np.flatnonzero(m.geom_type == mujoco.mjtGeom.mjGEOM_PLANE)[0])
    with_boxes, with_capsules = cartesian_pairs(box_products), cartesian_pairs(capsule_products)
    geoms = [np.stack([np.full(on_floor, floor), boxes.geom[:on_floor]], 1), boxes.geom[with_boxes]]
    geoms += [np.stack([capsules.geom[with_capsules[:, 0]], boxes.geom[with_capsules[:, 1]]], 1)]
    pairs = np.concatenate(geoms)
    bodies = m.geom_bodyid[pairs]
    moved = _moved(constants)[constants.body_of[bodies]]
    rows = [_contact_parameters(m, a, b) for a, b in pairs.tolist()]
    friction, solref, solimp = (np.array([r[k] for r in rows]) for k in range(3))
    sensor_sign = (bodies == scene.pad_body).astype(float)
    return TabletopPairs(
        signs=moved[:, 1] - moved[:, 0],
        sensor_sign=sensor_sign[:, 1] - sensor_sign[:, 0],
        friction=friction,
        invweight=m.body_invweight0[bodies, 0].sum(1),
        solref=solref,
        solimp=solimp,
    )


def _moved(c: SceneConstants) -> np.ndarray:
    """Returns float[moving bodies + 1, nv]: 1 for dofs that move a body; the last row is the world's."""
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


def stops_of(
    m: mujoco.MjModel,
    c: SceneConstants,
    caps: list[int],
    holders: list[int],
    moving: list[int],
    standing: list[int],
) -> SlideStops:
    """Finds the end stops: a button's cap at its box, drawer and window at their frames."""
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
        return SlideStops(np.zeros(0, int), empty[0], empty[0], empty[0], empty[0], empty[1], empty[2])
    slide, side, at, count, weight, solref, solimp = (np.array(x) for x in zip(*kept, strict=True))
    return SlideStops(slide, side.astype(float), at, count.astype(float), weight, solref, solimp)


def _ends(
    m: mujoco.MjModel, data: mujoco.MjData, a: int, b: int, axis: np.ndarray
) -> list[tuple[int, float]]:
    """Returns joint positions at which geom a, moved along `axis`, meets geom b, if it does."""
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
