"""Beam search against exhaustive search, and against a search of lists that makes the same choices."""

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from mac.ops.beam_search import beam_search, repeat

TOKENS, STAGES = 3, 4
GAINS = np.random.default_rng(0).normal(size=(STAGES, TOKENS, TOKENS)).astype(np.float32)
"""Reward of each token at each stage, by the token before it."""


class Beams(NamedTuple):
    tokens: Int[Array, "beams stages"]
    total: Float[Array, " beams"]


def start(width: int) -> Beams:
    return Beams(jnp.zeros((width, STAGES), jnp.int32), jnp.zeros(width))


def gain(beams: Beams, stage: Int[Array, ""], token: Int[Array, " n"]) -> Beams:
    before = jnp.where(stage > 0, beams.tokens[:, stage - 1], 0)
    reward = jnp.asarray(GAINS)[stage, before, token]
    return Beams(beams.tokens.at[:, stage].set(token), beams.total + reward)


def every_token(beams: Beams, stage: Int[Array, ""], key: jax.Array) -> tuple[Beams, Float[Array, " n"]]:
    del key
    token = jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), len(beams.total))
    candidates = gain(repeat(beams, TOKENS), stage, token)
    # At stage 0 all beams are equal; only the first one's candidates count.
    copies = jnp.where((jnp.arange(len(token)) >= TOKENS) & (stage == 0), -jnp.inf, 0.0)
    candidates = candidates._replace(total=candidates.total + copies)
    return candidates, candidates.total


def sampled(beams: Beams, stage: Int[Array, ""], key: jax.Array) -> tuple[Beams, Float[Array, " n"]]:
    token = jr.randint(key, beams.total.shape, 0, TOKENS)
    candidates = gain(beams, stage, token)
    return candidates, candidates.total


def total(tokens: tuple[int, ...]) -> float:
    befores = (0, *tokens[:-1])
    return float(
        sum(GAINS[t, before, token] for t, (before, token) in enumerate(zip(befores, tokens, strict=True)))
    )


def test_wide_beam_search_equals_exhaustive_search() -> None:
    """27 beams hold every sequence of three tokens, so that nothing is pruned before the last stage."""
    best = sorted(product(range(TOKENS), repeat=STAGES), key=total, reverse=True)
    beams, scores = jax.jit(lambda key: beam_search(every_token, start(27), STAGES, key))(jr.key(0))
    np.testing.assert_array_equal(beams.tokens, best[:27])
    np.testing.assert_allclose(scores, [total(tokens) for tokens in best[:27]], rtol=1e-5)


def test_search_by_many_samples_finds_the_best_sequence() -> None:
    """With one sample per beam nothing is pruned; with more, copies of a good prefix crowd out the others."""
    beams, scores = beam_search(sampled, start(2000), STAGES, jr.key(0))
    best = max(product(range(TOKENS), repeat=STAGES), key=total)
    np.testing.assert_array_equal(beams.tokens[0], best)
    np.testing.assert_allclose(scores[0], total(best), rtol=1e-5)


def test_narrow_beam_search_equals_a_search_of_lists() -> None:
    width = 2
    kept: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(STAGES):
        candidates = [(*tokens, token) for tokens, _ in kept for token in range(TOKENS)]
        kept = sorted(((c, total(c)) for c in candidates), key=lambda item: -item[1])[:width]
    beams, scores = beam_search(every_token, start(width), STAGES, jr.key(0))
    np.testing.assert_array_equal(beams.tokens, [tokens for tokens, _ in kept])
    np.testing.assert_allclose(scores, [score for _, score in kept], rtol=1e-5)


def test_repeat_keeps_the_copies_of_a_beam_together() -> None:
    np.testing.assert_array_equal(repeat({"x": jnp.asarray([1, 2])}, 2)["x"], [1, 1, 2, 2])
