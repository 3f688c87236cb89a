"""Beam search over codes: the score by hand, and the search against looking at every plan."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.ops.code_search import LEAST_LIKELIHOOD_TERM, Beam, likelihood_term, plan_return, search

K, DEPTH, STRIDE = 3, 3, 2


def test_return_of_a_plan_drops_the_last_reward():
    """.99 1 + .99² 2 + .99³ 30 = 32.05917, whatever the last reward and the first values."""
    reward, value = jnp.asarray([1.0, 2.0, 1e3]), jnp.asarray([7.0, 8.0, 30.0])
    assert plan_return(reward, value, 0.99) == pytest.approx(32.05917, abs=1e-5)


def test_plans_of_probable_codes_differ_by_their_returns_only():
    """500 * 5 * log .05 = -7489.33 for all of at least .05 per code; below it the likelihood counts."""
    log_prob = jnp.asarray([-1.0, 5 * np.log(0.05) + 1e-3, -20.0, -1000.0])
    got = likelihood_term(log_prob, weight=500.0, probable=0.05, depth=5)
    np.testing.assert_allclose(got, [-7489.33, -7489.33, -10000, LEAST_LIKELIHOOD_TERM], rtol=1e-6)


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of each code after every sequence of codes, and steps of its last one; by number in base K."""
    rng = np.random.default_rng(seed)
    count = sum(K**d for d in range(DEPTH + 1))
    return 0.5 * rng.normal(size=(count, K)), rng.normal(size=(count, STRIDE, 2))


def number_of(history: jax.Array, code: jax.Array | None) -> jax.Array:
    """Number of a sequence of codes, of those before it and its last one: 0 is the empty one."""
    return history if code is None else K * history + 1 + code


def score(plans: Beam) -> jax.Array:
    return jnp.sum(plans.steps[..., 0], axis=1) + 0.3 * plans.log_prob


def found(seed: int, *, beam: int, expand: int) -> np.ndarray:
    logits, steps = (jnp.asarray(x, jnp.float32) for x in tables(seed))

    def propose(code, history, number):
        del number
        history = number_of(history, code)
        return logits[history], history

    def decode(code, history, number):
        del number
        return steps[number_of(history, code)], number_of(history, code)

    zero = jnp.zeros(1, jnp.int32)
    begin = Beam(None, jnp.zeros(1), jnp.zeros((1, 0, 2)), zero, zero)
    return np.asarray(
        search(begin, propose, decode, score, jr.key(seed), depth=DEPTH, beam=beam, expand=expand)
    )


@pytest.mark.parametrize("seed", range(4))
def test_search_equals_looking_at_every_plan(seed: int):
    """With one draw for each of many plans none is dropped before the end, and all 27 are found."""
    logits, steps = tables(seed)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    best, plan = -np.inf, np.empty(0)
    for codes in itertools.product(range(K), repeat=DEPTH):
        at, total, made = 0, 0.0, []
        for code in codes:
            total += 0.3 * log_probs[at, code]
            at = K * at + 1 + code
            made.append(steps[at])
            total += np.sum(steps[at][:, 0])
        if total > best:
            best, plan = total, np.concatenate(made)
    np.testing.assert_allclose(found(seed, beam=4000, expand=1), plan, rtol=1e-5)


def test_narrow_search_keeps_plans_that_are_best_so_far():
    """With a beam of 1 each code is the best of those drawn, which are nearly surely all."""
    logits, steps = tables(5)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    at, made = 0, []
    for _ in range(DEPTH):
        gains = [0.3 * log_probs[at, c] + np.sum(steps[K * at + 1 + c][:, 0]) for c in range(K)]
        at = K * at + 1 + int(np.argmax(gains))
        made.append(steps[at])
    np.testing.assert_allclose(found(5, beam=1, expand=200), np.concatenate(made), rtol=1e-5)
