"""Data of a point that goes straight to a target, with noise, and the score of a policy."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mac.algorithm import TrainState
from mac.types import Window
from tests.helpers.toy_env import STRIDE, TARGET, from_rows, window

STEPS, WIDE = 10, 64


def journeys(chunk: int, *, goals: bool, episodes: int = 64, length: int = 14, seed: int = 0) -> Window:
    """Episodes that lead to `TARGET`, or, for goals, to a place of their own, and end around it."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(-1, 1, (episodes, 2)) if goals else np.tile(TARGET, (episodes, 1))
    obs, action = (np.empty((episodes, length, 2), np.float32) for _ in range(2))
    point = rng.uniform(-1, 1, (episodes, 2))
    for t in range(length):
        wanted = (place - point) / STRIDE + rng.normal(scale=0.3, size=point.shape)
        obs[:, t], action[:, t] = point, np.clip(wanted, -1, 1)
        point = point + STRIDE * action[:, t]
    return from_rows(obs.reshape(-1, 2), action.reshape(-1, 2), np.full(episodes, length), chunk)


def wanderers(chunk: int, *, goals: bool) -> Window:
    """Episodes of a point that takes all actions at all places; with goals, of any state."""
    del goals
    return window(chunk, episodes=64)


def distance_left(act: Any, state: TrainState, *, goals: bool) -> float:
    """Returns the mean distance from `TARGET` over `STEPS` steps, from starts all over the square.

    `act` is the algorithm's, compiled; the mean of an untrained policy that stays is about 1.
    """
    point = np.random.default_rng(1).uniform(-1, 1, (WIDE, 2)).astype(np.float32)
    goal = jnp.tile(jnp.asarray(TARGET[::-1], jnp.float32), (WIDE, 1)) if goals else None
    left = []
    for step in range(STEPS):
        action = np.asarray(act(state, jnp.asarray(point), goal, jr.key(step)))[:, 0]
        point = np.clip(point + STRIDE * np.clip(action, -1, 1), -1, 1).astype(np.float32)
        left.append(np.linalg.norm(point - np.asarray(TARGET), axis=-1).mean())
    return float(np.mean(left))


def one_seed(state: TrainState, seed: int) -> TrainState:
    """The state of one of several seeds."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[seed]), state)
