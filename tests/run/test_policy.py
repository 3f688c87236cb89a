"""Saved policies in a loop of one's own: the same actions as in the project's evaluations."""

import shutil
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest

import mac
from envs_mjx import make
from experiments.launch.saved_run import open_run
from experiments.run import main
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import EPSILON, Normalizer
from mac.errors import UserError
from mac.run.evaluate import Policies, episode_keys, evaluation_keys, select_actions
from mac.types import EnvSpec, Past, SampleSpec
from tests.helpers.command_line import SIZES

ENV = "cube-single-play-singletask-task2-v0"


@pytest.fixture(scope="module")
def goals(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """A goal-conditioned run of 5 updates."""
    folder = tmp_path_factory.mktemp("goals") / "run"
    env = ["--env", "cube-single-play-oraclerep-v0", "--eval.batch", "4"]
    assert main([*SIZES, *data, *env, "--steps", "5", "--out", str(folder)]) == 0
    return folder


def actions_of(run: Path, number: int, obs: np.ndarray, goal: np.ndarray | None, episode: int, decision: int):
    """Actions as evaluations select them for one episode of the run's first task."""
    found = open_run(run)
    keys = evaluation_keys(jnp.asarray(found.numbers), found.step)
    task = jnp.asarray([found.algo.env.tasks[0]])
    _, noise = episode_keys(keys, task, jnp.asarray([episode]))
    rows = jnp.broadcast_to(jnp.asarray(obs, jnp.float32), (len(found.numbers), 1, len(obs)))
    goals = None
    if goal is not None:
        goals = jnp.broadcast_to(jnp.asarray(goal, jnp.float32), (len(found.numbers), 1, len(goal)))
    count = jnp.full(noise.shape, decision, jnp.int32)
    chosen = select_actions(found.policies, rows, goals, noise, count)
    return np.clip(np.asarray(chosen)[found.numbers.index(number), 0], -1, 1)


def test_loop_in_ogbench_gets_the_actions_of_evaluations(finished: Path):
    env = ogbench.make_env_and_datasets(ENV, env_only=True)
    policy = mac.load(finished, seed=1)
    for episode in range(2):
        obs, _ = env.reset(seed=episode, options={"task_id": 2})
        policy.reset(episodes=[episode])
        for step in range(21):
            action = policy(obs)
            assert action.shape == (5,) and action.dtype == np.float32 and env.action_space.contains(action)
            if step % 10 == 0:
                chunk = actions_of(finished, 1, obs, None, episode, step // 10)
            np.testing.assert_allclose(action, chunk[step % 10], atol=1e-5)
            obs, _, terminated, truncated, _ = env.step(action)
            assert not (terminated or truncated)


def test_batch_gets_the_actions_of_single_episodes(finished: Path, getkey):
    rows = np.asarray(jax.random.normal(getkey(), (25, 3, 28)))
    batch, single = mac.load(finished), mac.load(finished)
    together = np.stack([batch(row) for row in rows])
    for lane in range(3):
        single.reset(episodes=[lane])
        alone = np.stack([single(row[lane]) for row in rows])
        np.testing.assert_allclose(together[:, lane], alone, atol=1e-5)


def test_restarted_episodes_decide_anew_and_others_go_on(finished: Path, getkey):
    rows = np.asarray(jax.random.normal(getkey(), (8, 2, 28)))
    policy, straight = mac.load(finished), mac.load(finished)
    for row in rows[:3]:
        policy(row), straight(row)
    policy.restart(np.asarray([False, True]))
    later = np.stack([policy(row) for row in rows[3:]])
    np.testing.assert_array_equal(later[:, 0], np.stack([straight(row)[0] for row in rows[3:]]))
    other = mac.load(finished)
    other.reset(episodes=[2])
    np.testing.assert_allclose(later[:, 1], np.stack([other(row[1]) for row in rows[3:]]), atol=1e-5)


def test_goals_are_entries_or_whole_observations(goals: Path):
    env = make("cube-single-play-oraclerep-v0")
    state = env.reset(jax.random.key(0), jnp.asarray(1))
    obs, goal = np.asarray(state.obs), np.asarray(state.goal)
    policy = mac.load(goals)
    found = policy(obs, goal)
    np.testing.assert_allclose(found, actions_of(goals, 0, obs, goal, 0, 0)[0], atol=1e-5)
    whole = np.zeros(28)
    whole[list(policy.env.goal_columns)] = goal
    policy.reset()
    np.testing.assert_array_equal(policy(obs, whole), found)
    policy.reset()
    with pytest.raises(UserError, match="goal-conditioned"):
        policy(obs)


class Remembering(AbstractAlgorithm):
    """Acts with the sum of the last two steps' observations, actions and rewards."""

    env: EnvSpec = eqx.field(static=True)

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(1, 1)

    @property
    def history(self) -> int:
        return 2

    def init(self, key: Any) -> TrainState:
        return TrainState((), (), ())

    def update(self, state: Any, batch: Any, step: Any, key: Any) -> Any:
        raise NotImplementedError

    def act(self, *_: Any) -> Any:
        raise AssertionError("act_after is called")

    def act_after(self, state: Any, past: Past, obs: Any, goal: None, key: Any) -> jax.Array:
        told = past.valid * (past.obs[..., 0] + past.actions[..., 0] + past.rewards)
        return jnp.broadcast_to(0.01 * (1 + told.sum(-1))[:, None, None], (len(obs), 1, 1))


def test_history_is_that_of_the_running_episode():
    normalizer = Normalizer(jnp.zeros(1), jnp.ones(1) - EPSILON)
    algo = Remembering(EnvSpec("toy", 1, 1, None, (1,), 9, 1.0))
    state = jax.tree.map(lambda x: x[None], algo.init(None))
    policy = mac.Policy(Policies(algo, normalizer, state), jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        first = policy(np.asarray([[1.0], [2.0]]))
        np.testing.assert_allclose(first[:, 0], 0.01)
        with pytest.raises(UserError, match="reward of the last step"):
            policy(np.asarray([[1.0], [2.0]]))
        second = policy(np.asarray([[3.0], [4.0]]), reward=np.asarray([5.0, 6.0]))
        np.testing.assert_allclose(second[:, 0], [0.01 * (1 + 6.01), 0.01 * (1 + 8.01)], rtol=1e-6)
        policy.restart(np.asarray([True, False]))
        third = policy(np.asarray([[3.0], [4.0]]), reward=7.0)
        told = (2 + 0.01 + 6) + (4 + 0.01 * (1 + 8.01) + 7)
        np.testing.assert_allclose(third[:, 0], [0.01, 0.01 * (1 + told)], rtol=1e-6)


def test_wrong_arguments_are_named(finished: Path, tmp_path: Path):
    policy = mac.load(finished)
    with pytest.raises(UserError, match=r"obs has shape \(3,\)"):
        policy(np.zeros(3))
    policy(np.zeros((2, 28)))
    with pytest.raises(UserError, match=r"call reset\(\)"):
        policy(np.zeros((3, 28)))
    with pytest.raises(UserError, match=r"seed=7: .* has seeds 0 to 1"):
        mac.load(finished, seed=7)
    with pytest.raises(UserError, match="holds no run"):
        mac.load(tmp_path)
    with pytest.raises(UserError, match="has checkpoints of updates 10"):
        mac.load(shutil.copytree(finished, tmp_path / "run"), step=3)
