"""Separates a function's draws of noise from the rest, for formats that have no random keys.

The function is traced, and each of its equations belongs to one of two programs. What depends on the key
alone draws the noise. What depends on an observation or a weight acts. Where acting reads a drawn value, that
value is a result of the first program and an argument of the second.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

_INLINED = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
"""Parameter that holds the called function, by the name of the equation."""


class Split(NamedTuple):
    """Attributes:

    draw: `draw(key)` gives the arrays of noise.
    call: `call(noise, *arguments)` gives the function's result, which is one array.
    """

    draw: Callable[[Any], list[Any]]
    call: Callable[..., Any]


class _Value(NamedTuple):
    """A value in one of the programs; None in the other. `drawn`: from the key alone; `acting`: not drawn."""

    value: Any
    drawn: bool = False
    acting: bool = False


def split_noise(function: Callable[..., Any], key: Any, *arguments: Any) -> Split:
    """Splits `function(key, *arguments)`, whose result depends on more than the key."""
    whole = jax.make_jaxpr(function)(key, *arguments)
    leaves = jax.tree.leaves(arguments)

    def draw(key: Any) -> list[Any]:
        found: list[Any] = []
        inputs = [_Value(key, drawn=True), *[_Value(None, acting=True)] * len(leaves)]
        _Program(found.append).run(whole.jaxpr, whole.consts, inputs)
        return found

    def call(noise: list[Any], *given: Any) -> Any:
        rest: Iterator[Any] = iter(noise)
        inputs = [_Value(None, drawn=True), *(_Value(x, acting=True) for x in jax.tree.leaves(given))]
        return _Program(lambda _: next(rest)).run(whole.jaxpr, whole.consts, inputs)[0].value

    return Split(draw, call)


class _Program:
    """Evaluates one of the two programs.

    Args:
        meet: called with each drawn value that acting reads, in the order of the equations; returns the value
            to act with.
    """

    def __init__(self, meet: Callable[[Any], Any]):
        self._meet = meet

    def run(self, jaxpr: Any, consts: Any, inputs: list[_Value]) -> list[_Value]:
        """Evaluates the equations of a function."""
        known: dict[Any, _Value] = {var: _Value(x) for var, x in zip(jaxpr.constvars, consts, strict=True)}
        known |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> _Value:
            return _Value(var.val) if isinstance(var, jex.Literal) else known[var]

        for equation in jaxpr.eqns:
            given = [read(var) for var in equation.invars]
            if equation.primitive.name in _INLINED:
                inner = equation.params[_INLINED[equation.primitive.name]]
                results = self.run(inner.jaxpr, inner.consts, given)
            else:
                if any(each.acting for each in given):
                    for var, each in zip(equation.invars, given, strict=True):
                        if each.drawn:
                            known[var] = _Value(self._meet(each.value), acting=True)
                    given = [read(var) for var in equation.invars]
                results = _evaluate(equation, given)
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]


def _evaluate(equation: Any, given: list[_Value]) -> list[_Value]:
    """The results of one equation, None where an argument is of the other program."""
    drawn, acting = any(each.drawn for each in given), any(each.acting for each in given)
    if any(each.value is None for each in given):
        return [_Value(None, drawn, acting)] * len(equation.outvars)
    params = equation.primitive.get_bind_params(equation.params)
    found = equation.primitive.bind(*(each.value for each in given), **params)
    results = found if equation.primitive.multiple_results else [found]
    return [_Value(x, drawn, acting) for x in results]
