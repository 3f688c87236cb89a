"""From the host's store to the device's window: normalise, relabel, and list the valid starts."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mac.data.normalize import Normalizer
from mac.data.store import Store
from mac.errors import UserError
from mac.types import Column, EpisodeIndex, Window

Relabel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Raw observations [N, D] to reward [N] and mask [N] (0 where the task is solved) of those states."""


def start_counts(length: Int[np.ndarray, " E"], chunk: int) -> Int[np.ndarray, " E"]:
    """At how many rows of each episode a chunk may begin: the first ones, all but the last `chunk + 2`.

    With T transitions (`length` T + 1) these are rows 0 ... T-2-chunk, so T-1-chunk of them; a shorter
    episode has none. The state after the chunk is thus never one of the last two. The second of
    them is given up because the reference marks the last *two* rows of an episode as terminal.

    Source: `ACDataset` in the authors' implementation of MAC.
    """
    return np.maximum(length - (chunk + 2), 0)


def index_episodes(
    first: Int[np.ndarray, " E"], length: Int[np.ndarray, " E"], chunk: int, room: int = 0
) -> EpisodeIndex:
    """The table of episodes that begin at rows `first` and have `length` rows (transitions plus one).

    Args:
        chunk: actions per chunk, which decides where one may begin.
        room: episodes that the table has room for, so that windows of other episodes have its shape;
            at least as many as there are, if less is given.
    """
    starts, steps = start_counts(length, chunk), length - 1
    padding = (0, max(room - len(first), 0))

    def before(count: np.ndarray) -> Array:
        ends = np.cumsum(count)
        return _int32(np.pad(ends - count, padding, constant_values=ends[-1]))

    return EpisodeIndex(
        first=_int32(np.pad(first, padding)),
        steps=_int32(np.pad(steps, padding)),
        starts_before=before(starts),
        steps_before=before(steps),
        n_starts=_int32(starts.sum()),
        n_steps=_int32(steps.sum()),
    )


def make_column(stored: Float[np.ndarray, "N D"], normalizer: Normalizer | None = None) -> Column:
    """Rows in the dataset's units as a column of normalised, or, without `normalizer`, of plain ones."""
    width = stored.shape[1]
    if normalizer is None:
        return Column(jnp.asarray(stored), jnp.zeros(width), jnp.ones(width))
    return Column(jnp.asarray(stored), normalizer.center, normalizer.width)


def make_window(
    store: Store, normalizer: Normalizer, chunk: int, relabel: Relabel | None = None, shard: int = 0
) -> Window:
    """One shard of `store` on the default device.

    Args:
        normalizer: applied to the observations; `relabel` sees the raw ones.
        chunk: actions per chunk, at least 1.
        relabel: reward and mask of each row; without it the window has neither.
        shard: which shard, counted from 0.
    Raises:
        UserError: if `chunk` is not positive, or no episode is long enough for it.
    """
    split = store.train[shard]
    check_chunk(str(store.path), split.length, chunk)
    reward, mask = relabel(split.obs) if relabel else (None, None)
    return Window(
        obs=make_column(split.obs, normalizer),
        action=make_column(split.action),
        reward=_numbers(reward),
        mask=_numbers(mask),
        episodes=index_episodes(split.first, split.length, chunk),
    )


def check_chunk(where: str, length: Int[np.ndarray, " E"], chunk: int) -> None:
    """Raises UserError if no episode of `length` rows holds a chunk of so many actions."""
    if chunk < 1:
        raise UserError(f"chunk={chunk}: a chunk has at least 1 action")
    if not start_counts(length, chunk).any():
        raise UserError(
            f"{where}: no episode is long enough for chunk={chunk}: the longest has {length.max() - 1} "
            f"transitions, {chunk + 2} are needed; take a smaller chunk or longer episodes"
        )


def _int32(value: np.ndarray | np.integer) -> Int[Array, "..."]:
    return jnp.asarray(value, jnp.int32)


def _numbers(value: np.ndarray | None) -> Float[Array, " N"] | None:
    return None if value is None else jnp.asarray(value, jnp.float32)
