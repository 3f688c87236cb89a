"""Tests of engine `mjx` of walkers against MuJoCo C, at walls too, and of its contract.

`pytest -s` prints the errors.
"""

import functools
import time
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from jaxtyping import Array

from envs_mjx.engines.base import StepState, WalkerPhysics
from envs_mjx.engines.walker_c import CWalkerEngine
from envs_mjx.engines.walker_mjx import step as engine_mjx_step
from envs_mjx.engines.walker_mjx.contacts import WalkerContactCapacity
from envs_mjx.engines.walker_mjx.engine import MJX_VERSION, MjxWalkerEngine, require_version
from envs_mjx.engines.walker_mjx.near_walls import near_walls, reach
from envs_mjx.locomotion.mazes import SIZES, UNIT, build_maze
from envs_mjx.locomotion.walkers import FAMILIES, MAZES, build_walker
from mac.errors import UserError
from tests.helpers.pytest_params import slow_except
from tests.helpers.walker_states import Moments, accelerations, chosen, errors_of, loaded, open_loop, record

pytestmark = pytest.mark.promotion

QUICK = ("hopper",)


@functools.cache
def engine_of(family: str) -> MjxWalkerEngine:
    return MjxWalkerEngine(build_walker(family))


@functools.cache
def moments_of(family: str) -> Moments:
    return record(build_walker(family))


@eqx.filter_jit
def step(engine: MjxWalkerEngine, motion: WalkerPhysics, ctrl: Array, active: Array) -> WalkerPhysics:
    return jax.vmap(engine.step)(motion, ctrl, active)


@eqx.filter_jit
def forward(engine: MjxWalkerEngine, qpos: Array, qvel: Array, ctrl: Array) -> tuple[Array, Array]:
    def one(qpos: Array, qvel: Array, ctrl: Array) -> tuple[Array, Array]:
        state = StepState(qpos, qvel, jnp.zeros_like(qvel), jnp.int32(0))
        data, lost = engine_mjx_step.forward(engine.sim, engine.model, engine.blank.replace(ctrl=ctrl), state)
        return data.qacc, lost

    return jax.vmap(one)(qpos, qvel, ctrl)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("many", slow_except([300], [300, 20_000]))
@pytest.mark.parametrize("anywhere", [False, True])
def test_a_humanoid_touches_something_where_it_does_in_c(anywhere: bool, many: int):
    """Checks draws as at resets, and draws all over the maze: in the air, on the floor and in walls."""
    engine, rng = engine_of("humanoidmaze-medium"), np.random.default_rng(many)
    walker = engine.walker
    qpos = np.tile(walker.model.qpos0, (many, 1))
    if anywhere and walker.maze is not None:
        free = np.argwhere(~walker.maze.walls)
        qpos[:, :2] = walker.maze.xy(free[rng.integers(len(free), size=many)])
        qpos[:, :2] += rng.uniform(-UNIT / 2, UNIT / 2, (many, 2))
        qpos[:, 2] = rng.uniform(0.3, 2.5, many)
    quat = rng.uniform(size=(many, 4))
    qpos[:, 3:7] = quat / np.linalg.norm(quat, axis=1, keepdims=True)
    qpos[:, 7:] = rng.uniform(*walker.model.jnt_range[1:].T, (many, walker.model.nq - 7))
    found = jax.jit(jax.vmap(engine.touches))(jnp.asarray(qpos, jnp.float32))
    expected = jax.vmap(CWalkerEngine(walker).touches)(jnp.asarray(qpos, jnp.float32))
    np.testing.assert_array_equal(found, expected)
    assert 0.15 < np.mean(expected) < 0.7


@pytest.mark.parametrize("family", slow_except(QUICK, FAMILIES))
def test_in_float64_accelerations_equal_those_of_c(float64: None, family: str):
    """Compares 30 states, as many at walls as were recorded; both solvers run until nothing changes."""
    moments = moments_of(family)
    touched, at_wall = moments.touching > 0, moments.walls
    some = chosen(moments, np.argsort(-(2 * at_wall + touched), kind="stable")[:30])
    assert (some.touching > 0).sum() >= 8 and (family not in MAZES or some.walls.sum() >= 3)
    engine = MjxWalkerEngine(build_walker(family), iterations=50, ls_iterations=50, tolerance=1e-15)
    found, lost = forward(engine, *(jnp.asarray(x) for x in (some.qpos, some.qvel, some.ctrl)))
    assert found.dtype == jnp.float64 and not np.asarray(lost).any()
    error = np.abs(np.asarray(found) - accelerations(build_walker(family), some)).max()
    print(f"{family}: acceleration {error:.1e}, {some.walls.sum()} at walls")
    assert error < 1e-6  # m/s2 and rad/s2, of up to 1e4


@pytest.mark.parametrize("family", slow_except(QUICK, FAMILIES))
def test_one_control_step_equals_that_of_c(family: str):
    walker, engine, moments = build_walker(family), engine_of(family), moments_of(family)
    start = loaded(engine, moments)
    active = np.arange(len(moments.qpos)) % 8 != 0
    after = step(engine, start, jnp.asarray(moments.ctrl, jnp.float32), jnp.asarray(active))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[~active], np.asarray(old)[~active])  # bit for bit
    assert not np.asarray(after.dropped).any()
    error = errors_of(walker, np.asarray(after.qpos), moments.next_qpos)[active]
    median, most = np.median(error), np.percentile(error, 95)
    print(f"{family}: control step median {median:.1e}, p95 {most:.1e}, max {error.max():.1e}")
    assert median < 5e-6 and most < 1e-4  # m, rad, quaternion


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_except(QUICK, FAMILIES))
def test_ten_control_steps_in_open_loop_follow_c(family: str):
    error = open_loop(engine_of(family), step, len(moments_of(family).qpos))
    print(f"{family}: ten steps median {np.median(error):.1e}, p95 {np.percentile(error, 95):.1e}", end="; ")
    print(f"max {error.max():.1e}")
    assert np.median(error) < 1e-4 and (family.startswith(("ant", "humanoid")) or error.max() < 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["hopper", pytest.param("humanoidmaze-medium", marks=pytest.mark.slow), "antmaze-medium"]
)
def test_what_is_seen_is_what_engine_c_sees(family: str):
    walker, moments = build_walker(family), moments_of(family)
    ctrl, on = jnp.asarray(moments.ctrl, jnp.float32), jnp.ones(len(moments.qpos), bool)
    seen = []
    for engine in (engine_of(family), CWalkerEngine(walker, threads=1)):
        start = jax.vmap(engine.load)(*(jnp.asarray(x, jnp.float32) for x in (moments.qpos, moments.qvel)))
        seen.append([np.asarray(m.seen) for m in (start, step(engine, start, ctrl, on))])
    for ours, theirs in zip(*seen, strict=True):
        error = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
        assert ours.shape == theirs.shape and (not error.size or np.percentile(error, 95) < 1e-4)


def test_no_part_of_a_walker_reaches_half_a_cell_from_its_torso():
    """Checks the bound that makes four walls sufficient, and poses near it."""
    for family in ("pointmaze-medium", "antmaze-medium", "humanoidmaze-medium"):
        model, far = build_walker(family).model, reach(build_walker(family).model)
        data, rng, seen = mujoco.MjData(model), np.random.default_rng(0), 0.0
        solid = np.flatnonzero((model.geom_bodyid > 0) & (model.geom_contype > 0))
        for _ in range(300):
            data.qpos[:] = rng.uniform(-np.pi, np.pi, model.nq)
            mujoco.mj_kinematics(model, data)
            away = np.linalg.norm(data.geom_xpos[solid] - data.xpos[1], axis=1) + model.geom_rbound[solid]
            seen = max(seen, away.max())
        assert 0.6 * far < seen <= far <= UNIT / 2


@pytest.mark.parametrize("size", SIZES)
def test_near_walls_are_all_walls_within_half_a_cell(size: str):
    maze, rng = build_maze(size), np.random.default_rng(0)
    centres = maze.xy(np.argwhere(maze.walls))
    low, high = centres.min(0) - UNIT, centres.max(0) + UNIT
    places = jnp.asarray(rng.uniform(low, high, (400, 2)), jnp.float32)
    found, there = jax.vmap(lambda xy: near_walls(maze, xy))(places)
    for xy, around, walls in zip(np.asarray(places), np.asarray(found), np.asarray(there), strict=True):
        gap = np.maximum(np.abs(centres - xy) - UNIT / 2, 0)
        within = {tuple(c) for c in centres[(gap < UNIT / 2 - 1e-3).all(1)].tolist()}
        ours = {tuple(c) for c in around[walls][:, :2].tolist()}
        assert within <= ours <= {tuple(c) for c in centres.tolist()} and walls.sum() == len(ours)


@pytest.mark.slow
def test_contacts_dropped_by_a_full_buffer_are_counted():
    """Drops contacts of an ant that lies on the floor; the four feet need a slot each."""
    walker = build_walker("antmaze-medium")
    engine = MjxWalkerEngine(walker, slots=WalkerContactCapacity(2, 1))
    moments = moments_of("antmaze-medium")
    _, lost = forward(
        engine, *(jnp.asarray(x, jnp.float32) for x in (moments.qpos, moments.qvel, moments.ctrl))
    )
    acting = np.maximum(moments.touching - 2, 0)
    np.testing.assert_array_equal(np.asarray(lost), acting)
    assert acting.any()


def test_other_versions_and_bad_numbers_are_refused():
    require_version(MJX_VERSION)
    with pytest.raises(UserError, match=r"mujoco-mjx==3\.17\.0.*or use engine c"):
        require_version("3.18.0")
    for options in ({"iterations": 0}, {"ls_iterations": 0}, {"slots": WalkerContactCapacity(0, 1)}):
        with pytest.raises(UserError, match="at least 1"):
            MjxWalkerEngine(build_walker("hopper"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("body", ["point", "ant", "humanoid"])
def test_a_step_costs_the_same_in_giant_and_medium_mazes(body: str):
    def runner(size: str):
        engine, some = engine_of(f"{body}maze-{size}"), moments_of(f"{body}maze-{size}")
        rows = np.arange(16)
        start = jax.tree.map(lambda x: x[rows], loaded(engine, some))
        ctrl, on = jnp.asarray(some.ctrl[rows], jnp.float32), jnp.ones(16, bool)

        def seconds() -> float:
            begin = time.perf_counter()
            jax.block_until_ready(step(engine, start, ctrl, on))
            return time.perf_counter() - begin

        return seconds

    medium, giant = runner("medium"), runner("giant")
    times = np.array([[medium(), giant()] for _ in range(31)])[1:]
    ratio = np.median(times[:, 1]) / np.median(times[:, 0])
    print(f"{body}: giant costs {ratio:.2f} of medium")
    assert ratio < 1.3
