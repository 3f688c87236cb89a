"""The cube environments on engine `c` against the real ogbench."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ogbench.relabel_utils import add_oracle_reps, relabel_dataset

from envs_mjx import arm as arms
from envs_mjx.base import EnvState
from envs_mjx.registry import make
from mac.errors import UserError
from tests.ogbench_runs import Run, official, play

TASKS = (1, 2, 3, 4, 5)
SEEDS = (0, 1, 2)
STEPS = 200
NOISE = {0: 0.0, 1: 0.1, 2: None}  # the expert, the expert disturbed, random actions
CONTACT = 18  # place of the contact force in an observation


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *trees)


def states_of(env, run: Run, times, goal=None) -> EnvState:
    """Our states of ogbench's run before its actions at `times`, the physics bit for bit; stacked."""
    blank = EnvState(
        physics=run.before[0],
        obs=jnp.zeros(env.spec.obs_dim),
        goal=goal,
        target=jnp.asarray(run.target, jnp.float32),
        reward=jnp.zeros(()),
        success=jnp.asarray(False),
        done=jnp.asarray(False),
        t=jnp.asarray(0),
    )
    at = [dataclasses.replace(blank, physics=run.before[t], t=jnp.asarray(t)) for t in times]
    return stack(at)


def assert_same_observations(ours, theirs):
    """Within 1e-4; the contact force, which a solver's last bits reach, within 1e-2.

    A cube that has tumbled onto its side has no yaw (its axis is level): OGBench reports the angle of
    two numbers near zero, which float32 cannot tell from one another, so those are left out.
    """
    error = np.abs(np.asarray(ours) - theirs)
    assert error[..., CONTACT].max(initial=0) <= 1e-2
    error[..., CONTACT] = 0.0
    cubes = error[..., 19:].reshape(*error.shape[:-1], -1, 9)
    w, x, y, z = np.moveaxis(theirs[..., 19:].reshape(cubes.shape)[..., 3:7], -1, 0)
    cubes[np.hypot(w * z + x * y, 0.5 - y * y - z * z) < 2e-3, 7:] = 0.0
    assert max(error[..., :19].max(), cubes.max()) <= 1e-4


def compare_steps(env, run: Run, after: EnvState, limit: int):
    assert_same_observations(after.obs, run.obs)
    np.testing.assert_array_equal(after.reward, run.reward)
    np.testing.assert_array_equal(after.success, run.success)
    steps = np.arange(len(run.obs))
    np.testing.assert_array_equal(after.done, run.terminated | (steps + 1 >= limit))


@pytest.fixture(scope="module")
def env():
    return make("cube-single-play-singletask-task2-v0")


@pytest.fixture(scope="module")
def runs(env) -> dict[tuple[int, int], Run]:
    """ogbench's runs by (task, seed)."""
    theirs, played = official("cube-single-singletask-v0"), {}
    for task in TASKS:
        theirs._reward_task_id = task
        for seed in SEEDS:
            noise = NOISE[seed]
            played[task, seed] = play(theirs, env.engine, seed=10 * task + seed, steps=STEPS, noise=noise)
    return played


@pytest.fixture(scope="module")
def step(env):
    """A compiled step of a batch; called with STEPS states everywhere, to compile once."""
    return jax.jit(jax.vmap(env.step))


def test_the_runs_are_worth_comparing(runs):
    """They touch, lift, succeed and fail; otherwise the tests below say little."""
    assert sum(run.success.any() for run in runs.values()) >= 5
    assert sum(run.touched.any() for run in runs.values()) >= 10
    assert max(run.qpos[:, 16].max() for run in runs.values()) > 0.06


def test_every_step_from_ogbenchs_state_is_ogbenchs_step(env, step, runs):
    worst = 0.0
    for run in runs.values():
        after = step(states_of(env, run, range(STEPS)), jnp.asarray(run.action))
        compare_steps(env, run, after, env.spec.max_steps)
        worst = max(worst, float(np.abs(np.asarray(after.physics.qpos) - run.qpos).max()))
    assert worst < 1e-4


def test_free_runs_stay_with_ogbench_up_to_the_first_contact(env, runs):
    """Same start, same actions, no correction: the same rewards and successes throughout.

    Compared are the arm and the cube. The gripper's passive links rattle in their joints, chaotically
    and without a contact: they are nothing that the observation shows.
    """

    def episode(state, actions):
        # Episodes run on after success here, as the recorded ones do.
        def body(state, action):
            after = env.step(state, action)
            return going_on(after), after

        return jax.lax.scan(body, state, actions)[1]

    start = jax.tree.map(lambda *x: jnp.concatenate(x), *(states_of(env, run, [0]) for run in runs.values()))
    actions = jnp.stack([run.action for run in runs.values()])
    after = jax.jit(jax.vmap(episode))(start, actions)
    for i, run in enumerate(runs.values()):
        np.testing.assert_array_equal(after.reward[i], run.reward)
        np.testing.assert_array_equal(after.success[i], run.success)
        free = np.argmax(run.touched) if run.touched.any() else STEPS
        seen = np.r_[0:6, 14:21]
        np.testing.assert_allclose(after.physics.qpos[i, :free, seen], run.qpos[:free, seen].T, atol=1e-3)
        np.testing.assert_allclose(after.obs[i, :free, 12:15] / 10, run.obs[:free, 12:15] / 10, atol=1e-3)


def going_on(state: EnvState) -> EnvState:
    return dataclasses.replace(state, done=jnp.zeros_like(state.done))


def test_goal_conditioned_steps_are_ogbenchs():
    """Judged after the action, on cubes in shuffled order; ogbench's goal is of our width."""
    ours, theirs = make("cube-double-play-oraclerep-v0"), official("cube-double-v0", use_oracle_rep=True)
    run = play(theirs, ours.engine, seed=3, steps=120, noise=0.1, options={"task_id": 2})
    goal = jnp.asarray(theirs._cur_goal_ob, jnp.float32)
    assert goal.shape == (ours.spec.goal_dim,)
    after = jax.jit(jax.vmap(ours.step))(states_of(ours, run, range(120), goal), jnp.asarray(run.action))
    compare_steps(ours, run, after, ours.spec.max_steps)


def test_servo_targets_are_the_official_controllers(env, runs):
    control = jax.jit(jax.vmap(functools.partial(arms.control, env.arm, env.scene)))
    for run in runs.values():
        ctrl = np.asarray(control(stack(run.before), jnp.asarray(run.action)))
        np.testing.assert_allclose(ctrl[:, :6], run.ctrl[:, :6], atol=5e-6)
        np.testing.assert_allclose(ctrl[:, 6], run.ctrl[:, 6], atol=1e-3)


def test_starting_poses_are_the_official_controllers(env):
    """From the home pose to random ones, over many more iterations than a control step takes."""
    theirs = official("cube-single-v0")
    theirs.reset()
    rng = np.random.default_rng(0)
    low, high = theirs._arm_sampling_bounds
    pos, yaw = rng.uniform(low, high, (48, 3)), rng.uniform(-np.pi, np.pi, 48)
    solve = jax.jit(
        jax.vmap(lambda p, y: arms.joints_for(env.arm, p, y, jnp.asarray(arms.HOME, jnp.float32)))
    )
    ours = np.asarray(solve(jnp.asarray(pos, jnp.float32), jnp.asarray(yaw, jnp.float32)))
    for i in range(48):
        np.testing.assert_allclose(ours[i], official_pose(theirs, pos[i], yaw[i]), atol=2e-5)


def official_pose(env, pos, yaw):
    from ogbench.manipspace import lie

    turn = lie.SO3.from_z_radians(yaw) @ env._effector_down_rotation
    flange = lie.SE3.from_rotation_and_translation(turn, pos) @ env._T_pa
    return env._ik.solve(flange.translation(), flange.rotation().wxyz, env._home_qpos)


def test_a_reset_is_observed_as_ogbench_observes_it(env):
    theirs = official("cube-single-singletask-task2-v0")
    look = jax.jit(lambda qpos: env.observe(env.engine.load(qpos, jnp.zeros(env.scene.model.nv))))
    for seed in range(3):
        ob, _ = theirs.reset(seed=seed)
        assert_same_observations(look(jnp.asarray(theirs._data.qpos, jnp.float32)), ob)


def test_actions_are_clipped(env, step, runs):
    states = states_of(env, runs[1, 0], range(STEPS))
    a, b = step(states, jnp.full((STEPS, 5), 7.0)), step(states, jnp.ones((STEPS, 5)))
    np.testing.assert_array_equal(a.obs, b.obs)


def test_relabelled_rewards_are_ogbenchs(env, runs):
    qpos = np.concatenate([run.qpos for run in runs.values()]).astype(np.float32)
    obs = np.concatenate([run.obs for run in runs.values()]).astype(np.float32)
    theirs = official("cube-single-singletask-v0")
    for task in TASKS:
        theirs._reward_task_id, dataset = task, {"qpos": qpos}
        relabel_dataset("cube-single-v0", theirs, dataset)
        reward, mask = env.relabel(obs, task)
        np.testing.assert_array_equal(reward, dataset["rewards"])
        np.testing.assert_array_equal(mask, dataset["masks"])
        assert 0 < mask.mean() < 1


def test_goal_representations_are_ogbenchs(runs):
    env = make("cube-single-play-oraclerep-v0")
    dataset = {"qpos": np.stack([run.qpos[-1] for run in runs.values()])}
    add_oracle_reps("cube-single-v0", official("cube-single-v0"), dataset)
    last = stack([run.before[-1] for run in runs.values()])
    look = jax.vmap(lambda physics, qpos: env.goal_of(dataclasses.replace(physics, qpos=qpos)))
    goals = look(last, jnp.asarray(dataset["qpos"], jnp.float32))
    np.testing.assert_allclose(goals, dataset["oracle_reps"], atol=1e-5)


def test_wrong_observations_or_tasks_are_mistakes(env):
    with pytest.raises(UserError, match=r"\(N, 28\)"):
        env.relabel(np.zeros((3, 37), np.float32), 1)
    with pytest.raises(UserError, match="task 6"):
        env.relabel(np.zeros((3, 28), np.float32), 6)
