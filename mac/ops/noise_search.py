"""Search for the best sample of a sampler by its noise: the cross-entropy method near standard normal."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

Noise = Float[Array, "n B A"]
Judged = tuple[Float[Array, "n B *C"], Float[Array, "n B"]]


def noise_search(
    judge: Callable[[Noise], Judged],
    size: tuple[int, int, int],
    key: Key[Array, ""],
    *,
    rounds: int,
    elites: int,
) -> Judged:
    """Candidates and their scores, found in rounds; each draws noises around the best ones before it.

    The first round draws standard normal noises, so one round is plain sampling. Later rounds draw from a
    normal whose mean is that of the `elites` best noises so far. Its deviation leaves the expected length of
    a noise as it is in the standard normal (`shell_deviation`), as a sampler knows no others.

    Args:
        judge: candidates of noises, and their scores; more is better.
        size: noises in all (a multiple of `rounds`), batch, entries of a noise.
        rounds: iterations, R.
        elites: best noises whose mean is the next round's, at most those of a round.
    Returns:
        All rounds' candidates `[n, B, ...]` and scores `[n, B]`, in the order in which they were judged.
    Source: de Boer et al. 2005 (a tutorial on the cross-entropy method). Deviations of few elites in many
    dimensions are noise, so the length of the noises decides the deviation instead.
    """
    count, *rest = size
    shape = (count // rounds, *rest)
    keys = [key] if rounds == 1 else list(jr.split(key, rounds))
    noises, found = [jr.normal(keys[0], shape)], []
    found.append(judge(noises[0]))
    for key in keys[1:]:
        mean = elite_mean(jnp.concatenate(noises), jnp.concatenate([score for _, score in found]), elites)
        noises.append(mean + shell_deviation(mean) * jr.normal(key, shape))
        found.append(judge(noises[-1]))
    candidates, scores = zip(*found, strict=True)
    return jnp.concatenate(candidates), jnp.concatenate(scores)


def elite_mean(noises: Noise, scores: Float[Array, "n B"], elites: int) -> Float[Array, "1 B A"]:
    """Returns the mean of the `elites` noises of highest score, per batch element."""
    best = jax.lax.top_k(scores.T, elites)[1].T  # [elites, B]
    return jnp.mean(jnp.take_along_axis(noises, best[..., None], axis=0), axis=0, keepdims=True)


def shell_deviation(mean: Float[Array, "*B A"]) -> Float[Array, "*B 1"]:
    """Returns the s at which `mean + s * z`, z standard normal, is expected to be as long as z; at least 0.

    Of A entries the expected squared length is |mean|² + A s², so s² = 1 - |mean|² / A.
    """
    return jnp.sqrt(jnp.maximum(1 - jnp.mean(jnp.square(mean), axis=-1, keepdims=True), 0))
