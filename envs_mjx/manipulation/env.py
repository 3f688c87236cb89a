"""OGBench's manipulation environments (cubes, scene, puzzles) as pure functions over a physics engine.

One class covers all families: a scene holds cubes, buttons and slides (drawer and window), and a task gives
their desired states. Observations are described in `observation.py`; actions are normalised, see
`arm.ACTION_SCALE`.

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
from envs_mjx.engines.base import AbstractTabletopEngine, TabletopPhysics
from envs_mjx.manipulation import arm_controller as arms
from envs_mjx.manipulation.observation import (
    SUCCESS_RADIUS,
    Objects,
    goal_columns,
    objects_of,
    obs_dim,
    oracle_goal,
)
from envs_mjx.manipulation.scene_simulation import SLIDE_RANGE, SceneState, Tabletop
from envs_mjx.manipulation.scenes import CONTROL_DT, Scene
from envs_mjx.manipulation.tasks import MAX_STEPS, TASKS, task_table
from mac.errors import UserError
from mac.types import EnvSpec

START_NOISE = 0.01  # m
ESCAPED = 0.2
"""A cube farther than this (m) outside the arm's workspace has been ejected by the physics."""


class ManipState(EnvState):
    """State of a manipulation environment.

    Attributes:
        world: the scene.
        target: desired states of the objects.
        key: source of randomness of this episode.
    """

    world: SceneState
    target: Objects
    key: Key[Array, ""]

    @property
    def physics(self) -> TabletopPhysics:
        return self.world.physics

    @property
    def buttons(self) -> Bool[Array, "*batch buttons"]:
        return self.world.buttons


class ManipEnv(Tabletop, AbstractEnv[ManipState]):
    """A UR5e with a parallel gripper at a table with cubes, buttons, a drawer and a window.

    Single-task: reward is minus the number of sub-goals not reached. Success and end are judged on the state
    *before* the action; cubes are in the table's order. Goal-conditioned: reward 1 at success, judged *after*
    the action; cubes are shuffled at each reset.
    """

    spec: EnvSpec = eqx.field(static=True)
    oracle_goal: bool = eqx.field(static=True)

    def __init__(
        self,
        name: str,
        scene: Scene,
        engine: AbstractTabletopEngine,
        *,
        task: int | None = None,
        oracle_goal: bool = True,
    ):
        """Creates an environment on `scene`.

        Args:
            task: id (1 to 5) of the task of a single-task environment; None for goal-conditioned.
            oracle_goal: whether goals are object positions and states only, or whole observations.
        """
        self.scene, self.engine, self.arm = scene, engine, arms.build_arm(scene)
        self.oracle_goal = oracle_goal
        columns = goal_columns(scene) if oracle_goal else tuple(range(obs_dim(scene)))
        self.spec = EnvSpec(
            name=name,
            obs_dim=obs_dim(scene),
            action_dim=arms.ACTION_DIM,
            goal_dim=len(columns) if task is None else None,
            tasks=tuple(range(1, TASKS + 1)) if task is None else (task,),
            max_steps=MAX_STEPS[scene.family],
            control_dt=CONTROL_DT,
            goal_columns=columns if task is None else (),
        )

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> ManipState:
        """Starts an episode of `task`: arm at a random pose; cubes, drawer and window at the task's start +-1
        cm; cubes at any yaw.
        """
        keys = dict(
            zip(("arm", "noise", "yaw", "order", "goal", "slides", "episode"), jr.split(key, 7), strict=True)
        )
        start, target = (jax.tree.map(lambda x: jnp.asarray(x)[task - 1], t) for t in self._tasks())
        if self.spec.goal_dim is not None:
            order = jr.permutation(keys["order"], self.scene.cubes)
            start, target = (t._replace(cubes=t.cubes[order]) for t in (start, target))
        shown = self._show(keys["goal"], target)
        noise = jr.uniform(keys["noise"], (self.scene.cubes, 2), minval=-START_NOISE, maxval=START_NOISE)
        yaw = jr.uniform(keys["yaw"], (self.scene.cubes,), maxval=2 * jnp.pi)
        shift = jr.uniform(keys["slides"], (self.scene.slides,), minval=-START_NOISE, maxval=START_NOISE)
        low, high = jnp.asarray(SLIDE_RANGE[: self.scene.slides], jnp.float32).T
        start = start._replace(
            cubes=start.cubes.at[:, :2].add(noise), slides=jnp.clip(start.slides + shift, low, high)
        )
        world = self.place(self.random_arm(keys["arm"]), start, yaw)
        # OGBench does not clear contact forces between showing the goal and the start.
        world = SceneState(dataclasses.replace(world.physics, touch=shown.physics.touch), world.buttons)
        return ManipState(
            world=world,
            obs=self.observe(world),
            goal=None if self.spec.goal_dim is None else self.goal_of(shown),
            target=target,
            dropped=world.physics.dropped,
            key=keys["episode"],
        )

    def step(self, state: ManipState, action: Float[Array, " A"]) -> ManipState:
        """Advances one control step, as in `AbstractEnv`. An action of zeros is no motion."""
        action, finite = self.check_action(action)
        world = self._recover(self.move(state.world, action, ~state.done), state)
        world = self.press(state.world, world)
        reached = self.reached(state.world if self.spec.goal_dim is None else world, state.target)
        success = jnp.all(reached)
        if self.spec.goal_dim is None:
            # A start that happens to solve the task is not reported: OGBench clears success on reset.
            success &= state.t > 0
            reward = jnp.sum(reached.astype(jnp.float32)) - reached.size
        else:
            reward = success.astype(jnp.float32)
        after = dataclasses.replace(
            state,
            world=world,
            obs=self.observe(world),
            reward=reward,
            success=success,
            done=success,
            dropped=world.physics.dropped,
        )
        return self.end_step(state, after, finite)

    def reached(self, world: SceneState, target: Objects) -> Bool[Array, " subgoals"]:
        """Returns the sub-goals reached: cubes and slides within 4 cm, buttons in the desired state."""
        seen = self.readings(world)
        cubes = jnp.linalg.norm(seen.cube_pos - target.cubes, axis=1) <= SUCCESS_RADIUS
        slides = jnp.abs(seen.slide_pos - target.slides) <= SUCCESS_RADIUS
        return jnp.concatenate([cubes, seen.button_state == target.buttons, slides])

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns reward (minus the sub-goals not reached) and mask (0 = terminal: all reached), float32[N],
        of raw observations.

        Raises:
            UserError: if `obs` has the wrong width, or the task does not exist.
        """
        self.check_observations(obs)
        if not 1 <= task <= TASKS:
            raise UserError(f"task {task} of {self.spec.name} does not exist; choose 1 to {TASKS}")
        _, goals = task_table(self.scene.family)
        objects, goal = objects_of(self.scene, obs), Objects(*(x[task - 1] for x in goals))
        reached = np.concatenate(
            [
                np.linalg.norm(objects.cubes - goal.cubes, axis=-1) <= SUCCESS_RADIUS,
                objects.buttons == goal.buttons,
                np.abs(objects.slides - goal.slides) <= SUCCESS_RADIUS,
            ],
            axis=1,
        )
        reward = reached.sum(axis=1) - float(reached.shape[1])
        return np.asarray(reward, np.float32), np.asarray(~reached.all(axis=1), np.float32)

    def goal_of(self, world: SceneState) -> Float[Array, " G"]:
        """Returns the goal representation of a scene: its objects only, or the whole observation."""
        return oracle_goal(self.scene, self.readings(world)) if self.oracle_goal else self.observe(world)

    def _tasks(self) -> tuple[Objects, Objects]:
        def single(objects: Objects) -> Objects:
            return Objects(np.float32(objects.cubes), objects.buttons, np.float32(objects.slides))

        start, goal = task_table(self.scene.family)
        return single(start), single(goal)

    def _recover(self, world: SceneState, state: ManipState) -> SceneState:
        """Puts a cube that the physics ejected back on the table, as OGBench does in `scene`."""
        if not self.scene.slides:
            return world
        scene, qpos, qvel = self.scene, world.physics.qpos, world.physics.qvel
        low, high = jnp.asarray(arms.WORKSPACE)
        cubes = qpos[scene.cube_qpos[:, None] + np.arange(3)]
        escaped = jnp.any((cubes <= low[None] - ESCAPED) | (cubes >= high[None] + ESCAPED))
        qpos = self.with_cubes(qpos, *self.scatter(jr.fold_in(state.key, state.t)))
        qvel = qvel.at[scene.cube_dof[:, None] + np.arange(6)].set(0.0)
        physics = self.engine.place(world.physics, qpos, qvel, escaped & ~state.done)
        return SceneState(physics, world.buttons)

    def _show(self, key: Key[Array, ""], target: Objects) -> SceneState:
        """Returns the solved scene after a few random steps: two, or five with the fingers closing."""
        key_arm, key_action = jr.split(key)
        world = self.place(self.random_arm(key_arm), target, jnp.zeros(self.scene.cubes))
        puzzle = any(self.scene.grid)
        shape = (5 if puzzle else 2, self.spec.action_dim)
        actions = jr.uniform(key_action, shape, minval=-1.0, maxval=1.0)
        if puzzle:
            actions = actions.at[:, -1].set(1.0)
        on = jnp.asarray(True)
        return jax.lax.scan(lambda world, a: (self.advance(world, a, on), None), world, actions)[0]
