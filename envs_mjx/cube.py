"""OGBench's cube manipulation environments as pure functions over a physics engine.

Layout of an observation (D = 19 + 9 * cubes): arm joint angles (6, rad), their velocities (6,
rad/s), pinch position ((xyz - centre) * 10), cos and sin of its yaw, gripper opening * 3 (0 is
open), finger contact in [0, 1]; then for each cube its position ((xyz - centre) * 10), quaternion
wxyz, cos and sin of its yaw. Actions are normalised: see `arm.ACTION_SCALE`.

Source: Park et al. 2025, "OGBench", and the behaviour of ogbench 1.2.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx import arm as arms
from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.engine import AbstractEngine, Physics
from envs_mjx.rotations import quat_about_z, yaw_of_mat, yaw_of_quat
from envs_mjx.scenes import CONTROL_DT, Scene
from envs_mjx.tasks import MAX_STEPS, task_table
from mac.errors import UserError
from mac.types import EnvSpec

CENTER = (0.425, 0.0, 0.0)
POSITION_SCALE = 10.0
GRIPPER_SCALE = 3.0
CONTACT_SCALE = 50.0
ROBOT_DIM = 19
CUBE_DIM = 9
SUCCESS_RADIUS = 0.04
START_NOISE = 0.01
GOAL_STEPS = 2
CUBE_REST_Z = 0.02


class Readings(NamedTuple):
    """What a scripted expert sees: metres and radians, world frame.

    The effector is the pinch point between the finger tips; its pose is one substep older than the
    cubes', as in OGBench. `gripper_opening` is OGBench's word for a number that is 0 with the fingers
    open and 1 with them closed; `gripper_contact` is the right finger's contact force, in [0, 1].
    """

    effector_pos: Float[Array, " 3"]
    effector_yaw: Float[Array, ""]
    gripper_opening: Float[Array, ""]
    gripper_contact: Float[Array, ""]
    cube_pos: Float[Array, "cubes 3"]
    cube_quat: Float[Array, "cubes 4"]
    cube_yaw: Float[Array, " cubes"]


class CubeState(EnvState):
    physics: Physics
    target: Array


def cube_tasks(family):
    start, goal = task_table(family)
    return start.cubes, goal.cubes


class CubeEnv(AbstractEnv):
    """Cubes to be brought to target positions by a UR5e with a parallel gripper.

    Single-task: reward -(cubes not at their target), success and end judged on the state *before* the
    action, cubes in the table's order. Goal-conditioned: reward 1 at success, judged *after* the
    action, cubes shuffled at each reset.
    """

    spec: EnvSpec = eqx.field(static=True)
    engine: AbstractEngine
    scene: Scene = eqx.field(static=True)
    arm: arms.Arm = eqx.field(static=True)
    oracle_goal: bool = eqx.field(static=True)

    def __init__(
        self,
        name: str,
        scene: Scene,
        engine: AbstractEngine,
        *,
        task: int | None = None,
        oracle_goal: bool = True,
    ):
        """An environment on `scene`.

        Args:
            task: id (1 to 5) of the task of a single-task environment; None for goal-conditioned.
            oracle_goal: whether goals are cube positions only, or whole observations.
        """
        self.scene, self.engine, self.arm = scene, engine, arms.build_arm(scene)
        self.oracle_goal = oracle_goal
        obs_dim = ROBOT_DIM + CUBE_DIM * scene.cubes
        self.spec = EnvSpec(
            name=name,
            obs_dim=obs_dim,
            action_dim=arms.ACTION_DIM,
            goal_dim=(3 * scene.cubes if oracle_goal else obs_dim) if task is None else None,
            tasks=tuple(range(1, 6)) if task is None else (task,),
            max_steps=MAX_STEPS[scene.family],
            control_dt=CONTROL_DT,
        )

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> EnvState:
        """Starts an episode of `task`: arm at a random pose, cubes at the task's start +-1 cm, random yaw."""
        keys = dict(zip(("arm", "noise", "yaw", "order", "goal"), jr.split(key, 5), strict=True))
        starts, targets = (jnp.asarray(t, jnp.float32)[task - 1] for t in cube_tasks(self.scene.family))
        goal = touch = None
        if self.spec.goal_dim is not None:
            order = jr.permutation(keys["order"], self.scene.cubes)
            starts, targets = starts[order], targets[order]
            goal, touch = self._goal(keys["goal"], targets)
        noise = jr.uniform(keys["noise"], (self.scene.cubes, 2), minval=-START_NOISE, maxval=START_NOISE)
        yaw = jr.uniform(keys["yaw"], (self.scene.cubes,), maxval=2 * jnp.pi)
        physics = self._place(self._random_arm(keys["arm"]), starts.at[:, :2].add(noise), yaw)
        if touch is not None:
            # OGBench does not clear contact forces between showing the goal and the start.
            physics = dataclasses.replace(physics, touch=touch)
        return CubeState(
            physics=physics,
            obs=self.observe(physics),
            goal=goal,
            target=targets,
            reward=jnp.zeros(()),
            success=jnp.asarray(False),
            done=jnp.asarray(False),
            t=jnp.asarray(0),
            dropped=physics.dropped,
        )

    def step(self, state: EnvState, action: Float[Array, " A"]) -> EnvState:
        physics = self.advance(state.physics, action, ~state.done)
        t = state.t + 1
        if self.spec.goal_dim is None:
            placed = self._placed(state.physics, state.target)
            # A start that happens to solve the task is not reported: OGBench clears success on reset.
            success = jnp.all(placed) & (state.t > 0)
            reward = jnp.sum(placed.astype(jnp.float32)) - self.scene.cubes
        else:
            success = jnp.all(self._placed(physics, state.target))
            reward = success.astype(jnp.float32)
        new = CubeState(
            physics=physics,
            obs=self.observe(physics),
            goal=state.goal,
            target=state.target,
            reward=reward,
            success=success,
            done=success | (t >= self.spec.max_steps),
            t=t,
            dropped=physics.dropped,
        )
        return jax.tree.map(lambda old, fresh: jnp.where(state.done, old, fresh), state, new)

    def relabel(self, obs: np.ndarray, task: int) -> tuple[np.ndarray, np.ndarray]:
        """Reward in [-cubes, 0] and mask (0 where every cube is placed), float32[N], of raw observations.

        Raises:
            UserError: if `obs` has another width than this environment's, or there is no such task.
        """
        if obs.ndim != 2 or obs.shape[1] != self.spec.obs_dim:
            raise UserError(
                f"observations of shape {obs.shape} are not those of {self.spec.name}: "
                f"expected (N, {self.spec.obs_dim})"
            )
        _, goals = cube_tasks(self.scene.family)
        if not 1 <= task <= len(goals):
            raise UserError(f"task {task} of {self.spec.name} does not exist; choose 1 to {len(goals)}")
        cubes = obs[:, ROBOT_DIM:].reshape(len(obs), self.scene.cubes, CUBE_DIM)[:, :, :3]
        placed = np.linalg.norm(cubes / POSITION_SCALE + CENTER - goals[task - 1], axis=-1) <= SUCCESS_RADIUS
        reward = placed.sum(axis=1) - float(self.scene.cubes)
        return reward.astype(np.float32), 1 - placed.all(axis=1).astype(np.float32)

    # The pieces below are what a scripted expert needs to collect data.

    def reset_collect(self, key: Key[Array, ""]) -> Physics:
        """A random scene: arm anywhere in its box, cubes flat on the table, anywhere, at any yaw."""
        key_arm, key_xy, key_yaw = jr.split(key, 3)
        low, high = jnp.asarray(self.scene.object_bounds)
        xy = jr.uniform(key_xy, (self.scene.cubes, 2), minval=low, maxval=high)
        pos = jnp.concatenate([xy, jnp.full((self.scene.cubes, 1), CUBE_REST_Z)], axis=1)
        yaw = jr.uniform(key_yaw, (self.scene.cubes,), maxval=2 * jnp.pi)
        return self._place(self._random_arm(key_arm), pos, yaw)

    def advance(self, physics: Physics, action: Float[Array, " A"], active: Bool[Array, ""]) -> Physics:
        """The scene one control step later, whatever the task; unchanged where not `active`."""
        ctrl = self.engine.control(self.arm, self.scene, physics, jnp.clip(action, -1.0, 1.0))
        return self.engine.step(physics, ctrl, active)

    def readings(self, physics: Physics) -> Readings:
        """Physical quantities of the scene, not normalised."""
        cubes = physics.qpos[self.scene.cube_qpos[:, None] + np.arange(7)]
        return Readings(
            effector_pos=physics.site_pos[0],
            effector_yaw=yaw_of_mat(physics.site_mat[0]),
            gripper_opening=arms.gripper_opening(self.scene, physics.qpos),
            gripper_contact=jnp.clip(jnp.linalg.norm(physics.touch) / CONTACT_SCALE, 0.0, 1.0),
            cube_pos=cubes[:, :3],
            cube_quat=cubes[:, 3:],
            cube_yaw=jax.vmap(yaw_of_quat)(cubes[:, 3:]),
        )

    def observe(self, physics: Physics) -> Float[Array, " D"]:
        """The observation of a scene, as stored in datasets."""
        seen = self.readings(physics)
        robot = [
            physics.qpos[self.scene.arm_qpos],
            physics.qvel[self.scene.arm_dof],
            _scaled(seen.effector_pos),
            jnp.stack([jnp.cos(seen.effector_yaw), jnp.sin(seen.effector_yaw)]),
            jnp.stack([seen.gripper_opening * GRIPPER_SCALE, seen.gripper_contact]),
        ]
        turn = jnp.stack([jnp.cos(seen.cube_yaw), jnp.sin(seen.cube_yaw)], axis=1)
        cubes = jnp.concatenate([_scaled(seen.cube_pos), seen.cube_quat, turn], axis=1)
        return jnp.concatenate([*robot, cubes.ravel()])

    def goal_of(self, physics: Physics) -> Float[Array, " G"]:
        """The goal representation of a scene: scaled cube positions, or the whole observation."""
        return _scaled(self.readings(physics).cube_pos).ravel() if self.oracle_goal else self.observe(physics)

    def _goal(
        self, key: Key[Array, ""], targets: Float[Array, "cubes 3"]
    ) -> tuple[Float[Array, " G"], Float[Array, " 6"]]:
        """Goal representation and finger contact after two random steps from the solved scene."""
        key_arm, key_action = jr.split(key)
        physics = self._place(self._random_arm(key_arm), targets, jnp.zeros(self.scene.cubes))
        actions = jr.uniform(key_action, (GOAL_STEPS, self.spec.action_dim), minval=-1.0, maxval=1.0)

        def move(physics: Physics, action: Float[Array, " A"]) -> tuple[Physics, None]:
            return self.advance(physics, action, jnp.asarray(True)), None

        physics, _ = jax.lax.scan(move, physics, actions)
        return self.goal_of(physics), physics.touch

    def _random_arm(self, key: Key[Array, ""]) -> Float[Array, " 6"]:
        key_pos, key_yaw = jr.split(key)
        low, high = jnp.asarray(self.scene.arm_bounds)
        pos = jr.uniform(key_pos, (3,), minval=low, maxval=high)
        yaw = jr.uniform(key_yaw, minval=-jnp.pi, maxval=jnp.pi)
        return arms.joints_for(self.arm, pos, yaw, jnp.asarray(arms.HOME, jnp.float32))

    def _place(
        self, joints: Float[Array, " 6"], pos: Float[Array, "cubes 3"], yaw: Float[Array, " cubes"]
    ) -> Physics:
        """A motionless scene with the fingers open."""
        pose = jnp.concatenate([pos, jax.vmap(quat_about_z)(yaw)], axis=1)
        qpos = jnp.asarray(self.scene.model.qpos0, jnp.float32).at[self.scene.arm_qpos].set(joints)
        qpos = qpos.at[self.scene.cube_qpos[:, None] + np.arange(7)].set(pose)
        return self.engine.load(qpos, jnp.zeros(self.scene.model.nv))

    def _placed(self, physics: Physics, target: Float[Array, "cubes 3"]) -> Bool[Array, " cubes"]:
        cubes = physics.qpos[self.scene.cube_qpos[:, None] + np.arange(3)]
        return jnp.linalg.norm(cubes - target, axis=1) <= SUCCESS_RADIUS


def _scaled(pos: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    return (pos - jnp.broadcast_to(jnp.asarray(CENTER), pos.shape)) * POSITION_SCALE
