"""From the host's store to the device's window: fold the units, relabel, and list the valid starts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from mac.data.normalize import Normalizer
from mac.data.quantize import Affine, row_blocks
from mac.data.store import Store, spans
from mac.errors import UserError
from mac.formatting import counted
from mac.types import Column, EpisodeIndex, SampleSpec, Window

Relabel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Raw observations [N, D] to reward [N] and mask [N] (0 where the task is solved) of those states."""

_ALIGNMENT = 64  # bytes: so that a CPU device takes host arrays as they are, without a copy


class EpisodeRange(NamedTuple):
    """Consecutive episodes of one shard: numbers `first`, ..., `last - 1`."""

    shard: int
    first: int
    last: int


class WindowCapacity(NamedTuple):
    """Capacity of a window in rows and episodes, so that windows of one shape hold different ones."""

    rows: int
    episodes: int


EXACT = WindowCapacity(0, 0)
"""Just what the episodes need."""


def start_counts(
    length: Int[np.ndarray, " E"],
    chunk: int,
    terminated: Bool[np.ndarray, " E"] | None = None,
    anywhere: bool = False,
) -> Int[np.ndarray, " E"]:
    """At how many rows of each episode a chunk may begin: the first ones, all but the last `chunk + 2`.

    With T transitions (`length` T + 1) these are rows 0 ... T-2-chunk, so T-1-chunk of them; a shorter
    episode has none. The state after the chunk is thus never one of the last two. The second of
    them is given up because the reference marks the last *two* rows of an episode as terminal.

    The terminal state of a terminated episode is absorbing, so there a chunk may begin at each of its T
    transitions: else no chunk would ever hold a termination, and a model could not learn of it. With
    `anywhere` (`SampleSpec.starts_anywhere`), chunks begin at each transition of any episode.

    Source: `ACDataset` in the authors' implementation of MAC; which has no rule for terminations.
    """
    if anywhere:
        return length - 1
    whole = np.maximum(length - (chunk + 2), 0)
    return whole if terminated is None else np.where(terminated, length - 1, whole)


def index_episodes(
    first: Int[np.ndarray, " E"],
    length: Int[np.ndarray, " E"],
    chunk: int,
    room: int = 0,
    terminated: Bool[np.ndarray, " E"] | None = None,
) -> EpisodeIndex:
    """The table of episodes that begin at rows `first` and have `length` rows (transitions plus one).

    Args:
        chunk: actions per chunk, which decides where one may begin.
        room: episodes that the table has room for, so that windows of other episodes have its shape;
            at least as many as there are, if less is given.
        terminated: which of them terminated; None where data record none.
    """
    starts, steps = start_counts(length, chunk, terminated), length - 1
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
        terminated=None if terminated is None else jnp.asarray(np.pad(terminated, padding)),
    )


def make_column(
    stored: Shaped[np.ndarray, "N D"] | Shaped[Array, "N D"],
    normalizer: Normalizer | None = None,
    affine: Affine | None = None,
) -> Column:
    """Rows as a column of normalised, or, without `normalizer`, of plain values.

    Args:
        affine: how `stored` is coded, None if not. Both maps become one: in float64, because codes are
            up to 65535 and differences of a few of them must not be lost.
    """
    width = stored.shape[1]
    center = np.zeros(width) if normalizer is None else np.asarray(normalizer.center, np.float64)
    scale = np.ones(width) if normalizer is None else np.asarray(normalizer.width, np.float64)
    if affine is not None:
        center, scale = (center - affine.low) / affine.step, scale / affine.step
    return Column(jnp.asarray(stored), jnp.asarray(center, jnp.float32), jnp.asarray(scale, jnp.float32))


def make_window(
    store: Store,
    normalizer: Normalizer,
    spec: SampleSpec,
    relabel: Relabel | None = None,
    *,
    pieces: Sequence[EpisodeRange] | None = None,
    room: WindowCapacity = EXACT,
    put: Callable[[Any], Any] = jnp.asarray,
) -> Window:
    """Episodes of `store` on the device, as they are stored.

    Args:
        normalizer: folded into the observations; `relabel` sees values in the environment's units.
        spec: how chunks will be drawn: where they begin, and whether they need the returns of the data.
        relabel: reward and mask of each row; without it the window has those that the store records, if any.
        pieces: which episodes; None is all of them, of all shards.
        room: size of the window if that is more than the pieces need.
        put: moves an array, or a tree of them, to the device.
    Raises:
        UserError: if `spec.chunk` is not positive, no episode is long enough for it, the rows are too many to
            be numbered, or a file cannot be read.
    """
    pieces = pieces or all_pieces(store)
    length = np.concatenate([store.train[p.shard].length[p.first : p.last] for p in pieces])
    terminated = recorded_terminations(store, pieces)
    check_chunk(str(store.path), length, spec, terminated)
    rows = max(int(length.sum()), room.rows)
    if rows >= 2**31:
        raise UserError(f"{store.path}: {rows:,} rows are too many for one window; at most 2**31 - 1")
    first = np.cumsum(length) - length
    obs, action = (_gather(store, pieces, name, rows) for name in ("obs", "action"))
    codec, reward, mask = store.train[0].codec, None, None
    if relabel:
        reward, mask = _labels(relabel, obs, int(length.sum()), codec and codec.obs)
    elif terminated is not None:
        reward, mask = _gather(store, pieces, "reward", rows), _recorded_mask(first, length, terminated, rows)
    if reward is not None and spec.terminal_reward is not None and terminated is not None and not relabel:
        reward[(first + length - 2)[terminated]] = spec.terminal_reward
    returns = None
    if spec.return_to_go and reward is not None:
        returns = sum_to_go(reward, first, length, spec.return_discount)
    return Window(
        obs=make_column(put(obs), normalizer, codec and codec.obs),
        action=make_column(put(action), None, codec and codec.action),
        reward=None if reward is None else put(reward),
        mask=None if mask is None else put(mask),
        episodes=index_episodes(first, length, spec.chunk, room.episodes, None if relabel else terminated),
        return_to_go=None if returns is None else put(returns),
    )


def sum_to_go(
    reward: Float[np.ndarray, " N"],
    first: Int[np.ndarray, " E"],
    length: Int[np.ndarray, " E"],
    discount: float = 1.0,
) -> Float[np.ndarray, " N"]:
    """Discounted sums of rewards from each row to its episode's last action; 0 in all other rows.

    Args:
        first: row of each episode's first state.
        length: rows of each episode, transitions plus one.
    """
    out = aligned_empty(reward.shape, np.dtype(np.float32))
    out[int(length.sum()) :] = 0
    for begin, rows in zip(first.tolist(), length.tolist(), strict=True):
        last = begin + rows - 1  # the final state, whose action has no meaning
        out[begin:last] = _discounted_sums(reward[begin:last], discount)
        out[last] = 0
    return out


def _discounted_sums(reward: Float[np.ndarray, " T"], discount: float) -> Float[np.ndarray, " T"]:
    """Sums of `discount**k * reward[t + k]` over k, in float64."""
    backwards = reward[::-1].astype(np.float64)
    if discount == 1:
        return np.cumsum(backwards)[::-1]
    from scipy.signal import lfilter  # takes longer to import than all of JAX

    return np.asarray(lfilter([1.0], [1.0, -discount], backwards))[::-1]


def make_held_out(
    store: Store, normalizer: Normalizer, spec: SampleSpec, rows: int = 100_000
) -> Window | None:
    """The first episodes of the validation split, at most about `rows` rows, with recorded rewards only.

    For looks at data that are not trained on. None if there is no such split, or no chunk in it.
    """
    if store.val is None:
        return None
    count = max(int(np.searchsorted(np.cumsum(store.val.length), rows, side="right")), 1)
    held, pieces = store._replace(train=(store.val,)), [EpisodeRange(0, 0, count)]
    if not start_counts(
        store.val.length[:count], spec.chunk, recorded_terminations(held, pieces), spec.starts_anywhere
    ).any():
        return None
    return make_window(held, normalizer, spec, pieces=pieces)


def all_pieces(store: Store) -> list[EpisodeRange]:
    """All episodes of all shards."""
    return [EpisodeRange(i, 0, len(split.first)) for i, split in enumerate(store.train)]


def recorded_terminations(store: Store, pieces: Sequence[EpisodeRange]) -> Bool[np.ndarray, " E"] | None:
    """Returns which episodes of the pieces terminated; None if the store does not record it."""
    if store.train[0].terminated is None:
        return None
    return np.concatenate([np.asarray(store.train[p.shard].terminated)[p.first : p.last] for p in pieces])


def _recorded_mask(
    first: Int[np.ndarray, " E"], length: Int[np.ndarray, " E"], terminated: Bool[np.ndarray, " E"], rows: int
) -> Float[np.ndarray, " N"]:
    """0 for the last two rows of a terminated episode and behind all rows, else 1."""
    mask = aligned_empty((rows,), np.dtype(np.float32))
    mask[:] = 1
    mask[int(length.sum()) :] = 0
    final = (first + length - 1)[terminated]
    mask[final] = mask[final - 1] = 0
    return mask


def _gather(
    store: Store, pieces: Sequence[EpisodeRange], name: str, rows: int
) -> Shaped[np.ndarray, "N ..."]:
    """The rows of all pieces, end to end, in an array of `rows` rows; rows left over are 0."""
    like = getattr(store.train[0], name)
    out, at = aligned_empty((rows, *like.shape[1:]), like.dtype), 0
    for piece in pieces:
        split = store.train[piece.shard]
        for first, last in spans(split.length[piece.first : piece.last]):
            begin, end = piece.first + first, piece.first + last
            count = int(split.length[begin:end].sum())
            split.read(name, begin, end, out[at : at + count])  # checked while it is in the cache
            at += count
    out[at:] = 0
    return out


def _labels(
    relabel: Relabel, stored: Shaped[np.ndarray, "N D"], rows: int, affine: Affine | None
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Reward and mask of the first `rows` rows, a block at a time; 0 of those that are room only."""
    reward, mask = (aligned_empty((len(stored),), np.dtype(np.float32)) for _ in range(2))
    reward[rows:] = mask[rows:] = 0
    for block in row_blocks(rows):
        values = stored[block]
        reward[block], mask[block] = relabel(values if affine is None else affine.decode(values))
    return reward, mask


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """An array that is not filled yet, at an address that JAX on a CPU can use without copying."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def check_chunk(
    where: str,
    length: Int[np.ndarray, " E"],
    spec: SampleSpec,
    terminated: Bool[np.ndarray, " E"] | None = None,
) -> None:
    """Raises UserError if no episode of `length` rows holds a chunk as `spec` asks for."""
    chunk = spec.chunk
    if chunk < 1:
        raise UserError(f"chunk={chunk}: a chunk has at least 1 action")
    if not start_counts(length, chunk, terminated, spec.starts_anywhere).any():
        longest = counted(int(length.max()) - 1, "transition")
        raise UserError(
            f"{where}: no episode is long enough for chunk={chunk}: the longest has {longest}, {chunk + 2} "
            "are needed; take a smaller chunk or longer episodes"
        )


def _int32(value: np.ndarray | np.integer) -> Int[Array, "..."]:
    return jnp.asarray(value, jnp.int32)
