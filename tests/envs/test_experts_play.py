"""Tests of the `play` experts against OGBench's, and of facts about their plans."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx.experts.keyframes import Keyframes, PlanDraws, key_poses
from envs_mjx.experts.play import KeyframePlan, build_plan, follow, max_rows, plan_from_draws, plan_row
from envs_mjx.experts.targets import BUTTON, CUBE, Target
from envs_mjx.manipulation.observation import Readings
from envs_mjx.manipulation.scenes import Scene, build_scene
from tests.helpers.ogbench_expert_states import (
    CASES,
    PLAN_ORACLES,
    QUICK_CASES,
    angle_between,
    f32,
    info_of,
    oracle,
    random_readings,
    random_target,
    row,
    stack,
    taped,
)
from tests.helpers.pytest_params import slow_except

PLANS = 30
LENGTHS = {CUBE: range(87, 91), BUTTON: range(25, 50)}  # rows; drawer and window 35 to 37
MAX_KEYFRAMES = {CUBE: 11, BUTTON: 5}  # drawer and window 8


class Batch(NamedTuple):
    """Random situations and the keys and plans of our experts in them, with a leading axis."""

    draws: PlanDraws
    readings: Readings
    target: Target
    keys: Keyframes
    plan: KeyframePlan
    rows: jax.Array


def random_draws(scene: Scene, seed: int) -> PlanDraws:
    rng = np.random.default_rng(1000 + seed)
    shapes = PlanDraws(3, (), 2, 3, 10, None)
    draws = {k: f32(rng.uniform(size=v)) for k, v in shapes._asdict().items() if k != "noise"}
    return PlanDraws(**draws, noise=f32(rng.normal(size=(max_rows(scene), 5))))


@functools.cache
def compiled(scene: Scene):
    """Returns keys, plan and all its rows of one situation, vmapped."""

    def one(
        draws: PlanDraws, readings: Readings, target: Target
    ) -> tuple[Keyframes, KeyframePlan, jax.Array]:
        plan = plan_from_draws(draws, scene, readings, target)
        rows = jax.vmap(plan_row, in_axes=(None, 0))(plan, jnp.arange(max_rows(scene)))
        return key_poses(draws, scene, readings, target), plan, rows

    return jax.jit(jax.vmap(one))


@functools.cache
def batch_of(family: str, kind: int) -> Batch:
    scene = build_scene(family)
    given = (
        stack([random_draws(scene, seed) for seed in range(PLANS)]),
        stack([random_readings(scene, seed) for seed in range(PLANS)]),
        stack([random_target(scene, kind, seed) for seed in range(PLANS)]),
    )
    return jax.tree.map(np.asarray, Batch(*given, *compiled(scene)(*given)))


def package_plan(family: str, kind: int, batch: Batch, i: int, time: float = 0.0) -> tuple:
    """Returns OGBench's expert, reset with our random draws in its order, and its keys: times, poses and
    grips."""
    draws, seen = row(batch.draws, i), []
    lift, clear = ([*draws.lift], [draws.clear]) if kind == CUBE else ([], [])
    jitter = draws.jitter[: MAX_KEYFRAMES.get(kind, 8) - 1]
    expert = oracle(PLAN_ORACLES, family, kind, noise=0.1)
    build = expert.compute_plan
    expert.compute_plan = lambda *keys: seen.extend(keys) or build(*keys)
    info = info_of(build_scene(family), row(batch.readings, i), row(batch.target, i), time)
    with taped([draws.end_pos, draws.end_yaw, *lift, *clear, *jitter, draws.noise]):
        expert.reset(None, info)
    return expert, seen


@pytest.mark.parametrize(("family", "kind"), slow_except(QUICK_CASES, CASES))
def test_keys_equal_the_packages(family: str, kind: int) -> None:
    batch, count = batch_of(family, kind), MAX_KEYFRAMES.get(kind, 8)
    for i in range(PLANS):
        times, poses, grips = package_plan(family, kind, batch, i)[1]
        keys = row(batch.keys, i)
        assert len(times) == count
        np.testing.assert_allclose(keys.times[:count], times, atol=2e-6)
        np.testing.assert_allclose(keys.end, times[-1], atol=2e-6)
        np.testing.assert_allclose(keys.poses[:count, :3], [p.translation() for p in poses], atol=2e-6)
        yaws = np.array([p.rotation().compute_yaw_radians() for p in poses])
        assert angle_between(np.asarray(keys.poses[:count, 3]), yaws).max() < 5e-6
        np.testing.assert_array_equal(keys.poses[:count, 4], grips)


@pytest.mark.parametrize(("family", "kind"), slow_except(QUICK_CASES, CASES))
def test_plans_equal_the_packages_row_by_row(family: str, kind: int) -> None:
    batch, lengths = batch_of(family, kind), set()
    for i in range(PLANS):
        expert, _ = package_plan(family, kind, batch, i)
        length = int(batch.plan.length[i])
        assert length == len(expert._plan)
        lengths.add(length)
        ours = np.asarray(batch.rows[i, :length])
        np.testing.assert_allclose(np.delete(ours, 3, 1), np.delete(expert._plan, 3, 1), atol=2e-6)
        assert angle_between(ours[:, 3], expert._plan[:, 3]).max() < 1e-5
    assert lengths <= set(LENGTHS.get(kind, range(35, 38))) and len(lengths) >= 2


@pytest.mark.parametrize(
    ("family", "kind"),
    slow_except([("cube-quadruple", CUBE)], [("cube-quadruple", CUBE), ("puzzle-3x3", BUTTON)]),
)
def test_actions_and_end_of_plan_equal_the_packages(family: str, kind: int) -> None:
    scene, batch = build_scene(family), batch_of(family, kind)
    track = jax.jit(jax.vmap(follow))
    for i in range(3):
        start = 0.05 * 7 * i  # time of the step at which the plan begins; 0.05 s per control step
        expert, _ = package_plan(family, kind, batch, i, start)
        plan, length = row(batch.plan, i), int(batch.plan.length[i])
        here = stack([random_readings(scene, 100 * i + step) for step in range(length)])
        plans = jax.tree.map(lambda x, n=length: np.stack([x] * n), plan)
        ours, after, done = track(plans._replace(index=np.arange(length, dtype=np.int32)), here)
        np.testing.assert_array_equal(after.index, np.arange(length) + 1)
        for step in range(length):
            info = info_of(scene, row(here, step), row(batch.target, i), start + 0.05 * step)
            theirs = expert.select_action(None, info)
            assert bool(done[step]) == expert.done == (step == length - 1)
            # 1e-4 of full scale is 5e-6 m; the yaw may flip sign where the plan crosses pi.
            flips = np.abs(np.abs(expert._plan[step, 3]) - np.pi) < 1e-4
            keep = np.array([True, True, True, not flips, True])
            np.testing.assert_allclose(np.asarray(ours[step])[keep], theirs[keep], atol=1e-4)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_of_a_cube_do_not_change_the_plan(quarters: int) -> None:
    batch = batch_of("cube-quadruple", CUBE)
    turned = batch.readings._replace(cube_yaw=batch.readings.cube_yaw + quarters * jnp.pi / 2)
    keys, _, _ = compiled(build_scene("cube-quadruple"))(batch.draws, turned, batch.target)
    np.testing.assert_allclose(batch.keys.poses, keys.poses, atol=3e-6)


def test_arm_turns_by_an_eighth_at_most_to_grasp_and_to_place() -> None:
    turns = np.abs(np.diff(batch_of("cube-quadruple", CUBE).keys.poses[:, :10, 3], axis=1))
    # Start to above the cube, and lifted to above the target in two halves.
    assert turns.max() < np.pi / 4 + 1e-5 and (turns[:, 4] + turns[:, 5]).max() < np.pi / 4 + 1e-5
    np.testing.assert_allclose(np.delete(turns, [0, 4, 5], axis=1), 0.0, atol=1e-6)


def test_plan_noise_is_a_tenth_of_a_full_action_before_smoothing() -> None:
    scene = build_scene("puzzle-3x3")
    given = random_readings(scene, 0), random_target(scene, BUTTON, 0)
    build = jax.vmap(lambda key, *given: build_plan(key, scene, *given), in_axes=(0, None, None))
    plans = jax.jit(build)(jr.split(jr.key(0), 800), *given)
    keep = np.arange(max_rows(scene))[None] < np.asarray(plans.length)[:, None]
    noise = np.asarray(plans.noise)[keep]
    # Taps exp(-2 k^2), k = -2..2, over their sum 1.27137: the squares add up to 0.6416, root 0.801.
    expected = 0.801 * 0.1 * np.array([0.05, 0.05, 0.05, 0.3, 1.0])
    np.testing.assert_allclose(noise.std(0), expected, rtol=0.03)


@pytest.mark.parametrize(
    ("family", "rows"),
    # 11 units of 0.4 s and 0.08 s of jitter; the same with 0.04 s for buttons: 3.35 units, and 4 for
    # each metre on the way, of which there is at most one.
    [("cube-quadruple", 90), ("scene", 90), ("puzzle-4x6", 60)],
)
def test_no_plan_is_longer_than_the_noise_drawn_for_it(family: str, rows: int) -> None:
    scene = build_scene(family)
    assert max_rows(scene) == rows
    # Every key as late as can be; towards each button from the corner of the workspace.
    draws = random_draws(scene, 0)._replace(jitter=f32(np.ones(10)))
    far = random_readings(scene, 0)._replace(effector_pos=f32([0.6, 0.35, 0.35]))
    tops = [f32(top) for top in scene.button_top] or [f32([0.3, -0.3, 0.02])]
    target = random_target(scene, BUTTON if scene.buttons else CUBE, 0)
    each = [jax.tree.map(lambda x: np.stack([x] * len(tops)), tree) for tree in (draws, far)]
    keys, plan, _ = compiled(scene)(*each, stack([target._replace(pos=top) for top in tops]))
    lengths = np.asarray(plan.length)
    np.testing.assert_array_equal(lengths, np.ceil(np.asarray(keys.end) / 0.05 - 1e-5))
    assert lengths.max() <= rows
    assert lengths.max() >= {"cube-quadruple": 90, "puzzle-4x6": 50}.get(family, 0)
