"""Measurements in a tabletop scene, and the observations and goals computed from them.

Layout of an observation (D = 19 + 9 cubes + 4 buttons + 2 slides): arm joint angles (6, rad), their
velocities (6, rad/s), pinch position ((xyz - centre) * 10), cos and sin of its yaw, gripper opening
* 3 (0 is open), finger contact in [0, 1]; for each cube its position ((xyz - centre) * 10), quaternion
wxyz, cos and sin of its yaw; for each button one-hot state (2), joint position * 120, joint velocity;
for drawer and window joint position * 18 and * 15, joint velocity.

Source: Park et al. 2025, "OGBench", and the behaviour of ogbench 1.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from envs_mjx.engines.base import TabletopPhysics
from envs_mjx.manipulation import arm_controller as arms
from envs_mjx.manipulation.scenes import Scene
from envs_mjx.rotations import yaw_of_mat, yaw_of_quat

CENTER = (0.425, 0.0, 0.0)
POSITION_SCALE = 10.0
GRIPPER_SCALE = 3.0
CONTACT_SCALE = 50.0
BUTTON_SCALE = 120.0
SLIDE_SCALE = (18.0, 15.0)
ROBOT_DIM, CUBE_DIM, BUTTON_DIM, SLIDE_DIM = 19, 9, 4, 2
SUCCESS_RADIUS = 0.04
"""Largest distance (m) at which a cube, a drawer or a window counts as reached."""


class Readings(NamedTuple):
    """Measurements that a scripted expert reads: metres and radians, world frame.

    The effector is the pinch point between the finger tips. `gripper_opening` is OGBench's word for a
    number that is 0 with the fingers open and 1 with them closed; `gripper_contact` is the right
    finger's contact force, in [0, 1]. Slides are the drawer and the window.
    """

    effector_pos: Float[Array, " 3"]
    effector_yaw: Float[Array, ""]
    gripper_opening: Float[Array, ""]
    gripper_contact: Float[Array, ""]
    cube_pos: Float[Array, "cubes 3"]
    cube_quat: Float[Array, "cubes 4"]
    cube_yaw: Float[Array, " cubes"]
    button_state: Bool[Array, " buttons"]
    button_pos: Float[Array, " buttons"]
    button_vel: Float[Array, " buttons"]
    slide_pos: Float[Array, " slides"]
    slide_vel: Float[Array, " slides"]


def read_scene(scene: Scene, physics: TabletopPhysics, buttons: Bool[Array, " buttons"]) -> Readings:
    """Returns the measurements in a scene whose buttons are in the states `buttons`."""
    cubes = physics.qpos[scene.cube_qpos[:, None] + np.arange(7)]
    return Readings(
        effector_pos=physics.site_pos[0],
        effector_yaw=yaw_of_mat(physics.site_mat[0]),
        gripper_opening=arms.gripper_opening(scene, physics.qpos),
        gripper_contact=jnp.clip(jnp.linalg.norm(physics.touch) / CONTACT_SCALE, 0.0, 1.0),
        cube_pos=cubes[:, :3],
        cube_quat=cubes[:, 3:],
        cube_yaw=jax.vmap(yaw_of_quat)(cubes[:, 3:]),
        button_state=buttons,
        button_pos=physics.qpos[scene.button_qpos],
        button_vel=physics.qvel[scene.button_dof],
        slide_pos=physics.qpos[scene.slide_qpos],
        slide_vel=physics.qvel[scene.slide_dof],
    )


def handle_pos(scene: Scene, slide_pos: Float[Array, " slides"]) -> Float[Array, "slides 3"]:
    """Returns the positions (m) of the handles of drawer and window at joint positions `slide_pos`."""
    base, axis = (jnp.asarray(x, slide_pos.dtype) for x in (scene.handle, scene.handle_axis))
    return base + slide_pos[:, None] * axis


def observe(scene: Scene, physics: TabletopPhysics, seen: Readings) -> Float[Array, " D"]:
    """Returns the observation of a scene, as stored in datasets."""
    robot = [
        physics.qpos[scene.arm_qpos],
        physics.qvel[scene.arm_dof],
        _scaled(seen.effector_pos),
        jnp.stack([jnp.cos(seen.effector_yaw), jnp.sin(seen.effector_yaw)]),
        jnp.stack([seen.gripper_opening * GRIPPER_SCALE, seen.gripper_contact]),
    ]
    turn = jnp.stack([jnp.cos(seen.cube_yaw), jnp.sin(seen.cube_yaw)], axis=1)
    cubes = jnp.concatenate([_scaled(seen.cube_pos), seen.cube_quat, turn], axis=1)
    on, pos = seen.button_state.astype(cubes.dtype), seen.button_pos * BUTTON_SCALE
    buttons = jnp.stack([1 - on, on, pos, seen.button_vel], axis=1)
    slides = jnp.stack([seen.slide_pos * _slide_scale(scene), seen.slide_vel], axis=1)
    return jnp.concatenate([*robot, cubes.ravel(), buttons.ravel(), slides.ravel()])


def oracle_goal(scene: Scene, seen: Readings) -> Float[Array, " G"]:
    """Returns the short goal representation: scaled cube positions, button states, scaled drawer and
    window."""
    slides = seen.slide_pos * _slide_scale(scene)
    states = seen.button_state.astype(slides.dtype)
    return jnp.concatenate([_scaled(seen.cube_pos).ravel(), states, slides])


def obs_dim(scene: Scene) -> int:
    """Returns the width of an observation."""
    return ROBOT_DIM + CUBE_DIM * scene.cubes + BUTTON_DIM * scene.buttons + SLIDE_DIM * scene.slides


def goal_columns(scene: Scene) -> tuple[int, ...]:
    """Returns the entries of an observation that are, in this order, the `oracle_goal` of its scene."""
    cubes = [ROBOT_DIM + CUBE_DIM * i + axis for i in range(scene.cubes) for axis in range(3)]
    after = ROBOT_DIM + CUBE_DIM * scene.cubes
    buttons = [after + BUTTON_DIM * i + 1 for i in range(scene.buttons)]
    after += BUTTON_DIM * scene.buttons
    return (*cubes, *buttons, *(after + SLIDE_DIM * i for i in range(scene.slides)))


class Objects(NamedTuple):
    """Current or desired states of a scene's objects: arrays of JAX or, in tables of tasks, of NumPy.

    Attributes:
        cubes: positions, m, [..., cubes, 3].
        buttons: states, bool[..., buttons].
        slides: joint positions of drawer and window, m, [..., slides].
    """

    cubes: Any
    buttons: Any
    slides: Any


def objects_of(scene: Scene, obs: np.ndarray) -> Objects:
    """Returns the states of the objects in dataset observations `obs[n, D]`, on the host."""
    ends = np.cumsum([ROBOT_DIM, CUBE_DIM * scene.cubes, BUTTON_DIM * scene.buttons])
    _, cubes, buttons, slides = np.split(obs, ends, axis=1)
    return Objects(
        cubes=cubes.reshape(len(obs), scene.cubes, CUBE_DIM)[:, :, :3] / POSITION_SCALE + CENTER,
        buttons=buttons.reshape(len(obs), scene.buttons, BUTTON_DIM)[:, :, 1] > 0.5,
        slides=slides.reshape(len(obs), scene.slides, SLIDE_DIM)[:, :, 0] / SLIDE_SCALE[: scene.slides],
    )


def _slide_scale(scene: Scene) -> Float[Array, " slides"]:
    return jnp.asarray(SLIDE_SCALE[: scene.slides], jnp.float32)


def _scaled(pos: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    return (pos - jnp.broadcast_to(jnp.asarray(CENTER), pos.shape)) * POSITION_SCALE
