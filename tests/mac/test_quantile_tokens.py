"""The quantile tokeniser and filters of token distributions, worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mac.ops.quantile_tokens import (
    decode,
    encode,
    expectation,
    keep_top_k,
    keep_top_mass,
    quantile_thresholds,
    thresholds_of,
)


def thresholds(values: list[float], bins: int) -> np.ndarray:
    x = jnp.asarray(values, jnp.float32)
    return np.asarray(quantile_thresholds(x, jnp.ones(len(values), bool), bins))


def test_thresholds_are_every_nth_sorted_value_and_the_maximum() -> None:
    np.testing.assert_array_equal(thresholds([7, 3, 9, 0, 1, 8, 2, 4, 6, 5], 5), [0, 2, 4, 6, 8, 9])


def test_thresholds_of_few_values_repeat_the_maximum() -> None:
    np.testing.assert_array_equal(thresholds([2, 0, 1], 5), [0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(thresholds([*range(11)], 5), [0, 3, 6, 9, 10, 10])


def test_thresholds_leave_out_what_is_not_valid() -> None:
    values, valid = jnp.asarray([5.0, -99.0, 1.0, 99.0, 3.0]), jnp.asarray([1, 0, 1, 0, 1], bool)
    np.testing.assert_array_equal(quantile_thresholds(values, valid, 3), [1, 3, 5, 5])


def test_tokens_are_bins_and_decode_to_midpoints() -> None:
    edges = jnp.asarray([[0.0, 2, 4, 6, 8, 9], [0, 1, 2, 3, 4, 5]])
    x = jnp.asarray([[-1.0, 0.5], [0.0, 1.0], [1.9, 2.5], [2.0, 4.5], [8.5, 5.0], [12.0, 9.0]])
    tokens = encode(x, edges)
    np.testing.assert_array_equal(tokens, [[0, 0], [0, 1], [0, 2], [1, 4], [4, 4], [4, 4]])
    np.testing.assert_array_equal(decode(tokens, edges)[:, 0], [1, 1, 1, 3, 8.5, 8.5])
    np.testing.assert_array_equal(decode(jnp.asarray([[5, 5]]), edges), [[8.5, 4.5]])  # an episode's end


def test_constant_dimensions_and_ties_decode_to_finite_values() -> None:
    edges = jnp.asarray(np.stack([thresholds([3] * 7, 5), thresholds([0, 0, 0, 0, 0, 0, 1], 5)]))
    tokens = encode(jnp.asarray([[3.0, 0.0], [3.0, 1.0], [2.0, -1.0]]), edges)
    np.testing.assert_array_equal(edges, [[3] * 6, [0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(tokens, [[4, 2], [4, 4], [0, 0]])
    np.testing.assert_array_equal(decode(tokens, edges), [[3, 0.5], [3, 1], [3, 0]])


@pytest.mark.parametrize("bins", [7, 100])
def test_each_of_few_values_has_a_bin_that_it_is_the_middle_of(bins: int) -> None:
    """A rare one too: by quantiles the reward of success, 1 in 1000, would be read as half a success."""
    values = jnp.asarray([-5.0] * 300 + [-1.0] * 699 + [0.0] + [7.0] * 2)
    valid = jnp.arange(len(values)) < 1000
    levels = jnp.asarray([[-5.0], [-1.0], [0.0]])
    edges = thresholds_of(values, valid, bins)[None]
    tokens = encode(levels, edges)
    assert len(set(tokens[:, 0].tolist())) == 3 and (jnp.diff(edges) >= 0).all()
    np.testing.assert_array_equal(decode(tokens, edges), levels)
    probs = jnp.zeros(bins + 1).at[tokens[1:, 0]].set(0.5)
    assert expectation(probs, edges[0]) == -0.5
    quantiles = quantile_thresholds(values, valid, bins)[None]
    assert decode(encode(levels[1:], quantiles), quantiles)[0] == -0.5


def test_many_values_and_one_have_quantiles() -> None:
    normal = np.random.default_rng(0).normal(size=500)
    nearly_one = 1 + 1e-7 * np.arange(3)
    for values in (normal, np.arange(51.0), np.ones(9), nearly_one):
        x, valid = jnp.asarray(values, jnp.float32), jnp.ones(len(values), bool)
        np.testing.assert_array_equal(thresholds_of(x, valid, 100), quantile_thresholds(x, valid, 100))


@pytest.mark.parametrize("bins", [1, 7, 100])
def test_decoded_values_lie_in_the_bin_of_the_value(bins: int) -> None:
    x = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    edges = quantile_thresholds(jnp.asarray(x[:, 0]), jnp.ones(len(x), bool), bins)[None]
    tokens = np.asarray(encode(jnp.asarray(x), edges))
    wide = np.diff(np.asarray(edges)[0])[tokens[:, 0]]
    assert (np.abs(decode(jnp.asarray(tokens), edges) - x)[:, 0] <= 0.5 * wide + 1e-6).all()
    assert np.bincount(tokens[:, 0], minlength=bins).max() <= -(-len(x) // bins) + 1


def test_expectation_leaves_out_the_end_and_averages_the_edges() -> None:
    edges = jnp.asarray([0.0, 2.0, 3.0])
    probs = jnp.asarray([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    left, right = 0.5 * 0 + 0.3 * 2, 0.5 * 2 + 0.3 * 3
    np.testing.assert_allclose(expectation(probs, edges), [(left + right) / 2, 0], atol=1e-6)


def kept(probs: list[float], cdf: float) -> list[bool]:
    return np.isfinite(keep_top_mass(jnp.log(jnp.asarray(probs)), cdf)).tolist()


def test_cdf_filter_keeps_the_most_probable_tokens() -> None:
    # Ascending: .1 .15 .2 .55, with cumulative mass .1 .25 .45 1. The last one below .6 is .2.
    assert kept([0.15, 0.55, 0.1, 0.2], 0.6) == [False, True, False, False]
    assert kept([0.15, 0.55, 0.1, 0.2], 0.3) == [False, True, False, True]
    assert kept([0.15, 0.55, 0.1, 0.2], 0.0) == [True] * 4
    # Equals of the last dropped token are dropped too: .2 .2 .2 .4 has .2 and .4 below .5.
    assert kept([0.2, 0.2, 0.4, 0.2], 0.5) == [False, False, True, False]


def test_cdf_filter_always_keeps_the_most_probable_token() -> None:
    logits = jnp.asarray([[0.0, 50.0, 0.0], [5.0, 4.0, 3.0]])
    assert np.isfinite(keep_top_mass(logits, 0.999)).any(axis=-1).all()


def test_top_k_keeps_k_tokens() -> None:
    logits = jnp.asarray([[1.0, 3.0, 2.0, 0.0]])
    np.testing.assert_array_equal(np.isfinite(keep_top_k(logits, 2)), [[False, True, True, False]])
    np.testing.assert_array_equal(keep_top_k(logits, 9), logits)
