"""Drawing batches of action chunks from a window, on the device."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from mac.types import Batch, SampleSpec, Window


def sample(window: Window, spec: SampleSpec, key: Key[Array, ""]) -> Batch:
    """`spec.batch` chunks, uniform over the window's valid starts, with replacement.

    A start leaves room for the whole chunk in its episode, so chunks never cross an episode.
    """
    start = window.starts[jr.randint(key, (spec.batch,), 0, window.n_starts)]
    rows = start[:, None] + jnp.arange(spec.chunk)[None, :]
    return Batch(
        obs=window.obs[start],
        actions=window.action[rows],
        next_obs=window.obs[start + spec.chunk],
        rewards=None if window.reward is None else window.reward[rows],
        masks=None if window.mask is None else window.mask[rows],
    )
