"""Training tasks of the experts: walking in a given direction, or a gym walker's own task.

An `AbstractExpertTask` is one environment, which the caller vmaps. The caller replaces a state that is `over`
by a new start.

Source of rewards and rules: OGBench's online locomotion environments (Park et al. 2025), and
`envs_mjx.locomotion.gym_env`.
"""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.engines.base import AbstractWalkerEngine, WalkerPhysics
from envs_mjx.engines.walker_c import CWalkerEngine
from envs_mjx.experts.maze_experts import DirectionActor
from envs_mjx.locomotion.gym_env import GymEnv
from envs_mjx.locomotion.initial_state import random_start
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.walkers import Walker, build_walker, walker_mjcf
from envs_mjx.registry import make
from envs_mjx.rotations import rotate
from experiments.expert_training.sac import Transitions
from mac.nn.gaussian_policy import GaussianPolicy

GYM = ("hopper", "walker2d", "halfcheetah")
DIRECTED = ("ant", "humanoid")
TASKS = (*DIRECTED, *GYM)
MAX_STEPS = 1000
_DIRECTION_STEPS = {"ant": 100, "humanoid": 200}
"""Control steps after which a new direction is drawn."""
_ANT_HEIGHT = (0.2, 1.0)
"""Range of the height of an ant's torso, m, outside which an episode terminates."""
_HEAD, _HEAD_MARGIN = 1.4, 0.35
"""Height of a standing humanoid's head, m, and the margin over which the reward decreases to 0.1."""
_UPRIGHT, _UPRIGHT_MARGIN = 0.9, 1.9
"""Vertical component of a standing humanoid's torso axis, and the margin down to reward 0."""


class TaskState(eqx.Module):
    """State of a task.

    Attributes:
        obs: observation of the policy.
        t: control steps since the start.
        over: whether the episode has ended, by termination or by the time limit.
        inner: state of the environment.
    """

    obs: Float[Array, " D"]
    t: Int[Array, ""]
    over: Bool[Array, ""]
    inner: Any


class AbstractExpertTask(eqx.Module):
    """An environment for online training."""

    name: eqx.AbstractVar[str]
    obs_dim: eqx.AbstractVar[int]
    action_dim: eqx.AbstractVar[int]
    control_dt: eqx.AbstractVar[float]

    @abc.abstractmethod
    def start(self, key: Key[Array, ""]) -> TaskState:
        """Starts an episode."""

    @abc.abstractmethod
    def step(
        self, state: TaskState, action: Float[Array, " A"], key: Key[Array, ""]
    ) -> tuple[TaskState, Transitions]:
        """Takes one control step; returns also its transition."""


class WalkState(eqx.Module):
    """State of a walk: the walker's physics, and the unit vector along which it should walk."""

    motion: WalkerPhysics
    direction: Float[Array, " 2"]


class WalkTask(AbstractExpertTask):
    """Walking of an ant or a humanoid on a plane, along a direction that changes every few seconds.

    Reward of an ant: its displacement along the direction, m; a fall terminates the episode. Reward of a
    humanoid: `standing`, in [0, 1], times (1 + 100 times its displacement along the direction).
    """

    env: MazeEnv
    name: str = eqx.field(static=True)
    obs_dim: int = eqx.field(static=True)
    action_dim: int = eqx.field(static=True)
    control_dt: float = eqx.field(static=True)

    def __init__(self, body: str, engine: AbstractWalkerEngine | None = None):
        """Creates the task of `body`, a name in `DIRECTED`.

        Args:
            engine: engine of `flat_walker(body)`; MuJoCo C if None.
        """
        flat, maze = flat_walker(body), f"{body}maze-medium"
        # The maze environment computes observations only: the engine has no walls.
        self.env = MazeEnv(f"{maze}-navigate-v0", build_walker(maze), engine or CWalkerEngine(flat))
        self.name, self.control_dt = body, flat.control_dt
        self.action_dim = self.env.spec.action_dim
        self.obs_dim = int(rotated_obs(body, jnp.zeros(self.env.spec.obs_dim - 2), jnp.ones(2)).shape[0])

    def start(self, key: Key[Array, ""]) -> TaskState:
        pose_key, turn_key = jr.split(key)
        motion = self.env.engine.load(*random_start(self.env.walker, pose_key, self.env.engine.touches))
        direction = random_direction(turn_key)
        obs = self._observe(motion, direction)
        return TaskState(obs, jnp.zeros((), jnp.int32), jnp.asarray(False), WalkState(motion, direction))

    def step(
        self, state: TaskState, action: Float[Array, " A"], key: Key[Array, ""]
    ) -> tuple[TaskState, Transitions]:
        walk: WalkState = state.inner
        motion = self.env.engine.step(walk.motion, action, jnp.asarray(True))
        ahead = jnp.dot(motion.qpos[:2] - walk.motion.qpos[:2], walk.direction)
        terminated = ~jnp.all(jnp.isfinite(motion.qpos)) | ~jnp.all(jnp.isfinite(motion.qvel))
        if self.name == "ant":
            terminated |= (motion.qpos[2] < _ANT_HEIGHT[0]) | (motion.qpos[2] > _ANT_HEIGHT[1])
            reward = ahead
        else:
            reward = standing(motion.seen[0], motion.seen[15]) * (1 + 100 * ahead)
        t, next_obs = state.t + 1, self._observe(motion, walk.direction)
        mask, late = 1.0 - terminated.astype(jnp.float32), t >= MAX_STEPS
        transition = Transitions(state.obs, action, reward, next_obs, mask, late & ~terminated)
        new_direction = t % _DIRECTION_STEPS[self.name] == 0
        direction = jnp.where(new_direction, random_direction(key), walk.direction)
        obs = self._observe(motion, direction)
        return TaskState(obs, t, terminated | late, WalkState(motion, direction)), transition

    def _observe(self, motion: WalkerPhysics, direction: Float[Array, " 2"]) -> Float[Array, " D"]:
        return rotated_obs(self.name, self.env.observe(motion)[2:], direction)


class Gym(AbstractExpertTask):
    """A gym walker's own task."""

    env: GymEnv
    name: str = eqx.field(static=True)
    obs_dim: int = eqx.field(static=True)
    action_dim: int = eqx.field(static=True)
    control_dt: float = eqx.field(static=True)

    def __init__(self, body: str, engine: str = "c"):
        """Creates the task of `body`, a name in `GYM`, on the engine called `engine`."""
        env = make(f"{body}-medium-v2", engine)
        assert isinstance(env, GymEnv)
        self.env, self.name, self.control_dt = env, body, env.spec.control_dt
        self.obs_dim, self.action_dim = env.spec.obs_dim, env.spec.action_dim

    def start(self, key: Key[Array, ""]) -> TaskState:
        state = self.env.reset(key, jnp.asarray(1))
        return TaskState(state.obs, state.t, state.done, state)

    def step(
        self, state: TaskState, action: Float[Array, " A"], key: Key[Array, ""]
    ) -> tuple[TaskState, Transitions]:
        new = self.env.step(state.inner, action)
        terminated = ~self.env.healthy(new.motion)
        mask, cut = 1.0 - terminated.astype(jnp.float32), new.done & ~terminated
        return TaskState(new.obs, new.t, new.done, new), Transitions(
            state.obs, action, new.reward, new.obs, mask, cut
        )


class DirectedPolicy(DirectionActor):
    """A trained policy as an expert for mazes: the mean of its actions."""

    policy: GaussianPolicy
    body: str = eqx.field(static=True)

    def __call__(self, obs: Float[Array, " R"], direction: Float[Array, " 2"]) -> Float[Array, " A"]:
        return jnp.tanh(self.policy(rotated_obs(self.body, obs, direction)).mean)


def build_task(name: str, engine: str = "c") -> AbstractExpertTask:
    """Returns the task called `name`, one of `TASKS`, on engine `c`, `mjx` or `warp`."""
    if name in GYM:
        return Gym(name, engine)
    return WalkTask(name, None if engine == "c" else walker_engine(flat_walker(name), engine))


def walker_engine(walker: Walker, engine: str) -> AbstractWalkerEngine:
    """Returns an engine of a walker that is not in the registry."""
    if engine == "mjx":
        from envs_mjx.engines.walker_mjx.engine import MjxWalkerEngine

        return MjxWalkerEngine(walker)
    if engine == "warp":
        from envs_mjx.engines.walker_warp import WarpWalkerEngine

        return WarpWalkerEngine(walker)
    return CWalkerEngine(walker)


def flat_walker(body: str) -> Walker:
    """Returns the walker of OGBench's mazes, without walls."""
    spec = walker_mjcf(f"{body}maze-medium")
    for geom in [geom for geom in spec.worldbody.geoms if geom.name.startswith("block_")]:
        spec.delete(geom)
    model = spec.compile()
    return dataclasses.replace(build_walker(f"{body}maze-medium"), family=body, model=model, maze=None)


def random_direction(key: Key[Array, ""]) -> Float[Array, " 2"]:
    """Draws a unit vector, uniform over directions."""
    angle = jr.uniform(key, (), maxval=2 * jnp.pi)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rotated_obs(body: str, obs: Float[Array, " W"], direction: Float[Array, " 2"]) -> Float[Array, " D"]:
    """Returns an observation without the position, in a frame whose first axis is `direction`.

    A plane is the same in every direction, so the policy need only learn to walk along the first axis. The
    ant's quaternion becomes the rotation matrix of its torso, because a quaternion's sign is arbitrary.
    """
    ahead, aside = direction, jnp.stack([-direction[1], direction[0]])
    frame = jnp.stack([ahead, aside])
    if body == "ant":
        quat = obs[1:5] / (jnp.linalg.norm(obs[1:5]) + 1e-9)
        torso = jax.vmap(lambda axis: rotate(quat, axis), out_axes=1)(jnp.eye(3))
        torso = jnp.concatenate([frame @ torso[:2], torso[2:]])
        return jnp.concatenate([obs[:1], torso.reshape(-1), obs[5:13], frame @ obs[13:15], obs[15:]])
    # Of the humanoid only the velocities of the centre of mass and of the torso depend on the frame.
    return obs.at[37:39].set(frame @ obs[37:39]).at[40:42].set(frame @ obs[40:42])


def standing(head: Float[Array, ""], upright: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a humanoid's posture in [0, 1].

    Args:
        head: height of the head, m.
        upright: vertical component of the torso's axis.
    """
    low = jnp.maximum(_HEAD - head, 0.0) / _HEAD_MARGIN
    tilt = jnp.maximum(_UPRIGHT - upright, 0.0) / _UPRIGHT_MARGIN
    return 0.1 ** jnp.square(low) * jnp.maximum(1.0 - tilt, 0.0)
