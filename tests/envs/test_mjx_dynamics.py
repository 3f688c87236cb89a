"""Tests of kinematics, inertia, forces and contact rows of engine `mjx` against MuJoCo C, in float64."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from envs_mjx.engines.tabletop_mjx import dynamics
from envs_mjx.engines.tabletop_mjx import model as mjx_model
from envs_mjx.engines.tabletop_mjx.collision import collision_model
from envs_mjx.engines.tabletop_mjx.collision import detection as mjx_contacts
from envs_mjx.engines.tabletop_mjx.collision.detection import TabletopContactCapacity
from envs_mjx.manipulation.scenes import FREE_DAMPING, LOCKED_DAMPING, Scene, build_scene
from mac.errors import UserError
from tests.helpers.pytest_params import slow_except

pytestmark = pytest.mark.promotion

FAMILIES = ("cube-double", "scene")
LANES = 6


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Case(NamedTuple):
    """Random states of a scene, one a lane: `MjData` of C after `mj_forward`, and ours."""

    scene: Scene
    constants: mjx_model.SceneConstants
    datas: list[mujoco.MjData]
    at: dynamics.Poses
    smooth: dynamics.SmoothDynamics
    model: collision_model.CollisionModel
    contacts: mjx_contacts.Contacts


def contacts_of(
    model: collision_model.CollisionModel, slots: TabletopContactCapacity, at: dynamics.Poses
) -> mjx_contacts.Contacts:
    return jax.jit(lambda at: mjx_contacts.detect_contacts(model, slots, at))(at)


@pytest.fixture(scope="module", params=slow_except(["cube-double"], FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    scene, rng = build_scene(request.param), np.random.default_rng(0)
    m, c = scene.model, mjx_model.read_constants(scene)
    damping = m.dof_damping.copy()
    damping[scene.slide_dof] = [LOCKED_DAMPING, FREE_DAMPING][: scene.slides]
    datas = []
    for _ in range(LANES):
        d = mujoco.MjData(m)
        d.qpos[:] = m.qpos0
        d.qpos[scene.arm_qpos] = rng.uniform(-2, 2, 6)
        d.qpos[6:14] += rng.uniform(0, 0.3, 8)
        for k in scene.cube_qpos:
            d.qpos[k : k + 7] += rng.normal(size=7) * 0.3
        d.qpos[scene.button_qpos] -= rng.uniform(0, 0.02, scene.buttons)
        d.qvel[:] = rng.normal(size=m.nv)
        d.ctrl[:] = rng.uniform(-1, 1, m.nu) * 3
        d.ctrl[-1] = rng.uniform(0, 255)
        m.dof_damping[:], old = damping, m.dof_damping.copy()
        mujoco.mj_forward(m, d)
        m.dof_damping[:] = old
        datas.append(d)
    qpos, qvel, ctrl = (
        jnp.asarray(np.stack([getattr(d, f) for d in datas], -1)) for f in ("qpos", "qvel", "ctrl")
    )
    at = jax.jit(lambda q: dynamics.poses(c, q))(qpos)
    lanes = jnp.asarray(np.tile(damping[:, None], LANES))
    smooth = jax.jit(lambda *x: dynamics.smooth_dynamics(c, *x))(at, qpos, qvel, ctrl, lanes)
    model = collision_model.collision_model(scene, c)
    return Case(
        scene, c, datas, at, smooth, model, contacts_of(model, TabletopContactCapacity(40, 20, 200), at)
    )


def test_sites_are_where_they_are_in_c(case: Case):
    found = dynamics.attached_poses(case.constants.sites, case.at)
    for i, d in enumerate(case.datas):
        np.testing.assert_allclose(found.pos[..., i], d.site_xpos[case.scene.sites], atol=1e-12)
        mats = d.site_xmat[case.scene.sites].reshape(-1, 3, 3)
        np.testing.assert_allclose(found.mat[..., i], mats, atol=1e-12)


def test_mass_matrix_and_smooth_forces_are_those_of_c(case: Case):
    hinges = len(case.constants.hinges.parent)
    for i, d in enumerate(case.datas):
        dense = np.empty((case.constants.nv, case.constants.nv))
        mujoco.mj_fullM(case.scene.model, d, dense)
        ours = np.diag(case.constants.fixed_mass)
        ours[:hinges, :hinges] = case.smooth.hinge_mass[..., i]
        np.testing.assert_allclose(ours, dense, atol=1e-12)
        np.testing.assert_allclose(case.smooth.force[:, i], d.qfrc_smooth, rtol=1e-10, atol=1e-9)


def test_derivatives_by_velocity_are_those_that_c_keeps(case: Case):
    """Checks that a saturated actuator has none, and neither does the pair of drivers, which one tendon
    pulls."""
    m = case.scene.model
    saturated = []
    for i, d in enumerate(case.datas):
        expected = np.full(m.nv, 0.0)
        for u in range(m.nu):
            low, high = m.actuator_forcerange[u]
            inside = low < d.actuator_force[u] < high
            saturated.append(not inside)
            moment = np.zeros(m.nv)
            mujoco.mju_sparse2dense(
                moment[None],
                d.actuator_moment,
                d.moment_rownnz[u : u + 1],
                d.moment_rowadr[u : u + 1],
                d.moment_colind,
            )
            expected -= inside * m.actuator_biasprm[u, 2] * moment**2
        ours = np.asarray(case.smooth.slope[:, i])
        damping = m.dof_damping.copy()
        damping[case.scene.slide_dof] = [LOCKED_DAMPING, FREE_DAMPING][: case.scene.slides]
        np.testing.assert_allclose(ours, expected + damping, rtol=1e-12)
    assert {True, False} <= set(saturated)


def test_contacts_have_the_rows_of_c(case: Case):
    """Compares contacts of boxes and planes: Jacobian, reference acceleration and weight, row by row."""
    m, contacts = case.scene.model, case.contacts
    table = mjx_contacts.pair_table(case.model, m.opt.timestep)
    qvel = jnp.asarray(np.stack([d.qvel for d in case.datas], -1))
    rows = mjx_contacts.cone_rows(table, contacts, case.smooth.motions, qvel)
    compared = 0
    for i, d in enumerate(case.datas):
        assert not mujoco.mj_isSparse(m)
        dense = d.efc_J.reshape(d.nefc, m.nv)
        for con in d.contact:
            off = np.abs(np.asarray(contacts.pos[..., i]) - con.pos).max(1)
            off += np.abs(np.asarray(contacts.normal[..., i]) - con.frame[:3]).max(1)
            off += np.abs(np.asarray(rows.friction[:, i]) - con.friction[0])  # the two pads share an edge
            off += np.asarray(contacts.dist[:, i] >= 0)
            k = int(np.argmin(off))
            if off[k] > 1e-7:
                continue  # one that a link or the arm has in C
            at = slice(con.efc_address, con.efc_address + 3)
            np.testing.assert_allclose(rows.jacobian[:, k, :, i], dense[at], atol=1e-9)
            np.testing.assert_allclose(rows.aref[:, k, i], d.efc_aref[at], rtol=1e-7, atol=1e-6)
            np.testing.assert_allclose(rows.weight[k, i], d.efc_D[con.efc_address], rtol=1e-7)
            compared += 1
    assert compared >= 1


def test_the_broad_phase_misses_no_contact(case: Case):
    """Checks that narrow phases of the nearest 40 pairs and of three times as many find the same contacts."""
    more = contacts_of(case.model, TabletopContactCapacity(120, 60, 200), case.at)
    assert not np.asarray(case.contacts.dropped).any()
    depths = (np.sort(np.minimum(x.dist, 0), axis=0)[:60] for x in (case.contacts, more))
    np.testing.assert_allclose(*depths, atol=1e-12)


def test_points_dropped_by_a_full_buffer_are_counted(case: Case):
    used = np.asarray(case.contacts.dist < 0).sum(axis=0)
    few = contacts_of(case.model, TabletopContactCapacity(40, 20, 2), case.at)
    np.testing.assert_array_equal(few.dropped, np.maximum(used - 2, 0))
    assert used.max() > 2


def test_slides_stop_where_furniture_meets():
    scene = build_scene("scene")
    stops = collision_model.collision_model(scene, mjx_model.read_constants(scene)).stops
    ends = {(int(s), int(e)): (float(a), int(n)) for s, e, a, n in zip(*stops[:4], strict=True)}
    # buttons 0 and 1: the cap comes down on four boxes with four points each
    assert ends[0, 1] == (pytest.approx(-0.0272, abs=1e-4), 16) and ends[1, 1][1] == 16
    assert ends[2, -1][0] == pytest.approx(0.004, abs=1e-4)  # the drawer's back


def test_other_models_are_refused():
    scene = build_scene("cube-single")
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><joint type='ball'/><geom size='1'/></body></worldbody></mujoco>"
    )
    with pytest.raises(UserError, match="engine c"):
        mjx_model.read_constants(dataclasses.replace(scene, model=model))
