"""Parts of a program that XLA compiles one by one where that is faster: on CPUs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from mac.target_platform import target_platform

P = ParamSpec("P")
R = TypeVar("R")


def stage(function: Callable[P, R], static: tuple[int, ...] = ()) -> Callable[P, R]:
    """Compiles a function of arrays as a computation of its own; arguments number `static` are static.

    XLA on CPU fuses element-wise work by copying shared subexpressions into each result, layer after layer:
    ten layers of geometry become a million operations per number. A call that is not inlined ends that,
    because its arguments and results are memory. (`optimization_barrier` does not: it is gone before fusion.)

    On other platforms the function is called plainly. XLA on GPU fuses nothing inside such a call, so that
    each operation would be a kernel of its own: 50 times as many launches.
    """

    @functools.wraps(function)
    def staged(*args: P.args, **kwargs: P.kwargs) -> R:
        if target_platform() != "cpu":
            return function(*args, **kwargs)
        with set_xla_metadata(inlineable="false"):
            return jax.jit(function, static_argnums=static)(*args, **kwargs)

    return staged
