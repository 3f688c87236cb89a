"""Experts that navigate mazes, as in OGBench's locomotion datasets.

An expert moves the walker in a given direction: to the next cell on the shortest path to a goal, or a random
one. A point's action is its displacement, so its expert is the direction itself. Ants and humanoids need a
trained policy, a `DirectionActor`. OGBench's policies are not in its package, so these are trained here
(`experiments/train_expert.py`), and the data differ from OGBench's.

Source: OGBench (Park et al. 2025) and its script that makes locomotion data.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.datagen.data_policy import AbstractDataPolicy, ExpertDecision, StepRecords, TargetEvents
from envs_mjx.engines.base import WalkerPhysics
from envs_mjx.locomotion.maze_env import SUCCESS_RADIUS, MazeEnv
from envs_mjx.locomotion.maze_paths import MazePaths, build_maze_paths

ACTION_NOISE = {"point": 0.5, "ant": 0.2, "humanoid": 0.2}
"""Standard deviation of the noise on the expert's action, which is in [-1, 1]."""
EXPLORE_NOISE = 1.0
"""The same in style `explore`."""
EXPLORE_STEPS = 10
"""Control steps between two changes of direction in style `explore`."""


class DirectionActor(eqx.Module):
    """A policy that moves a walker in a given direction."""

    @abc.abstractmethod
    def __call__(self, obs: Float[Array, " R"], direction: Float[Array, " 2"]) -> Float[Array, " A"]:
        """Returns the action in [-1, 1] for an observation `obs[R]` without its first two entries, the
        position."""


class PointActor(DirectionActor):
    """The point's expert: its action is the direction."""

    def __call__(self, obs: Float[Array, " R"], direction: Float[Array, " 2"]) -> Float[Array, " A"]:
        del obs
        return direction


class MazeEpisode(eqx.Module):
    """A walker on its way to a goal.

    Attributes:
        motion: its physical state.
        obs: its last observation. After a teleport this is still the one at the entrance, as in OGBench's
            datasets.
        goal: position to reach, m.
        direction: direction in style `explore`, a unit vector.
        t: control steps taken.
        arrived: whether it has reached the goal, in style `stitch`.
    """

    motion: WalkerPhysics
    obs: Float[Array, " D"]
    goal: Float[Array, " 2"]
    direction: Float[Array, " 2"]
    t: Int[Array, ""]
    arrived: Bool[Array, ""]


class MazeDataPolicy(AbstractDataPolicy):
    """A walker that navigates a maze in one of the styles `maze_paths.STYLES`.

    In style `navigate`, a new goal is drawn after each goal reached; in `stitch` there is one goal, in
    `explore` none.
    """

    env: MazeEnv
    actor: DirectionActor
    paths: MazePaths = eqx.field(static=True)
    style: str = eqx.field(static=True)
    noise: float = eqx.field(static=True)
    rows: int = eqx.field(static=True)

    def __init__(self, style: str, env: MazeEnv, rows: int, actor: DirectionActor | None):
        """Args: a name in `maze_paths.STYLES`; the maze; rows of an episode; a trained policy, None for a
        point."""
        self.env, self.actor, self.style, self.rows = env, actor or PointActor(), style, rows
        self.paths = build_maze_paths(env.maze.size)
        self.noise = EXPLORE_NOISE if style == "explore" else ACTION_NOISE[env.walker.body]

    @property
    def engine(self) -> str:
        return self.env.engine.name

    @property
    def widths(self) -> dict[str, int]:
        spec, model = self.env.spec, self.env.walker.model
        sizes = spec.obs_dim, spec.action_dim, int(model.nq), int(model.nv), 0
        return dict(zip(StepRecords._fields, sizes, strict=True))

    def begin(self, world_key: Key[Array, ""], expert_key: Key[Array, ""]) -> MazeEpisode:
        cell_key, place_key, pose_key = jr.split(world_key, 3)
        goal_key, noise_key = jr.split(expert_key)
        start = self.paths.draw_start(cell_key)
        motion = self.env.start(pose_key, self.paths.place(place_key, start))
        goal = self.paths.place(noise_key, self.paths.draw_goal(goal_key, self.style, start))
        return MazeEpisode(
            motion, self.env.observe(motion), goal, jnp.zeros(2), jnp.zeros((), jnp.int32), jnp.asarray(False)
        )

    def decide(self, state: MazeEpisode, key: Key[Array, ""]) -> ExpertDecision:
        direction_key, noise_key = jr.split(key)
        motion = state.motion
        if self.style == "explore":
            drawn = jr.normal(direction_key, (2,))
            drawn = drawn / (jnp.linalg.norm(drawn) + 1e-6)
            direction = jnp.where(state.t % EXPLORE_STEPS == 0, drawn, state.direction)
        else:
            direction = self.paths.toward(motion.qpos[:2], state.goal)
        action = self.actor(state.obs[2:], direction)
        action = jnp.clip(action + self.noise * jr.normal(noise_key, action.shape), -1.0, 1.0)
        row = StepRecords(state.obs, action, motion.qpos, motion.qvel, jnp.zeros(0, bool))
        moved = MazeEpisode(motion, state.obs, state.goal, direction, state.t, state.arrived)
        finite = jnp.all(jnp.isfinite(motion.qpos)) & jnp.all(jnp.isfinite(motion.qvel))
        return ExpertDecision(row, moved, jnp.asarray(False), finite)

    def advance(
        self,
        state: MazeEpisode,
        action: Float[Array, " A"],
        done: Bool[Array, ""],
        active: Bool[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[MazeEpisode, TargetEvents]:
        del done
        exit_key, goal_key, noise_key = jr.split(key, 3)
        motion = self.env.engine.step(state.motion, action, active)
        obs, distance = self.env.observe(motion), jnp.linalg.norm(motion.qpos[:2] - state.goal)
        reached = distance <= SUCCESS_RADIUS[self.env.walker.body]
        motion = self.env.teleport(exit_key, motion, active)
        goal, event = state.goal, reached & ~state.arrived
        if self.style == "navigate":
            cell = self.paths.draw_goal(goal_key, self.style, self.paths.cell(state.goal))
            goal = jnp.where(reached, self.paths.place(noise_key, cell), goal)
        if self.style == "explore":
            event = jnp.asarray(False)
        arrived = (state.arrived | reached) & (self.style == "stitch")
        moved = MazeEpisode(motion, obs, goal, state.direction, state.t + 1, arrived)
        return moved, TargetEvents(event, event)

    def dropped(self, state: MazeEpisode) -> Int[Array, "..."]:
        return state.motion.dropped
