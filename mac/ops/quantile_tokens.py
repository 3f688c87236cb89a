"""Tokens of real numbers: quantile bins of each dimension, and expectations of token distributions.

Token `i` of a dimension is its bin from threshold `i` to `i + 1`, for `i` in 0, ..., `bins - 1`. Bins hold
about equally many values of the data, or a value each where there are few. Token `bins` stands for the time
after an episode's end.

Source: Janner et al. 2021 (arXiv 2106.02039), but for few values: there a rare one, such as the reward of
success, would share the bin of another.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mac.types import Number


def thresholds_of(values: Float[Array, " N"], valid: Bool[Array, " N"], bins: int) -> Float[Array, " bins_1"]:
    """The `bins + 1` thresholds of one dimension: quantiles, or around each value where there are few.

    Few are 2 to `bins / 2` distinct values. Each is the middle of a bin of its own, as wide as half the
    smallest gap. The bins between them are empty.

    Args:
        values: finite numbers.
        valid: which of them count; at least one.
    """
    ordered, count = _ordered(values, valid)
    quantiles, most = _quantiles(ordered, count, bins), bins // 2
    if most < 2:
        return quantiles
    number = jnp.cumsum(jnp.diff(ordered, prepend=ordered[:1]) > 0, dtype=jnp.int32)  # of its value
    counted = jnp.arange(len(ordered), dtype=jnp.int32) < count
    first, last, distinct = ordered[0], ordered[count - 1], number[count - 1] + 1
    levels = jnp.full(most, last).at[jnp.where(counted, number, most)].set(ordered, mode="drop")
    exists = jnp.arange(most, dtype=jnp.int32) < distinct
    margin = 0.25 * jnp.min(jnp.where(exists[1:], jnp.diff(levels), jnp.inf))
    edges = jnp.stack([levels - margin, levels + margin], axis=-1)
    edges = jnp.where(exists[:, None], edges, last + margin).reshape(-1)
    edges = jnp.concatenate([edges, jnp.full(bins + 1 - 2 * most, last + margin)])
    # Values that differ in their last bits alone are no levels.
    apart = margin > 1e-5 * jnp.maximum(jnp.abs(first), jnp.abs(last))
    return jnp.where((distinct > 1) & (distinct <= most) & apart, edges, quantiles)


def quantile_thresholds(
    values: Float[Array, " N"], valid: Bool[Array, " N"], bins: int
) -> Float[Array, " bins_1"]:
    """The `bins + 1` thresholds of one dimension, in ascending order.

    They are every `ceil(n / bins)`-th of the `n` sorted valid values, then their maximum. Where fewer values
    than that exist, the maximum is repeated. Equal thresholds enclose bins that no value falls in.

    Args:
        values: finite numbers.
        valid: which of them count; at least one.
    """
    return _quantiles(*_ordered(values, valid), bins)


def _ordered(
    values: Float[Array, " N"], valid: Bool[Array, " N"]
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    """The valid values in ascending order, and how many there are; the others follow as infinities."""
    return jnp.sort(jnp.where(valid, values, jnp.inf)), jnp.sum(valid, dtype=jnp.int32)


def _quantiles(ordered: Float[Array, " N"], count: Int[Array, ""], bins: int) -> Float[Array, " bins_1"]:
    stride = (count + bins - 1) // bins
    return ordered[jnp.minimum(jnp.arange(bins + 1, dtype=jnp.int32) * stride, count - 1)]


def encode(x: Float[Array, "*B K"], thresholds: Float[Array, "K bins_1"]) -> Int[Array, "*B K"]:
    """Tokens of numbers; those outside of the data's range are in the first or the last bin.

    A value equal to several thresholds is in the last bin that one of them begins.
    """
    bins = thresholds.shape[-1] - 1

    def of_dimension(x: Float[Array, " N"], edges: Float[Array, " bins_1"]) -> Int[Array, " N"]:
        return jnp.searchsorted(edges, x, side="right", method="compare_all") - 1

    flat = jax.vmap(of_dimension, in_axes=(1, 0), out_axes=1)(x.reshape(-1, x.shape[-1]), thresholds)
    return jnp.clip(flat, 0, bins - 1).astype(jnp.int32).reshape(x.shape)


def decode(tokens: Int[Array, "*B K"], thresholds: Float[Array, "K bins_1"]) -> Float[Array, "*B K"]:
    """Midpoints of the tokens' bins; the token after an episode's end is read as the last bin."""
    middles = bin_middles(thresholds)
    return middles[jnp.arange(len(middles), dtype=jnp.int32), jnp.minimum(tokens, middles.shape[-1] - 1)]


def bin_middles(thresholds: Float[Array, "*K bins_1"]) -> Float[Array, "*K bins"]:
    """Midpoint of each bin."""
    return 0.5 * (thresholds[..., :-1] + thresholds[..., 1:])


def expectation(probs: Float[Array, "*B bins_1"], thresholds: Float[Array, " bins_1"]) -> Float[Array, "*B"]:
    """Expected value of token distributions of one dimension.

    It is the mean of the expected left and right edges of the bins. The last token, an episode's end, adds
    0: the other probabilities are not normalised again.
    """
    return probs[..., :-1] @ bin_middles(thresholds)


def keep_top_mass(logits: Float[Array, "*B V"], cdf: Number) -> Float[Array, "*B V"]:
    """Logits with improbable tokens at -inf, so that roughly the top `1 - cdf` of the probability is kept.

    Tokens are sorted by ascending probability. The last one whose cumulative probability is below `cdf`
    is dropped, and with it every token that is at most as probable.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    ordered = jnp.sort(probs, axis=-1)
    below = jnp.cumsum(ordered, axis=-1) < cdf
    limit = jnp.max(jnp.where(below, ordered, -1.0), axis=-1, keepdims=True)
    return jnp.where(probs > jnp.broadcast_to(limit, probs.shape), logits, -jnp.inf)


def keep_top_k(logits: Float[Array, "*B V"], k: int) -> Float[Array, "*B V"]:
    """Logits with all but the `k` largest at -inf; ties with the `k`-th are kept."""
    if k >= logits.shape[-1]:
        return logits
    limit = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= jnp.broadcast_to(limit, logits.shape), logits, -jnp.inf)
