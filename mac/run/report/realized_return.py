"""Returns of episodes as critics count them, to compare expected with realized returns."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mac.types import EnvSpec, Number


def realised_return(
    discounted: Float[Array, "*E"],
    last: Float[Array, "*E"],
    ended: Bool[Array, "*E"],
    length: Int[Array, "*E"],
    discount: Number | Float[Array, "*#E"],
) -> Float[Array, "*E"]:
    """Discounted return of episodes as critics count it, which know no time limit.

    What ended by itself is followed by nothing (`ended_itself`). Any other episode is continued with its last
    reward forever, which is an approximation.

    Args:
        discounted: sum of `discount**t` times the reward of step t = 0, 1, ...; in an environment with
            goals the reward is -1 (`step_reward`).
        last: reward of the last step, or what stands for it (`steady_reward`).
        ended: whether they ended by themselves, and not at the time limit.
        length: steps taken.
    """
    rest = jnp.where(ended, 0.0, last / (1 - discount))
    return discounted + rest * discount ** length.astype(discounted.dtype)


def step_reward(spec: EnvSpec, reward: Float[Array, "*E"]) -> Float[Array, "*E"]:
    """A step's reward in returns that critics predict: the environment's, or, with goals, -1."""
    return reward if spec.goal_dim is None else jnp.full_like(reward, -1.0)


def ended_itself(spec: EnvSpec, success: Bool[Array, "*E"], length: Int[Array, "*E"]) -> Bool[Array, "*E"]:
    """Returns whether episodes ended by success or, where data record terminations, before the limit."""
    return success | (length < spec.max_steps) if spec.recorded else success


def steady_reward(
    spec: EnvSpec, last: Float[Array, "*E"], total: Float[Array, "*E"], length: Int[Array, "*E"]
) -> Float[Array, "*E"]:
    """The reward with which an episode that meets the time limit is thought to go on.

    That of its last step; where rewards are recorded, and go up and down with every stride, their mean.
    """
    return total / jnp.maximum(length, 1).astype(total.dtype) if spec.recorded else last
