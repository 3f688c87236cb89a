"""The codebook: rounding, its gradient, and exponential averages, against NumPy in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from mac.nn.vector_quantizer import LEAST_COUNT, Codebook, perplexity

K, W, DECAY = 6, 3, 0.9


@pytest.fixture
def book() -> Codebook:
    fresh = Codebook(K, W, key=jr.key(0))
    rng = np.random.default_rng(0)
    parts = rng.uniform(0.5, 2, K), rng.normal(size=(K, W))
    return eqx.tree_at(lambda b: (b.count, b.total), fresh, tuple(jnp.asarray(x, jnp.float32) for x in parts))


@pytest.fixture
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, W)), jnp.float32)


def updated(book: Codebook, x: jax.Array) -> Codebook:
    """The codebook after one update on a batch of vectors."""
    gradient = jax.grad(lambda book: book.average_loss(x, book(x).code))(book)
    sgd = optax.sgd(1 - DECAY)
    return optax.apply_updates(book, sgd.update(gradient, sgd.init(book))[0])  # pyright: ignore


def test_fresh_codes_lie_within_one_over_their_number():
    codes = np.asarray(Codebook(64, 32, key=jr.key(1)).vectors)
    assert np.abs(codes).max() <= 1 / 64
    assert codes.std() == pytest.approx(1 / 64 / np.sqrt(3), rel=0.05)


def test_vectors_are_rounded_to_the_nearest_code(book: Codebook, x: jax.Array):
    got = jax.jit(lambda book, x: book(x))(book, x)
    codes = np.asarray(book.total, np.float64) / np.asarray(book.count, np.float64)[:, None]
    for at in np.ndindex(5, 4):
        nearest = np.argmin([np.linalg.norm(np.asarray(x[at]) - code) for code in codes])
        assert got.code[at] == nearest
        np.testing.assert_allclose(got.vector[at], codes[nearest], rtol=1e-5)
    np.testing.assert_allclose(got.passed, got.vector, atol=1e-6)
    assert len(set(np.asarray(got.code).flat)) > 2


def test_gradient_passes_straight_through_and_not_to_codes(book: Codebook, x: jax.Array):
    weight = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    to_book, to_x = jax.grad(lambda both: jnp.sum(weight * both[0](both[1]).passed))((book, x))
    np.testing.assert_array_equal(to_x, weight)
    assert not np.any(to_book.count) and not np.any(to_book.total)
    assert not np.any(jax.grad(lambda x: jnp.sum(book(x).vector))(x))


def test_update_is_the_exponential_average(book: Codebook, x: jax.Array):
    """γ old + (1 - γ) new, of counts and of sums; codes are their ratios."""
    code = np.asarray(book(x).code).reshape(-1)
    rows = np.asarray(x, np.float64).reshape(-1, W)
    count = DECAY * np.asarray(book.count, np.float64)
    total = DECAY * np.asarray(book.total, np.float64)
    for row, k in zip(rows, code, strict=True):
        count[k] += 1 - DECAY
        total[k] += (1 - DECAY) * row
    after = updated(book, x)
    np.testing.assert_allclose(after.count, count, rtol=1e-5)
    np.testing.assert_allclose(after.total, total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.vectors, total / count[:, None], rtol=1e-5, atol=1e-6)


def test_averages_have_no_gradient_to_what_is_averaged(book: Codebook, x: jax.Array):
    assert not np.any(jax.grad(lambda x: book.average_loss(x, book(x).code))(x))


def test_unused_code_keeps_its_place_for_ever(book: Codebook):
    """After 2,000 updates with decay 0.9 an average is 1e-92 of itself, which float32 cannot hold."""
    x = jnp.broadcast_to(book.vectors[2], (8, W))
    after = jax.lax.fori_loop(0, 2000, lambda _, book: updated(book, x), book)
    assert np.all(np.isfinite(after.vectors)) and after.count[2] == pytest.approx(8, rel=1e-4)
    unused = np.arange(K) != 2
    np.testing.assert_allclose(after.vectors[unused], book.vectors[unused], rtol=1e-3)
    assert np.all(np.asarray(after.count)[unused] > 0.5 * LEAST_COUNT)


def test_perplexity_counts_the_codes_in_use():
    assert perplexity(jnp.asarray([[3, 3], [3, 3]]), 8) == pytest.approx(1)
    assert perplexity(jnp.asarray([0, 1, 5, 7]), 8) == pytest.approx(4)
