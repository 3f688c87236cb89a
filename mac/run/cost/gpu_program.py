"""Kernels of a program that XLA compiled for a GPU: launches, matrix products, bytes, loops, callbacks.

The program need not have run, nor the GPU exist. One instruction of the scheduled program is one launch; the
few kernels that a cuBLAS call may consist of count as one.
"""

import re
from math import prod
from typing import NamedTuple

from mac.run.cost.hlo import FREE, Execution, Instruction, Loop, Program, array_shape
from mac.run.cost.hlo_bytes import instruction_bytes

_NO_KERNEL = FREE | {"async-done", "async-update", "partition-id", "replica-id"}
_ALGORITHM = re.compile(r'\balgorithm"?[=:]"?(?:ALG_|alg_)?(\w+)')


class Product(NamedTuple):
    """A matrix product [rows, depth] x [depth, columns], `batch` times.

    Attributes:
        dtype: of the operands, in XLA's notation.
        tf32: float32 operands that the card rounds to the 10 bits of TF32.
    """

    rows: int
    columns: int
    depth: int
    batch: int
    dtype: str
    tf32: bool

    @property
    def flops(self) -> int:
        """Operations; a multiply and an add count as two."""
        return 2 * self.rows * self.columns * self.depth * self.batch


class Kernel(NamedTuple):
    """A kernel of a program.

    Attributes:
        name: of its instruction.
        kind: cuBLAS's or another library's call, the emitter of a fusion, or the operation.
        times: launches per call of the program; loops of unknown length count once.
        bytes: read and written by one launch.
        product: the matrix product in it, if any.
        loops: around it, outermost first.
        source: its line in the project, `file:line`, or "".
    """

    name: str
    kind: str
    times: int
    bytes: int
    product: Product | None
    loops: tuple[Loop, ...]
    source: str


def kernels(text: str, folder: str = "") -> list[Kernel]:
    """Lists the kernels of a compiled GPU program (`compiled.as_text()`).

    Args:
        folder: whose source lines are looked for.
    """
    program = Program(text)
    return [
        Kernel(
            name=each.instruction.name,
            kind=kernel_kind(each.instruction),
            times=each.times,
            bytes=instruction_bytes(program, each.instruction, each.computation),
            product=product_of(program, each.instruction, each.computation),
            loops=each.loops,
            source=program.source(each.instruction, folder) if folder else "",
        )
        for each in program.executions(_launches)
        if _launches(each)
    ]


def _launches(each: Execution) -> int:
    """Launches of an instruction; the condition of a loop of known length is not evaluated."""
    counted = any(loop.role == "condition" and loop.trip_count is not None for loop in each.loops)
    return 0 if counted or each.instruction.op in _NO_KERNEL else each.times


def kernel_kind(instruction: Instruction) -> str:
    if instruction.op == "custom-call":
        found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        return found[1] if found else instruction.op
    if instruction.op == "fusion":
        emitter = instruction.backend_config.get("fusion_backend_config", {}).get("kind", "").strip("_")
        found = re.search(r"kind=k(\w+)", instruction.attributes)
        return emitter or f"{found[1].lower() if found else 'other'} fusion"
    return instruction.op


def product_of(program: Program, instruction: Instruction, computation: str) -> Product | None:
    """Returns the first matrix product that a kernel computes, None if it computes none."""
    product = _product(program, instruction, computation)
    # In loop and reduction fusions a product is written out in plain float32; custom ones are Triton's, or
    # cuBLAS's with slices of its operands.
    plain = instruction.op == "fusion" and not re.search("triton|custom", kernel_kind(instruction))
    return product._replace(tf32=False) if product and plain else product


def _product(program: Program, instruction: Instruction, computation: str) -> Product | None:
    if instruction.op == "fusion":
        (called,) = instruction.called("calls")
        inner = program.computations[called].values()
        return next((product for each in inner if (product := _product(program, each, called))), None)
    if instruction.op == "dot":
        contracted, batched = (instruction.numbers(f"lhs_{kind}_dims") for kind in ("contracting", "batch"))
    elif "gemm_backend_config" in instruction.attributes:
        axes = instruction.backend_config["gemm_backend_config"]["dot_dimension_numbers"]
        contracted, batched = (
            [int(axis) for axis in axes.get(f"lhs_{kind}_dimensions", [])]
            for kind in ("contracting", "batch")
        )
    else:
        return None
    around = program.computations[computation]
    (dtype, left), (_, right) = (array_shape(around[name].shape) for name in instruction.operands[:2])
    depth, batch = prod(left[axis] for axis in contracted), prod(left[axis] for axis in batched)
    rows, columns = prod(left) // (depth * batch), prod(right) // (depth * batch)
    return Product(rows, columns, depth, batch, dtype, dtype == "f32" and _is_tf32(instruction.attributes))


def _is_tf32(attributes: str) -> bool:
    algorithm = _ALGORITHM.search(attributes)
    if algorithm and algorithm[1].upper() != "UNSET":
        return "TF32" in algorithm[1].upper()
    return "highest" not in attributes.lower()


def host_waits(kernels: list[Kernel]) -> int:
    """Counts the loops whose end only the device knows: each iteration copies the condition to the host."""
    return len({loop.name for each in kernels for loop in each.loops if loop.trip_count is None})


def callbacks(kernels: list[Kernel]) -> list[Kernel]:
    """Returns the kernels that call Python on the host."""
    return [each for each in kernels if "callback" in each.kind]


def own_kernels(kernels: list[Kernel]) -> list[Kernel]:
    """Returns the kernels that the project writes in Pallas."""
    return [
        each
        for each in kernels
        if each.kind in ("__gpu$xla.gpu.triton", "mosaic_gpu_v2", "triton_kernel_call")
    ]
