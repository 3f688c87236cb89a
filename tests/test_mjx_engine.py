"""Engine `mjx` against MuJoCo C: recorded control steps of OGBench's expert, and closed loops."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mujoco
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float

from envs_mjx import experts, mjx_fixes
from envs_mjx.collisions import collision_model
from envs_mjx.engine import Physics
from envs_mjx.engine_mjx import MjxEngine
from envs_mjx.experts.plan import max_rows
from envs_mjx.registry import make
from envs_mjx.scenes import Scene, build_scene
from envs_mjx.world import Tabletop
from mac.errors import UserError

BATCH = (2, 16)
"""Two nested axes, as in an evaluation of tasks x episodes."""
ROWS = BATCH[0] * BATCH[1]


class Moments(NamedTuple):
    """Control steps of C, one a row: state, warm start and control before; state and readings after."""

    qpos: np.ndarray
    qvel: np.ndarray
    warmstart: np.ndarray
    ctrl: np.ndarray
    next_qpos: np.ndarray
    next_qvel: np.ndarray
    next_pinch: np.ndarray
    next_touch: np.ndarray


@pytest.fixture(scope="module")
def scene() -> Scene:
    return build_scene("cube-single")


@pytest.fixture(scope="module")
def engine(scene: Scene) -> MjxEngine:
    return MjxEngine(scene)


@pytest.fixture(scope="module")
def moments() -> Moments:
    """Two pick-and-place rounds by OGBench's scripted expert in OGBench's environment."""
    gymnasium = pytest.importorskip("gymnasium")
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    np.random.seed(0)
    env = gymnasium.make(
        "cube-single-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=1001
    )
    data, expert, rows = env.unwrapped, CubePlanOracle(env=env, noise=0.0), []
    for episode in range(2):
        obs, info = env.reset(seed=episode)
        expert.reset(obs, info)
        while not expert.done:
            d = data._data
            before = (d.qpos.copy(), d.qvel.copy(), d.qacc_warmstart.copy())
            obs, _, _, _, info = env.step(np.clip(expert.select_action(obs, info), -1, 1))
            pinch, pad = d.site("ur5e/robotiq/pinch").xpos, d.body("ur5e/robotiq/right_pad").cfrc_ext
            after = (d.qpos.copy(), d.qvel.copy(), pinch.copy(), pad.copy())
            rows.append((*before, d.ctrl.copy(), *after))
    return Moments(*(np.array(column) for column in zip(*rows, strict=True)))


@pytest.fixture(scope="module")
def some(moments: Moments) -> Moments:
    """As many moments as one batch holds, evenly spread, about half of them with the cube in hand."""
    rows = np.linspace(0, len(moments.qpos) - 1, ROWS).astype(int)
    chosen = Moments(*(column[rows] for column in moments))
    assert (np.abs(chosen.next_touch).max(1) > 1).mean() > 0.2
    return chosen


@eqx.filter_jit
def load(engine: MjxEngine, qpos: Float[Array, "*b nq"], qvel: Float[Array, "*b nv"]) -> Physics:
    return jax.vmap(jax.vmap(engine.load))(qpos, qvel)


@eqx.filter_jit
def step(
    engine: MjxEngine, physics: Physics, ctrl: Float[Array, "*b nu"], active: Bool[Array, "*b"]
) -> Physics:
    return jax.vmap(jax.vmap(engine.step))(physics, ctrl, active)


class Stepped(NamedTuple):
    start: Physics
    after: Physics
    active: np.ndarray


@pytest.fixture(scope="module")
def stepped(engine: MjxEngine, some: Moments) -> Stepped:
    """One control step from each moment; every eighth scene is inactive."""
    qpos, qvel, warmstart, ctrl = (jnp.asarray(x, jnp.float32).reshape(*BATCH, -1) for x in some[:4])
    start = eqx.tree_at(lambda p: p.raw, load(engine, qpos, qvel), warmstart)
    active = np.arange(ROWS) % 8 != 0
    after = step(engine, start, ctrl, jnp.asarray(active).reshape(BATCH))
    start, after = (
        jax.tree.map(lambda x: np.asarray(x).reshape(ROWS, *x.shape[2:]), p) for p in (start, after)
    )
    return Stepped(start, after, active)


def test_the_reduced_collision_model_moves_as_the_full_one_in_c(scene: Scene, moments: Moments):
    for level in ("lite", "finger"):
        model = collision_model(scene.model, level)
        data = mujoco.MjData(model)
        for row in range(0, len(moments.qpos), 4):
            data.qpos[:], data.qvel[:], data.qacc_warmstart[:], data.ctrl[:] = (x[row] for x in moments[:4])
            mujoco.mj_step(model, data, scene.substeps)
            np.testing.assert_allclose(data.qpos, moments.next_qpos[row], rtol=0, atol=1e-9)


def test_a_loaded_scene_has_the_site_poses_of_c_and_nothing_else(
    scene: Scene, stepped: Stepped, some: Moments
):
    data = mujoco.MjData(scene.model)
    for row in range(0, ROWS, 8):
        data.qpos[:] = some.qpos[row]
        mujoco.mj_kinematics(scene.model, data)
        np.testing.assert_allclose(stepped.start.site_pos[row], data.site_xpos[scene.sites], atol=2e-6)
        np.testing.assert_allclose(
            stepped.start.site_mat[row], data.site_xmat[scene.sites].reshape(-1, 3, 3), atol=2e-6
        )
    assert not stepped.start.touch.any()


def test_an_inactive_scene_is_returned_bit_for_bit(stepped: Stepped):
    same = ~stepped.active
    assert same.any()
    for new, old in zip(jax.tree.leaves(stepped.after), jax.tree.leaves(stepped.start), strict=True):
        np.testing.assert_array_equal(new[same], old[same])


def test_one_control_step_stays_near_c(stepped: Stepped, some: Moments):
    """Medians are float32 noise; tails are grasps, where MJX's boxes touch at 4 points and C's at 8."""
    error = np.abs(stepped.after.qpos - some.next_qpos)[stepped.active]
    arm, gripper, cube = (error[:, part].max(1) for part in (slice(0, 6), slice(6, 14), slice(14, 21)))
    assert np.median(arm) < 2e-6 and np.percentile(arm, 95) < 1e-5  # rad
    assert np.median(gripper) < 1e-5 and np.percentile(gripper, 95) < 5e-3  # rad
    assert np.median(cube) < 1e-6 and cube.max() < 5e-3  # m and quaternion
    pinch = np.abs(stepped.after.site_pos[:, 0] - some.next_pinch)[stepped.active].max(1)
    assert np.percentile(pinch, 95) < 1e-5  # m; fails by 1e-3 if the poses are those of the new qpos
    contact, expected = (
        np.clip(np.linalg.norm(t, axis=1) / 50, 0, 1) for t in (stepped.after.touch, some.next_touch)
    )
    contact_error = np.abs(contact - expected)[stepped.active]
    assert np.median(contact_error) < 1e-4 and np.percentile(contact_error, 90) < 0.05


def test_bad_options_and_other_versions_of_mjx_are_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    for options in ({"iterations": 0}, {"ls_iterations": 0}, {"level": "all"}, {"max_contacts": 0}):
        with pytest.raises(UserError, match=f"{next(iter(options))}|collision level"):
            MjxEngine(scene, **options)
    monkeypatch.setattr(mjx_fixes, "MJX_VERSION", "3.16.0")
    with pytest.raises(UserError, match="mujoco-mjx"):
        MjxEngine(scene)


@pytest.mark.slow
def test_sixteen_scenes_step_no_slower_together_than_apart(engine: MjxEngine, some: Moments):
    """Without the barriers the batch takes 17 times as long."""
    qpos, qvel, _, ctrl = (jnp.asarray(x[:16], jnp.float32) for x in some[:4])
    yes = jnp.ones(16, bool)
    together = eqx.filter_jit(lambda e, p: jax.vmap(e.step)(p, ctrl, yes))
    apart = eqx.filter_jit(lambda e, p: e.step(p, ctrl[0], yes[0]))
    start = eqx.filter_jit(lambda e: jax.vmap(e.load)(qpos, qvel))(engine)
    first = jax.tree.map(lambda x: x[0], start)

    def seconds(f: Callable[..., Physics], physics: Physics) -> float:
        jax.block_until_ready(f(engine, physics))
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(f(engine, physics))
            times.append(time.perf_counter() - begin)
        return min(times)

    assert seconds(together, start) / 16 <= seconds(apart, first)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
def test_in_float64_a_control_step_without_contact_of_the_fingers_equals_c(
    float64: None, scene: Scene, moments: Moments
):
    engine = MjxEngine(scene, iterations=50, ls_iterations=50)
    free = np.flatnonzero(np.abs(moments.next_touch).max(1) == 0)[4:64:6]  # the cube lies on the floor
    rows = [jnp.asarray(x[free]) for x in moments[:4]]
    start = eqx.filter_jit(lambda e: jax.vmap(e.load)(rows[0], rows[1]))(engine)
    start = eqx.tree_at(lambda p: p.raw, start, rows[2])
    after = eqx.filter_jit(lambda e, p: jax.vmap(e.step)(p, rows[3], jnp.ones(len(free), bool)))(
        engine, start
    )
    assert after.qpos.dtype == np.float64
    errors = np.abs(np.asarray(after.qpos) - moments.next_qpos[free]).max(1)
    assert np.median(errors) < 1e-10
    assert errors.max() < 1e-7


@pytest.mark.slow
def test_the_scripted_expert_succeeds_in_at_least_seven_of_eight_episodes():
    env = make("cube-single-play-v0", "mjx")
    assert isinstance(env, Tabletop)

    def episode(env: Tabletop, key: Array) -> Bool[Array, ""]:
        """Whether the target is achieved when the plan has been followed, without noise."""
        scene_key, expert_key, act_key = jr.split(key, 3)
        world = env.reset_collect(scene_key)
        expert = experts.begin("play", env.scene, expert_key, env.readings(world))
        expert = eqx.tree_at(lambda e: e.intent.noise, expert, jnp.zeros_like(expert.intent.noise))

        def advance(carry: tuple, _: None) -> tuple[tuple, None]:
            world, expert, active = carry
            action, expert, done = experts.act("play", env.scene, expert, env.readings(world), act_key)
            return (env.advance(world, action, active), expert, active & ~done), None

        begin = (world, expert, jnp.ones((), bool))
        (world, expert, _), _ = jax.lax.scan(advance, begin, length=max_rows(env.scene))
        return experts.achieved(env.scene, expert.target, env.readings(world))

    run = eqx.filter_jit(lambda env, keys: jax.vmap(lambda key: episode(env, key))(keys))
    assert run(env, jr.split(jr.key(0), 8)).sum() >= 7
