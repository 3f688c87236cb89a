"""Tests of the narrow phase of engine `mjx` against MuJoCo C, on random pairs that touch, in float64."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from envs_mjx.engines.tabletop_mjx.collision import box_box, box_button_cap, box_capsule
from envs_mjx.engines.tabletop_mjx.collision.box_box import OrientedBoxes, TabletopContactPoints

pytestmark = pytest.mark.promotion

COUNT = 400


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def pair(first: str, second: str) -> mujoco.MjModel:
    body = "<body><freejoint/><geom {} mass='1'/></body>"
    bodies = body.format(first) + body.format(second)
    return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{bodies}</worldbody></mujoco>")


BOXES = pair("type='box' size='.02 .03 .01'", "type='box' size='.02 .02 .025'")
HANDLE = pair("type='capsule' size='.009 .05'", "type='box' size='.011 .004 .0094'")


def turned(rng: np.random.Generator, quat: np.ndarray, by: float) -> np.ndarray:
    """`quat` turned by a multiple of 90 degrees about one of its axes and then a little at random."""
    quarter = np.eye(4)[0] + np.eye(4)[rng.integers(4)]
    result = np.empty(4)
    mujoco.mju_mulQuat(result, quat, quarter / np.linalg.norm(quarter) + by * rng.normal(size=4))
    return result / np.linalg.norm(result)


def touching(model: mujoco.MjModel, aligned: bool, offset: float = 0.0) -> list[mujoco.MjData]:
    """Pairs that penetrate by 0.2 to 4 mm along a random direction, nearly parallel or at random.

    `offset`: how far the second may lie from the middle of the first, along the first's z axis.
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        data = mujoco.MjData(model)
        quat = rng.normal(size=4)
        data.qpos[3:7] = quat / np.linalg.norm(quat)
        other = rng.normal(size=4)
        data.qpos[10:14] = turned(rng, data.qpos[3:7], 0.005) if aligned else other / np.linalg.norm(other)
        mujoco.mj_kinematics(model, data)
        axis = data.geom_xmat[0].reshape(3, 3)
        away = axis @ (rng.normal(size=3) * (1, 1, 0 if offset else 1))
        base = axis[:, 2] * rng.uniform(-offset, offset)
        away /= np.linalg.norm(away)
        low, high = 0.0, 0.2
        for _ in range(40):
            data.qpos[7:10] = base + away * (low + high) / 2
            mujoco.mj_kinematics(model, data)
            apart = mujoco.mj_geomDistance(model, data, 0, 1, 1, None) > 1e-9
            low, high = (low, (low + high) / 2) if apart else ((low + high) / 2, high)
        data.qpos[7:10] = base + away * (low - rng.choice([2e-4, 1e-3, 4e-3] if not offset else [2e-4, 1e-3]))
        mujoco.mj_forward(model, data)
        found.append(data)
    return found


PAD, CAP = np.array([0.011, 0.004, 0.0094]), np.array([0.0172, 0.0044])  # m; as in the puzzles
PRESS = pair("type='box' size='.011 .004 .0094'", "type='cylinder' size='.0172 .0044'")


def pressing(aside: float) -> list[mujoco.MjData]:
    """Draws pads, tilted by up to 8 degrees, whose lowest corner is 0.03 to 1 mm below the face of a cap.
    Their middle is at most `aside` away from the cap's.
    """
    rng, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        data, tilt, quats = mujoco.MjData(PRESS), rng.uniform(0, 2 * np.pi), rng.normal(size=(3, 4))
        mujoco.mju_normalize4(quats[0])
        mujoco.mju_axisAngle2Quat(quats[1], np.array([0, 0, 1.0]), rng.uniform(-np.pi, np.pi))
        axis = np.array([np.cos(tilt), np.sin(tilt), 0])
        # Not within 1e-3 rad of 5.1 degrees, where C changes the normal, nor of 0, where corners tie.
        angle = rng.choice([rng.uniform(0.002, 0.088), rng.uniform(0.09, 0.14)])
        mujoco.mju_axisAngle2Quat(quats[2], axis, angle + rng.choice([0, np.pi]))
        data.qpos[10:14] = quats[0]
        turn = np.empty(4)
        mujoco.mju_mulQuat(turn, quats[1], quats[2])
        mujoco.mju_mulQuat(data.qpos[3:7], quats[0], turn)
        mujoco.mj_kinematics(PRESS, data)
        cap, pad = (data.geom_xmat[g].reshape(3, 3) for g in (1, 0))
        reach = np.abs(cap[:, 2] @ pad) @ PAD
        center = [
            *rng.uniform(-aside, aside, 2) / np.sqrt(2),
            CAP[1] + reach - rng.choice([3e-5, 2e-4, 1e-3]),
        ]
        data.qpos[:3] = cap @ center
        mujoco.mj_forward(PRESS, data)
        found.append(data)
    return found


def solid(datas: list[mujoco.MjData], geom: int, half: np.ndarray) -> OrientedBoxes:
    pos = np.array([d.geom_xpos[geom] for d in datas])
    mat = np.array([d.geom_xmat[geom].reshape(3, 3) for d in datas])
    return OrientedBoxes(
        tuple(jnp.asarray(pos[None, :, r]) for r in range(3)),
        tuple(tuple(jnp.asarray(mat[None, :, r, c]) for c in range(3)) for r in range(3)),
        tuple(jnp.full((1, len(datas)), h) for h in half),
    )


def share_that_agrees(touch: TabletopContactPoints, datas: list[mujoco.MjData], tolerance: float) -> float:
    """Returns the share of pairs whose contacts are C's, one for one, in depth (m), position (m) and
    normal."""
    dist, pos, normal = (np.asarray(x) for x in touch)
    good = 0
    for i, data in enumerate(datas):
        mine = [
            (dist[p, 0, i], *pos[p, :, 0, i], *normal[p, :, 0, i])
            for p in range(len(dist))
            if dist[p, 0, i] < 0
        ]
        theirs = [(c.dist, *c.pos, *np.sign(c.geom[1] - c.geom[0]) * c.frame[:3]) for c in data.contact]
        if len(mine) == len(theirs):
            gaps = [min(np.abs(np.subtract(a, b)).max() for b in theirs) for a in mine]
            good += max(gaps, default=0) < tolerance
    return good / len(datas)


@pytest.mark.parametrize("aligned", [True, False])
def test_boxes_touch_where_they_do_in_c(aligned: bool):
    datas = touching(BOXES, aligned)
    assert not aligned or {d.ncon for d in datas} >= {1, 2, 4, 5}
    boxes = [solid(datas, g, BOXES.geom_size[g]) for g in (0, 1)]
    touch = jax.jit(box_box.box_box)(*boxes)
    # the rest choose another of two axes that are equally good
    assert share_that_agrees(touch, datas, 1e-8) > 0.98


def test_boxes_that_are_apart_have_no_contact():
    datas = touching(BOXES, False)
    for data in datas:
        data.qpos[7:10] *= 1.2
        mujoco.mj_forward(BOXES, data)
    datas = [d for d in datas if mujoco.mj_geomDistance(BOXES, d, 0, 1, 1, None) > 1e-6]
    assert len(datas) > COUNT / 2
    touch = jax.jit(box_box.box_box)(*(solid(datas, g, BOXES.geom_size[g]) for g in (0, 1)))
    assert not (np.asarray(touch.dist) < 0).any()


def test_a_finger_meets_a_handle_where_it_does_in_c():
    datas = touching(HANDLE, True, offset=0.06)
    assert {d.ncon for d in datas} == {1, 2}
    capsule, radius = solid(datas, 0, np.array([0, 0, 0.05])), jnp.full((1, COUNT), 0.009)
    touch = jax.jit(box_capsule.capsule_box)(capsule, radius, solid(datas, 1, HANDLE.geom_size[1]))
    # the second point is off by up to 0.2 mm along the handle
    assert share_that_agrees(touch, datas, 1e-3) > 0.8
    first = np.array([min(c.dist for c in d.contact) for d in datas])
    assert (np.abs(np.asarray(touch.dist).min(0)[0] - first) < 1e-7).mean() > 0.95


@pytest.mark.parametrize(("aside", "share"), [(0.005, 0.97), (0.012, 0.8)])
def test_a_pad_meets_a_cap_where_it_does_in_c(aside: float, share: float):
    datas = pressing(aside)
    assert {d.ncon for d in datas} >= {1, 2, 3, 4}
    half = np.array([*(2 * [CAP[0] * box_button_cap.SIDE_OF_RADIUS]), CAP[1]])
    touch = jax.jit(box_button_cap.pad_cap)(solid(datas, 0, PAD), solid(datas, 1, half))
    # the rest have a corner beyond the rim, where C may make other contacts on the rim
    assert share_that_agrees(touch, datas, 1e-7) > share


def test_boxes_meet_the_floor_at_their_lower_corners():
    box = "<body><freejoint/><geom type='box' size='.02 .03 .01'/></body>"
    spec = f"<mujoco><worldbody><geom type='plane' size='1 1 1'/>{box}</worldbody></mujoco>"
    model, rng, datas = mujoco.MjModel.from_xml_string(spec), np.random.default_rng(1), []
    for i in range(100):
        data = mujoco.MjData(model)
        quat = np.eye(4)[0] + (0.02 if i % 2 else 1) * rng.normal(size=4)
        data.qpos[3:7] = quat / np.linalg.norm(quat)
        data.qpos[2] = rng.uniform(0.005, 0.02)
        mujoco.mj_forward(model, data)
        datas.append(data)
    assert {d.ncon for d in datas} >= {0, 4}
    touch = jax.jit(box_box.floor_box)(solid(datas, 1, model.geom_size[1]))
    assert share_that_agrees(touch, datas, 1e-9) == 1
