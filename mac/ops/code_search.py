"""Beam search over sequences of codes: a prior proposes them, a decoder tells what they lead to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.types import Number

LEAST_LIKELIHOOD_TERM = -1e5
"""Smallest that a log-likelihood adds to a plan's return."""


class Beam(NamedTuple):
    """N plans of the same length.

    Attributes:
        code: the last code of each; None without any.
        log_prob: logarithm of the probability of its codes.
        steps: what they decode to.
        prior: what the prior remembers of the codes before the last one, leading axis N.
        decoder: what the decoder remembers of the steps, leading axis N.
    """

    code: Int[Array, " N"] | None
    log_prob: Float[Array, " N"]
    steps: Float[Array, "N T C"]
    prior: Any
    decoder: Any


Propose = Callable[[Int[Array, " N"] | None, Any, int], tuple[Float[Array, "N K"], Any]]
"""Last code, memory and number of the next code (0, 1, ...) to its logits and the memory after it."""
Decode = Callable[[Int[Array, " N"], Any, int], tuple[Float[Array, "N stride C"], Any]]
"""Code, memory and number of the code to its steps and the memory after it."""


def search(
    begin: Beam,
    propose: Propose,
    decode: Decode,
    score: Callable[[Beam], Float[Array, " N"]],
    key: Key[Array, ""],
    *,
    depth: int,
    beam: int,
    expand: int,
) -> Float[Array, "T C"]:
    """Steps of the best plan of `depth` codes found from `begin`, a beam of one empty plan.

    Codes are sampled from the prior: `beam * expand` first ones, then `expand` to continue each plan. Of all
    plans the `beam` with the highest scores are kept, and the best at the end. Equal plans are kept twice.

    Source: Jiang et al. 2023 (TAP), arXiv 2208.10291.
    """
    plans = begin
    for number, k in enumerate(jr.split(key, depth)):
        plans = _continue(plans, propose, decode, number, expand if number else beam * expand, k)
        _, best = jax.lax.top_k(score(plans), beam if number + 1 < depth else 1)
        plans = jax.tree.map(lambda x, best=best: x[best], plans)
    return plans.steps[0]


def _continue(
    plans: Beam, propose: Propose, decode: Decode, number: int, draws: int, key: Key[Array, ""]
) -> Beam:
    """Plans that are one code longer: `draws` for each."""
    logits, prior = propose(plans.code, plans.prior, number)
    code = jr.categorical(key, logits[:, None], shape=(len(logits), draws))
    added = jnp.take_along_axis(jax.nn.log_softmax(logits), code, axis=1).reshape(-1)
    code, before = code.reshape(-1), plans._replace(code=None, prior=prior)
    before = jax.tree.map(lambda x: jnp.repeat(x, draws, axis=0), before)
    steps, decoder = decode(code, before.decoder, number)
    steps = jnp.concatenate([before.steps, steps], axis=1)
    return Beam(code, before.log_prob + added, steps, before.prior, decoder)


def plan_return(
    reward: Float[Array, "*N T"], value: Float[Array, "*N T"], discount: Number
) -> Float[Array, "*N"]:
    """Discounted return of plans of T steps: `sum_{t<T-1} γ^{t+1} r_t + γ^T V_{T-1}`.

    The last reward is dropped, though the last value excludes it too, and discounts begin at γ, as published.
    """
    counted = jnp.concatenate([reward[..., :-1], value[..., -1:]], axis=-1)
    factor = discount ** (1 + jnp.arange(reward.shape[-1], dtype=reward.dtype))
    return jnp.sum(counted * jnp.broadcast_to(factor, counted.shape), axis=-1)


def likelihood_term(
    log_prob: Float[Array, " N"], *, weight: Number, probable: Number, depth: int
) -> Float[Array, " N"]:
    """What the log-likelihood of plans adds to their returns: `weight * min(log_prob, depth * log probable)`.

    It is at least `LEAST_LIKELIHOOD_TERM`.

    Args:
        probable: probability per code from which a plan is as good as any more probable one.
        depth: codes of a whole plan, also where plans are shorter yet, as published.
    """
    bounded = jnp.minimum(log_prob, depth * jnp.log(probable))
    return jnp.maximum(weight * bounded, LEAST_LIKELIHOOD_TERM)
