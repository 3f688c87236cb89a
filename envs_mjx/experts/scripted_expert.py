"""The experts as one loop: begin an episode, act, and draw a new target after the last one is done.

The two styles are the two kinds of datasets in OGBench. `play` follows plans with correlated noise. `noisy`
reacts to each state, with Gaussian noise on the action and occasional random actions. Functions are written
for one environment; the caller vmaps. An `ExpertState` is arrays only, of the same shapes whatever its
target, so it may be carried by `lax.scan` and selected by `jnp.where`.

Source: OGBench (Park et al. 2025) and its script that makes manipulation data.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from envs_mjx.experts.noisy import MAX_STEPS, NoisyState, RestPose, react, rest_from_draws
from envs_mjx.experts.play import KeyframePlan, build_plan, follow
from envs_mjx.experts.targets import (
    FIRST_P_STACK,
    Target,
    choose_target,
    stack_probability,
    unset_targets,
)
from envs_mjx.manipulation.observation import Readings
from envs_mjx.manipulation.scenes import Scene
from mac.errors import UserError

STYLES = ("play", "noisy")
"""Kinds of experts, named as in datasets: `cube-single-play-v0`, `cube-single-noisy-v0`."""

_MAX_XI = 0.1
"""Largest standard deviation of an episode's action noise along x, y and z, as a share of full scale."""
_XI_SCALE = (1.0, 1.0, 1.0, 3.0, 10.0)
_P_RANDOM, _P_RANDOM_PUZZLE = 0.1, 0.2


class ExpertState(eqx.Module):
    """State of an expert: its target, and its progress.

    Attributes:
        target: the object state to reach.
        p_stack: probability in this episode of stacking a cube on another.
        intent: the plan of a `play` expert, the state of a `noisy` one.
    """

    target: Target
    p_stack: Float[Array, ""]
    intent: KeyframePlan | NoisyState


def begin(style: str, scene: Scene, key: Key[Array, ""], readings: Readings) -> ExpertState:
    """Begins an episode: draws its constants, the first target, and a plan or a resting pose.

    Raises:
        UserError: for an unknown style.
    """
    if style not in STYLES:
        raise UserError(f"unknown style of expert {style!r}; known: {', '.join(STYLES)}")
    stack_key, noisy_key, target_key, intent_key = jr.split(key, 4)
    target = choose_target(target_key, scene, readings, FIRST_P_STACK)
    p_stack = stack_probability(stack_key, scene)
    if style == "play":
        return ExpertState(target, p_stack, build_plan(intent_key, scene, readings, target))
    rest = _draw_rest(intent_key, scene, readings, target)
    uniform = jr.uniform(noisy_key, (5,), readings.effector_pos.dtype)
    unset = unset_targets(uniform[1:], scene)
    return ExpertState(target, p_stack, NoisyState.of(_MAX_XI * uniform[0], unset, target, rest))


def act(
    style: str, scene: Scene, expert: ExpertState, readings: Readings, key: Key[Array, ""]
) -> tuple[Float[Array, " 5"], ExpertState, Bool[Array, ""]]:
    """Chooses one action.

    Returns:
        The action in [-1, 1]; the expert after it; and whether it is done with its target. If so, the caller
        applies the action, then calls `retarget` with the readings *after* it.
    """
    if isinstance(expert.intent, KeyframePlan):
        action, plan, done = follow(expert.intent, readings)
        return action, ExpertState(expert.target, expert.p_stack, plan), done
    pursuit = expert.intent
    uniform_key, normal_key = jr.split(key)
    dtype = readings.effector_pos.dtype
    uniform, normal = jr.uniform(uniform_key, (6,), dtype), jr.normal(normal_key, (5,), dtype)
    reaction, over = react(scene, readings, pursuit.seen, pursuit.rest)
    spread = pursuit.xi * jnp.asarray(_XI_SCALE, dtype)
    noisy = jnp.clip(reaction + spread * normal, -1.0, 1.0)
    random = uniform[0] < (_P_RANDOM_PUZZLE if any(scene.grid) else _P_RANDOM)
    steps = pursuit.steps + (~random).astype(jnp.int32)
    done = ~random & (over | (steps >= jnp.asarray(MAX_STEPS, jnp.int32)[expert.target.kind]))
    action = jnp.where(random, 2 * uniform[1:] - 1, noisy)
    after = pursuit._replace(steps=steps, seen=expert.target)
    return action, ExpertState(expert.target, expert.p_stack, after), done


def retarget(
    style: str, scene: Scene, expert: ExpertState, readings: Readings, key: Key[Array, ""]
) -> ExpertState:
    """Draws a new target for an expert that is done with the last one."""
    target_key, intent_key = jr.split(key)
    target = choose_target(target_key, scene, readings, expert.p_stack)
    if isinstance(expert.intent, KeyframePlan):
        return ExpertState(target, expert.p_stack, build_plan(intent_key, scene, readings, target))
    rest = _draw_rest(intent_key, scene, readings, target)
    return ExpertState(target, expert.p_stack, expert.intent.renew(target, rest))


def _draw_rest(key: Key[Array, ""], scene: Scene, readings: Readings, target: Target) -> RestPose:
    return rest_from_draws(jr.uniform(key, (4,), readings.effector_pos.dtype), scene, target.kind)
