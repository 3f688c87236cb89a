"""Bytes that a compiled program reads and writes, counted from its HLO text.

By the rules of XLA's own cost analysis, each instruction of the optimised program, or each fusion as a whole,
reads all of its operands and writes its result. `compiled.cost_analysis()` counts the body of a loop once,
whatever its trip count, and jax has no public interface to the instructions. So the text is parsed, and the
body of a loop counts for every iteration where XLA states the trip count.
"""

import re
from math import prod

# Instructions that move no data: they name memory, or a part of it.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def program_bytes(text: str) -> int:
    """Counts the bytes that one call of a compiled program (`compiled.as_text()`) reads and writes.

    Loops with unknown trip count are counted once; for conditionals the most expensive branch counts. The
    count of a text that is no program is 0.
    """
    bodies: dict[str, list[str]] = {}
    entry, body = "", list[str]()
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := _COMPUTATION.match(line):
            entry = head[2] if head[1] else entry
            body = bodies[head[2]] = []
        else:
            body.append(line)
    return _Counter(bodies).computation(entry) if entry else 0


class _Counter:
    """Bytes of computations, each counted once."""

    def __init__(self, bodies: dict[str, list[str]]):
        self.bodies = bodies
        self.known: dict[str, int] = {}

    def computation(self, name: str) -> int:
        if name not in self.known:
            found = [match for line in self.bodies[name] if (match := _INSTRUCTION.match(line))]
            sizes = {match[1]: _bytes(match[2]) for match in found}
            self.known[name] = sum(self.instruction(sizes, *match.groups()) for match in found)
        return self.known[name]

    def instruction(
        self, sizes: dict[str, int], name: str, shape: str, kind: str, args: str, rest: str
    ) -> int:
        del shape
        operands = [sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", args)]
        if kind in _FREE:
            return 0
        if kind == "while":
            trips = int(found[1]) if (found := _TRIP_COUNT.search(rest)) else 1
            return trips * sum(self.called(rest, "body", "condition"))
        if kind == "call":
            return sum(self.called(rest, "to_apply"))
        if kind == "conditional":
            sides = self.called(rest, "true_computation", "false_computation", "branch_computations")
            return max(sides, default=0)
        if kind in ("slice", "dynamic-slice", "gather"):
            return 2 * sizes[name]
        if kind == "dynamic-update-slice":
            return 2 * operands[1]
        return sizes[name] + sum(operands)

    def called(self, rest: str, *roles: str) -> list[int]:
        groups = [found[1] for role in roles if (found := re.search(role + r"=(\{.*?\}|%[\w.\-]+)", rest))]
        return [self.computation(name) for group in groups for name in re.findall(r"%([\w.\-]+)", group)]


def _bytes(shape: str) -> int:
    """Returns the bytes of an array or of a tuple of arrays, from its shape in XLA's notation."""
    return (
        sum(_bits(kind) * prod(int(n) for n in size.split(",") if n) for kind, size in _SHAPE.findall(shape))
        // 8
    )


def _bits(kind: str) -> int:
    found = re.search(r"\d+", kind)
    return _BITS[kind] if kind in _BITS else int(found[0]) if found else 8
