"""Tests of the draws of targets against OGBench's, and of their success."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import chi2_contingency

from envs_mjx.experts import achieved, healthy
from envs_mjx.experts.targets import (
    BUTTON,
    CUBE,
    DRAWER,
    WINDOW,
    TargetDraws,
    choose_target,
    kinds,
    stack_probability,
    target_from_draws,
    unset_targets,
)
from envs_mjx.manipulation.observation import Readings, handle_pos
from envs_mjx.manipulation.scenes import Scene, build_scene
from tests.helpers.ogbench_expert_states import (
    KIND_NAMES,
    Tape,
    angle_between,
    f32,
    package_env,
    random_readings,
    random_target,
    row,
    stack,
    target_of,
)

DRAWS = 3000


@functools.cache
def targets_from_draws(scene: Scene, p_stack: float):
    return jax.jit(jax.vmap(lambda draws, readings: target_from_draws(draws, scene, readings, p_stack)))


@functools.cache
def many_targets(scene: Scene):
    """Targets drawn with many keys in one state."""
    choose = jax.vmap(
        lambda key, readings, p: choose_target(key, scene, readings, p), in_axes=(0, None, None)
    )
    return jax.jit(choose)


def random_draws(seed: int) -> TargetDraws:
    rng = np.random.default_rng(seed)
    return TargetDraws(*(f32(rng.uniform(size=n)) for n in [(), (), (), (), (), 2, ()]))


def place(family: str, readings: Readings) -> dict:
    """Puts the real environment into a state with these cubes, buttons and slides; returns its `info`."""
    env, scene = package_env(family).unwrapped, build_scene(family)
    qpos = env._data.qpos.copy()
    qpos[(scene.cube_qpos[:, None] + np.arange(3)).ravel()] = np.asarray(readings.cube_pos, float).ravel()
    qpos[scene.slide_qpos] = np.asarray(readings.slide_pos, float)
    buttons = [np.asarray(readings.button_state).astype(int)] if scene.buttons else []
    env.set_state(qpos, 0 * env._data.qvel, *buttons)
    return env.compute_ob_info()


def with_furniture_at_ends(readings: Readings, seed: int) -> Readings:
    """Drawer and window near an end or the middle of their travel, the cube at times in the drawer."""
    rng = np.random.default_rng(4000 + seed)
    middle = (
        rng.choice([-0.15, -0.121, -0.119, -0.082, -0.078, -0.01]),
        rng.choice([0.01, 0.099, 0.101, 0.19]),
    )
    slides = f32(np.add(middle, rng.uniform(-0.0005, 0.0005, 2)))
    # The handle is at y = -0.24 - slide; the box reaches from 0.27 m to 0.07 m behind it.
    y = -0.24 - slides[0] - rng.choice([0.065, 0.075, 0.15, 0.265, 0.275])
    inside = np.array([[0.33, y, rng.choice([0.066, 0.151])]])
    cube = f32(inside) if rng.random() < 0.5 else readings.cube_pos
    return readings._replace(slide_pos=slides, cube_pos=cube)


def assert_same(ours: object, theirs: object) -> None:
    assert (int(ours.kind), int(ours.index)) == (int(theirs.kind), int(theirs.index))
    np.testing.assert_allclose(ours.pos, theirs.pos, atol=1e-6)
    np.testing.assert_allclose(ours.value, theirs.value, atol=1e-7)
    assert angle_between(np.asarray(ours.yaw), theirs.yaw) < 1e-5


def test_targets_of_cubes_equal_the_packages() -> None:
    scene, env = build_scene("cube-quadruple"), package_env("cube-quadruple").unwrapped
    rng, cases = np.random.default_rng(0), []
    for trial in range(60):
        readings = random_readings(scene, trial)
        for child, parent in rng.permutation(scene.cubes).reshape(-1, 2)[: trial % 3]:
            shift = rng.choice([0.01, 0.03])  # on top of it, or next to it and higher
            readings.cube_pos[child] = readings.cube_pos[parent] + f32([shift, 0.0, 0.04])
        cases.append((random_draws(trial), readings))
    all_ours = targets_from_draws(scene, 0.4)(*(stack(list(x)) for x in zip(*cases, strict=True)))
    stacked = 0
    for i, (draws, readings) in enumerate(cases):
        place("cube-quadruple", readings)
        on_top = bool(draws.stack < f32(0.4))
        env._np_random = Tape([draws.index, draws.stack, draws.base if on_top else draws.xy, draws.yaw])
        assert_same(row(all_ours, i), target_of(scene, env.set_new_target(p_stack=0.4)[1]))
        stacked += on_top
    env._np_random = None
    assert 10 < stacked < 50


def test_targets_of_the_scene_equal_the_packages() -> None:
    scene, env = build_scene("scene"), package_env("scene").unwrapped
    puts = (0.1, 0.299, 0.301, 0.9)
    cases = [
        (random_draws(i)._replace(put=f32(puts[i % 4])), with_furniture_at_ends(random_readings(scene, i), i))
        for i in range(200)
    ]
    all_ours = targets_from_draws(scene, 0.5)(*(stack(list(x)) for x in zip(*cases, strict=True)))
    seen = set()
    for i, (draws, readings) in enumerate(cases):
        info, ours = place("scene", readings), row(all_ours, i)
        kind, is_open = int(ours.kind), bool(readings.slide_pos[0] < -0.12)
        cube = [draws.index, *[draws.put] * is_open, draws.xy, draws.yaw]
        env._np_random = Tape([draws.kind, *{CUBE: cube, BUTTON: [draws.index]}.get(kind, [])])
        theirs = target_of(scene, env.set_new_target()[1])
        assert_same(ours, theirs)
        seen.add(
            (kind, int(ours.index), round(float(ours.value), 2), float(ours.pos[1]) < -0.2 and kind == CUBE)
        )
        handles = [info[f"privileged/{name}_handle_pos"] for name in KIND_NAMES[DRAWER:]]
        np.testing.assert_allclose(handle_pos(scene, jnp.asarray(readings.slide_pos)), handles, atol=1e-6)
    env._np_random = None
    # Cube on the table and in the drawer, two buttons on and off, both ends of drawer and window.
    assert len(seen) == 2 + 4 + 2 + 2


def test_targets_of_a_puzzle_equal_the_packages() -> None:
    scene, env = build_scene("puzzle-3x3"), package_env("puzzle-3x3").unwrapped
    cases = [(random_draws(i), random_readings(scene, i)) for i in range(40)]
    all_ours = targets_from_draws(scene, 0.5)(*(stack(list(x)) for x in zip(*cases, strict=True)))
    for i, (draws, readings) in enumerate(cases):
        place("puzzle-3x3", readings)
        env._np_random = Tape([draws.index])
        assert_same(row(all_ours, i), target_of(scene, env.set_new_target()[1]))
    env._np_random = None


@pytest.mark.parametrize(
    ("slides", "buttons", "cube"),
    [
        ((-0.15, 0.0), (True, True), (0.4, 0.1, 0.02)),  # an open drawer, nothing locked
        ((0.0, 0.2), (False, True), (0.4, 0.1, 0.02)),
        ((-0.15, 0.2), (False, False), (0.33, -0.24, 0.066)),  # the cube in the drawer
    ],
)
def test_targets_are_as_frequent_as_in_the_package(slides: tuple, buttons: tuple, cube: tuple) -> None:
    scene, env = build_scene("scene"), package_env("scene").unwrapped
    readings = random_readings(scene, 0)._replace(
        slide_pos=f32(slides), button_state=np.array(buttons), cube_pos=f32([cube])
    )
    place("scene", readings)
    env._np_random = np.random.default_rng(0)
    theirs = stack([_drawn_target(env, scene) for _ in range(DRAWS)])
    ours = many_targets(scene)(jr.split(jr.key(0), DRAWS), readings, 0.5)

    def label(target: object) -> np.ndarray:
        put = (np.asarray(target.kind) == CUBE) & (np.asarray(target.pos)[:, 1] < -0.2)
        return 10 * np.asarray(target.kind) + np.asarray(target.index) % 2 + 5 * put

    labels = np.union1d(label(ours), label(theirs))
    table = np.array([[np.sum(label(x) == name) for name in labels] for x in (ours, theirs)])
    assert chi2_contingency(table).pvalue > 1e-3 and table.min() > 50
    assert (CUBE in ours.kind) == (cube[1] > 0)  # a cube in the drawer stays in it


def _drawn_target(env, scene: Scene):
    env.set_new_target(return_info=False)
    info: dict = {}
    env.add_object_info(info)
    return target_of(scene, info)


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [
        ("cube-single", 0.0, 0.0),
        ("cube-double", 0.0, 0.25),
        ("cube-triple", 0.05, 0.35),
        ("cube-quadruple", 0.1, 0.5),
        ("cube-octuple", 0.0, 0.35),
        ("scene", 0.5, 0.5),
    ],
)
def test_stacking_probability_lies_in_the_familys_range(family: str, low: float, high: float) -> None:
    scene = build_scene(family)
    p = jax.vmap(lambda key: stack_probability(key, scene))(jr.split(jr.key(0), 400))
    assert low <= p.min() <= low + 0.03 * (high - low) and high - 0.03 * (high - low) <= p.max() <= high


def test_lone_cube_is_never_stacked_and_targets_fill_the_table() -> None:
    scene = build_scene("cube-single")
    pos = np.asarray(many_targets(scene)(jr.split(jr.key(0), 500), random_readings(scene, 0), 1.0).pos)
    np.testing.assert_allclose(pos[:, 2], 0.02)
    assert (pos[:, :2] >= f32([0.3, -0.3])).all() and (pos[:, :2] <= f32([0.55, 0.3])).all()
    # Uniform: 500 draws leave the outer 5% of a side empty with probability 0.95^500 = 7e-12.
    span = np.array([0.25, 0.6])
    assert (pos[:, :2].min(0) < np.array([0.3, -0.3]) + 0.05 * span).all()
    assert (pos[:, :2].max(0) > np.array([0.55, 0.3]) - 0.05 * span).all()


@pytest.mark.parametrize("kind", [CUBE, BUTTON, DRAWER, WINDOW])
def test_target_is_achieved_within_4_cm_or_with_button_toggled(kind: int) -> None:
    scene = build_scene("scene")
    target = random_target(scene, kind, 0)
    for off, expected in ((0.0, True), (0.0399, True), (0.0401, False)):
        readings = random_readings(scene, 1)
        if kind == CUBE:
            readings.cube_pos[0] = target.pos + f32([0.0, 0.6 * off, 0.8 * off])
        elif kind == BUTTON:
            readings.button_state[target.index] = bool(target.value) == (off < 0.04)
        else:
            readings.slide_pos[target.index] = target.value + f32(off)
        given = jax.tree.map(jnp.asarray, (target, readings))
        assert bool(achieved(scene, *given)) == expected
    assert kinds(scene) == (CUBE, BUTTON, DRAWER, WINDOW)


@pytest.mark.parametrize(
    ("y", "z", "kept"),
    [
        (0.28, 0.02, True),
        (0.291, 0.02, False),
        (-0.31, 0.07, True),
        (-0.31, 0.05, False),
        (-0.31, 0.09, False),
    ],
)
def test_scene_episodes_are_kept_while_the_cube_is_in_view(y: float, z: float, kept: bool) -> None:
    scene = build_scene("scene")
    readings = random_readings(scene, 0)._replace(cube_pos=f32([[0.33, y, z]]))
    assert bool(healthy(scene, jax.tree.map(jnp.asarray, readings))) == kept
    other = jax.tree.map(jnp.asarray, random_readings(build_scene("cube-single"), 0))
    assert healthy(build_scene("cube-single"), other._replace(cube_pos=jnp.array([[0.33, y, z]])))


def test_placeholder_targets_are_any_button_and_either_end() -> None:
    scene = build_scene("scene")
    unset = jax.jit(jax.vmap(lambda u: unset_targets(u, scene)))(jr.uniform(jr.key(0), (400, 4)))
    assert (np.asarray(unset.kind) == np.arange(4)).all()
    buttons = set(zip(unset.index[:, BUTTON].tolist(), unset.value[:, BUTTON].tolist(), strict=True))
    assert buttons == {(0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0)}
    tops = f32(scene.button_top)[np.asarray(unset.index[:, BUTTON])]
    np.testing.assert_array_equal(unset.pos[:, BUTTON], tops)
    for kind, ends in ((DRAWER, [-0.16, 0.0]), (WINDOW, [0.0, 0.2])):
        values, counts = np.unique(unset.value[:, kind], return_counts=True)
        np.testing.assert_allclose(values, ends, atol=1e-7)
        assert counts.min() > 150
