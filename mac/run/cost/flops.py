"""Arithmetic of a traced function, counted by kind and by named scope."""

import re
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
from jax.extend import core

REST = "rest"
"""Name of the operations outside of all named scopes."""

# One operation per element of the result, unless listed here; XLA counts the same way.
_MOVES = {
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "device_put", "dynamic_slice",
    "dynamic_update_slice", "expand_dims", "gather", "iota", "optimization_barrier", "pad",
    "random_unwrap", "random_wrap", "reshape", "rev", "slice", "split", "squeeze", "stop_gradient",
    "transpose",
}  # fmt: skip
_TRANSCENDENTAL = {
    "cbrt", "cos", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sin", "sqrt",
    "tan", "tanh",
}  # fmt: skip
_REDUCTIONS = {
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
}  # fmt: skip
_PER_ELEMENT = {
    "random_bits": 120,  # 20 rounds of Threefry (Salmon et al. 2011), 5 operations each, and its key schedule
    "random_fold_in": 120,
    "random_seed": 120,
    "random_split": 120,
    "erf_inv": 50,  # two polynomials of degree 8 (Giles 2012), and the choice between them
}


class Operations(NamedTuple):
    """Numbers of operations, as XLA's cost analysis counts them.

    Attributes:
        matmuls: operations of matmuls; a multiply and an add count as two.
        elementwise: all other arithmetic, comparisons, choices and conversions: one per element.
        transcendental: exponentials, roots, tanh and the like: one per element.
    """

    matmuls: int = 0
    elementwise: int = 0
    transcendental: int = 0

    @property
    def flops(self) -> int:
        """Returns the flops as XLA counts them, without transcendental functions."""
        return self.matmuls + self.elementwise

    def plus(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(self, other, strict=True)))


def operations(f: Callable[..., Any], *args: Any) -> dict[str, Operations]:
    """Counts the operations of one call of `f`, by their outermost `jax.named_scope`.

    `args` may be arrays or `jax.ShapeDtypeStruct`s; nothing is computed. Operations without a scope are those
    of `REST`. A gradient's operations belong to the scope of the differentiated operations. Operations on
    which no result depends are not counted. Loops are counted for every iteration, and once if the trip count
    is unknown. For conditionals the most expensive branch counts.
    """
    counts = _count(jax.make_jaxpr(f)(*args).jaxpr, REST)
    parts = {part: Operations() for part, _ in counts}
    for (part, kind), number in counts.items():
        parts[part] = parts[part].plus(Operations(**{kind: number}))
    return parts


def sum_operations(parts: dict[str, Operations]) -> Operations:
    """Returns the sum over all parts."""
    return Operations(*(sum(kind) for kind in zip(*parts.values(), strict=True))) if parts else Operations()


def matmul_flops(f: Callable[..., Any], *args: Any) -> int:
    """Counts the operations of matmuls in one call of `f`; see `operations`."""
    return sum_operations(operations(f, *args)).matmuls


def scope_of(eqn: Any, outer: str) -> str:
    """Returns the outermost named scope of an equation, `outer` if it has none of its own."""
    if outer != REST:
        return outer
    # Transformations show up as calls: `transpose(jvp(model))` is part of the scope `model`.
    names = re.findall(r"[\w ]+(?![\w ]*\()", str(eqn.source_info.name_stack))
    return names[0] if names else REST


def inner_jaxprs(eqn: Any) -> list[core.Jaxpr]:
    """Returns the jaxprs inside the parameters of an equation."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
    closed = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in closed if isinstance(v, core.Jaxpr)]


def _count(jaxpr: core.Jaxpr, outer: str) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for eqn in _needed(jaxpr):
        part = scope_of(eqn, outer)
        inner = [_count(sub, part) for sub in inner_jaxprs(eqn)]
        if eqn.primitive.name == "cond":
            counts += max(inner, key=lambda c: c.total())
        elif inner:
            trips = {"scan": _length, "pallas_call": _programs}.get(eqn.primitive.name, lambda _: 1)(eqn)
            for sub in inner:
                counts += Counter({key: trips * number for key, number in sub.items()})
        else:
            kind, number = _one(eqn)
            counts[part, kind] += number
    return counts


def _length(eqn: Any) -> int:
    return eqn.params["length"]


def _programs(eqn: Any) -> int:
    """Returns how many programs run a kernel."""
    return prod(eqn.params["grid_mapping"].grid)


def _needed(jaxpr: core.Jaxpr) -> list[Any]:
    """Returns the equations that a result depends on; compilers drop the others."""
    live, needed = set(filter(_is_variable, jaxpr.outvars)), []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or live.intersection(eqn.outvars):
            live.update(filter(_is_variable, eqn.invars))
            needed.append(eqn)
    return needed


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _one(eqn: Any) -> tuple[str, int]:
    """Returns kind and number of the operations of an equation without inner jaxprs."""
    name, size = eqn.primitive.name, sum(prod(v.aval.shape) for v in eqn.outvars)
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return "matmuls", 2 * size * prod(eqn.invars[0].aval.shape[axis] for axis in contract)
    if name in _TRANSCENDENTAL:
        return "transcendental", size
    if name in _MOVES:
        return "elementwise", 0
    if name in _REDUCTIONS:
        return "elementwise", prod(eqn.invars[0].aval.shape) - size
    if name == "integer_pow":  # by repeated squaring
        power = abs(eqn.params["y"])
        return "elementwise", size * (power.bit_length() + power.bit_count() - 2)
    if name.startswith("scatter"):
        return "elementwise", prod(eqn.invars[2].aval.shape)
    return "elementwise", size * _PER_ELEMENT.get(name, 1)
