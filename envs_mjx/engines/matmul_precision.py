"""Precision of the matmuls of physics."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Wraps a function whose matmuls are to be in full precision wherever it is traced, MJX's included.

    GPUs and TPUs otherwise round their factors to 10 or 7 bits of mantissa (TF32, bfloat16). The position of
    a solid 0.5 m from its body's origin would be off by 0.2 mm, which is as much as the depth of contacts.
    On CPUs matmuls have full precision anyway.
    """

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise
