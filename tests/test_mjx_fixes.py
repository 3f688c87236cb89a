"""MJX-JAX with the four corrections against MuJoCo C, in float64; each correction matters.

If a test named `..._differs_without_...` fails after an upgrade of mujoco-mjx, upstream has fixed
that difference and the correction can go.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from mujoco.mjx._src import scan

from envs_mjx import mjx_fixes
from envs_mjx.mjx_fixes import ALL, Corrections, barriers, require_version, tree_mask
from mac.errors import UserError

NO_SATURATION = ALL._replace(saturated_actuators=False)
NO_CONNECT = ALL._replace(connect_acceleration=False)
NO_SPARSITY = ALL._replace(tree_sparsity=False)


class Substep(NamedTuple):
    """State and control before one C substep, and its results."""

    qpos: np.ndarray
    qvel: np.ndarray
    ctrl: np.ndarray
    warmstart: np.ndarray
    next_qvel: np.ndarray
    saturated: bool


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def gripper() -> mujoco.MjModel:
    """OGBench's Robotiq 2F-85 alone, without contacts: linkage, tendon actuator, implicitfast.

    The cone is pyramidal because MJX's elliptic solver needs at least one contact slot.
    """
    spec = importlib.util.find_spec("ogbench")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "manipspace" / "descriptions" / "robotiq_2f85"
    model = mujoco.MjModel.from_xml_path(str(folder / "2f85.xml"))
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    model.opt.cone = mujoco.mjtCone.mjCONE_PYRAMIDAL
    model.geom_contype[:] = model.geom_conaffinity[:] = 0
    model.opt.tolerance = 1e-14
    return model


@pytest.fixture(scope="module")
def substeps(gripper: mujoco.MjModel) -> list[Substep]:
    """Moments of random opening and closing in C, some with the actuator's force at its limit."""
    data, rng, found = mujoco.MjData(gripper), np.random.default_rng(0), []
    for _ in range(16):
        data.ctrl[:] = rng.uniform(0, 255)
        mujoco.mj_step(gripper, data, int(rng.integers(2, 25)))
        before = [x.copy() for x in (data.qpos, data.qvel, data.ctrl, data.qacc_warmstart)]
        mujoco.mj_step(gripper, data)
        saturated = bool(np.abs(data.actuator_force[0]) >= gripper.actuator_forcerange[0, 1])
        found.append(Substep(*before, data.qvel.copy(), saturated))
    assert {s.saturated for s in found} == {True, False}
    return found


@pytest.fixture(scope="module")
def velocity_errors(gripper: mujoco.MjModel, substeps: list[Substep]) -> dict[Corrections, np.ndarray]:
    """Largest error of qvel (rad/s) after each substep, with all corrections and without each."""
    put = mjx.put_model(gripper, impl="jax")

    def velocities(ons: tuple[Corrections, ...]) -> Callable[..., list[jax.Array]]:
        # corrections that act after the solver share one solve
        @jax.jit
        def run(qpos: jax.Array, qvel: jax.Array, ctrl: jax.Array, warmstart: jax.Array) -> list[jax.Array]:
            data = mjx.make_data(put).replace(qpos=qpos, qvel=qvel, ctrl=ctrl, qacc_warmstart=warmstart)
            data = mjx_fixes.forward(put, data, ons[0])
            return [mjx_fixes.implicitfast(put, data, on).qvel for on in ons]

        return run

    errors = {}
    for ons in ((ALL, NO_SATURATION, NO_SPARSITY), (NO_CONNECT,)):
        run = velocities(ons)
        found = [[np.abs(v - s.next_qvel).max() for v in run(*map(jnp.asarray, s[:4]))] for s in substeps]
        errors.update(zip(ons, np.array(found).T, strict=True))
    return errors


def test_a_substep_of_the_gripper_equals_c(velocity_errors: dict[Corrections, np.ndarray]):
    assert velocity_errors[ALL].max() < 1e-10


def test_a_substep_differs_without_leaving_out_saturated_actuators(
    velocity_errors: dict[Corrections, np.ndarray], substeps: list[Substep]
):
    saturated = np.array([s.saturated for s in substeps])
    assert velocity_errors[NO_SATURATION][saturated].min() > 1e-4
    assert velocity_errors[NO_SATURATION][~saturated].max() < 1e-10


def test_a_substep_differs_without_the_acceleration_of_connect_anchors(
    velocity_errors: dict[Corrections, np.ndarray],
):
    assert np.median(velocity_errors[NO_CONNECT]) > 1e-5


def test_a_substep_differs_without_the_tree_sparsity_of_the_derivative(
    velocity_errors: dict[Corrections, np.ndarray], substeps: list[Substep]
):
    unsaturated = ~np.array([s.saturated for s in substeps])  # a saturated tendon couples nothing
    assert np.median(velocity_errors[NO_SPARSITY][unsaturated]) > 1e-4


CAPSULE = """<mujoco><option cone="pyramidal" tolerance="1e-14"/><worldbody>
<geom type="plane" size="5 5 .1" quat="0.999 0.02 0.03 0"/>
<body pos="0 0 .3"><freejoint/><geom type="capsule" size=".05 .2"/></body></worldbody></mujoco>"""


@pytest.fixture(scope="module")
def capsules() -> tuple[mujoco.MjModel, list[mujoco.MjData]]:
    """A capsule leaning by 8 to 17 degrees, sliding on one end with 1 mm of penetration."""
    model, states = mujoco.MjModel.from_xml_string(CAPSULE), []
    for tilt in ((0.052, 0.07, 0.0), (0.1, 0.1, 0.04), (0.1, -0.06, 0.0)):
        data = mujoco.MjData(model)
        data.qpos[3:] = 1, *tilt
        mujoco.mju_normalize4(data.qpos[3:])
        data.qvel[:] = 3, -2, 0, 0.2, 0.4, -0.3
        mujoco.mj_kinematics(model, data)
        gap = mujoco.mj_geomDistance(model, data, 0, 1, 10, None)
        data.qpos[2] -= gap + 0.001
        mujoco.mj_forward(model, data)
        assert data.ncon == 1
        states.append(data)
    return model, states


@pytest.mark.parametrize("aligned", [True, False])
def test_a_leaning_capsule_slides_as_in_c_only_with_its_contact_frame_aligned(
    capsules: tuple[mujoco.MjModel, list[mujoco.MjData]], aligned: bool
):
    model, states = capsules
    put = mjx.put_model(model, impl="jax")

    @jax.jit
    def acceleration(qpos: jax.Array, qvel: jax.Array) -> jax.Array:
        data = mjx.make_data(put).replace(qpos=qpos, qvel=qvel)
        return mjx_fixes.forward(put, data, ALL._replace(capsule_frames=aligned)).qacc

    errors = [np.abs(acceleration(jnp.array(d.qpos), jnp.array(d.qvel)) - d.qacc).max() for d in states]
    assert max(errors) < 1e-7 if aligned else min(errors) > 1e-2


def test_a_capsule_exactly_upright_has_an_orthonormal_contact_frame():
    frame = np.asarray(mjx_fixes._capsule_frame(jnp.array([0.0, 0, 1]), jnp.array([0.0, 0, 1])))
    np.testing.assert_allclose(frame, [[0, 0, 1], [0, 1, 0], [-1, 0, 0]], atol=1e-15)


def test_tree_mask_couples_a_dof_with_its_ancestors_only():
    #   0 - 1 - 2     3 is alone
    #    \- 4
    expected = [[1, 1, 1, 0, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]
    np.testing.assert_array_equal(tree_mask(np.array([-1, 0, 1, -1, 0])), np.array(expected, bool))


def test_barriers_end_every_level_of_the_tree_and_change_no_number(gripper: mujoco.MjModel):
    put = mjx.put_model(gripper, impl="jax")
    qpos = jnp.linspace(0, 0.4, gripper.nq)

    def poses(qpos: jax.Array) -> jax.Array:
        return mjx.kinematics(put, mjx.make_data(put).replace(qpos=qpos)).xpos

    plain = jax.jit(poses).trace(qpos)
    with barriers():
        ended = jax.jit(lambda q: poses(q)).trace(qpos)
    assert "optimization_barrier" not in str(plain.jaxpr)
    assert str(ended.jaxpr).count("optimization_barrier") >= 5  # as many as the linkage is deep
    results = [traced.lower().compile()(qpos) for traced in (plain, ended)]
    np.testing.assert_allclose(*results, rtol=0, atol=1e-15)


def test_barriers_restore_mjx_even_after_an_error():
    original = scan.body_tree
    with pytest.raises(RuntimeError), barriers():
        assert scan.body_tree is not original
        raise RuntimeError
    assert scan.body_tree is original


def test_another_version_of_mjx_is_refused():
    require_version()
    with pytest.raises(UserError, match=r"mujoco-mjx 3\.17\.0 but 3\.18\.1"):
        require_version("3.18.1")
