"""The `noisy` experts: closed-loop reactions to the current readings, with a phase for each kind of state.

A reaction is the effector's next position and rotation, and whether to grip. The action is proportional to
these, but never below a minimum speed. Functions are written for one environment. Metres, radians, world
frame.

Source: OGBench (Park et al. 2025), section on manipulation data; numbers agree with the Markov oracles
of ogbench 1.2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from envs_mjx.experts.angles import between, raised, wrap
from envs_mjx.experts.targets import BUTTON, CUBE, DRAWER, WINDOW, Target, kinds
from envs_mjx.manipulation.observation import Readings, handle_pos
from envs_mjx.manipulation.scenes import Scene

MAX_STEPS = (200, 100, 75, 75)
"""Reactions to one target, by its kind, after which the expert gives up."""

_GAIN_POS, _GAIN_YAW = 5.0, 3.0  # action per m and per rad
_MIN_DISTANCE = 0.4  # m, lower bound of the distance to a goal in the action's size
_NEAR = 0.04  # m
_REST_MIN_Z = {WINDOW: 0.3}  # m; after the window the arm rests above it
_CLOSED, _OPEN = 0.5, 0.1  # finger contact above which it is closed, and below which open

_CUBE_ABOVE, _CUBE_HIGH, _CUBE_AT = 0.18, 0.16, 0.02  # m
_BUTTON_ABOVE, _BUTTON_PRESS, _BUTTON_HIGH = 0.06, -0.022, 0.16
_SLIDE_ABOVE = {DRAWER: 0.12, WINDOW: 0.06}
_SLIDE_HIGH = {DRAWER: 0.18, WINDOW: 0.28}
_SLIDE_GRIP = {DRAWER: -1.0, WINDOW: 1.0}  # the drawer is pulled and pushed with open fingers
_HANDLE_AT, _SLIDE_AT = 0.03, 0.01  # m


class RestPose(NamedTuple):
    """Pose of the effector after the target is achieved: m, and rad."""

    pos: Float[Array, " 3"]
    yaw: Float[Array, ""]


class NoisyState(NamedTuple):
    """State of a `noisy` expert.

    Attributes:
        xi: noise level of the episode.
        rest: pose of the effector after the target is achieved.
        steps: reactions to the target so far; random actions do not count.
        seen: the target of the next reaction. In OGBench the first reaction after a new target gets the
            previous step's readings, with the previous target of the same kind.
        latest: the latest target of each kind, on an axis of length 4.
    """

    xi: Float[Array, ""]
    rest: RestPose
    steps: Int[Array, ""]
    seen: Target
    latest: Target

    @classmethod
    def of(cls, xi: Float[Array, ""], unset: Target, target: Target, rest: RestPose) -> "NoisyState":
        """Returns the state at the start of an episode whose first target is `target`, which is seen at
        once."""
        begun = cls(xi, rest, jnp.zeros((), jnp.int32), target, unset)
        return begun._replace(latest=begun.renew(target, rest).latest)

    def renew(self, target: Target, rest: RestPose) -> "NoisyState":
        """Returns the state after a new target."""
        return self._replace(
            rest=rest,
            steps=jnp.zeros_like(self.steps),
            seen=jax.tree.map(lambda x: x[target.kind], self.latest),
            latest=jax.tree.map(lambda all, one: all.at[target.kind].set(one), self.latest, target),
        )


class Reaction(NamedTuple):
    """The next displacement, rotation and grip.

    Attributes:
        toward: desired position of the effector, m.
        turn: desired rotation, rad.
        grip: 1 to close the fingers, -1 to open them.
    """

    toward: Float[Array, " 3"]
    turn: Float[Array, ""]
    grip: Float[Array, ""] | float


def rest_from_draws(uniform: Float[Array, " 4"], scene: Scene, kind: Int[Array, ""]) -> RestPose:
    """Returns the pose at which an attempt at a target of `kind` ends, from four numbers in [0, 1)."""
    corners = [np.array(scene.arm_bounds) for _ in MAX_STEPS]
    for k, height in _REST_MIN_Z.items():
        corners[k][0, 2] = max(corners[k][0, 2], height)
    low, high = jnp.asarray(np.stack(corners, axis=1), uniform.dtype)
    return RestPose(between(uniform[:3], low[kind], high[kind]), between(uniform[3], -jnp.pi, jnp.pi))


def react(
    scene: Scene, readings: Readings, target: Target, rest: RestPose
) -> tuple[Float[Array, " 5"], Bool[Array, ""]]:
    """Returns the action in [-1, 1], without noise, and whether the attempt is over: target and rest
    reached."""
    makers = {
        CUBE: lambda: _cube(readings, target, rest),
        BUTTON: lambda: _button(scene, readings, target, rest),
        DRAWER: lambda: _slide(DRAWER, scene, readings, target, rest),
        WINDOW: lambda: _slide(WINDOW, scene, readings, target, rest),
    }
    branches = [makers[kind] for kind in kinds(scene)]
    reaction, achieved = branches[0]() if len(branches) == 1 else jax.lax.switch(target.kind, branches)
    step = _GAIN_POS * _hastened(reaction.toward - readings.effector_pos)
    action = jnp.concatenate([step, jnp.stack([_GAIN_YAW * reaction.turn, reaction.grip])])
    return jnp.clip(action, -1.0, 1.0), achieved & _near(rest.pos, readings.effector_pos, _NEAR)


def _cube(readings: Readings, target: Target, rest: RestPose) -> tuple[Reaction, Bool[Array, ""]]:
    hand, cube, goal = readings.effector_pos, readings.cube_pos[target.index], target.pos
    placed = _near(goal, cube, _CUBE_AT)
    over, at = _near(cube[:2], hand[:2], _NEAR), _near(cube, hand, _CUBE_AT)
    closed, opened = readings.gripper_contact > _CLOSED, readings.gripper_contact < _OPEN
    high, over_goal = hand[2] > _CUBE_HIGH, _near(goal[:2], cube[:2], _NEAR)
    # A cube has a four-fold symmetry.
    yaw = readings.effector_yaw
    to_cube = wrap(readings.cube_yaw[target.index] - yaw, jnp.pi / 2)
    to_goal = wrap(target.yaw - yaw, jnp.pi / 2) - to_cube
    away = rest.yaw - yaw
    phases = [
        (~placed & ~over, Reaction(raised(cube, _CUBE_ABOVE), to_cube, -1.0)),
        (~placed & ~at, Reaction(cube, to_cube, -1.0)),
        (~placed & ~closed, Reaction(cube, to_cube, 1.0)),
        (~placed & ~over_goal & ~high, Reaction(cube.at[2].set(2 * _CUBE_ABOVE), to_goal, 1.0)),
        (~placed & ~over_goal, Reaction(raised(goal, _CUBE_ABOVE), to_goal, 1.0)),
        (~placed, Reaction(goal, to_goal, 1.0)),
        (~opened, Reaction(goal, to_goal, -1.0)),
        (~high, Reaction(cube.at[2].set(2 * _CUBE_HIGH), away, -1.0)),
    ]
    return _first(phases, Reaction(rest.pos, away, -1.0)), placed


def _button(
    scene: Scene, readings: Readings, target: Target, rest: RestPose
) -> tuple[Reaction, Bool[Array, ""]]:
    hand, top = readings.effector_pos, target.pos
    pressed = readings.button_state[target.index] == (target.value > 0.5)
    over, high = _near(top[:2], hand[:2], _NEAR), hand[2] > _BUTTON_HIGH
    away, still = rest.yaw - readings.effector_yaw, jnp.zeros_like(rest.yaw)
    # With nothing to grasp, in puzzles, the fingers stay closed.
    idle = -1.0 if scene.cubes else 1.0
    phases = [
        (~pressed & ~over, Reaction(raised(top, _BUTTON_ABOVE), still, 1.0)),
        (~pressed, Reaction(raised(top, _BUTTON_PRESS), still, 1.0)),
        (~high, Reaction(top.at[2].set(2 * _BUTTON_HIGH), away, idle)),
    ]
    return _first(phases, Reaction(rest.pos, away, idle)), pressed


def _slide(
    kind: int, scene: Scene, readings: Readings, target: Target, rest: RestPose
) -> tuple[Reaction, Bool[Array, ""]]:
    hand, handle = readings.effector_pos, handle_pos(scene, readings.slide_pos)[kind - DRAWER]
    moved = _near(target.pos, handle, _SLIDE_AT)
    over, at = _near(handle[:2], hand[:2], _NEAR), _near(handle, hand, _HANDLE_AT)
    high = hand[2] > _SLIDE_HIGH[kind]
    # A handle has a two-fold symmetry.
    to_handle = wrap(target.yaw - readings.effector_yaw, jnp.pi)
    away = rest.yaw - readings.effector_yaw
    phases = [
        (~moved & ~over, Reaction(raised(handle, _SLIDE_ABOVE[kind]), to_handle, -1.0)),
        (~moved & ~at, Reaction(handle, to_handle, -1.0)),
        (~moved, Reaction(target.pos, to_handle, _SLIDE_GRIP[kind])),
        (~high, Reaction(handle.at[2].set(2 * _SLIDE_HIGH[kind]), away, -1.0)),
    ]
    return _first(phases, Reaction(rest.pos, away, -1.0)), moved


def _first(phases: list[tuple[Array, Reaction]], fallback: Reaction) -> Reaction:
    """Returns the reaction of the first phase whose condition holds, else `fallback`."""
    for holds, reaction in reversed(phases):
        fallback = jax.tree.map(functools.partial(jnp.where, holds), reaction, fallback)
    return fallback


def _hastened(distance: Float[Array, " 3"]) -> Float[Array, " 3"]:
    """Returns a vector of the same direction and at least the length `_MIN_DISTANCE`."""
    norm = jnp.linalg.norm(distance)
    # The constant keeps a zero vector zero.
    return jnp.where(norm >= _MIN_DISTANCE, distance, distance / (norm + 1e-6) * _MIN_DISTANCE)


def _near(a: Float[Array, " n"], b: Float[Array, " n"], radius: float) -> Bool[Array, ""]:
    return jnp.linalg.norm(a - b) <= radius
