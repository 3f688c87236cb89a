"""Tests of every manipulation environment on engine `c` against the real ogbench, step by step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs_mjx.manipulation.env import ManipEnv, ManipState
from envs_mjx.manipulation.scenes import FAMILIES
from envs_mjx.registry import make
from tests.helpers.ogbench_runs import Run, official, play, single, stack, state_of, target_of, world_of

TASKS = (1, 2, 3, 4, 5)
SEEDS = (0, 1, 2)
NOISE = {0: 0.0, 1: 0.1, 2: None}  # the expert, the expert with noise, random actions
STEPS = 200
CONTACT = 18  # place of the contact force in an observation

CASES = [
    *(
        pytest.param((family, mode, TASKS), id=f"{family}-{mode}", marks=pytest.mark.slow)
        for family in FAMILIES
        for mode in ("single", "goal")
    ),
    *(
        pytest.param((family, mode, tasks), id=f"{family}-{mode}-some", marks=marks)
        for family, mode, tasks, marks in (
            ("scene", "single", (1, 5), ()),
            ("puzzle-3x3", "goal", (2, 4), pytest.mark.slow),
        )
    ),
]


class Recorded(NamedTuple):
    """An environment of ours, and ogbench's runs in it by (task, seed)."""

    env: ManipEnv
    runs: dict[tuple[int, int], Run]


@pytest.fixture(scope="module", params=CASES)
def recorded(request) -> Recorded:
    family, mode, tasks = request.param
    env = make(f"{family}-play-" + ("singletask-v0" if mode == "single" else "oraclerep-v0"))
    assert isinstance(env, ManipEnv)
    runs = {}
    for task in tasks:
        theirs = single(family, task) if mode == "single" else official(f"{family}-v0", use_oracle_rep=True)
        for seed in SEEDS:
            options = {"task_id": task} if mode == "goal" else None
            runs[task, seed] = play(
                theirs, env.engine, seed=10 * task + seed, steps=STEPS, noise=NOISE[seed], options=options
            )
    return Recorded(env, runs)


@pytest.fixture(scope="module")
def stepped(recorded: Recorded) -> dict[tuple[int, int], ManipState]:
    """Returns our step from each of ogbench's states, under its action."""
    env = recorded.env
    step = jax.jit(jax.vmap(env.step))
    goal = None if env.spec.goal_dim is None else jnp.zeros(env.spec.goal_dim)
    return {
        key: step(stack([state_of(env, run, t, goal) for t in range(STEPS)]), jnp.asarray(run.action))
        for key, run in recorded.runs.items()
    }


def observation_error(env: ManipEnv, ours, theirs) -> np.ndarray:
    """Returns the largest error of each observation. That of the contact force, which depends on a solver's
    last bits, is divided by 100.

    A cube that has tumbled onto its side has no yaw (its axis is level): OGBench reports the angle of
    two numbers near zero, which float32 cannot tell from one another, so those are left out.
    """
    error = np.abs(np.asarray(ours) - theirs)
    error[..., CONTACT] /= 100
    block = slice(19, 19 + 9 * env.scene.cubes)
    cubes = error[..., block].reshape(*error.shape[:-1], -1, 9)
    w, x, y, z = np.moveaxis(theirs[..., block].reshape(cubes.shape)[..., 3:7], -1, 0)
    cubes[np.hypot(w * z + x * y, 0.5 - y * y - z * z) < 2e-3, 7:] = 0.0
    error[..., block] = cubes.reshape(*error.shape[:-1], -1)
    return error.max(axis=-1)


def test_the_runs_are_worth_comparing(recorded: Recorded):
    """Checks that the runs touch and move objects and change the reward; else the tests below prove
    little."""
    scene, runs = recorded.env.scene, recorded.runs.values()
    assert sum(run.touched.any() for run in runs) >= len(runs) // 2
    if scene.cubes:
        assert max(run.qpos[:, scene.cube_qpos + 2].max() for run in runs) > 0.06
    if scene.buttons:
        assert sum((run.buttons[1:] != run.buttons[:-1]).any(1).sum() for run in runs) >= 5
    for slide in scene.slide_qpos:
        assert max(np.ptp(run.qpos[:, slide]) for run in runs) > 0.1
    if recorded.env.spec.goal_dim is None:
        assert len({reward for run in runs for reward in run.reward}) >= 2


def test_every_step_from_ogbenchs_state_is_ogbenchs_step(recorded: Recorded, stepped):
    """Excepts steps that jam the fingers between buttons, at most one in thirty: in these MuJoCo's own result
    changes by more than the tolerance if a servo target changes in its last bit. With ogbench's own targets
    every step is equal bit for bit (the test after the next).
    """
    env, jammed = recorded.env, 0
    for key, run in recorded.runs.items():
        after, steps = stepped[key], np.arange(STEPS)
        same = observation_error(env, after.obs, run.obs) <= 1e-4
        jammed += np.sum(~same)
        for ours, theirs in (
            (after.reward, run.reward),
            (after.success, run.success),
            (after.done, run.terminated | (steps + 1 >= env.spec.max_steps)),
            (after.buttons, run.buttons),
        ):
            np.testing.assert_array_equal(np.asarray(ours)[same], theirs[same])
    assert jammed <= (0 if env.scene.family.startswith("cube") else STEPS * len(recorded.runs) // 30)


def test_servo_targets_are_the_official_controllers(recorded: Recorded):
    env = recorded.env
    control = jax.jit(jax.vmap(lambda p, a: env.engine.control(env.arm, env.scene, p, a)))
    for run in recorded.runs.values():
        bits = control(stack([world.physics for world in run.before]), jnp.asarray(run.action))
        np.testing.assert_allclose(np.asarray(bits).view(np.float64), run.ctrl, rtol=0, atol=1e-12)


def test_physics_under_ogbenchs_servo_targets_is_bitwise_equal(recorded: Recorded):
    for run in recorded.runs.values():
        raw, locked = (np.stack([getattr(w.physics, f) for w in run.before]) for f in ("raw", "locked"))
        ctrl = np.ascontiguousarray(run.ctrl).view(np.uint32)
        _, rows = recorded.env.engine.host.step(raw, ctrl, np.ones(STEPS, bool), locked)
        np.testing.assert_array_equal(rows[:, : run.qpos.shape[1]], run.qpos.astype(np.float32))


def test_goal_representations_are_ogbenchs(recorded: Recorded, stepped):
    env = make(f"{recorded.env.scene.family}-play-oraclerep-v0")
    assert isinstance(env, ManipEnv)
    for key, run in recorded.runs.items():
        goals = jax.vmap(env.goal_of)(stepped[key].world)
        same = observation_error(env, stepped[key].obs, run.obs) <= 1e-4
        np.testing.assert_allclose(goals[same], run.oracle[same], atol=1e-4)


def test_relabelled_rewards_are_ogbenchs(recorded: Recorded):
    """Compares the reward of a stored state with ogbench's for acting in it, for all tasks."""
    env, family = recorded.env, recorded.env.scene.family
    theirs = single(family, 1)
    data, first = theirs._data, {task: run for (task, seed), run in recorded.runs.items() if seed == 0}
    for task, of_task in first.items():
        for key, run in recorded.runs.items():
            rows = np.arange(0, STEPS, 10 if key[1] else 3)
            reward, mask = env.relabel(run.obs[rows].astype(np.float32), task)
            theirs._target_button_states = of_task.target.buttons.astype(int)
            if env.scene.slides:
                theirs._target_drawer_pos, theirs._target_window_pos = of_task.target.slides.astype(float)
            for i, row in enumerate(rows):
                data.qpos[:] = run.qpos[row].astype(np.float32)
                theirs._cur_button_states = run.buttons[row].astype(int)
                if env.scene.cubes:
                    data.mocap_pos[theirs._cube_target_mocap_ids] = _goal_cubes(theirs, task)
                expected = theirs.compute_reward()
                assert (reward[i], mask[i]) == (expected, float(expected < 0))


def _goal_cubes(theirs, task: int) -> np.ndarray:
    """The goal positions of a task's cubes, unshuffled."""
    info = theirs.task_infos[task - 1]
    return np.asarray(info["goal_xyzs"] if "goal_xyzs" in info else info["goal"]["block_xyzs"])


@pytest.mark.slow
def test_free_runs_stay_with_ogbench_up_to_the_first_contact(recorded: Recorded):
    """Checks runs of the same start and actions without correction: rewards and successes are the same.

    Compared are the arm and the objects. The gripper's passive links rattle chaotically in their joints,
    without a contact; the observation does not contain them.
    """
    env, runs = recorded.env, list(recorded.runs.values())

    def episode(state, actions):
        # Episodes continue after success, as the recorded ones do.
        def body(state, action):
            after = env.step(state, action)
            return dataclasses.replace(after, done=jnp.zeros_like(after.done)), after

        return jax.lax.scan(body, state, actions)[1]

    goal = None if env.spec.goal_dim is None else jnp.zeros(env.spec.goal_dim)
    start = stack([state_of(env, run, 0, goal) for run in runs])
    after = jax.jit(jax.vmap(episode))(start, jnp.stack([run.action for run in runs]))
    seen = np.r_[0:6, 14 : env.scene.model.nq]
    for i, run in enumerate(runs):
        # Bodies in contact at the end of a control step may have touched, and bounced, some steps before.
        free = max(np.argmax(run.touched) - 10, 0) if run.touched.any() else STEPS
        np.testing.assert_array_equal(after.reward[i, :free], run.reward[:free])
        np.testing.assert_array_equal(after.success[i, :free], run.success[:free])
        np.testing.assert_allclose(after.physics.qpos[i, :free, seen], run.qpos[:free, seen].T, atol=1e-3)
        np.testing.assert_allclose(after.obs[i, :free, 12:15] / 10, run.obs[:free, 12:15] / 10, atol=1e-3)


def test_a_reset_shows_the_goal_as_ogbench_does(recorded: Recorded):
    """Replays its random steps from the solved scene: states and goals are the same."""
    family = recorded.env.scene.family
    ours, theirs = make(f"{family}-play-oraclerep-v0"), official(f"{family}-v0", use_oracle_rep=True)
    assert isinstance(ours, ManipEnv)
    advance = jax.jit(ours.advance)
    for task in TASKS:
        shown, worlds, actions = theirs.step, [], []

        def step(action, shown=shown, worlds=worlds, actions=actions):
            worlds.append(world_of(theirs, ours.engine))
            actions.append(jnp.asarray(action))
            return shown(action)

        theirs.step = step
        ob, info = theirs.reset(seed=task, options={"task_id": task})
        del theirs.step
        assert len(actions) == (5 if any(ours.scene.grid) else 2)
        solved = jax.tree.map(jnp.asarray, worlds[0])
        goal = target_of(theirs)
        assert ours.reached(solved, goal).all()
        world = solved
        for action in actions:
            world = advance(world, action, jnp.asarray(True))
        np.testing.assert_allclose(ours.goal_of(world), info["goal"], atol=1e-4)
        start = jax.tree.map(jnp.asarray, world_of(theirs, ours.engine))
        assert observation_error(ours, ours.observe(start), ob) <= 1e-4
