"""The real ogbench and gymnasium environments of walkers, stepped together with ours."""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ogbench
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv as HalfCheetah4
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv as HalfCheetah5
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv as Hopper4
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv as Hopper5
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv as Walker4
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv as Walker5

from envs_mjx.base import EnvState
from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.maze_env import SUCCESS_RADIUS, MazeEnv
from envs_mjx.registry import make

_GYM = {
    ("hopper", 4): Hopper4,
    ("hopper", 5): Hopper5,
    ("walker2d", 4): Walker4,
    ("walker2d", 5): Walker5,
    ("halfcheetah", 4): HalfCheetah4,
    ("halfcheetah", 5): HalfCheetah5,
}


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In another folder: MuJoCo writes its warnings to a file where it runs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        yield


def real(env: MazeEnv | GymEnv) -> Any:
    """The package's environment, without wrappers."""
    with elsewhere():
        if isinstance(env, GymEnv):
            return _GYM[env.kind, env.version]()
        return ogbench.make_env_and_datasets(env.spec.name, env_only=True).unwrapped


def limit(name: str) -> int:
    """ogbench's own time limit."""
    return ogbench.make_env_and_datasets(name, env_only=True).spec.max_episode_steps


class Worst(NamedTuple):
    """Largest errors over all steps, and counts of rare events that must occur."""

    obs: float
    reward: float
    flags: int  # steps at which success or termination differ
    successes: int
    endings: int
    teleports: int


class Pair:
    """One real environment, and the state of ours that equals it."""

    def __init__(self, env: MazeEnv | GymEnv, template: EnvState, seed: int):
        self.env, self.real, self.rng = env, real(env), np.random.default_rng(seed)
        self.template, self.teleports, self.t = template, 0, 0

    def begin(self) -> EnvState:
        """Starts a new episode in both; the goal is put where the walker may reach it."""
        env, self.t = self.env, 0
        with mock.patch("numpy.random.uniform", self.rng.uniform):
            self.real.reset(seed=int(self.rng.integers(2**31)))
        state = self.template
        if isinstance(env, MazeEnv):
            angle = self.rng.uniform(0, 2 * np.pi)
            away = SUCCESS_RADIUS[env.walker.body] + self.rng.uniform(0, 0.1)
            goal = self.real.get_xy() + away * np.array([np.cos(angle), np.sin(angle)])
            if env.maze.entrances.size and self.rng.random() < 0.7:  # to a teleporter, far from the goal
                self.real.set_xy(env.maze.entrances[0] + [0, 1.7])
                goal = env.maze.xy((1, 1))
            self.real.set_goal(goal_xy=np.float32(goal).astype(float))
            state = eqx.tree_at(lambda s: s.target, state, jnp.asarray(goal, jnp.float32))
        motion = env.engine.read(self.real.data)  # pyright: ignore[reportAttributeAccessIssue]
        return eqx.tree_at(lambda s: (s.motion, s.obs), state, (motion, env.observe(motion)))

    def step(self, action: np.ndarray, ours: EnvState) -> tuple[np.ndarray, float, bool, bool]:
        """Observation, reward, success and termination of the real environment."""
        exits = self.env.maze.exits if isinstance(self.env, MazeEnv) else np.zeros((0, 2))
        here = np.asarray(ours.motion.qpos[:2])  # pyright: ignore[reportAttributeAccessIssue]
        chosen = int(np.argmin(np.linalg.norm(exits - here, axis=1))) if len(exits) else 0
        before = self.real.data.qpos.copy()
        with mock.patch("numpy.random.randint", lambda n: chosen):  # the exit that ours has taken
            obs, reward, terminated, _, info = self.real.step(action)
        self.teleports += bool(np.linalg.norm(self.real.data.qpos[:2] - before[:2]) > 3)
        self.t += 1
        ended = terminated or self.t >= self.env.spec.max_steps
        return obs, reward, bool(info.get("success", 0.0)), ended


def compare(name: str, seeds: int = 3, steps: int = 200) -> Worst:
    """Both environments side by side under the same random actions, set back only at an episode's end."""
    env = make(name)
    assert isinstance(env, MazeEnv | GymEnv)
    template = env.reset(jr.key(0), jnp.asarray(1))
    pairs = [Pair(env, template, seed) for seed in range(seeds)]
    states = jax.tree.map(lambda *x: jnp.stack(x), *[pair.begin() for pair in pairs])
    step = jax.jit(jax.vmap(env.step))
    worst = np.zeros(2)
    flags = successes = endings = 0
    for _ in range(steps):
        actions = np.stack([p.rng.uniform(-1, 1, env.spec.action_dim).astype(np.float32) for p in pairs])
        states = step(states, actions)
        for s, pair in enumerate(pairs):
            mine = jax.tree.map(lambda x, s=s: x[s], states)
            obs, reward, success, ended = pair.step(actions[s], mine)
            worst = np.maximum(
                worst, [np.abs(np.asarray(mine.obs) - obs).max(), abs(float(mine.reward) - reward)]
            )
            flags += (bool(mine.success) != success) + (bool(mine.done) != ended)
            successes, endings = successes + success, endings + ended
            if ended:
                states = jax.tree.map(lambda x, new, s=s: x.at[s].set(new), states, pair.begin())
    return Worst(*worst.tolist(), flags, successes, endings, sum(p.teleports for p in pairs))
