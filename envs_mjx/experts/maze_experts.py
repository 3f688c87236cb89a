"""Experts that navigate mazes, as in OGBench's locomotion datasets.

An expert moves the walker in a given direction: to the next cell on the shortest path to a goal, or a random
one. A point's action is its displacement, so its expert is the direction itself. Ants and humanoids need a
trained policy, an `Actor`. OGBench's policies are not in its package, so these are trained here
(`experiments/train_expert.py`), and the data differ from OGBench's.

Source: OGBench (Park et al. 2025) and its script that makes locomotion data.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.datagen.data_policy import AbstractScript, Decision, Events, Rows
from envs_mjx.engines.walker_base import Motion
from envs_mjx.locomotion.maze_env import SUCCESS_RADIUS, MazeEnv
from envs_mjx.locomotion.maze_paths import Compass, build_compass

ACTION_NOISE = {"point": 0.5, "ant": 0.2, "humanoid": 0.2}
"""Standard deviation of the noise on the expert's action, which is in [-1, 1]."""
EXPLORE_NOISE = 1.0
"""The same in style `explore`."""
EXPLORE_STEPS = 10
"""Control steps between two changes of direction in style `explore`."""


class Actor(eqx.Module):
    """A policy that moves a walker in a given direction."""

    @abc.abstractmethod
    def __call__(self, obs: Float[Array, " R"], direction: Float[Array, " 2"]) -> Float[Array, " A"]:
        """Returns the action in [-1, 1] for an observation `obs[R]` without its first two entries, the
        position."""


class Point(Actor):
    """The point's expert: its action is the direction."""

    def __call__(self, obs: Float[Array, " R"], direction: Float[Array, " 2"]) -> Float[Array, " A"]:
        del obs
        return direction


class Walk(eqx.Module):
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

    motion: Motion
    obs: Float[Array, " D"]
    goal: Float[Array, " 2"]
    direction: Float[Array, " 2"]
    t: Int[Array, ""]
    arrived: Bool[Array, ""]


class NavigationScript(AbstractScript):
    """A walker that navigates a maze in one of the styles `maze_paths.STYLES`.

    In style `navigate`, a new goal is drawn after each goal reached; in `stitch` there is one goal, in
    `explore` none.
    """

    env: MazeEnv
    actor: Actor
    compass: Compass = eqx.field(static=True)
    style: str = eqx.field(static=True)
    noise: float = eqx.field(static=True)
    rows: int = eqx.field(static=True)

    def __init__(self, style: str, env: MazeEnv, rows: int, actor: Actor | None):
        """Args: a name in `maze_paths.STYLES`; the maze; rows of an episode; a trained policy, None for a
        point."""
        self.env, self.actor, self.style, self.rows = env, actor or Point(), style, rows
        self.compass = build_compass(env.maze.size)
        self.noise = EXPLORE_NOISE if style == "explore" else ACTION_NOISE[env.walker.body]

    @property
    def engine(self) -> str:
        return self.env.engine.name

    @property
    def widths(self) -> dict[str, int]:
        spec, model = self.env.spec, self.env.walker.model
        sizes = spec.obs_dim, spec.action_dim, int(model.nq), int(model.nv), 0
        return dict(zip(Rows._fields, sizes, strict=True))

    def begin(self, world_key: Key[Array, ""], expert_key: Key[Array, ""]) -> Walk:
        cell_key, place_key, pose_key = jr.split(world_key, 3)
        goal_key, noise_key = jr.split(expert_key)
        start = self.compass.draw_start(cell_key)
        motion = self.env.start(pose_key, self.compass.place(place_key, start))
        goal = self.compass.place(noise_key, self.compass.draw_goal(goal_key, self.style, start))
        return Walk(
            motion, self.env.observe(motion), goal, jnp.zeros(2), jnp.zeros((), jnp.int32), jnp.asarray(False)
        )

    def decide(self, play: Walk, key: Key[Array, ""]) -> Decision:
        direction_key, noise_key = jr.split(key)
        motion = play.motion
        if self.style == "explore":
            drawn = jr.normal(direction_key, (2,))
            drawn = drawn / (jnp.linalg.norm(drawn) + 1e-6)
            direction = jnp.where(play.t % EXPLORE_STEPS == 0, drawn, play.direction)
        else:
            direction = self.compass.toward(motion.qpos[:2], play.goal)
        action = self.actor(play.obs[2:], direction)
        action = jnp.clip(action + self.noise * jr.normal(noise_key, action.shape), -1.0, 1.0)
        row = Rows(play.obs, action, motion.qpos, motion.qvel, jnp.zeros(0, bool))
        walk = Walk(motion, play.obs, play.goal, direction, play.t, play.arrived)
        finite = jnp.all(jnp.isfinite(motion.qpos)) & jnp.all(jnp.isfinite(motion.qvel))
        return Decision(row, walk, jnp.asarray(False), finite)

    def advance(
        self,
        play: Walk,
        action: Float[Array, " A"],
        done: Bool[Array, ""],
        active: Bool[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[Walk, Events]:
        del done
        exit_key, goal_key, noise_key = jr.split(key, 3)
        motion = self.env.engine.step(play.motion, action, active)
        obs, distance = self.env.observe(motion), jnp.linalg.norm(motion.qpos[:2] - play.goal)
        reached = distance <= SUCCESS_RADIUS[self.env.walker.body]
        motion = self.env.teleport(exit_key, motion, active)
        goal, event = play.goal, reached & ~play.arrived
        if self.style == "navigate":
            cell = self.compass.draw_goal(goal_key, self.style, self.compass.cell(play.goal))
            goal = jnp.where(reached, self.compass.place(noise_key, cell), goal)
        if self.style == "explore":
            event = jnp.asarray(False)
        arrived = (play.arrived | reached) & (self.style == "stitch")
        walk = Walk(motion, obs, goal, play.direction, play.t + 1, arrived)
        return walk, Events(event, event)

    def dropped(self, play: Walk) -> Int[Array, "..."]:
        return play.motion.dropped
