"""The interface of environments: the end of a step, and what evaluation needs of an environment."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mac.algorithm import TrainState
from mac.run.evaluate import Policies, evaluate
from mac.run.mesh import seed_keys
from mac.types import Env, EnvSpec, EnvState
from tests.helpers.fixed_policy import ActsOnly
from tests.helpers.toy_env import SPEC, PointEnv, identity


@pytest.mark.parametrize(("t", "terminated", "done"), [(3, False, False), (3, True, True), (11, False, True)])
def test_step_ends_by_termination_or_time_limit(t: int, terminated: bool, done: bool):
    before = EnvState(obs=jnp.zeros(2), goal=None, t=jnp.asarray(t))
    after = dataclasses.replace(before, obs=jnp.ones(2), done=jnp.asarray(terminated))
    got = PointEnv().end_step(before, after)
    assert (int(got.t), bool(got.done)) == (t + 1, done) and SPEC.max_steps == 12
    np.testing.assert_array_equal(got.obs, 1)


def test_state_that_is_done_is_frozen_and_a_bad_action_pays_nan():
    before = EnvState(obs=jnp.zeros(2), goal=None, reward=jnp.asarray(5.0))
    after = dataclasses.replace(before, obs=jnp.ones(2))
    assert np.isnan(PointEnv().end_step(before, after, jnp.asarray(False)).reward)
    over = dataclasses.replace(before, done=jnp.asarray(True))
    frozen = PointEnv().end_step(over, after, jnp.asarray(False))
    assert (int(frozen.t), float(frozen.reward), float(frozen.obs[0])) == (0, 5.0, 0.0)


class Counter(eqx.Module):
    """An environment that inherits nothing: observes the steps taken, pays 1 each, ends after three."""

    spec: EnvSpec = eqx.field(static=True, default=SPEC._replace(tasks=(1,), max_steps=3))

    def reset(self, key: jax.Array, task: jax.Array) -> EnvState:
        return EnvState(obs=jnp.zeros(2), goal=None)

    def step(self, state: EnvState, action: jax.Array) -> EnvState:
        t = jnp.where(state.done, state.t, state.t + 1)
        return dataclasses.replace(
            state, obs=jnp.full(2, t, jnp.float32), reward=jnp.ones(()), done=t >= self.spec.max_steps, t=t
        )


class Idle(ActsOnly):
    """Does nothing."""

    env: EnvSpec = eqx.field(static=True, default=SPEC)

    def act(self, state: TrainState, obs: jax.Array, goal: None, key: jax.Array) -> jax.Array:
        return jnp.zeros((len(obs), 1, 2))


def test_environments_need_only_the_protocol():
    env = Counter()
    assert isinstance(env, Env) and isinstance(PointEnv(), Env)
    got = evaluate(Policies(Idle(), identity(), TrainState((), (), ())), env, 2, seed_keys(0, 1))
    assert got.length.tolist() == [[[3, 3]]] and got.episode_return.tolist() == [[[3.0, 3.0]]]
