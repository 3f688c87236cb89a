"""Tests of contacts of walkers' balls and capsules against MuJoCo C on random pairs, and of MJX's errors."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco.mjx._src import collision_primitive
from mujoco.mjx._src import collision_types as mjx_types

from envs_mjx.engines.walker_mjx import sphere_capsule
from envs_mjx.engines.walker_mjx.contacts import frame_of
from tests.helpers.pytest_params import slow_except

pytestmark = pytest.mark.promotion

HALF = (2.0, 2.0, 1.0)
MARGIN = 0.02
UPRIGHT = np.array([1.0, 0, 0, 0])


@pytest.fixture(autouse=True, scope="module")
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def scene(first: str, second: str) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """Two geoms; the second moves freely."""
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><worldbody><geom {first} margin="{MARGIN / 2}"/>
        <body><freejoint/><geom {second} margin="{MARGIN / 2}" mass="1"/></body></worldbody></mujoco>"""
    )
    return model, mujoco.MjData(model)


def contacts_at(model: mujoco.MjModel, data: mujoco.MjData, pos: np.ndarray, quat: np.ndarray) -> list:
    """C's contacts: gap, position, frame."""
    data.qpos[:] = [*pos, *quat / np.linalg.norm(quat)]
    mujoco.mj_kinematics(model, data)
    mujoco.mj_collision(model, data)
    return [(c.dist, c.pos.copy(), c.frame.reshape(3, 3).copy()) for c in data.contact]


def same(found: sphere_capsule.WalkerContactPoints, row: int, expected: list) -> bool:
    """Returns whether the points of a row within the margin are C's, up to order and the normal's sign."""
    points = zip(
        *(np.atleast_1d(x[row]) for x in found[:1]), *(x[row].reshape(-1, 3) for x in found[1:]), strict=True
    )
    ours = [point for point in points if point[0] < MARGIN]
    return len(ours) == len(expected) and all(
        min(_apart(point, other) for point in ours) < 1e-6 for other in expected
    )


def _apart(ours: tuple, theirs: tuple) -> float:
    turned = min(np.abs(ours[2] - theirs[2][0]).max(), np.abs(ours[2] + theirs[2][0]).max())
    return max(abs(ours[0] - theirs[0]), np.abs(ours[1] - theirs[1]).max(), turned)


def near_box(rng: np.random.Generator) -> np.ndarray:
    """A point near a face, an edge or a corner of the box."""
    half = np.array(HALF)
    on = rng.uniform(-1.1, 1.1, 3).clip(-1, 1)
    on[rng.permutation(3)[: rng.integers(1, 4)]] = rng.choice([-1, 1])
    return on * half + rng.normal(size=3) * 0.12


@pytest.mark.parametrize("length", slow_except([0.14], [0.05, 0.14, 0.28]))
def test_a_capsule_at_a_wall_touches_where_it_does_in_c(length: float):
    rng, n = np.random.default_rng(0), 1500
    model, data = scene('type="box" size="2 2 1"', f'type="capsule" size="0.08 {length}"')
    centre, axis, expected = [], [], []
    for _ in range(n):
        pos, quat = near_box(rng), rng.normal(size=4) * rng.choice([1, 1e-3]) + UPRIGHT
        expected.append(contacts_at(model, data, pos, quat))
        centre.append(pos)
        axis.append(data.geom_xmat[1].reshape(3, 3)[:, 2] * length)
    assert sum(len(e) == 2 for e in expected) > 50 and sum(len(e) == 1 for e in expected) > 50
    find = jax.jit(jax.vmap(lambda c, a: sphere_capsule.capsule_wall(c, a, jnp.asarray(0.08), HALF)))
    found = jax.tree.map(np.asarray, find(jnp.array(centre), jnp.array(axis)))
    wrong = [row for row in range(n) if not same(found, row, expected[row])]
    assert len(wrong) <= 1  # a tie between two edges may be decided either way


@pytest.mark.parametrize("radius", [0.08, 0.7])
def test_a_ball_at_a_wall_touches_where_it_does_in_c(radius: float):
    rng, n = np.random.default_rng(1), 500
    model, data = scene('type="box" size="2 2 1"', f'type="sphere" size="{radius}"')
    centre = np.array([near_box(rng) for _ in range(n)])
    expected = [contacts_at(model, data, c, np.array([1.0, 0, 0, 0])) for c in centre]
    assert sum(len(e) for e in expected) > 50
    find = jax.vmap(lambda c: sphere_capsule.ball_wall(c, jnp.asarray(radius), HALF))
    found = jax.tree.map(np.asarray, find(jnp.asarray(centre)))
    assert all(same(found, row, expected[row]) for row in range(n))


def test_two_capsules_touch_where_they_do_in_c():
    """Draws half of them nearly parallel, as thighs are."""
    rng, n = np.random.default_rng(2), 500
    model, data = scene('type="capsule" size="0.1 0.3"', 'type="capsule" size="0.06 0.2"')
    centre, axis, expected = [], [], []
    for _ in range(n):
        pos, quat = rng.normal(size=3) * [0.1, 0.1, 0.3], rng.normal(size=4) * rng.choice([1, 3e-3])
        expected.append(contacts_at(model, data, pos, quat + UPRIGHT))
        centre.append(pos)
        axis.append(data.geom_xmat[1].reshape(3, 3)[:, 2] * 0.2)
    first, r = (jnp.zeros(3), jnp.array([0, 0, 0.3]), jnp.asarray(0.1)), jnp.asarray(0.06)
    find = jax.jit(jax.vmap(lambda c, a: sphere_capsule.capsule_capsule(*first, c, a, r)))
    found = jax.tree.map(np.asarray, find(jnp.array(centre), jnp.array(axis)))
    assert all(same(found, row, expected[row]) for row in range(n))


def test_floor_tangents_follow_the_capsules_axis_as_in_c():
    """Includes steep capsules, for which MJX takes another tangent: friction pyramids depend on it."""
    rng, n = np.random.default_rng(3), 200
    model, data = scene('type="plane" size="1 1 1"', 'type="capsule" size="0.08 0.2"')
    steep = 0
    for _ in range(n):
        quat = rng.normal(size=4) * rng.choice([1, 0.1]) + UPRIGHT
        data.qpos[:] = 0
        contacts_at(model, data, np.zeros(3), quat)
        mat = data.geom_xmat[1].reshape(3, 3).copy()
        low = 0.2 * abs(mat[2, 2]) + 0.075
        expected = contacts_at(model, data, np.array([0, 0, low]), quat)
        ours = np.asarray(frame_of(jnp.array([0.0, 0, 1]), jnp.asarray(mat[:, 2])))
        assert expected and all(np.abs(ours - e[2]).max() < 1e-9 for e in expected)
        if np.hypot(mat[0, 2], mat[1, 2]) < 0.5:
            steep += 1
            theirs = _mjx_frame(mat, low)
            assert np.abs(theirs[1] - expected[0][2][1]).max() > 1e-3, "mujoco-mjx has been corrected"
    assert steep > 30


def _mjx_frame(mat: np.ndarray, height: float) -> np.ndarray:
    pair = mjx_types.GeomInfo
    plane = pair(jnp.zeros(3), jnp.eye(3), jnp.ones(3))
    capsule = pair(jnp.array([0, 0, height]), jnp.asarray(mat), jnp.array([0.08, 0.2, 0]))
    cells = [cell.cell_contents for cell in collision_primitive.plane_capsule.__closure__]
    one_pair = next(c for c in cells if callable(c))  # the function that MJX's decorator wraps
    return np.asarray(one_pair(plane, capsule)[2][0])
