"""Toy environment and its data: a point in the plane that must reach a disc."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from envs_mjx.base import AbstractEnv, EnvState
from mac.config import Config
from mac.data.normalize import Normalizer
from mac.data.window import index_episodes, make_column, sum_to_go
from mac.mac import MAC
from mac.types import EnvSpec, Window

SPEC = EnvSpec(
    "toy-point", obs_dim=2, action_dim=2, goal_dim=None, tasks=(1, 2), max_steps=12, control_dt=0.1
)
GOAL_SPEC = SPEC._replace(name="toy-point-goals", goal_dim=2, goal_columns=(1, 0))
"""The goal-conditioned point: goals are positions, second coordinate first, so that column order matters."""

FALL_SPEC = SPEC._replace(name="toy-point-edge", tasks=(1,), recorded=True, score_range=(-10.0, 30.0))
"""The point on a table; an episode terminates when the point falls off."""
EDGE = 0.9

STRIDE = 0.2  # distance per step at action 1
TARGET, RADIUS = (0.5, 0.5), 0.3
STARTS = ((-0.5, -0.5), (0.5, -0.5))  # of tasks 1 and 2; ± 0.1 at random
PLACES = ((0.5, 0.5), (-0.5, 0.5))  # goals of tasks 1 and 2

SMALL = Config(
    batch=8, hidden=(8,), chunk=2, rollout=3, candidates=4, candidates_test=4, flow_steps=3, discount=0.9
)
"""Sizes at which every function of MAC compiles fast."""


class PointEnv(AbstractEnv[EnvState]):
    """The point moves by `STRIDE * action`; reward is -1 until the disc, where the episode ends."""

    spec: EnvSpec = eqx.field(static=True, default=SPEC)

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> EnvState:
        start = jnp.asarray(STARTS)[task - 1] + jr.uniform(key, (2,), minval=-0.1, maxval=0.1)
        return EnvState(obs=start, goal=None)

    def step(self, state: EnvState, action: Float[Array, " A"]) -> EnvState:
        point = state.obs + STRIDE * jnp.clip(action, -1, 1)
        solved = jnp.sum(jnp.square(point - jnp.asarray(TARGET))) < RADIUS**2
        reward = jnp.where(solved, 0.0, -1.0)
        after = dataclasses.replace(state, obs=point, reward=reward, success=solved, done=solved)
        return self.end_step(state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        solved = np.sum((obs - np.asarray(TARGET)) ** 2, axis=-1) < RADIUS**2
        return solved - 1.0, 1.0 - solved


class GoalState(EnvState):
    """The point on its way to `place`."""

    place: Float[Array, " 2"]


class GoalPointEnv(AbstractEnv[GoalState]):
    """The point moves as in `PointEnv`; reward is 1 where it comes within `RADIUS` of its task's place."""

    spec: EnvSpec = eqx.field(static=True, default=GOAL_SPEC)

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> GoalState:
        place = jnp.asarray(PLACES)[task - 1]
        goal = place[jnp.asarray(self.spec.goal_columns)]
        return GoalState(obs=PointEnv().reset(key, task).obs, goal=goal, place=place)

    def step(self, state: GoalState, action: Float[Array, " A"]) -> GoalState:
        point = state.obs + STRIDE * jnp.clip(action, -1, 1)
        solved = jnp.sum(jnp.square(point - state.place)) < RADIUS**2
        reward = solved.astype(jnp.float32)
        after = dataclasses.replace(state, obs=point, reward=reward, success=solved, done=solved)
        return self.end_step(state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        solved = np.sum((obs - np.asarray(PLACES[task - 1])) ** 2, axis=-1) < RADIUS**2
        return solved - 1.0, 1.0 - solved


class EdgeEnv(AbstractEnv[EnvState]):
    """The point moves as in `PointEnv`; reward is its first coordinate plus 1; terminates beyond `EDGE`."""

    spec: EnvSpec = eqx.field(static=True, default=FALL_SPEC)

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> EnvState:
        return PointEnv().reset(key, task)

    def step(self, state: EnvState, action: Float[Array, " A"]) -> EnvState:
        point = state.obs + STRIDE * jnp.clip(action, -1, 1)
        off_table = jnp.max(jnp.abs(point)) > EDGE
        after = dataclasses.replace(state, obs=point, reward=1 + point[0], done=off_table)
        return self.end_step(state, after)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError("rewards are recorded")


def identity(dim: int = 2) -> Normalizer:
    """A normaliser that changes nothing."""
    return Normalizer(jnp.zeros(dim), jnp.full(dim, 1 - 1e-3))


def mac(**changes: object) -> MAC:
    """MAC for the point at the sizes of `SMALL`, with `changes` to its configuration."""
    return MAC(dataclasses.replace(SMALL, **changes), SPEC)  # pyright: ignore[reportArgumentType]


def edge_mac(**changes: object) -> MAC:
    """MAC for the point that may fall off the table."""
    return MAC(dataclasses.replace(SMALL, **changes), FALL_SPEC)  # pyright: ignore[reportArgumentType]


def goal_mac(**changes: object) -> MAC:
    """MAC for the point with goals."""
    return MAC(dataclasses.replace(SMALL, **changes), GOAL_SPEC)  # pyright: ignore[reportArgumentType]


def window(chunk: int = 2, episodes: int = 8, length: int = 40, seed: int = 0) -> Window:
    """Episodes of a point that wanders through the square [-1, 1]², laid end to end."""
    rng = np.random.default_rng(seed)
    obs = np.empty((episodes, length, 2), np.float32)
    action = np.empty_like(obs)
    obs[:, 0] = rng.uniform(-1, 1, (episodes, 2))
    drift = np.zeros((episodes, 2))
    for t in range(length):
        drift = 0.7 * drift + rng.normal(scale=0.6, size=drift.shape)
        action[:, t] = np.clip(drift, -1, 1)
        if t + 1 < length:
            obs[:, t + 1] = np.clip(obs[:, t] + STRIDE * action[:, t], -1, 1)
            action[:, t] = (
                obs[:, t + 1] - obs[:, t]
            ) / STRIDE  # the realized displacement, less than requested at a wall
    return from_rows(obs.reshape(-1, 2), action.reshape(-1, 2), np.full(episodes, length), chunk)


def from_rows(obs: np.ndarray, action: np.ndarray, lengths: np.ndarray, chunk: int) -> Window:
    """A window over the given rows of whole episodes, with the point's rewards."""
    reward, mask = PointEnv().relabel(obs[:, :2], task=1)
    first = np.cumsum(lengths) - lengths
    return Window(
        obs=make_column(np.asarray(obs, np.float32)),
        action=make_column(np.asarray(action, np.float32)),
        reward=jnp.asarray(reward, jnp.float32),
        mask=jnp.asarray(mask, jnp.float32),
        episodes=index_episodes(first, lengths, chunk),
        return_to_go=jnp.asarray(sum_to_go(np.asarray(reward, np.float32), first, lengths)),
    )


def falling_window(chunk: int = 2, episodes: int = 40, length: int = 13, seed: int = 0) -> Window:
    """Episodes of `EdgeEnv` under actions that wander; about half of them terminate before the time limit."""
    rng = np.random.default_rng(seed)
    obs, action, reward, lengths, terminated = [], [], [], [], []
    for _ in range(episodes):
        point, drift = rng.uniform(-0.6, 0.6, 2), np.zeros(2)
        for t in range(length):
            drift = 0.7 * drift + rng.normal(scale=0.6, size=2)
            over = bool(np.abs(point).max() > EDGE)
            final = over or t == length - 1
            a = np.zeros(2) if final else np.clip(drift, -1, 1)
            obs.append(point)
            action.append(a)
            point = point + STRIDE * a
            reward.append(0.0 if final else 1 + point[0])
            if final:
                lengths.append(t + 1)
                terminated.append(over)
                break
    length_of, fallen = np.asarray(lengths), np.asarray(terminated)
    first = np.cumsum(length_of) - length_of
    mask = np.ones(len(obs), np.float32)
    for last in (first + length_of - 1)[fallen]:
        mask[last - 1 : last + 1] = 0
    return Window(
        obs=make_column(np.asarray(obs, np.float32)),
        action=make_column(np.asarray(action, np.float32)),
        reward=jnp.asarray(reward, jnp.float32),
        mask=jnp.asarray(mask),
        episodes=index_episodes(first, length_of, chunk, terminated=fallen),
        return_to_go=jnp.asarray(sum_to_go(np.asarray(reward, np.float32), first, length_of)),
    )
