"""The equations of a traced program."""

from collections.abc import Iterator
from typing import Any

from jax.extend import core

from mac.run.cost.flops import inner_jaxprs


def equations(jaxpr: core.Jaxpr, inside: bool = False) -> Iterator[tuple[Any, bool]]:
    """All equations, each with whether it is inside a loop."""
    for eqn in jaxpr.eqns:
        yield eqn, inside
        within = inside or eqn.primitive.name in ("scan", "while")
        for each in inner_jaxprs(eqn):
            yield from equations(each, within)
