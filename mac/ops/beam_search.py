"""Beam search over partial sequences that are sampled, with scores that any function may give."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key, PyTree

State = TypeVar("State", bound=PyTree)
Extend = Callable[[Any, Int[Array, ""], Key[Array, ""]], tuple[Any, Float[Array, " candidates"]]]
"""Extends beams by one stage: of the beams, the stage's number and a key, candidates and their scores."""


def repeat(beams: State, times: int) -> State:
    """Each beam `times` times in a row, along the leading axis of every array."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), beams)


def beam_search(
    extend: Extend, beams: State, stages: int, key: Key[Array, ""]
) -> tuple[State, Float[Array, " beams"]]:
    """The best beams after all stages, best first, and their scores.

    Each stage makes candidates of the beams and keeps as many of the best as there are beams.

    Args:
        extend: returns at least as many candidates as there are beams, in the same form: arrays of equal
            leading axis.
        beams: what the search starts from, usually the same in every beam.
    """
    width = len(jax.tree.leaves(beams)[0])

    def stage(beams: State, inputs: tuple[Int[Array, ""], Key[Array, ""]]) -> tuple[State, Any]:
        candidates, scores = extend(beams, *inputs)
        scores, best = jax.lax.top_k(scores, width)
        return jax.tree.map(lambda x: x[best], candidates), scores

    numbers = jnp.arange(stages, dtype=jnp.int32)
    beams, scores = jax.lax.scan(stage, beams, (numbers, jr.split(key, stages)))
    return beams, scores[-1]
