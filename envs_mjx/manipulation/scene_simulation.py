"""A table with a robot arm and objects: set-up, stepping and readings of a scene, independent of the task.

Scripted experts collect data with this; `env.py` adds tasks and rewards.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from envs_mjx.engines.base import AbstractTabletopEngine, TabletopPhysics
from envs_mjx.manipulation import arm_controller as arms
from envs_mjx.manipulation.observation import Objects, Readings, observe, read_scene
from envs_mjx.manipulation.scenes import Scene
from envs_mjx.rotations import quat_about_z

CUBE_REST_Z = 0.02  # m
PRESSED = -0.02
"""A button toggles when its joint comes to this position (m) from above between two control steps."""
SLIDE_RANGE = np.asarray([(-0.16, 0.0), (0.0, 0.2)])
"""Ends (m) of the joints of the drawer and of the window."""


class SceneState(eqx.Module):
    """State of a scene: its physics, and the states of its buttons, which are not in the physics."""

    physics: TabletopPhysics
    buttons: Bool[Array, " buttons"]


class Tabletop(eqx.Module):
    """The mechanics of one scene on one engine; methods are written for one scene, and vmappable."""

    engine: AbstractTabletopEngine
    scene: Scene = eqx.field(static=True)
    arm: arms.Arm = eqx.field(static=True)

    def reset_collect(self, key: Key[Array, ""]) -> SceneState:
        """Draws a random scene: arm anywhere in its box; cubes flat on the table, anywhere, at any yaw; any
        button states; drawer and window anywhere.
        """
        scene = self.scene
        keys = jr.split(key, 4)
        cubes, yaw = self.scatter(keys[1])
        low, high = jnp.asarray(SLIDE_RANGE[: scene.slides], jnp.float32).T
        buttons = jr.bernoulli(keys[2], shape=(scene.buttons,))
        slides = low + (high - low) * jr.uniform(keys[3], (scene.slides,))
        return self.place(self.random_arm(keys[0]), Objects(cubes, buttons, slides), yaw)

    def advance(self, world: SceneState, action: Float[Array, " A"], active: Bool[Array, ""]) -> SceneState:
        """Advances the scene by one control step; unchanged where not `active`."""
        return self.press(world, self.move(world, action, active))

    def readings(self, world: SceneState) -> Readings:
        """Returns the measurements in the scene, not normalised."""
        return read_scene(self.scene, world.physics, world.buttons)

    def observe(self, world: SceneState) -> Float[Array, " D"]:
        """Returns the observation of a scene, as stored in datasets."""
        return observe(self.scene, world.physics, self.readings(world))

    def move(self, world: SceneState, action: Float[Array, " A"], active: Bool[Array, ""]) -> SceneState:
        """Runs the physics of `advance`, before buttons react."""
        ctrl = self.engine.control(self.arm, self.scene, world.physics, jnp.clip(action, -1.0, 1.0))
        return SceneState(self.engine.step(world.physics, ctrl, active), world.buttons)

    def press(self, before: SceneState, after: SceneState) -> SceneState:
        """Toggles the buttons that were pressed between the two, and locks or frees the slides."""
        if not self.scene.buttons:
            return after
        old, new = (w.physics.qpos[self.scene.button_qpos] for w in (before, after))
        flips = (
            jnp.asarray(influence(self.scene.buttons, self.scene.grid))
            & ((old > PRESSED) & (new <= PRESSED))[:, None]
        )
        buttons = before.buttons ^ (jnp.sum(flips, axis=0) % 2 == 1)
        locked = ~buttons[: self.scene.slides]
        return SceneState(dataclasses.replace(after.physics, locked=locked), buttons)

    def scatter(self, key: Key[Array, ""]) -> tuple[Float[Array, "cubes 3"], Float[Array, " cubes"]]:
        """Draws positions of all cubes, flat on the table, and yaws."""
        key_xy, key_yaw = jr.split(key)
        low, high = jnp.asarray(self.scene.object_bounds)
        xy = jr.uniform(key_xy, (self.scene.cubes, 2), minval=low, maxval=high)
        pos = jnp.concatenate([xy, jnp.full((self.scene.cubes, 1), CUBE_REST_Z)], axis=1)
        return pos, jr.uniform(key_yaw, (self.scene.cubes,), maxval=2 * jnp.pi)

    def random_arm(self, key: Key[Array, ""]) -> Float[Array, " 6"]:
        """Draws joint angles of the arm at a random place in its box, pointing down at any yaw."""
        key_pos, key_yaw = jr.split(key)
        low, high = jnp.asarray(self.scene.arm_bounds)
        pos = jr.uniform(key_pos, (3,), minval=low, maxval=high)
        yaw = jr.uniform(key_yaw, minval=-jnp.pi, maxval=jnp.pi)
        return arms.joints_for(self.arm, pos, yaw, jnp.asarray(arms.HOME, jnp.float32))

    def place(self, joints: Float[Array, " 6"], objects: Objects, yaw: Float[Array, " cubes"]) -> SceneState:
        """Loads a motionless scene with the fingers open."""
        scene = self.scene
        qpos = jnp.asarray(scene.model.qpos0, jnp.float32).at[scene.arm_qpos].set(joints)
        qpos = self.with_cubes(qpos, objects.cubes, yaw).at[scene.slide_qpos].set(objects.slides)
        physics = self.engine.load(qpos, jnp.zeros(scene.model.nv))
        locked = ~objects.buttons[: scene.slides]
        return SceneState(dataclasses.replace(physics, locked=locked), objects.buttons)

    def with_cubes(
        self, qpos: Float[Array, " nq"], pos: Float[Array, "cubes 3"], yaw: Float[Array, " cubes"]
    ) -> Float[Array, " nq"]:
        """Returns `qpos` with the cubes upright at `pos` and `yaw`."""
        pose = jnp.concatenate([pos, jax.vmap(quat_about_z)(yaw)], axis=1)
        return qpos.at[self.scene.cube_qpos[:, None] + np.arange(7)].set(pose)


def influence(buttons: int, grid: tuple[int, int]) -> np.ndarray:
    """Returns bool[buttons, buttons]: whether pressing the first toggles the second. In a puzzle a press
    toggles the button and its neighbours in the grid of (rows, columns); (0, 0) is no puzzle.
    """
    if not any(grid):
        return np.eye(buttons, dtype=bool)
    place = np.stack(np.divmod(np.arange(buttons), grid[1]), axis=1)
    return np.abs(place[:, None] - place).sum(axis=-1) <= 1
