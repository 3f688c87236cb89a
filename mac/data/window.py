"""From the host's store to the device's window: normalise, relabel, and list the valid starts."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mac.data.normalize import Normalizer
from mac.data.store import Store
from mac.errors import UserError
from mac.types import Window

ACTION_LIMIT = 1 - 1e-5
"""Actions are clipped to ± this, as in the authors' implementation."""

Relabel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Raw observations [N, D] to reward [N] and mask [N] (0 where the task is solved) of those states."""


def valid_starts(
    first: Int[np.ndarray, " E"], length: Int[np.ndarray, " E"], chunk: int
) -> Int[np.ndarray, " M"]:
    """Rows at which a chunk may begin: those of each episode but its last `chunk + 2`.

    With T transitions (`length` T + 1) these are 0 ... T-2-chunk, so T-1-chunk of them; a shorter
    episode has none. The state after the chunk is thus never one of the last two. The second of
    them is given up because the reference marks the last *two* rows of an episode as terminal.

    Source: `ACDataset` in the authors' implementation of MAC.
    """
    count = np.maximum(length - (chunk + 2), 0)
    total = int(count.sum())
    before = np.cumsum(count) - count
    return (np.arange(total) + np.repeat(first - before, count)).astype(np.int32)


def make_window(
    store: Store, normalizer: Normalizer, chunk: int, relabel: Relabel | None = None, shard: int = 0
) -> Window:
    """One shard of `store` on the default device.

    Args:
        normalizer: applied to the observations; `relabel` sees the raw ones.
        chunk: actions per chunk, at least 1.
        relabel: reward and mask of each row; without it the window has neither.
        shard: which shard, counted from 0.
    Returns:
        `starts` has one entry per row; those past `n_starts` repeat the first, a valid start.
    Raises:
        UserError: if `chunk` is not positive, or no episode is long enough for it.
    """
    if chunk < 1:
        raise UserError(f"chunk={chunk}: a chunk has at least 1 action")
    split = store.train[shard]
    starts = valid_starts(split.first, split.length, chunk)
    if starts.size == 0:
        longest = int(split.length.max()) - 1
        raise UserError(
            f"{store.path}: no episode is long enough for chunk={chunk}: the longest has {longest} "
            f"transitions, {chunk + 2} are needed; take a smaller chunk or longer episodes"
        )
    padded = np.full(len(split.obs), starts[0], np.int32)
    padded[: starts.size] = starts
    reward, mask = relabel(split.obs) if relabel else (None, None)
    return Window(
        obs=jnp.asarray(normalizer.apply_host(split.obs)),
        action=jnp.asarray(np.clip(split.action, -ACTION_LIMIT, ACTION_LIMIT)),
        reward=_column(reward),
        mask=_column(mask),
        starts=jnp.asarray(padded),
        n_starts=jnp.asarray(starts.size, jnp.int32),
    )


def _column(value: np.ndarray | None) -> Float[Array, " N"] | None:
    return None if value is None else jnp.asarray(value, jnp.float32)
