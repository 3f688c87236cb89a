"""The `play` experts: a timed path through key poses, followed with smoothed noise on top.

The plan is open loop, the tracking closed loop: each action is the difference between the plan and the
measured effector pose. Functions are written for one environment; the caller vmaps.

Source: OGBench (Park et al. 2025), section on manipulation data; numbers agree with the plan oracles
of ogbench 1.2. Yaw is in radians about the world z axis, positions are in metres, world frame.
"""

from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.experts.angles import between, wrap
from envs_mjx.experts.keyframes import MAX_KEYFRAMES, PlanDraws, key_poses, longest
from envs_mjx.experts.targets import Target
from envs_mjx.manipulation.arm_controller import ACTION_SCALE
from envs_mjx.manipulation.observation import Readings
from envs_mjx.manipulation.scenes import CONTROL_DT, Scene

_NOISE_STD = 0.1 * np.asarray(ACTION_SCALE)
_RADIUS, _SIGMA = 2, 0.5  # rows; the tails beyond 4 sigma are cut
_TAPS = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
_TAPS /= _TAPS.sum()


class KeyframePlan(NamedTuple):
    """A timed path of the effector, and the expert's position along it.

    Attributes:
        times: seconds from the plan's start at which each key is reached; the last ones may be padding.
        keys: xyz, yaw and grip (0 open, 1 closed) at those times, yaw unwrapped (`keyframes.Keyframes`).
        noise: noise added to row i of the plan; rows from `length` on mean nothing.
        length: rows of the plan, one per control step.
        index: the row that the next `follow` uses.
    """

    times: Float[Array, " 11"]
    keys: Float[Array, "11 5"]
    noise: Float[Array, "rows 5"]
    length: Int[Array, ""]
    index: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]


def max_rows(scene: Scene) -> int:
    """Returns the rows of the longest plan in a scene: 90 in scenes with cubes, 4.48 s."""
    return int(np.ceil(longest(scene) / CONTROL_DT - 1e-9))


def build_plan(key: Key[Array, ""], scene: Scene, readings: Readings, target: Target) -> KeyframePlan:
    """Draws a plan that reaches the target, starting from the current readings."""
    uniform, normal = jr.split(key)
    dtype = readings.effector_pos.dtype
    u, noise = jr.uniform(uniform, (19,), dtype), jr.normal(normal, (max_rows(scene), 5), dtype)
    draws = PlanDraws(end_pos=u[:3], end_yaw=u[3], lift=u[4:6], clear=u[6:9], jitter=u[9:], noise=noise)
    return plan_from_draws(draws, scene, readings, target)


def plan_from_draws(draws: PlanDraws, scene: Scene, readings: Readings, target: Target) -> KeyframePlan:
    """Returns the plan for given random numbers: the deterministic part of `build_plan`."""
    keys = key_poses(draws, scene, readings, target)
    rows = jnp.arange(draws.noise.shape[0], dtype=keys.end.dtype)
    length = (rows * CONTROL_DT < keys.end).sum(dtype=jnp.int32)
    return KeyframePlan(
        times=keys.times,
        keys=keys.poses,
        noise=_smooth(draws.noise * jnp.asarray(_NOISE_STD, draws.noise.dtype)[None], length),
        length=length,
        index=jnp.zeros_like(length),
    )


def follow(
    plan: KeyframePlan, readings: Readings
) -> tuple[Float[Array, " 5"], KeyframePlan, Bool[Array, ""]]:
    """Follows the plan by one control step.

    Returns:
        The action in [-1, 1]; the plan, one row further; and whether this action was the plan's last,
        in which case the caller draws a new target and plan from the readings *after* this step.

    The yaw difference is not wrapped, as in OGBench. When plan and effector lie on opposite sides of +-pi,
    the action saturates and the arm rotates the long way.
    """
    goal = plan_row(plan, jnp.minimum(plan.index, plan.length - 1))
    measured = jnp.concatenate(
        [readings.effector_pos, jnp.stack([readings.effector_yaw, readings.gripper_opening])]
    )
    action = jnp.clip((goal - measured) / jnp.asarray(ACTION_SCALE, measured.dtype), -1.0, 1.0)
    return action, plan._replace(index=plan.index + 1), plan.index >= plan.length - 1


def plan_row(plan: KeyframePlan, row: Int[Array, ""]) -> Float[Array, " 5"]:
    """Returns row `row` of the plan with its noise: xyz (m), yaw (before noise in [-pi, pi]), grip."""
    t = row.astype(plan.times.dtype) * CONTROL_DT
    left = jnp.clip((plan.times <= t).sum() - 1, 0, MAX_KEYFRAMES - 2)
    t0, t1 = plan.times[left], plan.times[left + 1]
    pose = between((t - t0) / (t1 - t0), plan.keys[left], plan.keys[left + 1])
    return pose.at[3].set(wrap(pose[3])) + plan.noise[row]


def _smooth(noise: Float[Array, "rows 5"], length: Int[Array, ""]) -> Float[Array, "rows 5"]:
    """Applies a Gaussian filter along the first `length` rows, mirrored at both ends (edge rows repeated)."""
    rows = np.arange(noise.shape[0])[:, None] + np.arange(-_RADIUS, _RADIUS + 1)
    rows = np.where(rows < 0, -1 - rows, rows)
    rows = jnp.where(rows >= length, 2 * length - 1 - rows, rows)
    taps = jnp.asarray(_TAPS, noise.dtype)[None, :, None]
    return (noise[jnp.clip(rows, 0)] * taps).sum(axis=1)
