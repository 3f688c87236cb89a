"""All transitions of a window, for statistics of the data."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mac.types import Window


def transition_rows(window: Window) -> tuple[Int[Array, " N"], Bool[Array, " N"]]:
    """The row of every transition of a window, and which of these numbers count.

    There are as many as the window has rows: shapes do not depend on the data. Those that count come first.
    """
    episodes = window.episodes
    number = jnp.arange(len(window.obs), dtype=jnp.int32)
    valid = number < episodes.n_steps
    number = jnp.minimum(number, episodes.n_steps - 1)
    episode = jnp.searchsorted(episodes.steps_before, number, side="right") - 1
    return episodes.first[episode] + number - episodes.steps_before[episode], valid
