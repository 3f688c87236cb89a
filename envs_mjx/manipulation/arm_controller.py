"""Controller of the UR5e and its gripper: computes servo targets from a normalised action.

OGBench's control scheme: an action moves a target pose relative to the *observed* pinch pose, and the pose is
clipped to the workspace. Differential inverse kinematics gives joint angles, which the servos track for the
whole control step. Metres, radians, world frame.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float

from envs_mjx.manipulation.scenes import Scene
from envs_mjx.rotations import quat_about_z, quat_conj, quat_mul, rotate, rotation_vector, yaw_of_mat

ACTION_DIM = 5
ACTION_SCALE = (0.05, 0.05, 0.05, 0.3, 1.0)
"""Scale of an action of 1: metres along x, y, z, radians of yaw, share of the gripper's travel."""
WORKSPACE = ((0.25, -0.35, 0.02), (0.6, 0.35, 0.35))
"""Lower and upper corner of the box that target positions are clipped to."""
HOME = (-np.pi / 2, -np.pi / 2, np.pi / 2, -np.pi / 2, -np.pi / 2, 0.0)
"""Joint angles from which a reset solves for its random starting pose."""
DRIVER_RANGE = 0.8
GRIPPER_CTRL_MAX = 255.0

IK_ITERATIONS = 20
IK_TOLERANCE = 1e-4
IK_MAX_STEP = np.deg2rad(45.0)
IK_DAMPING = 1e-12
_DOWN = (0.0, 1.0, 0.0, 0.0)  # quaternion of a gripper that points straight down at yaw 0


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """Kinematic constants of the six-joint chain from the world to the flange; hashed by identity.

    Attributes:
        pos, quat: pose of each joint's body in its parent's frame (of the first in the world).
        axis: axis of each joint in its body's frame.
        flange_pos, flange_quat: pose of the flange site in the last body's frame.
        pinch_to_flange_pos, pinch_to_flange_quat: pose of the flange seen from the pinch site.
    """

    pos: np.ndarray
    quat: np.ndarray
    axis: np.ndarray
    flange_pos: np.ndarray
    flange_quat: np.ndarray
    pinch_to_flange_pos: np.ndarray
    pinch_to_flange_quat: np.ndarray


@functools.cache
def build_arm(scene: Scene) -> Arm:
    """Reads the chain from the compiled model, once per scene.

    The gripper's base is bolted to the flange, so the transform between the two tracked sites is a
    constant, taken at the model's reference pose.
    """
    model = scene.model
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    joints = model.actuator_trnid[scene.arm_ctrl, 0]
    bodies = model.jnt_bodyid[joints]
    root = model.body_parentid[bodies[0]]
    assert (model.body_parentid[bodies[1:]] == bodies[:-1]).all() and not model.jnt_pos[joints].any()
    pos, quat = model.body_pos[bodies].copy(), model.body_quat[bodies].copy()
    pos[0], quat[0] = _compose(data.xpos[root], data.xquat[root], pos[0], quat[0])
    pinch, flange = scene.sites
    inverse = np.empty(4)
    pinch_quat, flange_quat = np.empty(4), np.empty(4)
    mujoco.mju_mat2Quat(pinch_quat, data.site_xmat[pinch])
    mujoco.mju_mat2Quat(flange_quat, data.site_xmat[flange])
    mujoco.mju_negQuat(inverse, pinch_quat)
    offset, turn = _compose(np.zeros(3), inverse, data.site_xpos[flange] - data.site_xpos[pinch], flange_quat)
    return Arm(
        pos=pos,
        quat=quat,
        axis=model.jnt_axis[joints].copy(),
        flange_pos=model.site_pos[flange].copy(),
        flange_quat=model.site_quat[flange].copy(),
        pinch_to_flange_pos=offset,
        pinch_to_flange_quat=turn,
    )


def _compose(pos_a, quat_a, pos_b, quat_b) -> tuple[np.ndarray, np.ndarray]:
    """Pose b, given in frame a, in the frame of a (float64, host)."""
    pos, quat = np.empty(3), np.empty(4)
    mujoco.mju_rotVecQuat(pos, np.asarray(pos_b), np.asarray(quat_a))
    mujoco.mju_mulQuat(quat, np.asarray(quat_a), np.asarray(quat_b))
    return pos + pos_a, quat


class Pinch(NamedTuple):
    """Pose of the point between the finger tips: position (m) and rotation matrix, world frame."""

    pos: Float[Array, " 3"]
    mat: Float[Array, "3 3"]


def control(
    arm: Arm, scene: Scene, pinch: Pinch, qpos: Float[Array, " nq"], action: Float[Array, " 5"]
) -> Float[Array, " nu"]:
    """Servo targets for an action in [-1, 1]^5: joint angles (rad), gripper 0 (open) to 255 (closed).

    The action is added to the observed pose, which may be one substep older than `qpos`. All arithmetic is in
    the precision of `qpos`, except the position of each action in its interval, which OGBench rounds to the
    action's precision.
    """
    dtype = qpos.dtype
    scale = jnp.asarray(ACTION_SCALE, dtype)
    move = (0.5 * (action + 1)).astype(dtype) * (2 * scale) - scale
    low, high = jnp.asarray(WORKSPACE, dtype)
    pos = jnp.clip(pinch.pos + move[:3], low, high)
    yaw = yaw_of_mat(pinch.mat) + move[3]
    joints = joints_for(arm, pos, yaw, qpos[scene.arm_qpos])
    opening = jnp.clip(gripper_opening(scene, qpos) + move[4], 0.0, 1.0)
    ctrl = jnp.zeros(scene.model.nu, dtype)
    return ctrl.at[scene.arm_ctrl].set(joints).at[scene.gripper_ctrl].set(GRIPPER_CTRL_MAX * opening)


def gripper_opening(scene: Scene, qpos: Float[Array, " nq"]) -> Float[Array, ""]:
    """Returns the position of the gripper in [0, 1]. The name is OGBench's: 0 is fully open, 1 fully
    closed."""
    return jnp.clip(qpos[scene.driver_qpos] / DRIVER_RANGE, 0.0, 1.0)


def joints_for(
    arm: Arm, pos: Float[Array, " 3"], yaw: Float[Array, ""], start: Float[Array, " 6"]
) -> Float[Array, " 6"]:
    """Returns joint angles that bring the pinch site to `pos` (m), pointing down at `yaw` (rad), from
    `start`."""
    pinch_quat = quat_mul(quat_about_z(yaw), jnp.asarray(_DOWN))
    flange_pos = pos + rotate(pinch_quat, jnp.asarray(arm.pinch_to_flange_pos, pos.dtype))
    flange_quat = quat_mul(pinch_quat, jnp.asarray(arm.pinch_to_flange_quat, pos.dtype))
    return inverse_kinematics(arm, flange_pos, flange_quat, start)


def inverse_kinematics(
    arm: Arm, pos: Float[Array, " 3"], quat: Float[Array, " 4"], start: Float[Array, " 6"]
) -> Float[Array, " 6"]:
    """Solves for the flange pose by damped Gauss-Newton, as OGBench's controller. It stops as soon as both
    errors are within 1e-4 (m, rad), and after 20 updates at most; no update moves a joint by more than 45
    degrees. If the target cannot be reached, the last iterate is returned.
    """

    def errors(joints):
        flange_pos, flange_quat, jacobian = flange_kinematics(arm, joints)
        turn = rotation_vector(quat_mul(quat, quat_conj(flange_quat)))
        return pos - flange_pos, turn, jacobian

    def unfinished(carry):
        count, _, done = carry
        return (count < IK_ITERATIONS) & ~done

    def update(carry):
        count, joints, _ = carry
        shift, turn, jacobian = errors(joints)
        done = (jnp.sum(shift**2) <= IK_TOLERANCE**2) & (jnp.sum(turn**2) <= IK_TOLERANCE**2)
        step = damped_least_squares(jacobian, jnp.concatenate([shift, turn]))
        step *= jnp.minimum(1.0, IK_MAX_STEP / jnp.maximum(jnp.max(jnp.abs(step)), 1e-12))
        return count + 1, jnp.where(done, joints, joints + step), done

    return jax.lax.while_loop(unfinished, update, (0, start, False))[1]


def flange_kinematics(
    arm: Arm, joints: Float[Array, " 6"]
) -> tuple[Float[Array, " 3"], Float[Array, " 4"], Float[Array, "6 6"]]:
    """Returns flange position, quaternion, and the Jacobian (rows: 3 of translation, then 3 of rotation)."""
    dtype = joints.dtype

    def link(frame, joint):
        pos, quat = frame
        offset, turn, axis, angle = joint
        pos = pos + rotate(quat, offset)
        quat = quat_mul(quat, turn)
        spin = jnp.concatenate([jnp.cos(angle / 2)[None], jnp.sin(angle / 2) * axis])
        return (pos, quat_mul(quat, spin)), (pos, rotate(quat, axis))

    # A scan, not a Python loop: XLA on CPU fuses an unrolled chain so that every link recomputes all
    # links before it, which costs seconds per call for a batch.
    chain = [jnp.asarray(x, dtype) for x in (arm.pos, arm.quat, arm.axis)]
    world = jnp.zeros(3, dtype), jnp.asarray([1.0, 0.0, 0.0, 0.0], dtype)
    (pos, quat), (anchors, axes) = jax.lax.scan(link, world, (*chain, joints))
    pos = pos + rotate(quat, jnp.asarray(arm.flange_pos, dtype))
    quat = quat_mul(quat, jnp.asarray(arm.flange_quat, dtype))
    levers = jnp.cross(axes, pos[None] - anchors)
    return pos, quat, jnp.concatenate([levers, axes], axis=1).T


def damped_least_squares(jacobian: Float[Array, "6 6"], rhs: Float[Array, " 6"]) -> Float[Array, " 6"]:
    """Returns the damped least squares solution `J.T @ inv(J @ J.T + damping) @ rhs`, by Gram-Schmidt.

    It is the first half of the shortest x with `[J, sqrt(damping) I] @ x = rhs`. Solving for it row by row
    does not square the condition number, which float32 could not afford. Written out, a batch is a handful of
    fused loops rather than one call of a linear algebra library per environment.
    """

    def add_row(carry, equation):
        basis, x = carry
        i, row, value = equation
        left = row
        for _ in range(2):  # once more, because one pass loses orthogonality to rounding
            along = jnp.sum(basis * left[None], axis=1)
            left = left - jnp.sum(basis * along[:, None], axis=0)
        square = jnp.sum(left * left)
        x = x + left * ((value - jnp.sum(row * x)) / square)
        return (basis.at[i].set(left / jnp.sqrt(square)), x), None

    rows = jnp.concatenate([jacobian, np.sqrt(IK_DAMPING) * jnp.eye(6, dtype=rhs.dtype)], axis=1)
    empty = jnp.zeros_like(rows), jnp.zeros_like(rows[0])
    return jax.lax.scan(add_row, empty, (jnp.arange(6), rows, rhs))[0][1][:6]
