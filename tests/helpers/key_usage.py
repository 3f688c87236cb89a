"""Recorder of the random keys that a computation uses."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
import pytest

DRAWS = ("normal", "uniform", "randint", "bernoulli", "choice", "permutation", "bits")
"""The functions of `jax.random` that the project draws with; all take the key first."""


class Use(NamedTuple):
    """One call: the name of the function, and the bits of its key."""

    name: str
    key: tuple[int, ...]


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[list[Use]]:
    """All uses of keys, by compiled functions too, if they are traced within the context.

    Take sizes that no other test has: a function that was traced before is not traced again.
    """
    seen: list[Use] = []

    def note(data: np.ndarray, name: str) -> None:
        seen.append(Use(name, tuple(int(x) for x in np.asarray(data).ravel())))

    def watched(name: str) -> Any:
        real = getattr(jr, name)

        def call(key: Any, *args: Any, **options: Any) -> Any:
            jax.debug.callback(partial(note, name=name), jr.key_data(key))
            return real(key, *args, **options)

        return call

    with patch.context() as inner:
        for name in (*DRAWS, "split", "fold_in"):
            inner.setattr(jr, name, watched(name))
        yield seen
        jax.effects_barrier()


def used_twice(seen: list[Use]) -> dict[tuple[int, ...], list[str]]:
    """Keys that are split or drawn from more than once, or that and folded, with what they are used for.

    Folding a key twice is allowed: equal numbers give equal keys, whose own uses are recorded.
    """
    spent = Counter(use.key for use in seen if use.name != "fold_in")
    folded = {use.key for use in seen if use.name == "fold_in"}
    wrong = {key for key, count in spent.items() if count > 1 or key in folded}
    found: dict[tuple[int, ...], list[str]] = {key: [] for key in wrong}
    for use in seen:
        if use.key in wrong:
            found[use.key].append(use.name)
    return found
