"""Environments as `gymnasium.Env` and `gymnasium.vector.VectorEnv`, for other libraries.

    env = make("cube-single-play-v0")  # one environment
    envs = make_vec("cube-single-play-v0", 64)  # a batch in one compiled call
    obs, info = envs.reset(seed=0, options={"task_id": 1})

Spaces are those of OGBench in float32. `info` holds OGBench's `success`, and `goal` where there is one. Tasks
are chosen as in OGBench, by the option `task_id`. Goal-conditioned environments draw a task without it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gymnasium.vector import AutoresetMode

from envs_mjx.base import AbstractEnv
from envs_mjx.registry import TaskId
from envs_mjx.registry import make as make_env
from mac.errors import UserError
from mac.types import EnvSpec, EnvState


def make(name: str | TaskId, engine: str = "c") -> "GymnasiumEnv":
    """Makes one environment.

    Raises:
        UserError: as `envs_mjx.make`.
    """
    return GymnasiumEnv(make_env(name, engine))


def make_vec(name: str | TaskId, num_envs: int, engine: str = "c") -> "GymnasiumVectorEnv":
    """Makes a batch of environments that step in one compiled call.

    Raises:
        UserError: as `envs_mjx.make`.
    """
    return GymnasiumVectorEnv(make_env(name, engine), num_envs)


@eqx.filter_jit
def _reset(env: AbstractEnv[Any], keys: jax.Array, tasks: jax.Array) -> EnvState:
    return jax.vmap(env.reset)(keys, tasks)


@eqx.filter_jit
def _step(env: AbstractEnv[Any], state: EnvState, action: jax.Array) -> EnvState:
    return jax.vmap(env.step)(state, action)


@eqx.filter_jit
def _replace(at: jax.Array, new: EnvState, old: EnvState) -> EnvState:
    """The states `new` where `at`, else `old`."""
    return jax.vmap(lambda at, new, old: jax.tree.map(lambda x, y: jnp.where(at, x, y), new, old))(
        at, new, old
    )


class _Lanes:
    """States of some environments, which begin and step together."""

    def __init__(self, env: AbstractEnv[Any], count: int):
        self.env, self.count = env, count
        self.tasks = np.zeros(count, np.int32)
        self.state: Any = None

    def begin(self, rng: np.random.Generator, options: Mapping[str, Any] | None) -> None:
        """Starts an episode in each environment.

        Raises:
            UserError: an option that does not exist, or a task.
        """
        self.choose(rng, options or {})
        self.state = self._fresh(rng)

    def choose(self, rng: np.random.Generator, options: Mapping[str, Any]) -> None:
        """Decides the tasks: those of the option, or random ones of the environment's."""
        known = self.env.spec.tasks
        if unknown := set(options) - {"task_id", "render_goal"}:
            raise UserError(f"reset option {sorted(unknown)[0]!r} does not exist; the only one is 'task_id'")
        if options.get("render_goal"):
            raise UserError("reset option render_goal=True: these environments render nothing; leave it out")
        asked = options.get("task_id")
        tasks = rng.choice(known, self.count) if asked is None else np.broadcast_to(asked, self.count)
        if not np.isin(tasks, known).all():
            raise UserError(f"task_id={asked}: {self.env.spec.name} has tasks {', '.join(map(str, known))}")
        self.tasks = np.asarray(tasks, np.int32)

    def begin_again(self, rng: np.random.Generator, at: np.ndarray) -> None:
        """Starts further episodes of the same tasks in the environments `at`, a mask."""
        self.state = _replace(jnp.asarray(at), self._fresh(rng), self.state)

    def _fresh(self, rng: np.random.Generator) -> EnvState:
        keys = jr.split(jr.key(int(rng.integers(2**32))), self.count)
        return _reset(self.env, keys, jnp.asarray(self.tasks))

    def step(self, action: np.ndarray) -> None:
        """Steps each environment; one whose episode has ended stays as it is."""
        self.state = _step(self.env, self.state, jnp.asarray(action, jnp.float32))

    @property
    def obs(self) -> np.ndarray:
        """Observations, [B, D]."""
        return np.array(self.state.obs)

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns which episodes are terminated, and which are at the time limit."""
        spec, state = self.env.spec, self.state
        truncated = np.asarray(state.t) >= spec.max_steps
        own = np.array(state.success)
        if spec.terminal is not None:
            own |= np.asarray(spec.terminal(state.obs))
        return np.asarray(state.done) & (own | ~truncated), truncated

    @property
    def facts(self) -> dict[str, np.ndarray]:
        """Entries of `info`."""
        goal = {} if self.state.goal is None else {"goal": np.array(self.state.goal)}
        return {"success": np.array(self.state.success)} | goal


def _spaces(spec: EnvSpec) -> tuple[gymnasium.spaces.Box, gymnasium.spaces.Box]:
    """The spaces of observations and of actions of one environment."""
    obs = gymnasium.spaces.Box(-np.inf, np.inf, (spec.obs_dim,), np.float32)
    return obs, gymnasium.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)


class GymnasiumEnv(gymnasium.Env):
    """One environment. Rewards, ends and time limit are those of `envs_mjx`."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as in gymnasium

    def __init__(self, env: AbstractEnv[Any]):
        self._lanes = _Lanes(env, 1)
        self.observation_space, self.action_space = _spaces(env.spec)
        self.render_mode = None

    @property
    def tasks(self) -> Sequence[int]:
        """Ids of the tasks."""
        return self._lanes.env.spec.tasks

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._lanes.begin(self.np_random, options)
        return self._lanes.obs[0], self._info()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._lanes.step(np.asarray(action)[None])
        terminated, truncated = self._lanes.ends
        reward = float(self._lanes.state.reward[0])
        return self._lanes.obs[0], reward, bool(terminated[0]), bool(truncated[0]), self._info()

    def _info(self) -> dict[str, Any]:
        facts = self._lanes.facts
        return {name: bool(x[0]) if name == "success" else x[0] for name, x in facts.items()}


class GymnasiumVectorEnv(gymnasium.vector.VectorEnv):
    """A batch of environments in one compiled call.

    The step after an episode's end ignores its action and starts the next episode, of the same task, in that
    environment (`AutoresetMode.NEXT_STEP`). `task_id` may be one task, or one for each environment.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - as in gymnasium
        "render_modes": [],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(self, env: AbstractEnv[Any], num_envs: int):
        self.num_envs = num_envs
        self._lanes = _Lanes(env, num_envs)
        self.single_observation_space, self.single_action_space = _spaces(env.spec)
        batch = gymnasium.vector.utils.batch_space
        self.observation_space = batch(self.single_observation_space, num_envs)
        self.action_space = batch(self.single_action_space, num_envs)
        self._over = np.zeros(num_envs, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._lanes.begin(self.np_random, options)
        self._over = np.zeros(self.num_envs, bool)
        return self._lanes.obs, self._info()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self._lanes.step(np.asarray(actions))
        if self._over.any():
            self._lanes.begin_again(self.np_random, self._over)
        terminated, truncated = self._lanes.ends
        self._over = terminated | truncated
        reward = np.asarray(self._lanes.state.reward, np.float64)
        return self._lanes.obs, reward, terminated, truncated, self._info()

    def _info(self) -> dict[str, Any]:
        facts = self._lanes.facts
        return facts | {f"_{name}": np.ones(self.num_envs, bool) for name in facts}
