"""A ring of imagined transitions, which a few rollouts fill at a time and each update draws from."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, Key


class ReplaySpec(NamedTuple):
    """Sizes of a ring, and when it is filled.

    Attributes:
        rows: transitions of one rollout, at most.
        kept: newest rollouts that the ring holds.
        every: updates between rollouts.
        batch: transitions drawn for each update.
        first: number of the update that begins with the first rollout.
        fill_at_start: whether that update begins with `kept` rollouts instead of one.
    """

    rows: int
    kept: int
    every: int
    batch: int
    first: int = 0
    fill_at_start: bool = False

    @property
    def capacity(self) -> int:
        """Transitions that the ring holds, at most."""
        return self.rows * self.kept


class Replay(eqx.Module):
    """The ring: slots of equal room, one for each rollout.

    Attributes:
        rows: arrays of transitions, leading axis `ReplaySpec.capacity`, slot after slot.
        count: transitions in each slot, which stand at its beginning.
    """

    rows: Any
    count: Int[Array, " kept"]


def empty_replay(spec: ReplaySpec, row: Any) -> Replay:
    """A ring without transitions; `row` is a pytree of arrays or shapes like one of them."""
    rows = jax.tree.map(lambda x: jnp.zeros((spec.capacity, *x.shape), x.dtype), row)
    return Replay(rows, jnp.zeros(spec.kept, jnp.int32))


def write(replays: Replay, slot: Int[Array, ""], rows: Any, count: Int[Array, " S"], *, room: int) -> Replay:
    """Puts one rollout of each of S rings into the same slot, in place of the transitions there.

    Args:
        replays: S rings, along a leading axis of every array.
        rows: arrays `[S, room, ...]`, of which the first `count` transitions are valid.
        room: `ReplaySpec.rows`.
    """

    def put(ring: Array, new: Array) -> Array:
        at = (0, slot * room, *(0 for _ in ring.shape[2:]))
        return jax.lax.dynamic_update_slice(ring, new.astype(ring.dtype), at)

    counts = jax.lax.dynamic_update_slice(replays.count, count[:, None].astype(jnp.int32), (0, slot))
    return Replay(jax.tree.map(put, replays.rows, rows), counts)


def draw(replays: Replay, number: Int[Array, ""], key: Key[Array, ""], batch: int, *, room: int) -> Any:
    """Draws transitions of the ring with that number, uniformly and with replacement.

    All rings are arguments, so that a loop over them copies none.
    """
    count = replays.count[number]
    before = jnp.cumsum(count) - count
    chosen = jr.randint(key, (batch,), 0, jnp.maximum(jnp.sum(count), 1))
    slot = jnp.searchsorted(before, chosen, side="right", method="compare_all") - 1
    row = slot * room + chosen - before[slot]

    def take(ring: Array) -> Array:
        return ring.reshape(-1, *ring.shape[2:])[number * ring.shape[1] + row]

    return jax.tree.map(take, replays.rows)
