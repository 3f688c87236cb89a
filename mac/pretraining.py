"""Dynamics models that are trained before the policy, judged on held-out steps, and then rest.

A share of the data's steps is held out: a hash of its state says whether a step is one of them, so it is the
same in every batch. After each epoch a member whose error there is better by 1% than its best keeps its
weights; after `patience` epochs in which no member was better, none learns any more. The members with the
least error are the elites that the policy learns from.

Source: Janner et al. 2019 (MBPO), as Sun (2023, OfflineRL-Kit) arranges it for MOPO and MOBILE.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mac.nn.dynamics_ensemble import DynamicsEnsemble

EPOCH = 1000
"""Updates between looks at the error on held-out steps."""
IMPROVEMENT = 0.01
"""Share by which an error must fall to count as better."""


class ModelRecord(eqx.Module):
    """The best weights of each member so far.

    Attributes:
        best: members at their best.
        error: their mean squared errors on held-out steps; the largest number before the first epoch's end.
        total: sum of squared errors in this epoch so far, one mean over entries per step.
        count: held-out steps in this epoch so far.
        stale: epochs in a row in which no member was better.
        learning: whether members still learn.
    """

    best: DynamicsEnsemble
    error: Float[Array, " E"]
    total: Float[Array, " E"]
    count: Float[Array, ""]
    stale: Int[Array, ""]
    learning: Bool[Array, ""]

    def elites(self, count: int) -> DynamicsEnsemble:
        """The `count` members with the least error, best first; all for 0."""
        order = jnp.argsort(self.error)[: count or None]
        members = jax.tree.map(lambda x: x[order], self.best.members)
        return eqx.tree_at(lambda ensemble: ensemble.members, self.best, members)


def fresh_record(dynamics: DynamicsEnsemble) -> ModelRecord:
    """The record of members that nobody has judged yet."""
    size = len(jax.tree.leaves(dynamics.members)[0])
    zero, error = jnp.zeros(()), jnp.full(size, jnp.finfo(jnp.float32).max)
    return ModelRecord(dynamics, error, jnp.zeros(size), zero, jnp.zeros((), jnp.int32), jnp.ones((), bool))


def held_out(obs: Float[Array, "B D"], share: float) -> Bool[Array, " B"]:
    """Returns which steps are held out, about a `share` of the data's states."""
    bits = jax.lax.bitcast_convert_type(obs.astype(jnp.float32), jnp.uint32)
    odd = 2 * jnp.arange(1, obs.shape[-1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(1)
    mixed = jnp.sum(bits * jnp.broadcast_to(odd, bits.shape), axis=-1, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (mixed >> jnp.uint32(8)).astype(jnp.float32) < share * 2.0**24


def judge(
    record: ModelRecord,
    dynamics: DynamicsEnsemble,
    s: Float[Array, "B D"],
    a: Float[Array, "B A"],
    after: Float[Array, "B P"],
    step: Int[Array, ""],
    *,
    share: float,
    patience: int,
) -> ModelRecord:
    """The record after update number `step`, given the members and a batch with some held-out steps."""
    mean = dynamics(s, a).mean
    held = held_out(s, share).astype(mean.dtype)
    errors = jnp.mean(jnp.square(mean - jnp.broadcast_to(after, mean.shape)), axis=-1)  # E B
    total = record.total + jnp.sum(errors * jnp.broadcast_to(held, errors.shape), axis=-1)
    count = record.count + jnp.sum(held)

    ends = ((step + 1) % EPOCH == 0) & record.learning & (count > 0)
    found = total / jnp.maximum(count, 1)
    better = ends & (found < (1 - IMPROVEMENT) * record.error)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape(-1, *(1 for _ in new.shape[1:])), new, old)

    members = jax.tree.map(choose, dynamics.members, record.best.members)
    bounds = jax.tree.map(
        lambda new, old: jnp.where(jnp.any(better), new, old), dynamics.bounds, record.best.bounds
    )
    best = eqx.tree_at(lambda e: e.members, record.best, members)
    if bounds is not None:
        best = eqx.tree_at(lambda e: e.bounds, best, bounds)
    stale = jnp.where(ends, jnp.where(jnp.any(better), 0, record.stale + 1), record.stale)
    return ModelRecord(
        best=best,
        error=jnp.where(better, found, record.error),
        total=jnp.where(ends, 0.0, total),
        count=jnp.where(ends, 0.0, count),
        stale=stale,
        learning=record.learning & (stale < patience),
    )
