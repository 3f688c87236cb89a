"""Instructions of a compiled XLA program, read from its text (`compiled.as_text()`).

jax has no public interface to the instructions of an optimised program, so the text is parsed. It says which
computation each loop, fusion and call runs, the trip counts that XLA knows, and the source line of each
instruction.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

FREE = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"})
"""Instructions that move no data: they name memory, or a part of it."""

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCHES = ("true_computation", "false_computation", "branch_computations")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
        shape: of the result, in XLA's notation.
        op: name of the operation, such as `fusion` or `custom-call`.
        operands: names of the arguments, which are instructions of the same computation.
        attributes: the rest of the line.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return shape_bytes(self.shape)

    @property
    def trip_count(self) -> int | None:
        """Iterations of a loop; None where XLA does not know them."""
        found = _TRIP_COUNT.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def backend_config(self) -> dict[str, Any]:
        """Settings that XLA's back end chose, such as those of a cuBLAS call; empty if there are none."""
        at = self.attributes.find("backend_config={")
        if at < 0:
            return {}
        return json.JSONDecoder().raw_decode(self.attributes, at + len("backend_config="))[0]

    def called(self, *roles: str) -> list[str]:
        """Returns the names of the computations that it runs in these roles, such as `body`."""
        groups = [
            found[1]
            for role in roles
            if (found := re.search(rf"\b{role}=(\{{.*?\}}|%[\w.\-]+)", self.attributes))
        ]
        return [name for group in groups for name in re.findall(r"%([\w.\-]+)", group)]

    def numbers(self, attribute: str) -> list[int]:
        """Returns an attribute such as `lhs_contracting_dims={1}`; empty if it is missing."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(number) for number in found[1].split(",") if number] if found else []


class Loop(NamedTuple):
    """A loop around an instruction: its name, its iterations if known, `body` or `condition`."""

    name: str
    trip_count: int | None
    role: str


class Execution(NamedTuple):
    """An instruction, how often one call of the program runs it, and the loops around it, outermost first.

    Loops with unknown trip count are counted once.
    """

    instruction: Instruction
    computation: str
    times: int
    loops: tuple[Loop, ...]


class Program:
    """A compiled program. A text that is no program has no instructions.

    Attributes:
        computations: instructions of each computation, by name, in the order of the text.
        entry: name of the computation that a call of the program runs; empty if there is none.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._text = text
        body = dict[str, Instruction]()
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if head := _COMPUTATION.match(line):
                self.entry = head[2] if head[1] else self.entry
                body = self.computations[head[2]] = {}
            elif found := _INSTRUCTION.match(line):
                root, name, shape, op, rest = found.groups()
                arguments, attributes = _split(rest)
                operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
                body[name] = Instruction(name, shape, op, operands, attributes, bool(root))

    def executions(self, weigh: Callable[[Execution], float]) -> Iterator[Execution]:
        """Yields all instructions that one call runs; those of a fusion are one.

        Of a conditional the branch counts whose instructions have the largest sum of `weigh`.
        """
        if self.entry:
            yield from self._within(self.entry, 1, (), weigh)

    def _within(
        self, computation: str, times: int, loops: tuple[Loop, ...], weigh: Callable[[Execution], float]
    ) -> Iterator[Execution]:
        for each in self.computations[computation].values():
            if each.op == "while":
                trips = each.trip_count
                for role in ("body", "condition"):
                    inner = (*loops, Loop(each.name, trips, role))
                    for name in each.called(role):
                        yield from self._within(name, times * (1 if trips is None else trips), inner, weigh)
            elif each.op == "conditional":
                branches = [list(self._within(name, times, loops, weigh)) for name in each.called(*_BRANCHES)]
                yield from max(branches, key=lambda some: sum(map(weigh, some)), default=[])
            elif each.op in ("call", "async-start"):
                for name in each.called("to_apply", "calls"):
                    yield from self._within(name, times, loops, weigh)
            elif each.op not in FREE:
                yield Execution(each, computation, times, loops)

    def source(self, instruction: Instruction, folder: str) -> str:
        """Returns the innermost line under `folder` that an instruction comes from, as `file:line`, or ""."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        frame, seen = found[1] if found else "", set[str]()
        files, places, frames = self._debug_tables
        while frame in frames and frame not in seen:
            seen.add(frame)
            place, parent = frames[frame]
            number, line = places.get(place, ("", ""))
            path = files.get(number, "")
            if path.startswith(folder):
                return f"{path[len(folder) :].lstrip('/')}:{line}"
            frame = parent
        return ""

    @cached_property
    def _debug_tables(self) -> tuple[dict[str, str], dict[str, tuple[str, str]], dict[str, tuple[str, str]]]:
        """Files, places in them, and stack frames (place, parent), by number."""
        head = self._text.split("FunctionNames")[0]
        files = dict(re.findall(r'^(\d+) "(.*)"$', head, re.MULTILINE))
        places = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", self._text, re.MULTILINE)
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", self._text, re.MULTILINE
        )
        return (
            files,
            {number: (file, line) for number, file, line in places},
            {number: (place, parent) for number, place, parent in frames},
        )


def _split(text: str) -> tuple[str, str]:
    """Splits what follows an operation's opening bracket at the closing one."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:at], text[at + 1 :]
    return text, ""


def array_shape(shape: str) -> tuple[str, list[int]]:
    """Returns element type and dimensions of the first array in a shape of XLA's notation."""
    found = _SHAPE.search(shape)
    return (found[1], [int(n) for n in found[2].split(",") if n]) if found else ("", [])


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array or of a tuple of arrays, from its shape in XLA's notation."""
    arrays = _SHAPE.findall(shape)
    return sum(_bits(kind) * prod(int(n) for n in size.split(",") if n) for kind, size in arrays) // 8


def _bits(kind: str) -> int:
    found = re.search(r"\d+", kind)
    return _BITS[kind] if kind in _BITS else int(found[0]) if found else 8
