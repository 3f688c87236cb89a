"""Parts of a program that XLA compiles one by one."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

P = ParamSpec("P")
R = TypeVar("R")


def stage(function: Callable[P, R], static: tuple[int, ...] = ()) -> Callable[P, R]:
    """Compiles a function of arrays as a computation of its own; arguments number `static` are static.

    XLA on CPU fuses element-wise work by copying shared subexpressions into each result, layer after layer:
    ten layers of geometry become a million operations per number. A call that is not inlined ends that,
    because its arguments and results are memory. (`optimization_barrier` does not: it is gone before fusion.)
    """

    @functools.wraps(function)
    def staged(*args: P.args, **kwargs: P.kwargs) -> R:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(function, static_argnums=static)(*args, **kwargs)

    return staged
