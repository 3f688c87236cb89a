"""Drawing real sequences of action chunks from a window, on the device: what a model must reproduce."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mac.data.sampler import actions_at, chunk_starts
from mac.errors import UserError
from mac.formatting import counted
from mac.types import EpisodeIndex, Window


class Sequences(NamedTuple):
    """`B` stretches of the data, each of `L` chunks of `n` actions that follow one another in one episode.

    Attributes:
        obs: the states before each chunk, and the one after the last, in normalised units:
            `actions[b, l]` lead from `obs[b, l]` to `obs[b, l + 1]`.
        actions: clipped as those of training batches are.
    """

    obs: Float[Array, "B L+1 D"]
    actions: Float[Array, "B L n A"]


def sample_sequences(window: Window, chunk: int, count: int, batch: int, key: Key[Array, ""]) -> Sequences:
    """`batch` sequences of `count` chunks of `chunk` actions each, drawn with replacement.

    Starts are uniform over all rows from which the whole sequence stays in its episode, whose last state
    it may reach. Rows are gathered as [batch, step], so nothing is ever reordered.

    `check_sequences` tells beforehand whether there is such a row; without one, rows mean nothing.
    """
    start, _ = sequence_starts(window.episodes, chunk * count, batch, key)
    rows = start[:, None] + jnp.arange(chunk * count)[None, :]
    states = start[:, None] + chunk * jnp.arange(count + 1)[None, :]
    actions = actions_at(window, rows)
    return Sequences(window.obs[states], actions.reshape(batch, count, chunk, -1))


def sequence_starts(
    episodes: EpisodeIndex, steps: int, batch: int, key: Key[Array, ""]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Rows at which the sequences of `steps` transitions begin that this key draws, and the last row of
    each one's episode at which an action is taken."""
    # T transitions are T + 1 states, the last of which may end a sequence; padding (T = 0) has no start.
    starts = jnp.maximum(episodes.steps + 1 - steps, 0)
    ends = jnp.cumsum(starts, dtype=starts.dtype)
    table = dataclasses.replace(episodes, starts_before=ends - starts, n_starts=ends[-1])
    return chunk_starts(table, batch, key)


def check_sequences(where: str, length: Int[np.ndarray, " E"], chunk: int, count: int) -> None:
    """Raises UserError, which begins with `where`, if no episode of `length` rows holds such a sequence."""
    if min(chunk, count) < 1:
        what = f"{counted(count, 'chunk')} of {counted(chunk, 'action')}"
        raise UserError(f"{where}: a sequence of {what}: give at least 1 of each")
    longest = int(length.max(initial=1)) - 1
    if longest < chunk * count:
        raise UserError(
            f"{where}: no episode holds {counted(count, 'chunk')} of {counted(chunk, 'action')} "
            f"({counted(chunk * count, 'transition')}): the longest has {longest}; take a shorter horizon or "
            "longer episodes"
        )
