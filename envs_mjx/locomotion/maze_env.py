"""OGBench's mazes as pure functions over a physics engine: a point, ant or humanoid must reach a position.

Observations are positions and velocities of all joints; the humanoid's are `Walker.seen` in place of its
torso's pose. Actions are the controls of the model, in [-1, 1]: torques, or the displacement of a point.

Source: Park et al. 2025, "OGBench", and the behaviour of ogbench 1.2.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.engines.base import AbstractWalkerEngine, WalkerPhysics
from envs_mjx.locomotion.initial_state import random_start
from envs_mjx.locomotion.mazes import PLACE_NOISE, TELEPORT_RADIUS, Maze
from envs_mjx.locomotion.walkers import Walker
from mac.errors import UserError
from mac.types import EnvSpec

SUCCESS_RADIUS = {"point": 1.0, "ant": 0.5, "humanoid": 0.5}  # m
_SETTLE = {"point": 5, "ant": 5, "humanoid": 40}
"""Random actions before a walker's observation is taken as the goal."""


class MazeState(EnvState):
    """State of a walker in a maze.

    Attributes:
        motion: the walker. After a teleport it is already at the exit, while `obs` is the observation at the
            entrance.
        target: position to reach, m.
        key: source of randomness of this episode.
    """

    motion: WalkerPhysics
    target: Float[Array, " 2"]
    key: Key[Array, ""]


class MazeEnv(AbstractEnv[MazeState]):
    """A walker in a maze.

    Single-task: reward -1, or 0 at success, which is judged on the state *before* the action; goals are
    centres of cells. Goal-conditioned: reward 1 at success, judged *after* the action; goals are uniform
    within 1 m of a centre along each axis, as starts always are. An episode ends at success.
    """

    spec: EnvSpec = eqx.field(static=True)
    walker: Walker = eqx.field(static=True)
    engine: AbstractWalkerEngine
    oracle_goal: bool = eqx.field(static=True)

    def __init__(
        self,
        name: str,
        walker: Walker,
        engine: AbstractWalkerEngine,
        *,
        task: int | None = None,
        oracle_goal: bool = True,
    ):
        """Creates an environment of `walker`, whose model contains a maze.

        Args:
            task: id (1 to 5) of the task of a single-task environment; None for goal-conditioned.
            oracle_goal: whether goals are positions (x, y) only, or whole observations.
        """
        self.walker, self.engine, self.oracle_goal = walker, engine, oracle_goal
        size, model = walker.seen_size, walker.model
        # The humanoid's observation has `seen` where the model has height and orientation of the torso.
        width = int(model.nq + model.nv + (size - 5 if size else 0)) if walker.body != "point" else 2
        columns = (0, 1) if oracle_goal else tuple(range(width))
        self.spec = EnvSpec(
            name=name,
            obs_dim=width,
            action_dim=int(model.nu),
            goal_dim=len(columns) if task is None else None,
            tasks=tuple(range(1, self.tasks + 1)) if task is None else (task,),
            max_steps=max_steps(walker),
            control_dt=walker.control_dt,
            goal_columns=columns if task is None else (),
        )

    @property
    def maze(self) -> Maze:
        maze = self.walker.maze
        assert maze is not None
        return maze

    @property
    def tasks(self) -> int:
        """Number of tasks in the maze."""
        return len(self.maze.goals)

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> MazeState:
        """Starts an episode of `task`, within 1 m of the centre of its first cell along each axis."""
        names = ("start", "pose", "goal", "show", "episode")
        keys = dict(zip(names, jr.split(key, len(names)), strict=True))
        start, target = (
            jnp.asarray(self.maze.xy(cells), jnp.float32)[task - 1]
            for cells in (self.maze.starts, self.maze.goals)
        )
        if self.spec.goal_dim is not None:
            target += _place_noise(keys["goal"])
        motion = self.start(keys["pose"], start + _place_noise(keys["start"]))
        return MazeState(
            motion=motion,
            obs=self.observe(motion),
            goal=None if self.spec.goal_dim is None else self._show(keys["show"], target),
            target=target,
            dropped=motion.dropped,
            key=keys["episode"],
        )

    def step(self, state: MazeState, action: Float[Array, " A"]) -> MazeState:
        """Advances one control step, as in `AbstractEnv`."""
        action, finite = self.check_action(action)
        moved = self.engine.step(state.motion, action, ~state.done)
        judged = state.motion if self.spec.goal_dim is None else moved
        distance = jnp.linalg.norm(judged.qpos[:2] - state.target)
        success = distance <= SUCCESS_RADIUS[self.walker.body]
        reward = success.astype(jnp.float32) - (1.0 if self.spec.goal_dim is None else 0.0)
        after = dataclasses.replace(
            state,
            motion=self.teleport(jr.fold_in(state.key, state.t + 1), moved, ~state.done),
            obs=self.observe(moved),
            reward=reward,
            success=success,
            done=success,
            dropped=moved.dropped,
        )
        return self.end_step(state, after, finite)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns reward (-1, or 0 at the goal cell's centre) and mask (0 = terminal, at the goal),
        float32[N], of raw observations.

        Raises:
            UserError: if `obs` has the wrong width, or the task does not exist.
        """
        self.check_observations(obs)
        if not 1 <= task <= self.tasks:
            raise UserError(f"task {task} of {self.spec.name} does not exist; choose 1 to {self.tasks}")
        goal = self.maze.xy(self.maze.goals[task - 1])
        away = np.linalg.norm(obs[:, :2] - goal, axis=1) > SUCCESS_RADIUS[self.walker.body]
        return -away.astype(np.float32), away.astype(np.float32)

    def start(self, key: Key[Array, ""], xy: Float[Array, " 2"]) -> WalkerPhysics:
        """Returns the walker in a random pose at the position `xy` (m)."""
        qpos, qvel = random_start(self.walker, key, self.engine.touches)
        return self.engine.load(qpos.at[:2].set(xy), qvel)

    def observe(self, motion: WalkerPhysics) -> Float[Array, " D"]:
        """Returns the observation of a state, as stored in datasets."""
        if self.walker.body == "point":
            return motion.qpos
        if self.walker.body == "ant":
            return jnp.concatenate([motion.qpos, motion.qvel])
        return jnp.concatenate([motion.qpos[:2], motion.qpos[7:], motion.seen, motion.qvel])

    def teleport(self, key: Key[Array, ""], motion: WalkerPhysics, active: Bool[Array, ""]) -> WalkerPhysics:
        """Moves a walker at an entrance of a teleporter to one of the exits."""
        maze = self.maze
        if not len(maze.entrances):
            return motion
        distance = jnp.linalg.norm(motion.qpos[None, :2] - jnp.asarray(maze.entrances, jnp.float32), axis=1)
        exit_xy = jr.choice(key, jnp.asarray(maze.exits, jnp.float32))
        return self.engine.place(motion, exit_xy, active & jnp.any(distance <= TELEPORT_RADIUS))

    def _show(self, key: Key[Array, ""], target: Float[Array, " 2"]) -> Float[Array, " G"]:
        """Returns the goal: the position, or the walker's observation there after a few random steps
        elsewhere."""
        if self.oracle_goal:
            return target
        key_pose, key_actions = jr.split(key)
        shape, on = (_SETTLE[self.walker.body], self.spec.action_dim), jnp.asarray(True)
        actions = jr.uniform(key_actions, shape, minval=-1.0, maxval=1.0)
        motion = self.engine.load(*random_start(self.walker, key_pose, self.engine.touches))
        motion, _ = jax.lax.scan(lambda m, a: (self.engine.step(m, a, on), None), motion, actions)
        return self.observe(self.engine.place(motion, target, on))


def max_steps(walker: Walker) -> int:
    """Returns the time limit of an episode in a maze, in control steps."""
    if walker.body != "humanoid":
        return 1000
    return 4000 if walker.maze is not None and walker.maze.size == "giant" else 2000


def _place_noise(key: Key[Array, ""]) -> Float[Array, " 2"]:
    return jr.uniform(key, (2,), minval=-PLACE_NOISE, maxval=PLACE_NOISE)
