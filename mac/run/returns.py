"""Returns of episodes as critics count them, for comparing what was expected with what came."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mac.types import EnvSpec


def realised_return(
    discounted: Float[Array, "*E"],
    last: Float[Array, "*E"],
    success: Bool[Array, "*E"],
    length: Int[Array, "*E"],
    discount: float,
) -> Float[Array, "*E"]:
    """Discounted return of episodes as critics count it, which know no time limit.

    A success is followed by nothing. Any other episode is continued with its last reward for ever,
    though it might have succeeded a little later.

    Args:
        discounted: sum of `discount**t` times the reward of step t = 0, 1, ...; in an environment with
            goals the reward is -1 (`step_reward`).
        last: reward of the last step.
        length: steps taken.
    """
    rest = jnp.where(success, 0.0, last / (1 - discount))
    return discounted + rest * discount ** length.astype(discounted.dtype)


def step_reward(spec: EnvSpec, reward: Float[Array, "*E"]) -> Float[Array, "*E"]:
    """A step's reward in returns that critics predict: the environment's, or, with goals, -1."""
    return reward if spec.goal_dim is None else jnp.full_like(reward, -1.0)
