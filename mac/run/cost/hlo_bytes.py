"""Bytes that a compiled program reads and writes, counted from its HLO text.

By the rules of XLA's own cost analysis, each instruction of the optimised program, or each fusion as a whole,
reads its operands and writes its result. Slices and gathers read only what they take, also within a
fusion. `compiled.cost_analysis()` counts the body of a loop once, whatever its trip count; here it counts for
every iteration where XLA states the trip count.
"""

import re

from mac.run.cost.hlo import Execution, Instruction, Program, shape_bytes

_TAKE = ("slice", "dynamic-slice", "gather")
_WORKSPACE = re.compile(r"s8\[\d+\]")


def program_bytes(text: str) -> int:
    """Counts the bytes that one call of a compiled program (`compiled.as_text()`) reads and writes.

    Loops with unknown trip count are counted once; for conditionals the most expensive branch counts. The
    count of a text that is no program is 0.
    """
    program = Program(text)

    def moved(each: Execution) -> int:
        return each.times * instruction_bytes(program, each.instruction, each.computation)

    return sum(map(moved, program.executions(moved)))


def instruction_bytes(program: Program, instruction: Instruction, computation: str) -> int:
    """Returns the bytes that one execution of an instruction of `computation` reads and writes."""
    if instruction.op in _TAKE:
        return 2 * instruction.bytes
    around = program.computations[computation]
    operands = [around[name].bytes if name in around else 0 for name in instruction.operands]
    if instruction.op == "dynamic-update-slice":
        return 2 * operands[1]
    if instruction.op == "fusion":
        (called,) = instruction.called("calls")
        return _fusion_bytes(program.computations[called])
    return _result_bytes(instruction) + sum(operands)


def _result_bytes(instruction: Instruction) -> int:
    """Returns the bytes of a result, without the scratch memory that cuBLAS gets with it."""
    if "gemm_backend_config" in instruction.attributes:
        return shape_bytes(_WORKSPACE.sub("", instruction.shape))
    return instruction.bytes


def _fusion_bytes(body: dict[str, Instruction]) -> int:
    read = sum(_read_of(body, each.name) for each in body.values() if each.op == "parameter")
    root = next(each for each in body.values() if each.is_root)
    results = [body[name] for name in root.operands] if root.op == "tuple" else [root]
    return read + sum(_written(body, each) for each in results)


def _read_of(body: dict[str, Instruction], name: str) -> int:
    """Returns the bytes that a fusion reads of its operand `name`: all, unless only parts are taken."""
    whole, taken = body[name].bytes, 0
    for user in body.values():
        for at, operand in enumerate(user.operands):
            if operand != name:
                continue
            if at == 0 and user.op in _TAKE:
                taken += user.bytes
            elif user.op == "bitcast":
                taken += _read_of(body, user.name)
            elif not (at == 0 and user.op == "dynamic-update-slice"):  # which is written in place
                return whole
    return min(taken, whole)


def _written(body: dict[str, Instruction], result: Instruction) -> int:
    while result.op == "bitcast" and result.operands:
        result = body[result.operands[0]]
    if result.op == "dynamic-update-slice":
        return body[result.operands[1]].bytes
    if result.op == "get-tuple-element" and "gemm_backend_config" in body[result.operands[0]].attributes:
        return shape_bytes(_WORKSPACE.sub("", result.shape))
    return _result_bytes(result)
