"""OGBench's scripted `play` expert for cubes, as pure functions.

The expert picks a cube and a place to put it, lays a plan of eleven timed key poses through the two
(approach, grasp, lift, cross, place, release, retreat), and follows the plan with smoothed noise on
top. The plan is open loop, the tracking closed loop: each action is the difference between the plan
and the measured effector pose. Functions are written for one environment; the caller vmaps.

Source: OGBench (Park et al. 2025), section on manipulation data; numbers agree with the plan oracle
of ogbench 1.2. Yaw is in radians about the world z axis, positions are in metres, world frame.
"""

from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.arm import ACTION_SCALE
from envs_mjx.cube import CUBE_REST_Z, Readings
from envs_mjx.scenes import CONTROL_DT, FAMILIES

OBJECT_BOUNDS, ARM_BOUNDS = FAMILIES["cube-single"].object_bounds, FAMILIES["cube-single"].arm_bounds

FIRST_P_STACK = 0.5
"""Stacking probability of an episode's first target: OGBench draws it inside the reset, before the
episode's own probability is set."""

_P_STACK = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
_CUBE_SIZE = 0.04  # m, edge length
_STACK_RADIUS = 0.02  # m, in xy: closer than this and higher means "on top of"

_NOISE_STD = 0.1 * np.asarray(ACTION_SCALE)
_DT = 0.4  # s, the unit of the key times below

# Key poses: start, above the cube, at the cube, grasped, lifted, halfway, above the target, at the
# target, released, retreated, end.
_KEY_TIMES = _DT * np.cumsum([0, 1, 1.5, 1, 1, 1, 1, 1.5, 1, 1, 1])
_KEY_GRIP = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0])
_JITTER = 0.2 * _DT  # s, largest shift of a key time
_LIFT = 0.1  # m, height above a cube: between this and twice this
_CLEAR = np.array([[-0.1, -0.1, 0.0], [0.1, 0.1, 0.2]])  # m, shift of the halfway pose
MAX_ROWS = int(np.ceil((_KEY_TIMES[-1] + _JITTER) / CONTROL_DT - 1e-9))
"""Rows of the longest plan (4.48 s)."""

_RADIUS, _SIGMA = 2, 0.5  # rows; the tails beyond 4 sigma are cut
_TAPS = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
_TAPS /= _TAPS.sum()


class Target(NamedTuple):
    """Which cube to move, and where to (centre in metres, yaw in radians)."""

    cube: Int[Array, ""]
    pos: Float[Array, " 3"]
    yaw: Float[Array, ""]


class TargetDraws(NamedTuple):
    """The random numbers of one target, all uniform in [0, 1)."""

    cube: Float[Array, ""]
    stack: Float[Array, ""]
    base: Float[Array, ""]
    xy: Float[Array, " 2"]
    yaw: Float[Array, ""]


class PlanDraws(NamedTuple):
    """The random numbers of one plan: uniform in [0, 1), except `noise`, standard normal."""

    end_pos: Float[Array, " 3"]
    end_yaw: Float[Array, ""]
    lift: Float[Array, " 2"]
    clear: Float[Array, " 3"]
    jitter: Float[Array, " 10"]
    noise: Float[Array, "rows 5"]


class Plan(NamedTuple):
    """A timed path of the effector, and how far along it the expert is.

    Attributes:
        times: seconds from the plan's start at which each key is reached.
        keys: xyz, yaw and grip (0 open, 1 closed) at those times. Yaw is unwrapped, so that the
            straight line between two keys is the shorter arc.
        noise: what is added to row i of the plan; rows from `length` on mean nothing.
        length: rows of the plan, one per control step, 87 to 90.
        index: the row that the next `act` follows.
    """

    times: Float[Array, " 11"]
    keys: Float[Array, "11 5"]
    noise: Float[Array, "rows 5"]
    length: Int[Array, ""]
    index: Int[Array, ""]


def stack_probability(key: Key[Array, ""], family: str) -> Float[Array, ""]:
    """Draws an episode's probability of stacking the target cube on another one.

    Args:
        family: `cube-single` to `cube-octuple`.
    Raises:
        KeyError: for a family without a scripted cube expert.
    """
    low, high = _P_STACK[family]
    return jr.uniform(key, (), minval=low, maxval=high)


def choose_target(key: Key[Array, ""], readings: Readings, p_stack: Float[Array, ""] | float) -> Target:
    """Draws the next target: any cube with nothing on it, to a free place or onto another such cube."""
    # One call for all of them: each call of the generator takes half a second to compile.
    u = jr.uniform(key, (6,))
    draws = TargetDraws(cube=u[0], stack=u[1], base=u[2], xy=u[3:5], yaw=u[5])
    return target_from_draws(draws, readings.cube_pos, p_stack)


def target_from_draws(
    draws: TargetDraws, cube_pos: Float[Array, "cubes 3"], p_stack: Float[Array, ""] | float
) -> Target:
    """The target that given random numbers lead to; deterministic part of `choose_target`."""
    top = _uncovered(cube_pos)
    cube = _pick(draws.cube, top)
    others = top & (jnp.arange(top.size) != cube)
    base = cube_pos[_pick(draws.base, others)]
    stacked = base + jnp.array([0.0, 0.0, _CUBE_SIZE])
    floor = jnp.append(_between(draws.xy, *np.asarray(OBJECT_BOUNDS)), CUBE_REST_Z)
    stack = others.any() & (draws.stack < p_stack)
    return Target(cube, jnp.where(stack, stacked, floor), 2 * jnp.pi * draws.yaw)


def build_plan(key: Key[Array, ""], readings: Readings, target: Target) -> Plan:
    """Draws a plan that moves the target cube from where it is read to be to where it shall be."""
    uniform, normal = jr.split(key)
    u, noise = jr.uniform(uniform, (19,)), jr.normal(normal, (MAX_ROWS, 5))
    draws = PlanDraws(end_pos=u[:3], end_yaw=u[3], lift=u[4:6], clear=u[6:9], jitter=u[9:], noise=noise)
    return plan_from_draws(draws, readings, target)


def plan_from_draws(draws: PlanDraws, readings: Readings, target: Target) -> Plan:
    """The plan that given random numbers lead to; deterministic part of `build_plan`."""
    times = jnp.asarray(_KEY_TIMES, jnp.float32).at[1:].add(_between(draws.jitter, -_JITTER, _JITTER))
    length = (np.arange(MAX_ROWS) * CONTROL_DT < times[-1]).sum()
    return Plan(
        times=times,
        keys=_key_poses(draws, readings, target),
        noise=_smooth(draws.noise * _NOISE_STD[None], length),
        length=length,
        index=jnp.zeros_like(length),
    )


def act(plan: Plan, readings: Readings) -> tuple[Float[Array, " 5"], Plan, Bool[Array, ""]]:
    """Follows the plan by one control step.

    Returns:
        The action in [-1, 1]; the plan, one row further; and whether this action was the plan's last,
        in which case the caller draws a new target and plan from the readings *after* this step.

    The yaw difference is not wrapped, as in OGBench: when plan and effector lie on opposite sides of
    +-pi the action saturates and the arm turns the long way round.
    """
    row = jnp.minimum(plan.index, plan.length - 1)
    goal = plan_row(plan, row)
    here = jnp.concatenate(
        [readings.effector_pos, jnp.stack([readings.effector_yaw, readings.gripper_opening])]
    )
    action = jnp.clip((goal - here) / np.asarray(ACTION_SCALE), -1.0, 1.0)
    return action, plan._replace(index=plan.index + 1), plan.index >= plan.length - 1


def plan_row(plan: Plan, row: Int[Array, ""]) -> Float[Array, " 5"]:
    """Row `row` of the plan with its noise: xyz (m), yaw (before noise in [-pi, pi]), grip."""
    t = row.astype(plan.times.dtype) * CONTROL_DT
    left = jnp.clip((plan.times <= t).sum() - 1, 0, len(_KEY_TIMES) - 2)
    t0, t1 = plan.times[left], plan.times[left + 1]
    pose = _between((t - t0) / (t1 - t0), plan.keys[left], plan.keys[left + 1])
    return pose.at[3].set(_wrap(pose[3])) + plan.noise[row]


def _key_poses(draws: PlanDraws, readings: Readings, target: Target) -> Float[Array, "11 5"]:
    """Key poses of a plan, in the order of `_KEY_TIMES`."""
    cube, goal = readings.cube_pos[target.cube], target.pos
    above_cube = cube.at[2].add(_LIFT * (1 + draws.lift[0]))
    above_goal = goal.at[2].add(_LIFT * (1 + draws.lift[1]))
    start = readings.effector_pos
    end = _between(draws.end_pos, *np.asarray(ARM_BOUNDS))
    # A cube looks the same after a quarter turn, so the arm turns by an eighth at most.
    quarter = jnp.pi / 2
    turn_in = _wrap(readings.cube_yaw[target.cube] - readings.effector_yaw, quarter)
    turn_over = _wrap(target.yaw - readings.cube_yaw[target.cube], quarter)
    yaw_cube = readings.effector_yaw + turn_in
    yaw_goal = yaw_cube + turn_over
    yaw_end = yaw_goal + _wrap(_between(draws.end_yaw, -jnp.pi, jnp.pi) - yaw_goal)
    halfway = jnp.append(_screw_midpoint(above_cube[:2], above_goal[:2], turn_over), start[2])
    halfway = halfway + _between(draws.clear, *_CLEAR)
    xyz = [start, above_cube, cube, cube, above_cube, halfway, above_goal, goal, goal, above_goal, end]
    yaw = [readings.effector_yaw, *[yaw_cube] * 4, yaw_cube + turn_over / 2, *[yaw_goal] * 4, yaw_end]
    return jnp.column_stack([jnp.stack(xyz), jnp.stack(yaw), jnp.asarray(_KEY_GRIP, jnp.float32)])


def _screw_midpoint(
    a: Float[Array, " 2"], b: Float[Array, " 2"], turn: Float[Array, ""]
) -> Float[Array, " 2"]:
    """Where a body is halfway along the screw motion from `a` to `b` that turns it by `turn`.

    The path is an arc, so the midpoint lies off the chord. In the complex plane, exp(log(g)/2)
    moves by d / (1 + exp(i turn / 2)) = d (1 - i tan(turn / 4)) / 2 with d = b - a.
    """
    d = b - a
    return a + 0.5 * (d - jnp.tan(turn / 4) * jnp.stack([-d[1], d[0]]))


def _smooth(noise: Float[Array, "rows 5"], length: Int[Array, ""]) -> Float[Array, "rows 5"]:
    """Gaussian filter along the first `length` rows, mirrored at both ends (edge rows repeated)."""
    rows = np.arange(noise.shape[0])[:, None] + np.arange(-_RADIUS, _RADIUS + 1)
    rows = np.where(rows < 0, -1 - rows, rows)
    rows = jnp.where(rows >= length, 2 * length - 1 - rows, rows)
    taps = jnp.asarray(_TAPS, noise.dtype)[None, :, None]
    return (noise[jnp.clip(rows, 0)] * taps).sum(axis=1)


def _uncovered(cube_pos: Float[Array, "cubes 3"]) -> Bool[Array, " cubes"]:
    """Which cubes have no other cube on top of them."""
    xy, z = cube_pos[:, :2], cube_pos[:, 2]
    near = jnp.linalg.norm(xy[:, None] - xy[None], axis=-1) < _STACK_RADIUS
    higher = z[None] > z[:, None]
    return ~(near & higher).any(axis=1)


def _pick(uniform: Float[Array, ""], mask: Bool[Array, " n"]) -> Int[Array, ""]:
    """One of the true entries of `mask`, each as likely; 0 if there is none."""
    count = jnp.cumsum(mask)
    rank = jnp.floor(uniform * count[-1].astype(uniform.dtype)).astype(count.dtype)
    return jnp.argmax(mask & (count == rank + 1))


def _between(fraction: Array, low: Array | np.ndarray | float, high: Array | np.ndarray | float) -> Array:
    """The point `fraction` of the way from `low` to `high`."""
    start = jnp.asarray(low, fraction.dtype)
    return start + fraction * (jnp.asarray(high, fraction.dtype) - start)


def _wrap(angle: Float[Array, ""], period: float = 2 * jnp.pi) -> Float[Array, ""]:
    """The angle nearest to zero that differs from `angle` by a multiple of `period`."""
    return angle - period * jnp.round(angle / period)
