"""Goals on their way to the policy: each episode's own, normalised as observations are, in every program.

The policy acts out the goal that it is given, and the worlds here write down what was done.
"""

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.manipulation.observation import Objects
from experiments.launch.saved_run import SavedRun
from experiments.launch.settings import DataConfig, EvalConfig, Settings
from experiments.ogbench_eval import evaluation
from experiments.ogbench_eval.worker import Snapshot, Start, StepResult
from experiments.video import record
from experiments.video.record import film_ours, record_in_ogbench
from mac.algorithm import TrainState
from mac.config import Config
from mac.data.normalize import Normalizer
from mac.run.evaluate import episode_keys, evaluate, evaluation_keys
from mac.run.mesh import seed_keys
from mac.run.train import RunConfig
from mac.types import EnvSpec
from tests.helpers.fixed_policy import ActsOnly

SPEC_3 = EnvSpec("listener", 3, 2, 2, (1, 4), max_steps=2, control_dt=1.0, goal_columns=(2, 0))
NORM = Normalizer(jnp.asarray([1.0, 50.0, -2.0]), jnp.asarray([0.5, 9.0, 4.0]))
WEIGHTS = np.asarray([1.0, 100.0])


def seen(goal: np.ndarray) -> np.ndarray:
    """What the policy should see: entries 2 and 0, less their centre, by their half range + 0.001."""
    return (np.asarray(goal) - [-2.0, 1.0]) / [4.001, 0.501]


class Telling(ActsOnly):
    """Acts out its goal, times the seed's number."""

    env: EnvSpec = eqx.field(static=True, default=SPEC_3)

    def act(self, state: TrainState, obs: jax.Array, goal: jax.Array | None, key: jax.Array) -> jax.Array:
        assert goal is not None and goal.shape == (len(obs), 2)
        return (state.nets * goal)[:, None]


class ListenerState(EnvState):
    """With what a film looks at: joint positions are the last action."""

    target: Objects
    qpos: jax.Array
    buttons: jax.Array

    @property
    def physics(self) -> Any:
        return self


class Listener(AbstractEnv):
    """Goals are (task, a number of the episode's key); pays `WEIGHTS` times the action, for two steps."""

    spec: EnvSpec = eqx.field(static=True, default=SPEC_3)

    def reset(self, key: jax.Array, task: jax.Array) -> ListenerState:
        goal = jnp.stack([task.astype(jnp.float32), jr.uniform(key)])
        objects = Objects(jnp.zeros((1, 3)), jnp.zeros(0, bool), jnp.zeros(0))
        buttons = jnp.zeros(1, bool)
        return ListenerState(obs=jnp.zeros(3), goal=goal, target=objects, qpos=jnp.zeros(2), buttons=buttons)

    def step(self, state: ListenerState, action: jax.Array) -> ListenerState:
        paid, t = jnp.sum(jnp.asarray(WEIGHTS, jnp.float32) * action), state.t + 1
        new = (paid, t, t >= 2, action)
        after = eqx.tree_at(lambda s: (s.reward, s.t, s.done, s.qpos), state, new)
        return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def run() -> SavedRun:
    """Two seeds of the policy, with the numbers 1 and 2."""
    settings = Settings(Config(), RunConfig(), EvalConfig(), DataConfig(), seeds=2)
    return SavedRun(Path(), settings, Telling(), NORM, 0, TrainState(jnp.asarray([1.0, 2.0]), (), ()))


def drawn(key: jax.Array, task: int, episode: int) -> np.ndarray:
    """Goal of an episode of the listener."""
    k_reset, _ = episode_keys(key[None], jnp.asarray([task]), jnp.asarray([episode]))
    return np.asarray([task, float(jr.uniform(k_reset[0, 0]))])


@pytest.mark.parametrize("batch", [0, 3])
def test_evaluation_gives_each_episode_its_own_normalised_goal(run: SavedRun, batch: int):
    keys = seed_keys(5, 2)
    got = evaluate(run.policies, Listener(), 3, keys, batch=batch)
    for s in range(2):
        for i, task in enumerate(SPEC_3.tasks):
            for e in range(3):
                want = 2 * (s + 1) * WEIGHTS @ seen(drawn(keys[s], task, e))
                assert got.episode_return[s, i, e] == pytest.approx(want, rel=1e-4)


class Lanes:
    """Replaces `EnvPool`: an episode lasts seed % 3 + 1 steps, and its goal follows from seed and task."""

    asked: list[tuple[int, np.ndarray]]

    def __init__(self, name: str, count: int, *, film: bool = False):
        self.left, Lanes.asked = [0] * count, []

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(self, *_: object) -> None: ...

    def execute(self, commands: list[tuple[int, Any]]) -> list[StepResult]:
        return [self.one(slot, command) for slot, command in commands]

    def one(self, slot: int, command: Any) -> StepResult:
        if isinstance(command, Start):
            self.left[slot] = command.seed % 3 + 1
            return self.played([], False, self.goal(command.seed, command.task))
        Lanes.asked.append((slot, np.asarray(command)))
        self.left[slot] -= 1
        return self.played([float(command[0] @ WEIGHTS)], self.left[slot] == 0, None)

    @staticmethod
    def goal(seed: int, task: int) -> np.ndarray:
        return np.asarray([seed % 1009 / 1009, task], np.float32)

    @staticmethod
    def played(rewards: list[float], done: bool, goal: np.ndarray | None) -> StepResult:
        target = (np.zeros((1, 3)), np.zeros(0, bool), np.zeros(0))
        shot = Snapshot(np.zeros(2), np.zeros(0, bool), target)
        return StepResult(np.zeros(3, np.float32), rewards, done, done, [shot], goal)


@pytest.mark.parametrize("batch", [2, 6])
def test_official_evaluation_normalises_each_episodes_goal(
    run: SavedRun, batch: int, monkeypatch: pytest.MonkeyPatch
):
    """Also an environment that takes up another task's episode when its first has ended."""
    monkeypatch.setattr(evaluation, "EnvPool", Lanes)
    keys, tasks, episodes = evaluation_keys(jnp.arange(2), 0), (1, 4), 4
    got = evaluation.play_official(run, "any", tasks, episodes, keys, batch=batch)
    k_reset, _ = episode_keys(keys, jnp.repeat(jnp.asarray(tasks), 4), jnp.tile(jnp.arange(4), 2))
    for s in range(2):
        for i in range(8):
            seed, task = evaluation.start_seed(k_reset[s, i]), tasks[i // 4]
            at = s, i // 4, i % 4
            assert got.length[at] == seed % 3 + 1
            want = (seed % 3 + 1) * (s + 1) * WEIGHTS @ seen(Lanes.goal(seed, task))
            assert got.episode_return[at] == pytest.approx(want, rel=1e-4)


def test_film_of_ours_shows_the_policy_its_normalised_goal(run: SavedRun):
    env: Any = Listener()
    got = film_ours(run, env, 4, draw=3)
    keys = evaluation_keys(jnp.arange(2), 0, 3)
    for s in range(2):
        want = (s + 1) * seen(drawn(keys[s], 4, 0))
        np.testing.assert_allclose(got.qpos[1:, s], [want, want], rtol=1e-4)


def test_film_of_the_original_normalises_the_policys_goal(run: SavedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "EnvPool", Lanes)
    record_in_ogbench(run, "any", 4, 3)
    k_reset, _ = episode_keys(evaluation_keys(jnp.arange(2), 0, 3), jnp.asarray([4]), jnp.asarray([0]))
    for s in range(2):
        seed = evaluation.start_seed(k_reset[s, 0])
        actions = np.stack([action[0] for slot, action in Lanes.asked if slot == s])
        want = (s + 1) * seen(Lanes.goal(seed, 4))
        np.testing.assert_allclose(actions, np.tile(want, (seed % 3 + 1, 1)), rtol=1e-4)
