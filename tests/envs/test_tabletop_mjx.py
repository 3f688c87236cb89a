"""Tests of engine `mjx` against MuJoCo C on recorded control steps of OGBench's experts, and of its
contract."""

import time
from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ogbench")

from envs_mjx.engines.base import TabletopPhysics
from envs_mjx.engines.tabletop_mjx.collision.detection import TabletopContactCapacity
from envs_mjx.engines.tabletop_mjx.engine import SLOTS, MjxEngine, over_batches
from envs_mjx.manipulation.scenes import FAMILIES, build_scene
from mac.errors import UserError
from tests.helpers.mujoco_control_steps import Moments, chosen, errors_of, physics_of, record
from tests.helpers.pytest_params import slow_except

BATCH = 32
QUICK = ("cube-single",)


pytestmark = pytest.mark.promotion


@pytest.fixture(scope="module")
def engines() -> Callable[[str], MjxEngine]:
    made: dict[str, MjxEngine] = {}

    def engine(family: str) -> MjxEngine:
        if family not in made:
            made[family] = MjxEngine(build_scene(family))
        return made[family]

    return engine


@pytest.fixture(scope="module")
def moments() -> Callable[[str], Moments]:
    made: dict[str, Moments] = {}

    def of(family: str) -> Moments:
        if family not in made:
            every = record(build_scene(family))
            made[family] = chosen(every, np.linspace(0, len(every.qpos) - 1, BATCH).astype(int))
        return made[family]

    return of


@eqx.filter_jit
def step(engine: MjxEngine, physics: TabletopPhysics, ctrl: jax.Array, active: jax.Array) -> TabletopPhysics:
    return jax.vmap(engine.step)(physics, ctrl, active)


@pytest.mark.parametrize("family", slow_except(QUICK, FAMILIES))
def test_one_control_step_equals_that_of_c(
    family: str, engines: Callable[[str], MjxEngine], moments: Callable[[str], Moments]
):
    scene, engine, some = build_scene(family), engines(family), moments(family)
    assert (np.abs(some.next_touch).max(1) > 1).any()
    start = physics_of(engine, some)
    active = np.arange(BATCH) % 8 != 0
    after = step(engine, start, jnp.asarray(some.ctrl, jnp.float32), jnp.asarray(active))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[~active], np.asarray(old)[~active])  # bit for bit
    assert not np.asarray(after.dropped).any()
    on = np.flatnonzero(active & ~some.links)
    assert len(on) >= BATCH / 2
    errors = errors_of(scene, jax.tree.map(lambda x: x[on], after), chosen(some, on))
    assert np.median(errors.arm) < 2e-6 and np.percentile(errors.arm, 90) < 1e-5  # rad
    assert np.median(errors.gripper) < 2e-6 and np.percentile(errors.gripper, 90) < 1e-3  # rad
    assert np.median(errors.objects) < 1e-6 and errors.objects.max() < 1e-3  # m and quaternion
    assert np.median(errors.pinch) < 1e-6 and np.percentile(errors.pinch, 90) < 1e-5  # m
    assert np.median(errors.contact) < 1e-4 and np.percentile(errors.contact, 90) < 0.02


@pytest.mark.slow
def test_links_that_touch_move_about_as_in_c(
    engines: Callable[[str], MjxEngine], moments: Callable[[str], Moments]
):
    """Checks steps in which the expert's gripper scrapes along the drawer."""
    scene, some = build_scene("scene"), moments("scene")
    start = physics_of(engines("scene"), some)
    after = step(engines("scene"), start, jnp.asarray(some.ctrl, jnp.float32), jnp.ones(BATCH, bool))
    on = np.flatnonzero(some.links)
    assert len(on) >= 3
    errors = errors_of(scene, jax.tree.map(lambda x: x[on], after), chosen(some, on))
    assert np.median(errors.arm) < 5e-3 and errors.arm.max() < 5e-2  # rad
    assert errors.objects.max() < 1e-3  # m


def test_a_function_of_batches_is_called_once_whatever_the_vmaps():
    calls = []

    def function(x: jax.Array, y: jax.Array, empty: jax.Array) -> tuple[jax.Array, jax.Array]:
        calls.append(x.shape)
        return x * y, empty

    single = over_batches(function)
    x, y, empty = jnp.arange(24.0).reshape(2, 4, 3), jnp.arange(4.0).reshape(4, 1), jnp.zeros((2, 4, 0))
    nested = jax.vmap(jax.vmap(single), in_axes=(0, None, 0))
    product, nothing = jax.jit(nested)(x, y, empty)
    np.testing.assert_array_equal(product, x * y)
    assert nothing.shape == (2, 4, 0) and calls[-1] == (3, 8)  # before: abstract traces of each level
    np.testing.assert_array_equal(single(x[0, 1], y[1], empty[0, 1])[0], x[0, 1] * y[1])
    shared = jax.vmap(single, in_axes=(None, 0, 0))(x[0, 1], y, empty[0])[0]
    np.testing.assert_array_equal(shared, x[0, 1] * y)


@pytest.mark.slow
def test_any_nesting_of_vmaps_and_none_give_the_same_step(
    engines: Callable[[str], MjxEngine], moments: Callable[[str], Moments]
):
    engine, some = engines("cube-single"), chosen(moments("cube-single"), np.arange(0, BATCH, 8))
    start, ctrl = physics_of(engine, some), jnp.asarray(some.ctrl, jnp.float32)
    on = jnp.ones(4, bool)
    flat = jax.jit(jax.vmap(engine.step))(start, ctrl, on)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (start, ctrl, on))
    nested = jax.jit(jax.vmap(jax.vmap(engine.step)))(*halves)
    shared = jax.jit(jax.vmap(engine.step, in_axes=(0, None, None)))(start, ctrl[1], on[1])
    alone = jax.jit(engine.step)(jax.tree.map(lambda x: x[1], start), ctrl[1], on[1])
    np.testing.assert_allclose(nested.qpos.reshape(flat.qpos.shape), flat.qpos, atol=1e-5)
    np.testing.assert_allclose(alone.qpos, flat.qpos[1], atol=1e-5)
    np.testing.assert_allclose(shared.qpos[1], flat.qpos[1], atol=1e-5)


@pytest.mark.slow
def test_a_locked_drawer_stays_where_a_free_one_moves(engines: Callable[[str], MjxEngine]):
    engine, scene = engines("scene"), build_scene("scene")
    qvel = jnp.zeros((BATCH, scene.model.nv)).at[:, scene.slide_dof[0]].set(-0.2)
    qpos = jnp.tile(jnp.asarray(scene.model.qpos0, jnp.float32), (BATCH, 1))
    qpos = qpos.at[:, scene.slide_qpos[0]].set(-0.05)
    start = jax.vmap(engine.load)(qpos, qvel)
    locked = jnp.zeros((BATCH, 2), bool).at[0, 0].set(True)
    start = eqx.tree_at(lambda p: p.locked, start, locked)
    after = step(engine, start, jnp.zeros((BATCH, scene.model.nu)), jnp.ones(BATCH, bool))
    moved = np.asarray(after.qpos - qpos)[:, scene.slide_qpos[0]]
    assert abs(moved[0]) < 1e-5 and moved[1:].max() < -1e-3  # m


def test_a_loaded_scene_has_fresh_poses_and_zero_forces(
    engines: Callable[[str], MjxEngine], moments: Callable[[str], Moments]
):
    import mujoco

    scene, some = build_scene("scene"), chosen(moments("scene"), np.arange(0, BATCH, 8))
    start = physics_of(engines("scene"), some)
    for row, qpos in enumerate(some.qpos):
        data = mujoco.MjData(scene.model)
        data.qpos[:] = qpos
        mujoco.mj_kinematics(scene.model, data)
        np.testing.assert_allclose(start.site_pos[row], data.site_xpos[scene.sites], atol=2e-6)
        mats = data.site_xmat[scene.sites].reshape(-1, 3, 3)
        np.testing.assert_allclose(start.site_mat[row], mats, atol=2e-6)
    assert not np.asarray(start.touch).any() and not np.asarray(start.dropped).any()


@pytest.mark.slow
def test_contacts_dropped_by_a_full_buffer_are_counted():
    scene = build_scene("cube-single")
    engine = MjxEngine(scene, slots=TabletopContactCapacity(40, 8, 3))  # a cube lies on 4 corners
    qpos = jnp.asarray(scene.model.qpos0, jnp.float32)[None].at[0, scene.cube_qpos[0] + 2].set(0.0199)
    start = jax.vmap(engine.load)(qpos, jnp.zeros((1, scene.model.nv)))
    after = step(engine, start, jnp.zeros((1, scene.model.nu)), jnp.ones(1, bool))
    assert 1 <= int(after.dropped[0]) <= scene.substeps
    again = step(engine, after, jnp.zeros((1, scene.model.nu)), jnp.ones(1, bool))
    assert int(again.dropped[0]) > int(after.dropped[0])


def test_every_family_has_slots_and_bad_numbers_are_refused():
    assert set(SLOTS) == set(FAMILIES)
    scene = build_scene("cube-single")
    for options in ({"iterations": 0}, {"ls_iterations": 0}, {"slots": TabletopContactCapacity(1, 1, 0)}):
        with pytest.raises(UserError, match="at least 1"):
            MjxEngine(scene, **options)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cube-single", "scene", "puzzle-3x3"])
def test_in_float64_control_steps_without_touch_equal_c(
    float64: None, family: str, moments: Callable[[str], Moments]
):
    scene = build_scene(family)
    engine = MjxEngine(scene, iterations=50, ls_iterations=50)
    some = moments(family)
    free = chosen(some, np.flatnonzero(np.abs(some.next_touch).max(1) == 0)[:8])
    start = physics_of(engine, free, jnp.float64)
    after = step(engine, start, jnp.asarray(free.ctrl), jnp.ones(len(free.qpos), bool))
    assert after.qpos.dtype == np.float64
    errors = np.abs(np.asarray(after.qpos) - free.next_qpos).max(1)
    assert np.median(errors) < 1e-9 and errors.max() < 1e-5


@pytest.mark.slow
def test_sixteen_scenes_step_faster_together_than_apart(
    engines: Callable[[str], MjxEngine], moments: Callable[[str], Moments]
):
    engine, some = engines("cube-single"), chosen(moments("cube-single"), np.arange(16))
    start, ctrl, on = physics_of(engine, some), jnp.asarray(some.ctrl, jnp.float32), jnp.ones(16, bool)
    apart = jax.jit(engine.step)
    first = jax.tree.map(lambda x: x[0], start)

    def seconds(run: Callable[[], TabletopPhysics]) -> float:
        jax.block_until_ready(run())
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - begin)
        return min(times)

    together = seconds(lambda: step(engine, start, ctrl, on))
    assert together / 16 <= 0.5 * seconds(lambda: apart(first, ctrl[0], on[0]))
