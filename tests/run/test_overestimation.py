"""Expected and realized returns: in evaluations, in rows, in the table."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from rich.console import Console

from envs_mjx.base import AbstractEnv, EnvState
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.run.evaluate import Policies, evaluate
from mac.run.io.eval_rows import Evaluation, eval_rows
from mac.run.mesh import seed_keys
from mac.run.report.realized_return import realised_return
from mac.run.report.stats import learning_curve
from mac.run.report.table import results_table
from mac.run.seed_diagnostics import overestimation
from mac.types import EnvSpec, Episodes
from tests.helpers.fixed_policy import ActsOnly
from tests.helpers.toy_env import identity

GAMMA, LIMIT = 0.9, 6
SINGLE = EnvSpec("chain", 1, 1, None, tasks=(1, 4, 9), max_steps=LIMIT, control_dt=1.0)
GOALS = SINGLE._replace(goal_dim=1, goal_columns=(0,))


class Chain(AbstractEnv):
    """Task k starts k steps from the end; each step of `action > 0` goes one on. A step's reward is -1, and
    success comes with the step that arrives; with goals the environment's own reward is something else.
    """

    spec: EnvSpec = eqx.field(static=True)

    def reset(self, key: jax.Array, task: jax.Array) -> EnvState:
        goal = None if self.spec.goal_dim is None else jnp.zeros(1)
        return EnvState(obs=task.astype(jnp.float32)[None], goal=goal)

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        left = state.obs - (action > 0).astype(jnp.float32)
        solved = left[0] < 0.5
        reward = jnp.full((), -1.0 if self.spec.goal_dim is None else 17.0)
        after = dataclasses.replace(state, obs=left, reward=reward, success=solved, done=solved)
        return self.end_step(state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class Walker(ActsOnly):
    """Goes on and knows what that costs, `nets` steps per chain link being the seed's own belief."""

    chunk: int = eqx.field(static=True, default=1)

    @property
    def step_discount(self) -> float:
        return GAMMA

    def act(self, state: TrainState, obs: jax.Array, goal: Any, key: jax.Array) -> jax.Array:
        return jnp.ones((len(obs), self.chunk, 1))

    def predict(self, state: TrainState, obs: jax.Array, goal: Any, key: jax.Array) -> jax.Array:
        """A perfect critic where the seed's number is 1: 9 links do not fit into the limit of 6 steps."""
        steps = jnp.where(obs[:, 0] > LIMIT, jnp.inf, state.nets * obs[:, 0])
        return -(1 - GAMMA**steps) / (1 - GAMMA)


def cost(steps: float) -> float:
    """Discounted sum of -1 over so many steps."""
    return -(1 - GAMMA**steps) / (1 - GAMMA)


def play(algo: AbstractAlgorithm, env: Any, numbers: list[float], **how: Any) -> Episodes:
    state = TrainState(jnp.asarray(numbers), (), ())
    keys = seed_keys(0, len(numbers))
    return jax.device_get(evaluate(Policies(algo, identity(1), state), env, 2, keys, **how))


@pytest.mark.parametrize("spec", [SINGLE, GOALS], ids=["rewards", "goals"])
def test_perfect_critic_expects_what_comes(spec: EnvSpec):
    """Also of the task that fails, continued at -1 forever. Seed 1 thinks that half the time will do."""
    got = play(Walker(spec, chunk=4), Chain(spec), [1.0, 0.5], batch=3)
    assert got.predicted is not None and got.realised is not None
    np.testing.assert_array_equal(got.success[0, :, 0], [True, True, False])
    for s in range(2):
        for e in range(2):
            np.testing.assert_allclose(got.realised[s, :, e], [cost(1), cost(4), cost(np.inf)], rtol=1e-5)
    np.testing.assert_allclose(got.predicted[0], got.realised[0], rtol=1e-5)
    np.testing.assert_allclose(got.predicted[1, :, 0], [cost(0.5), cost(2), cost(np.inf)], rtol=1e-5)


def test_episode_that_fails_is_continued_with_its_last_reward():
    rewards = np.asarray([[-3.0, -1.0, -2.0], [-3.0, -1.0, -2.0]])
    discounted = (GAMMA ** np.arange(3) * rewards).sum(axis=1)
    got = realised_return(
        jnp.asarray(discounted, jnp.float32), jnp.asarray([-2.0, -2.0]), jnp.asarray([True, False]),
        jnp.asarray([3, 3]), GAMMA,
    )  # fmt: skip
    longer = sum(GAMMA**t * -2.0 for t in range(3, 2000))
    np.testing.assert_allclose(got, [discounted[0], discounted[1] + longer], rtol=1e-5)


class Gambler(Walker):
    """Acts at random, and expects its first action: alike only if both are asked with the same key."""

    def act(self, state: TrainState, obs: jax.Array, goal: Any, key: jax.Array) -> jax.Array:
        return jr.uniform(key, (len(obs), self.chunk, 1), minval=-1.0)

    def predict(self, state: TrainState, obs: jax.Array, goal: Any, key: jax.Array) -> jax.Array:
        return self.act(state, obs, goal, key)[:, 0, 0]


class Teller(Chain):
    """Pays the first action, then nothing."""

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        after = super().step(state, action)
        return dataclasses.replace(after, reward=jnp.where(state.t == 0, action[0], 0.0))


def test_expectation_is_of_the_first_chunk_of_the_episode():
    got = play(Gambler(SINGLE), Teller(SINGLE), [1.0, 1.0])
    assert got.predicted is not None and got.realised is not None
    np.testing.assert_allclose(got.predicted, got.realised, rtol=1e-6)
    assert len(np.unique(got.predicted)) == got.predicted.size


# Rows, metrics, and the table.


@pytest.fixture(scope="module")
def played() -> Episodes:
    return play(Walker(SINGLE), Chain(SINGLE), [1.0, 0.5])


def rows_of(result: Episodes, step: int = 100) -> list[dict[str, Any]]:
    return eval_rows(Evaluation(step, SINGLE.tasks, result, "toy"), (3, 4))


def test_rows_hold_the_means_of_both_returns(played: Episodes):
    rows = rows_of(played)
    assert rows[4]["seed"] == 4 and rows[4]["task"] == 4
    assert rows[4]["predicted_return"] == pytest.approx(cost(2), rel=1e-5)
    assert rows[4]["realised_return"] == pytest.approx(cost(4), rel=1e-5)


def test_rows_without_expectations_have_no_such_columns(played: Episodes):
    mute = Episodes(*map(jnp.asarray, jax.tree.leaves(played)[:4]))
    assert not any("predicted" in name or "realised" in name for row in rows_of(mute) for name in row)
    assert overestimation(mute) == {}


def test_overestimation_of_each_seed_is_the_mean_difference(played: Episodes):
    found = {name.removeprefix("diagnostics/"): value for name, value in overestimation(played).items()}
    want = (cost(0.5) - cost(1) + cost(2) - cost(4)) / 3
    np.testing.assert_allclose(found["overestimation"], [0, want], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["realised_return"], (cost(1) + cost(4) + cost(np.inf)) / 3, rtol=1e-5)
    np.testing.assert_allclose(
        found["predicted_return"] - found["realised_return"], found["overestimation"], atol=1e-5
    )


def printed(rows: list[dict[str, Any]]) -> str:
    console = Console(width=120)
    with console.capture() as text:
        console.print(results_table(learning_curve(rows), title="walker"))
    return text.get()


def test_table_says_what_was_expected_and_what_came(played: Episodes):
    old = [{**row, "predicted_return": 7.0} for row in rows_of(played, step=50)]
    realised = (cost(1) + cost(4) + cost(np.inf)) / 3
    expected = realised + (cost(0.5) - cost(1) + cost(2) - cost(4)) / 6
    gap = f"{expected - realised:.1f} too high"
    line = f"discounted return: {expected:.1f} expected, {realised:.1f} realised: {gap}"
    assert line in printed(old + rows_of(played))


def test_rows_of_older_runs_have_a_table_without_that_line(played: Episodes):
    new = rows_of(played)
    old = [{k: v for k, v in row.items() if not k.endswith("d_return")} for row in new]
    assert "discounted return" not in printed(old) and "at 100 updates" in printed(old)
    np.testing.assert_array_equal(learning_curve(old).scores, learning_curve(new).scores)
    assert np.isnan(learning_curve(old).predicted).all()
