"""Tests of the programs that engine `mjx` becomes on a GPU; they are lowered for one that is not here."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.sharding import use_abstract_mesh

from envs_mjx.registry import make
from mac.algorithm import TrainState
from mac.data.normalize import Normalizer
from mac.run.evaluate import Policies, evaluate
from mac.run.mesh import seed_keys
from tests.helpers.fixed_policy import ActsOnly
from tests.helpers.platforms import mesh_of
from tests.helpers.pytest_params import slow_except

pytestmark = pytest.mark.promotion

BATCH = 2
NAMES = (
    "cube-single-play-singletask-v0",
    "scene-play-oraclerep-v0",
    "puzzle-3x3-play-singletask-v0",
    "pointmaze-medium-navigate-singletask-v0",
    "antmaze-medium-navigate-oraclerep-v0",
    "humanoidmaze-medium-navigate-oraclerep-v0",
    "hopper-medium-v2",
)


def lowered(function: Any, *args: Any) -> str:
    """Returns the program for CUDA, before XLA's optimisation."""
    with use_abstract_mesh(mesh_of("gpu")):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def assert_fit_for_a_gpu(program: str) -> None:
    """Asserts matmuls in full float32, no call to the host, and no call that XLA may not inline."""
    matmuls = re.findall(r"stablehlo\.dot_general.*", program)
    assert matmuls and not [line for line in matmuls if "precision = [HIGHEST, HIGHEST]" not in line]
    assert not re.findall(r"custom_call @\S*callback\S*", program)
    assert "inlineable" not in program


@pytest.mark.parametrize("name", slow_except((NAMES[4], NAMES[6]), NAMES))
def test_reset_and_step_are_fit_for_a_gpu(name: str):
    env = make(name, "mjx")
    keys, tasks = jr.split(jr.key(0), BATCH), jnp.ones(BATCH, jnp.int32)
    action = jnp.zeros((BATCH, env.spec.action_dim))
    assert_fit_for_a_gpu(
        lowered(
            lambda keys, action: jax.vmap(env.step)(jax.vmap(env.reset)(keys, tasks), action), keys, action
        )
    )


class Idle(ActsOnly):
    """Chunks of one action, zeros."""

    def act(self, state: TrainState, obs: jax.Array, goal: jax.Array | None, key: jax.Array) -> jax.Array:
        return jnp.zeros((*obs.shape[:-1], 1, self.env.action_dim))


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAMES[0], "humanoidmaze-medium-navigate-oraclerep-v0"])
def test_evaluation_of_two_seeds_is_fit_for_a_gpu(name: str):
    """Checks physics under `vmap` over seeds, which is applied after the loop over steps is traced."""
    env, shape = make(name, "mjx"), (make(name, "mjx").spec.obs_dim,)
    policies = Policies(
        Idle(env.spec), Normalizer(jnp.zeros(shape), jnp.ones(shape)), TrainState(jnp.zeros(2), (), ())
    )
    assert_fit_for_a_gpu(lowered(lambda keys: evaluate(policies, env, 2, keys), seed_keys(0, 2)))
