"""Targets of the scripted experts, drawn from OGBench's distributions for data collection.

A target is one object in one state: a cube at a pose, a button toggled, the drawer or the window at the other
end of its travel. Metres, radians, world frame; written for one environment.

Source: OGBench (Park et al. 2025) and the behaviour of ogbench 1.2 in its data collection mode.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx.experts.angles import between
from envs_mjx.manipulation.observation import SUCCESS_RADIUS, Readings, handle_pos
from envs_mjx.manipulation.scene_simulation import CUBE_REST_Z, SLIDE_RANGE
from envs_mjx.manipulation.scenes import Scene

CUBE, BUTTON, DRAWER, WINDOW = range(4)
"""Kinds of targets; an index into slides is `kind - DRAWER`."""

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
_DEFAULT_P_STACK = (0.5, 0.5)  # of families that have nothing to stack
_CUBE_SIZE = 0.04  # m, edge length
_STACK_RADIUS = 0.02  # m, in xy: closer than this and higher means "on top of"

_LOCKED_WEIGHT = 0.25  # sampling weight of a locked drawer or window; that of all else is 1
_PUT_IN_DRAWER = 0.3  # probability, where the drawer is open
_DRAWER_IS_OPEN = -0.12  # m, joint position below which a cube may go in
_DRAWER_SPOT = np.array([[0.325, -0.245, 0.066], [0.335, -0.235, 0.066]])  # m, where it is put down
_IN_DRAWER = np.array([[0.21, -0.27, 0.0], [0.45, -0.07, 0.15]])  # m; y relative to the handle's
_HANDLE_LIFT = 1e-4  # m, by which OGBench's target handle lies above the handle
_UNSET_CUBE = (0.45, 0.0, 0.02)  # m; position of the target between a reset and the first draw


class Target(NamedTuple):
    """One object and its desired state.

    Attributes:
        kind: 0 cube, 1 button, 2 drawer, 3 window.
        index: number of the cube or button; of slides 0 is the drawer and 1 the window.
        pos: m; desired position of the cube or handle, or position of the button's top.
        yaw: rad; of the cube at the target, or of the handle; 0 for a button.
        value: state of the button (0 or 1) or joint position (m) of drawer or window; 0 for a cube.
    """

    kind: Int[Array, ""]
    index: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    pos: Float[Array, " 3"]
    yaw: Float[Array, ""]
    value: Float[Array, ""]


class TargetDraws(NamedTuple):
    """The random numbers of one target, all uniform in [0, 1)."""

    kind: Float[Array, ""]
    index: Float[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
    put: Float[Array, ""]
    stack: Float[Array, ""]
    base: Float[Array, ""]
    xy: Float[Array, " 2"]
    yaw: Float[Array, ""]


def kinds(scene: Scene) -> tuple[int, ...]:
    """Returns the kinds of targets in a scene, in ascending order."""
    cube, button = (CUBE,) * (scene.cubes > 0), (BUTTON,) * (scene.buttons > 0)
    return cube + button + (DRAWER, WINDOW) * (scene.slides > 0)


def stack_probability(key: Key[Array, ""], scene: Scene) -> Float[Array, ""]:
    """Draws an episode's probability of stacking the target cube on another one."""
    low, high = _P_STACK.get(scene.family, _DEFAULT_P_STACK)
    return jr.uniform(key, (), minval=low, maxval=high)


def choose_target(
    key: Key[Array, ""], scene: Scene, readings: Readings, p_stack: Float[Array, ""] | float
) -> Target:
    """Draws the next target.

    A cube with nothing on it goes to a free place, onto another such cube (with probability `p_stack`) or
    into an open drawer, which it never leaves. A button is toggled; drawer and window go to the end they are
    farther from. All kinds are equally likely, except locked slides (a quarter) and a cube in the drawer
    (never).
    """
    # One call for all draws: each call of the generator takes half a second to compile.
    u = jr.uniform(key, (8,), readings.effector_pos.dtype)
    draws = TargetDraws(kind=u[0], index=u[1], put=u[2], stack=u[3], base=u[4], xy=u[5:7], yaw=u[7])
    return target_from_draws(draws, scene, readings, p_stack)


def target_from_draws(
    draws: TargetDraws, scene: Scene, readings: Readings, p_stack: Float[Array, ""] | float
) -> Target:
    """Returns the target for given random numbers: the deterministic part of `choose_target`."""
    choices = [_target(kind, draws, scene, readings, p_stack) for kind in kinds(scene)]
    if len(choices) == 1:
        return choices[0]
    share = jnp.cumsum(_weights(scene, readings))
    choice = (share <= draws.kind * share[-1]).sum()
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[choice], *choices)


def unset_targets(uniform: Float[Array, " 4"], scene: Scene) -> Target:
    """Returns placeholders for the target of each kind before the first one, stacked on an axis of length 4.

    In ogbench it is left over from the previous episode, except the cube's. Episodes here are independent:
    any button, in any state, and either end of drawer and window, from four numbers in [0, 1).
    """
    zero = jnp.zeros_like(uniform[0])
    cube = _of(CUBE, 0, jnp.asarray(_UNSET_CUBE, zero.dtype), zero, zero)
    unset = [cube] * 4
    if scene.buttons:
        index = _pick(uniform[0], jnp.ones(scene.buttons, bool))
        unset[BUTTON] = _button(index, scene, jnp.round(uniform[1]))
    for kind in (DRAWER, WINDOW) if scene.slides else ():
        ends = jnp.asarray(SLIDE_RANGE[kind - DRAWER], zero.dtype)
        unset[kind] = _slide(kind, scene, jnp.where(uniform[kind] < 0.5, *ends))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *unset)


def achieved(scene: Scene, target: Target, readings: Readings) -> Bool[Array, ""]:
    """Returns OGBench's success of one target: cube, drawer or window within 4 cm, button in its desired
    state."""
    reached = []
    for kind in kinds(scene):
        if kind == CUBE:
            off = jnp.linalg.norm(readings.cube_pos[target.index] - target.pos)
            reached.append(off <= SUCCESS_RADIUS)
        elif kind == BUTTON:
            reached.append(readings.button_state[target.index] == (target.value > 0.5))
        else:
            reached.append(jnp.abs(readings.slide_pos[kind - DRAWER] - target.value) <= SUCCESS_RADIUS)
    return reached[0] if len(reached) == 1 else jnp.stack(reached)[target.kind]


def healthy(scene: Scene, readings: Readings) -> Bool[Array, ""]:
    """Returns whether OGBench keeps an episode that passes through this state.

    In `scene` the cube must stay in view: never at y >= 0.29 m, and at y <= -0.3 m only in the drawer (z from
    0.06 to 0.08 m). Every state of other families is healthy.
    """
    if not scene.slides:
        return jnp.ones((), bool)
    y, z = readings.cube_pos[0, 1], readings.cube_pos[0, 2]
    hidden = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return ~((y >= 0.29) | hidden)


def _of(kind: int, index: Array | int, pos: Array, yaw: Array, value: Array) -> Target:
    return Target(jnp.asarray(kind, jnp.int32), jnp.asarray(index, jnp.int32), pos, yaw, value)


def _target(
    kind: int, draws: TargetDraws, scene: Scene, readings: Readings, p_stack: Float[Array, ""] | float
) -> Target:
    """Returns the target of one kind for given random numbers."""
    dtype = draws.yaw.dtype
    if kind == CUBE:
        return _cube(draws, scene, readings, p_stack)
    if kind == BUTTON:
        index = _pick(draws.index, jnp.ones(scene.buttons, bool))
        return _button(index, scene, 1 - readings.button_state[index].astype(dtype))
    ends = SLIDE_RANGE[kind - DRAWER]
    pos = readings.slide_pos[kind - DRAWER]
    # In the middle the drawer counts as closed (at 0) and so does the window (at 0).
    low = pos > ends.mean() if kind == WINDOW else pos >= ends.mean()
    return _slide(kind, scene, jnp.where(low, *jnp.asarray(ends, dtype)))


def _button(index: Int[Array, ""], scene: Scene, value: Float[Array, ""]) -> Target:
    top = jnp.asarray(scene.button_top, value.dtype)[index]
    return _of(BUTTON, index, top, jnp.zeros_like(value), value)


def _slide(kind: int, scene: Scene, value: Float[Array, ""]) -> Target:
    which = kind - DRAWER
    pos = handle_pos(scene, jnp.full(scene.slides, value))[which].at[2].add(_HANDLE_LIFT)
    return _of(kind, which, pos, jnp.asarray(scene.handle_yaw[which], value.dtype), value)


def _cube(draws: TargetDraws, scene: Scene, readings: Readings, p_stack: Float[Array, ""] | float) -> Target:
    cube_pos = readings.cube_pos
    top = _uncovered(cube_pos) & ~_in_drawer(scene, readings)
    cube = _pick(draws.index, top)
    others = top & (jnp.arange(top.size) != cube)
    base = cube_pos[_pick(draws.base, others)]
    pos = jnp.append(between(draws.xy, *np.asarray(scene.object_bounds)), CUBE_REST_Z)
    stack = others.any() & (draws.stack < p_stack)
    pos = jnp.where(stack, base.at[2].add(_CUBE_SIZE), pos)
    if scene.slides:
        put = (readings.slide_pos[0] < _DRAWER_IS_OPEN) & (draws.put < _PUT_IN_DRAWER)
        spot = between(jnp.append(draws.xy, 0.0), *_DRAWER_SPOT)
        pos = jnp.where(put, spot, pos)
    return _of(CUBE, cube, pos, 2 * jnp.pi * draws.yaw, jnp.zeros_like(draws.yaw))


def _weights(scene: Scene, readings: Readings) -> Float[Array, " kinds"]:
    """Returns unnormalised probabilities of the four kinds."""
    free = (~_in_drawer(scene, readings)).any().astype(readings.slide_pos.dtype)
    slides = jnp.where(readings.button_state, 1.0, _LOCKED_WEIGHT).astype(free.dtype)
    return jnp.concatenate([jnp.stack([free, jnp.ones_like(free)]), slides])


def _in_drawer(scene: Scene, readings: Readings) -> Bool[Array, " cubes"]:
    """Returns True for cubes that lie in the drawer, at any opening."""
    if not scene.slides:
        return jnp.zeros(scene.cubes, bool)
    handle_y = handle_pos(scene, readings.slide_pos)[0, 1]
    offset = readings.cube_pos.at[:, 1].add(-handle_y)
    low, high = jnp.asarray(_IN_DRAWER, offset.dtype)
    return ((low[None] <= offset) & (offset <= high[None])).all(axis=1)


def _uncovered(cube_pos: Float[Array, "cubes 3"]) -> Bool[Array, " cubes"]:
    """Returns True for cubes without another cube on top of them."""
    xy, z = cube_pos[:, :2], cube_pos[:, 2]
    near = jnp.linalg.norm(xy[:, None] - xy[None], axis=-1) < _STACK_RADIUS
    higher = z[None] > z[:, None]
    return ~(near & higher).any(axis=1)


def _pick(uniform: Float[Array, ""], mask: Bool[Array, " n"]) -> Int[Array, ""]:
    """Picks one of the true entries of `mask` uniformly; 0 if none is true."""
    count = jnp.cumsum(mask)
    rank = jnp.floor(uniform * count[-1].astype(uniform.dtype)).astype(count.dtype)
    return jnp.argmax(mask & (count == rank + 1))
