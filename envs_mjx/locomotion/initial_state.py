"""Initial states of walkers, drawn as in ogbench 1.2 and gymnasium."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from envs_mjx.locomotion.walkers import Walker

START_NOISE = {
    "point": 0.1,
    "ant": 0.1,
    "hopper": 5e-3,
    "walker2d": 5e-3,
    "walker2d-v5": 5e-3,
    "halfcheetah": 0.1,
}
"""Half width of the uniform noise on every entry of `qpos` (m, rad, quaternions too). Velocities of hopper
and walker2d have noise of the same distribution; others have normal noise of this standard deviation."""
_UNIFORM_SPEED = ("hopper", "walker2d", "walker2d-v5")
_HUMANOID_SPEED = 0.1

State = tuple[Float[Array, " nq"], Float[Array, " nv"]]
Touches = Callable[[Float[Array, " nq"]], Bool[Array, ""]]
"""Returns whether a walker at some positions touches anything (`AbstractWalkerEngine.touches`)."""


def random_start(walker: Walker, key: Key[Array, ""], touches: Touches) -> State:
    """Draws positions and velocities at the start of an episode, near the model's own pose.

    A humanoid has a random orientation (its quaternion's entries are uniform in [0, 1] before normalisation)
    and joints uniform in their ranges, redrawn until it touches nothing. All engines have the same initial
    states, because their `touches` agree.
    """
    if walker.body == "humanoid":
        return _random_humanoid(walker, key, touches)
    key_pos, key_vel = jr.split(key)
    noise, nv = START_NOISE[walker.body], walker.model.nv
    qpos = jnp.asarray(walker.model.qpos0, jnp.float32)
    qpos += jr.uniform(key_pos, qpos.shape, minval=-noise, maxval=noise)
    if walker.body in _UNIFORM_SPEED:
        return qpos, jr.uniform(key_vel, (nv,), minval=-noise, maxval=noise)
    return qpos, noise * jr.normal(key_vel, (nv,))


def _random_humanoid(walker: Walker, key: Key[Array, ""], touches: Touches) -> State:
    low, high = jnp.asarray(walker.model.jnt_range[1:], jnp.float32).T
    rest = jnp.asarray(walker.model.qpos0[:3], jnp.float32)

    def draw(key: Key[Array, ""]) -> tuple[Key[Array, ""], Float[Array, " nq"], Bool[Array, ""]]:
        key, key_quat, key_joints = jr.split(key, 3)
        quat = jr.uniform(key_quat, (4,))
        joints = low + (high - low) * jr.uniform(key_joints, low.shape)
        qpos = jnp.concatenate([rest, quat / jnp.linalg.norm(quat), joints])
        return key, qpos, touches(qpos)

    key_pose, key_vel = jr.split(key)
    _, qpos, _ = jax.lax.while_loop(lambda loop: loop[2], lambda loop: draw(loop[0]), draw(key_pose))
    return qpos, _HUMANOID_SPEED * jr.normal(key_vel, (walker.model.nv,))
