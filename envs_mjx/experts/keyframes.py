"""Timed key poses of the `play` experts, by kind of target.

Each kind has its own list of keys, at most eleven. Shorter lists are padded with their last pose, so all
kinds share one table. Metres, radians, seconds, world frame; written for one environment.

Source: OGBench (Park et al. 2025), section on manipulation data; numbers agree with the plan oracles
of ogbench 1.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from envs_mjx.experts.angles import between, raised, toward, wrap
from envs_mjx.experts.targets import BUTTON, CUBE, DRAWER, WINDOW, Target, kinds
from envs_mjx.manipulation.observation import Readings, handle_pos
from envs_mjx.manipulation.scenes import Scene

MAX_KEYFRAMES = 11
"""Keys of the longest list, the cube's."""

_DT = 0.4  # s, the unit of the key times below

# Start, above the cube, at the cube, grasped, lifted, halfway, above the target, at the target,
# released, retreated, end.
_CUBE_TIMES = _DT * np.cumsum([0, 1, 1.5, 1, 1, 1, 1, 1.5, 1, 1, 1])
_CUBE_GRIP = (0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0)
_CUBE_JITTER = 0.2 * _DT  # s, largest shift of a key time
_LIFT = 0.1  # m, height above a cube: between this and twice this
_CLEAR = np.array([[-0.1, -0.1, 0.0], [0.1, 0.1, 0.2]])  # m, shift of the halfway pose

# Start, above the button, pressed, above the button, end; the way to the first takes longer the
# larger the distance.
_BUTTON_TIMES = _DT * np.cumsum([0, 0.5, 0.8, 0.8, 1.25])
_BUTTON_PACE = 4 * _DT  # s / m
_BUTTON_GRIP = {"scene": (0, 1, 1, 1, 0)}  # puzzles: closed throughout
_JITTER = 0.1 * _DT  # s
_BEFORE_PRESS, _PRESS = 0.06, -0.025  # m, heights above the button's top

# Start, above the handle, at the handle, grasped, moved, released, above the handle, end.
_SLIDE_TIMES = _DT * np.cumsum([0, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 1])
_SLIDE_GRIP = (0, 0, 0, 1, 1, 0, 0, 0)
_HANDLE_CLEARANCE = {DRAWER: 0.12, WINDOW: 0.06}  # m, height above the handle

_FARTHEST = 1.0  # m, upper bound of the distance of a button from any place that the arm can reach


class PlanDraws(NamedTuple):
    """The random numbers of one plan: uniform in [0, 1), except `noise`, standard normal.

    Kinds with fewer keys use the first of the jitters; `lift` and `clear` are for cubes.
    """

    end_pos: Float[Array, " 3"]
    end_yaw: Float[Array, ""]
    lift: Float[Array, " 2"]
    clear: Float[Array, " 3"]
    jitter: Float[Array, " 10"]
    noise: Float[Array, "rows 5"]


class Keyframes(NamedTuple):
    """Key poses and the times at which they are reached.

    Attributes:
        times: s from the plan's start.
        poses: xyz, yaw and grip (0 open, 1 closed) at those times. Yaw is unwrapped, so that the
            straight line between two keys is the shorter arc.
        end: s, time of the last key that is not padding.
    """

    times: Float[Array, " 11"]
    poses: Float[Array, "11 5"]
    end: Float[Array, ""]


def longest(scene: Scene) -> float:
    """Returns an upper bound (s) of the end of any plan in a scene."""
    bounds = {
        CUBE: _CUBE_TIMES[-1] + _CUBE_JITTER,
        BUTTON: _BUTTON_TIMES[-1] + _BUTTON_PACE * _FARTHEST + _JITTER,
        DRAWER: _SLIDE_TIMES[-1] + _JITTER,
        WINDOW: _SLIDE_TIMES[-1] + _JITTER,
    }
    return float(max(bounds[kind] for kind in kinds(scene)))


def key_poses(draws: PlanDraws, scene: Scene, readings: Readings, target: Target) -> Keyframes:
    """Returns the key poses for given random numbers."""
    makers = {
        CUBE: lambda: _cube_keys(draws, scene, readings, target),
        BUTTON: lambda: _button_keys(draws, scene, readings, target),
        DRAWER: lambda: _slide_keys(DRAWER, draws, scene, readings, target),
        WINDOW: lambda: _slide_keys(WINDOW, draws, scene, readings, target),
    }
    branches = [makers[kind] for kind in kinds(scene)]
    return branches[0]() if len(branches) == 1 else jax.lax.switch(target.kind, branches)


def _cube_keys(draws: PlanDraws, scene: Scene, readings: Readings, target: Target) -> Keyframes:
    cube, goal, start = readings.cube_pos[target.index], target.pos, readings.effector_pos
    above_cube = raised(cube, _LIFT * (1 + draws.lift[0]))
    above_goal = raised(goal, _LIFT * (1 + draws.lift[1]))
    # A cube has a four-fold symmetry, so the arm rotates by 45 degrees at most.
    yaw_cube = toward(readings.effector_yaw, readings.cube_yaw[target.index], jnp.pi / 2)
    turn = wrap(target.yaw - yaw_cube, jnp.pi / 2)
    yaw_goal = yaw_cube + turn
    halfway = jnp.append(_screw_midpoint(above_cube[:2], above_goal[:2], turn), start[2])
    halfway = halfway + between(draws.clear, *_CLEAR)
    end, yaw_end = _end(draws, scene, yaw_goal)
    xyz = [start, above_cube, cube, cube, above_cube, halfway, above_goal, goal, goal, above_goal, end]
    yaw = [readings.effector_yaw, *[yaw_cube] * 4, yaw_cube + turn / 2, *[yaw_goal] * 4, yaw_end]
    return _table(_jittered(_CUBE_TIMES, draws, _CUBE_JITTER), xyz, yaw, _CUBE_GRIP)


def _button_keys(draws: PlanDraws, scene: Scene, readings: Readings, target: Target) -> Keyframes:
    start = readings.effector_pos
    above, pressed = raised(target.pos, _BEFORE_PRESS), raised(target.pos, _PRESS)
    # OGBench passes the button's x coordinate for its yaw; the arm does rotate to that angle.
    yaw = toward(readings.effector_yaw, target.pos[0])
    end, yaw_end = _end(draws, scene, yaw)
    times = _jittered(_BUTTON_TIMES, draws, _JITTER)
    times = times.at[1:].add(_BUTTON_PACE * jnp.linalg.norm(above - start))
    grip = _BUTTON_GRIP.get(scene.family, (1,) * len(_BUTTON_TIMES))
    return _table(
        times, [start, above, pressed, above, end], [readings.effector_yaw, yaw, yaw, yaw, yaw_end], grip
    )


def _slide_keys(kind: int, draws: PlanDraws, scene: Scene, readings: Readings, target: Target) -> Keyframes:
    start, goal = readings.effector_pos, target.pos
    handle = handle_pos(scene, readings.slide_pos)[kind - DRAWER]
    above, above_goal = (raised(pos, _HANDLE_CLEARANCE[kind]) for pos in (handle, goal))
    # A handle has a two-fold symmetry.
    yaw = toward(readings.effector_yaw, target.yaw, jnp.pi)
    end, yaw_end = _end(draws, scene, yaw)
    xyz = [start, above, handle, handle, goal, goal, above_goal, end]
    times = _jittered(_SLIDE_TIMES, draws, _JITTER)
    return _table(times, xyz, [readings.effector_yaw, *[yaw] * 6, yaw_end], _SLIDE_GRIP)


def _end(draws: PlanDraws, scene: Scene, yaw: Float[Array, ""]) -> tuple[Float[Array, " 3"], Array]:
    """Returns the random pose at which a plan ends; its yaw is the one nearest to `yaw`."""
    pos = between(draws.end_pos, *np.asarray(scene.arm_bounds))
    return pos, toward(yaw, between(draws.end_yaw, -jnp.pi, jnp.pi))


def _jittered(times: np.ndarray, draws: PlanDraws, jitter: float) -> Float[Array, " keys"]:
    """Returns key times, each but the first shifted independently by up to `jitter` seconds."""
    shift = between(draws.jitter[: len(times) - 1], -jitter, jitter)
    return jnp.asarray(times, shift.dtype).at[1:].add(shift)


def _table(
    times: Float[Array, " keys"], xyz: list[Array], yaw: list[Array], grip: tuple[int, ...]
) -> Keyframes:
    """Returns keys padded to `MAX_KEYFRAMES` with the last pose."""
    poses = jnp.column_stack([jnp.stack(xyz), jnp.stack(yaw), jnp.asarray(grip, times.dtype)])
    missing = MAX_KEYFRAMES - len(times)
    later = times[-1] + 1 + jnp.arange(missing, dtype=times.dtype)
    held = jnp.repeat(poses[-1:], missing, axis=0)
    return Keyframes(jnp.concatenate([times, later]), jnp.concatenate([poses, held]), times[-1])


def _screw_midpoint(
    a: Float[Array, " 2"], b: Float[Array, " 2"], turn: Float[Array, ""]
) -> Float[Array, " 2"]:
    """Returns the midpoint of the screw motion from `a` to `b` with rotation `turn`.

    The path is an arc, so the midpoint lies off the chord. In the complex plane, exp(log(g)/2)
    moves by d / (1 + exp(i turn / 2)) = d (1 - i tan(turn / 4)) / 2 with d = b - a.
    """
    d = b - a
    return a + 0.5 * (d - jnp.tan(turn / 4) * jnp.stack([-d[1], d[0]]))
