"""Counting the floating-point operations of matrix products in a traced function."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from jax.extend import core


def product_flops(f: Callable[..., Any], *args: Any) -> int:
    """Operations (a multiply and an add count as two) of all matrix products in one call of `f`.

    `args` may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed. Loops count as often as
    they run; of a branch, the dearest side; of a `while` of unknown length, one turn.
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_one(eqn) for eqn in jaxpr.eqns)


def _one(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        depth = prod(eqn.invars[0].aval.shape[axis] for axis in contract)
        return 2 * prod(eqn.outvars[0].aval.shape) * depth
    inner = [_count(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    turns = params["length"] if name == "scan" else 1
    return turns * sum(inner)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    """The programs inside one parameter of an equation."""
    values = value if isinstance(value, tuple | list) else [value]
    closed = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in closed if isinstance(v, core.Jaxpr)]
