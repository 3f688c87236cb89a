"""MAC learns to reach goals that its data only wanders to, and does better than the behaviour it cloned."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from mac.algorithm import TrainState
from mac.config import Config
from mac.mac import MAC
from mac.run.evaluate import Policies, evaluate, evaluation_keys
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.segment import init, segment
from tests.helpers.toy_env import GOAL_SPEC, GoalPointEnv, identity, window

pytestmark = pytest.mark.slow  # `test_contract` looks at a smaller problem

SEEDS, UPDATES, EPISODES = 2, 1500, 20
CONFIG = Config(
    batch=128, hidden=(64, 64), lr=2e-3, cooldown=0.5, discount=0.95, tau_ema=0.02, chunk=2, rollout=4,
    candidates=8, candidates_test=16, flow_steps=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> TrainState:
    algo, mesh = MAC(CONFIG, GOAL_SPEC, UPDATES), seed_mesh(1)
    keys, rows = seed_keys(0, SEEDS), window(chunk=2, episodes=64, length=40)
    state, _ = segment(algo, mesh, rows, keys, np.arange(UPDATES, dtype=np.int32), init(algo, mesh, keys))
    return state


def success(state: TrainState, candidates: int) -> np.ndarray:
    """Share of successes of each seed, with chunks that are the best of so many."""
    algo = MAC(dataclasses.replace(CONFIG, candidates_test=candidates), GOAL_SPEC, UPDATES)
    keys = evaluation_keys(jnp.arange(SEEDS), UPDATES)
    played = evaluate(Policies(algo, identity(), state), GoalPointEnv(), EPISODES, keys)
    return np.asarray(played.success).mean((1, 2))


def test_goals_are_reached_by_choice_among_chunks_not_by_cloning(trained: TrainState):
    chosen, cloned = success(trained, 16), success(trained, 1)
    print(f"best of 16: {chosen}, cloned behaviour: {cloned}")
    assert (chosen > 0.8).all()
    assert (chosen > cloned + 0.1).all()
