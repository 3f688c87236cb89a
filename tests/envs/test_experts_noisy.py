"""Tests of the `noisy` experts' reactions against OGBench's, in random states and through an episode."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx import experts
from envs_mjx.experts.noisy import MAX_STEPS, NoisyState, RestPose, react, rest_from_draws
from envs_mjx.experts.targets import BUTTON, CUBE, DRAWER, WINDOW, Target
from envs_mjx.manipulation.observation import Readings
from envs_mjx.manipulation.scenes import Scene, build_scene
from tests.helpers.ogbench_expert_states import (
    CASES,
    KIND_NAMES,
    MARKOV_ORACLES,
    QUICK_CASES,
    f32,
    info_of,
    oracle,
    package_env,
    random_readings,
    random_target,
    readings_of,
    stack,
    taped,
    target_of,
)
from tests.helpers.pytest_params import slow_except

CASES_EACH = 300
PHASES = {CUBE: "123456789", BUTTON: "1234", DRAWER: "12345", WINDOW: "12345"}


@functools.cache
def reactions(scene: Scene):
    return jax.jit(jax.vmap(lambda *args: react(scene, *args)))


def situation(scene: Scene, kind: int, seed: int) -> tuple[Readings, Target, RestPose]:
    """Draws a state in which hand at the object or at rest, and object at its target, have probability one
    half each, so that every phase occurs."""
    rng = np.random.default_rng(3000 + seed)
    here, target = random_readings(scene, seed), random_target(scene, kind, seed)
    rest = RestPose(f32(rng.uniform(*np.asarray(scene.arm_bounds))), f32(rng.uniform(-np.pi, np.pi)))

    def nearby(pos: np.ndarray, size: float) -> np.ndarray:
        return f32(pos + rng.uniform(-size, size, 3))

    if kind == CUBE:
        at = here.cube_pos[target.index] + f32([0.0, 0.0, rng.choice([0.0, 0.1, 0.2])])
        at = nearby(target.pos, rng.choice([0.01, 0.06])) if rng.random() < 0.6 else at
        here.cube_pos[target.index] = at
    elif kind == BUTTON:
        at = target.pos
    else:
        near = target.value + f32(rng.uniform(-0.015, 0.015))
        here.slide_pos[target.index] = near if rng.random() < 0.5 else here.slide_pos[target.index]
        at = scene.handle[target.index] + here.slide_pos[target.index] * scene.handle_axis[target.index]
    hand = (nearby(at, 0.04), nearby(at, 0.015), nearby(rest.pos, 0.03), here.effector_pos)[rng.integers(4)]
    contact = f32(rng.choice([0.0, 0.09, 0.11, 0.49, 0.51, 0.8]))
    return here._replace(effector_pos=hand, gripper_contact=contact), target, rest


@pytest.mark.parametrize(("family", "kind"), slow_except(QUICK_CASES, CASES))
def test_reactions_equal_the_packages_in_every_phase(family: str, kind: int) -> None:
    scene, expert = build_scene(family), oracle(MARKOV_ORACLES, family, kind)
    cases = [situation(scene, kind, seed) for seed in range(CASES_EACH)]
    actions, over = reactions(scene)(*(stack(list(x)) for x in zip(*cases, strict=True)))
    phases, overs = set(), 0
    expert.print_phase = lambda text: phases.add(text[0])
    for i, (readings, target, rest) in enumerate(cases):
        expert.reset(None, None)
        expert._final_pos, expert._final_yaw = np.asarray(rest.pos, float), float(rest.yaw)
        theirs = expert.select_action(None, info_of(scene, readings, target))
        np.testing.assert_allclose(actions[i], theirs, atol=1e-5)
        assert bool(over[i]) == expert.done
        overs += expert.done
    assert phases == set(PHASES[kind]) and 10 < overs < CASES_EACH - 10


@pytest.mark.parametrize(("family", "kind"), slow_except(QUICK_CASES, CASES))
def test_limits_and_resting_places_equal_the_packages(family: str, kind: int) -> None:
    scene, expert = build_scene(family), oracle(MARKOV_ORACLES, family, kind)
    uniform = np.random.default_rng(kind).uniform(size=4).astype(np.float32)
    with taped([uniform[:3], uniform[3]]):
        expert.reset(None, None)
    rest = rest_from_draws(jnp.asarray(uniform), scene, jnp.asarray(kind))
    np.testing.assert_allclose(rest.pos, expert._final_pos, atol=1e-6)
    np.testing.assert_allclose(rest.yaw, expert._final_yaw, atol=1e-6)
    assert MAX_STEPS[kind] == expert._max_step


def test_an_episode_of_the_packages_loop_gives_the_same_actions() -> None:
    """Runs OGBench's loop without noise and random actions; ours gets the same targets and resting places."""
    scene, env = build_scene("scene"), package_env("scene").unwrapped
    agents = dict(zip(KIND_NAMES, (make(env=env) for make in MARKOV_ORACLES), strict=True))
    np.random.seed(0)
    env.reset(seed=2)
    for _ in range(40):  # after which a target of each kind exists
        env.set_new_target(return_info=False)
    info = env.reset(seed=3)[1]
    step = jax.jit(functools.partial(_noiseless_step, scene))
    renew = jax.jit(NoisyState.renew)

    def take_up(info: dict) -> tuple:
        agent = agents[info["privileged/target_task"]]
        agent.reset(None, info)
        return agent, target_of(scene, info), RestPose(f32(agent._final_pos), f32(agent._final_yaw))

    agent, target, rest = take_up(info)
    unset = stack([target_of(scene, info, name) for name in KIND_NAMES])
    pursuit = jax.jit(NoisyState.of)(f32(0.0), unset, target, rest)
    stale = 0
    for _ in range(500):
        action = agent.select_action(None, info)
        ours, pursuit, done = step(pursuit, target, readings_of(scene, info))
        np.testing.assert_allclose(ours, action, atol=2e-4)
        assert bool(done) == agent.done
        info = env.step(action)[-1]
        if agent.done:
            agent, target, rest = take_up(env.set_new_target()[1])
            pursuit = renew(pursuit, target, rest)
            stale += not np.allclose(pursuit.seen.pos, target.pos)
    assert stale >= 3


def _noiseless_step(scene: Scene, pursuit: NoisyState, target: Target, readings: Readings) -> tuple:
    """Calls `experts.act` with a key for which the action is not a random one, and without noise."""
    expert = experts.ExpertState(target, jnp.zeros(()), pursuit)
    action, expert, done = experts.act("noisy", scene, expert, readings, _QUIET)
    return action, expert.intent, done


_QUIET = next(key for key in map(jr.key, range(9)) if jr.uniform(jr.split(key)[0], (6,))[0] > 0.2)
