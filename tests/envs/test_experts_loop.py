"""Tests of the experts over time: their ends, noise, and random actions."""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx import experts
from envs_mjx.experts import STYLES, ExpertState
from envs_mjx.experts.noisy import MAX_STEPS
from envs_mjx.experts.targets import DRAWER
from envs_mjx.manipulation.observation import Readings
from envs_mjx.manipulation.scenes import Scene, build_scene
from mac.errors import UserError
from tests.helpers.ogbench_expert_states import f32, random_readings, random_target
from tests.helpers.pytest_params import slow_except

LANES, STEPS = 32, 250


class Trace(NamedTuple):
    """Recorded steps of some lanes: expert before the step, action, done, and steps."""

    before: ExpertState
    action: np.ndarray
    done: np.ndarray
    steps: np.ndarray


FAMILIES = ("cube-double", "scene", "puzzle-3x3")


@functools.cache
def rollout(style: str, scene: Scene):
    """Runs lanes in a frozen scene, in which no target is ever achieved."""

    def lane(readings: Readings, key: jax.Array) -> Trace:
        def step(expert: ExpertState, key: jax.Array) -> tuple[ExpertState, Trace]:
            act_key, new_key = jr.split(key)
            action, after, done = experts.act(style, scene, expert, readings, act_key)
            fresh = experts.retarget(style, scene, after, readings, new_key)
            steps = after.intent.steps if style == "noisy" else after.intent.index
            chosen = jax.tree.map(functools.partial(jnp.where, done), fresh, after)
            return chosen, Trace(expert, action, done, steps)

        begin, *keys = jr.split(key, STEPS + 1)
        return jax.lax.scan(step, experts.begin(style, scene, begin, readings), jnp.stack(keys))[1]

    return jax.jit(jax.vmap(lane, in_axes=(None, 0)))


@functools.cache
def trace_of(style: str, family: str) -> Trace:
    scene = build_scene(family)
    # Buttons on, drawer and window half open: not even the placeholder before the first target is achieved.
    still = random_readings(scene, 0)._replace(
        slide_pos=f32([-0.07, 0.11])[: scene.slides], button_state=np.ones(scene.buttons, bool)
    )
    return jax.tree.map(np.asarray, rollout(style, scene)(still, jr.split(jr.key(0), LANES)))


def test_unknown_style_is_refused() -> None:
    scene = build_scene("cube-single")
    readings = jax.tree.map(jnp.asarray, random_readings(scene, 0))
    with pytest.raises(UserError, match="unknown style of expert 'careful'; known: play, noisy"):
        experts.begin("careful", scene, jr.key(0), readings)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", slow_except(["scene"], FAMILIES))
def test_actions_are_finite_and_within_bounds(style: str, family: str) -> None:
    trace = trace_of(style, family)
    assert np.isfinite(trace.action).all() and np.abs(trace.action).max() <= 1.0
    assert trace.done.any(axis=1).all()


@pytest.mark.parametrize("family", slow_except(["scene"], FAMILIES))
def test_plan_ends_with_its_last_row_and_the_next_begins(family: str) -> None:
    trace = trace_of("play", family)
    plan = trace.before.intent
    np.testing.assert_array_equal(trace.done, plan.index == plan.length - 1)
    np.testing.assert_array_equal(plan.index[:, 1:][trace.done[:, :-1]], 0)
    changed = (trace.before.target.pos[:, 1:] != trace.before.target.pos[:, :-1]).any(axis=-1)
    assert not changed[~trace.done[:, :-1]].any()


@pytest.mark.parametrize(
    ("family", "p"), slow_except([("scene", 0.1)], zip(FAMILIES, (0.1, 0.1, 0.2), strict=True))
)
def test_noisy_expert_acts_at_random_as_often_as_ogbenchs(family: str, p: float) -> None:
    trace = trace_of("noisy", family)
    random = trace.steps == trace.before.intent.steps
    assert abs(random.mean() - p) < 4 * np.sqrt(p * (1 - p) / random.size)
    action = trace.action[random]
    # Uniform in [-1, 1]: mean 0, variance 1/3.
    assert np.abs(action.mean(0)).max() < 4 * np.sqrt(1 / 3 / len(action))
    np.testing.assert_allclose(action.var(0), 1 / 3, rtol=0.15)


@pytest.mark.parametrize("family", slow_except(["scene"], FAMILIES))
def test_noisy_expert_gives_up_after_its_nonrandom_steps(family: str) -> None:
    trace = trace_of("noisy", family)
    random = trace.steps == trace.before.intent.steps
    limit = np.asarray(MAX_STEPS)[trace.before.target.kind]
    np.testing.assert_array_equal(trace.done, (trace.steps == limit) & ~random)


def test_first_reaction_uses_the_previous_target_of_its_kind() -> None:
    trace, checked = trace_of("noisy", "scene"), 0
    target, seen = trace.before.target, trace.before.intent.seen
    for lane in range(LANES):
        latest = {}
        for t in range(STEPS):
            kind = int(target.kind[lane, t])
            new = t > 0 and trace.done[lane, t - 1]
            if new and kind in latest:
                np.testing.assert_array_equal(seen.pos[lane, t], latest[kind])
                checked += 1
            elif not new:
                np.testing.assert_array_equal(seen.pos[lane, t], target.pos[lane, t])
            latest[kind] = target.pos[lane, t]
    assert checked > 10


@pytest.mark.slow
def test_noise_level_is_the_episodes_own_and_at_most_a_tenth() -> None:
    for family in ("cube-double", "scene", "puzzle-3x3"):
        xi = trace_of("noisy", family).before.intent.xi
        assert (xi == xi[:, :1]).all() and xi.min() >= 0 and 0.07 < xi.max() <= 0.1
        assert len(np.unique(xi)) == LANES


def test_action_noise_has_ogbenchs_scale_and_is_clipped() -> None:
    scene = build_scene("cube-single")
    # The hand is right above the cube, with the cube's yaw: it moves down with open fingers.
    readings = random_readings(scene, 0)._replace(
        effector_pos=f32([0.4, 0.0, 0.3]),
        effector_yaw=f32(0.5),
        cube_pos=f32([[0.4, 0.0, 0.02]]),
        cube_yaw=f32([0.5]),
    )
    target = random_target(scene, 0, 0)._replace(pos=f32([0.5, 0.2, 0.02]))

    @jax.jit
    def actions(keys: jax.Array, readings: Readings, target: experts.Target) -> tuple:
        expert = experts.begin("noisy", scene, keys[0], readings)
        intent = expert.intent._replace(seen=target, xi=jnp.asarray(0.1))
        expert = eqx.tree_at(lambda e: e.intent, expert, intent)
        action, after, _ = jax.vmap(lambda key: experts.act("noisy", scene, expert, readings, key))(keys)
        return action, after.intent.steps

    action, steps = (np.asarray(x) for x in actions(jr.split(jr.key(1), 8000), readings, target))
    action = action[steps == 1]
    np.testing.assert_allclose(action[:, [0, 1, 3]].std(0), [0.1, 0.1, 0.3], rtol=0.04)
    np.testing.assert_allclose(action[:, [0, 1, 3]].mean(0), 0.0, atol=0.015)
    # Cut at -1, the expert's own -1 plus N(0, 0.1): 0.1 E max(0, N) above it.
    np.testing.assert_allclose(action[:, 2].mean(), -1 + 0.0399, atol=0.004)
    # -1 + N(0, 1), cut at -1 and 1: E max(0, N) - E max(0, N - 2) = 0.3989 - 0.0085 above -1.
    np.testing.assert_allclose(action[:, 4].mean(), -1 + 0.3904, atol=0.03)


def test_first_target_has_stacking_probability_one_half() -> None:
    scene = build_scene("cube-double")
    readings = random_readings(scene, 0)

    @jax.jit
    def stacked(keys: jax.Array, readings: Readings) -> tuple:
        def one(key: jax.Array) -> tuple:
            expert = experts.begin("play", scene, key, readings)
            later = experts.retarget("play", scene, expert, readings, jr.fold_in(key, 1))
            return *(e.target.pos[2] > 0.05 for e in (expert, later)), expert.p_stack

        return jax.vmap(one)(keys)

    first, later, p_stack = (np.asarray(x) for x in stacked(jr.split(jr.key(2), 2000), readings))
    assert abs(first.mean() - 0.5) < 4 * np.sqrt(0.25 / 2000)
    assert abs(later.mean() - 0.125) < 4 * np.sqrt(0.125 * 0.875 / 2000)
    assert later[p_stack > 0.2].mean() > 2 * later[p_stack < 0.05].mean()


def test_drawer_target_is_given_up_after_seventy_five_reactions() -> None:
    trace = trace_of("noisy", "scene")
    drawer = trace.done & (trace.before.target.kind == DRAWER)
    assert drawer.any() and (trace.steps[drawer] == 75).all()
