"""Kernels of a GPU program, read from small texts whose figures are worked out by hand."""

import re

import pytest

from mac.run.cost.gpu_program import Kernel, callbacks, host_waits, kernels
from mac.run.cost.hlo import Program, shape_bytes
from mac.run.cost.hlo_bytes import program_bytes

PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "/project/mac/nn/mlp.py"
2 "/elsewhere/lib.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=44 end_line=44 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%taken (param_0.1: f32[1000,32], param_1.1: s32[4,1]) -> f32[4,32] {
  %param_0.1 = f32[1000,32]{1,0} parameter(0)
  %param_1.1 = s32[4,1]{1,0} parameter(1)
  %gathered = f32[4,32]{1,0} gather(%param_0.1, %param_1.1), offset_dims={1}, slice_sizes={1,32}
  ROOT %twice = f32[4,32]{1,0} add(%gathered, %gathered)
}

%written (param_0.2: f32[100,32], param_1.2: f32[1,32], param_2.2: s32[]) -> f32[100,32] {
  %param_0.2 = f32[100,32]{1,0} parameter(0)
  %param_1.2 = f32[1,32]{1,0} parameter(1)
  %param_2.2 = s32[] parameter(2)
  ROOT %updated = f32[100,32]{1,0} dynamic-update-slice(%param_0.2, %param_1.2, %param_2.2, %param_2.2)
}

%multiplied (param_0.3: f32[4,32], param_1.3: f32[32,8]) -> f32[4,8] {
  %param_0.3 = f32[4,32]{1,0} parameter(0)
  %param_1.3 = f32[32,8]{1,0} parameter(1)
  ROOT %dot = f32[4,8]{1,0} dot(%param_0.3, %param_1.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}DOT
}

%sliced (param_0.4: f32[4,32], param_1.4: f32[64,8]) -> (f32[4,8], s8[4194304]) {
  %param_0.4 = f32[4,32]{1,0} parameter(0)
  %param_1.4 = f32[64,8]{1,0} parameter(1)
  %half = f32[32,8]{1,0} slice(%param_1.4), slice={[0:32], [0:8]}
  ROOT %inner = (f32[4,8]{1,0}, s8[4194304]{0}) custom-call(%param_0.4, %half), CUBLAS
}

%body (arg.1: (s32[], f32[4,32], f32[32,8])) -> (s32[], f32[4,32], f32[32,8]) {
  %arg.1 = (s32[], f32[4,32]{1,0}, f32[32,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg.1), index=0
  %x = f32[4,32]{1,0} get-tuple-element(%arg.1), index=1
  %w = f32[32,8]{1,0} get-tuple-element(%arg.1), index=2
  %product = (f32[4,8]{1,0}, s8[4194304]{0}) custom-call(%x, %w), CUBLAS
  ROOT %out = (s32[], f32[4,32]{1,0}, f32[32,8]{1,0}) tuple(%i, %x, %w)
}

%test (arg.2: (s32[], f32[4,32], f32[32,8])) -> pred[] {
  %arg.2 = (s32[], f32[4,32]{1,0}, f32[32,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.2), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

ENTRY %f (p.1: f32[1000,32], p.2: s32[4,1], p.3: f32[32,8], p.4: f32[100,32], p.5: f32[64,8]) -> f32[100,32] {
  %p.1 = f32[1000,32]{1,0} parameter(0)
  %p.2 = s32[4,1]{1,0} parameter(1)
  %p.3 = f32[32,8]{1,0} parameter(2)
  %p.4 = f32[100,32]{1,0} parameter(3)
  %p.5 = f32[64,8]{1,0} parameter(4)
  %zero = s32[] constant(0)
  %parts = (f32[4,8]{1,0}, s8[4194304]{0}) fusion(%rows, %p.5), kind=kCustom, calls=%sliced, CUSTOM
  %rows = f32[4,32]{1,0} fusion(%p.1, %p.2), kind=kLoop, calls=%taken
  %start = (s32[], f32[4,32]{1,0}, f32[32,8]{1,0}) tuple(%zero, %rows, %p.3)
  %loop = (s32[], f32[4,32]{1,0}, f32[32,8]{1,0}) while(%start), condition=%test, body=%bodyTRIPS
  %small = f32[4,8]{1,0} fusion(%rows, %p.3), kind=KIND, calls=%multiplied
  %told = f32[4]{0} custom-call(%small), custom_call_target="xla_ffi_python_gpu_callback"
  %one = f32[1,32]{1,0} slice(%rows), slice={[0:1], [0:32]}
  ROOT %kept = f32[100,32]{1,0} fusion(%p.4, %one, %zero), kind=kLoop, calls=%written
}
"""
CUBLAS = (
    'custom_call_target="__cublas$lt$matmul", metadata={stack_frame_id=2}, '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},'
    '"precision_config":{"operand_precision":["PRECISION","PRECISION"],"algorithm":"ALG_UNSET"}}}'
)
CUSTOM = 'backend_config={"fusion_backend_config":{"kind":"__custom_fusion"}}'
TRIPS = ', backend_config={"known_trip_count":{"n":"5"}}'
TRITON = 'kCustom, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}'


def program(trips: str = TRIPS, precision: str = "DEFAULT", kind: str = "kLoop", dot: str = "") -> str:
    text = (
        PROGRAM.replace("TRIPS", trips)
        .replace("CUSTOM\n", f"{CUSTOM}\n")
        .replace("CUBLAS", CUBLAS)
        .replace("PRECISION", precision)
        .replace("DOT\n", f"{dot}\n")
    )
    return text.replace("KIND, calls=%multiplied", f"{kind.split(',')[0]}, calls=%multiplied{kind[7:]}")


def by_name(text: str) -> dict[str, Kernel]:
    return {each.name: each for each in kernels(text, "/project")}


def test_each_instruction_that_computes_is_a_launch():
    found = by_name(program())
    assert {name: each.times for name, each in found.items()} == {
        "parts": 1, "rows": 1, "product": 5, "small": 1, "told": 1, "one": 1, "kept": 1
    }  # fmt: skip


def test_unknown_loops_count_once_and_wait_for_the_host():
    known, unknown = by_name(program()), by_name(program(trips=""))
    assert unknown["product"].times == 1 and unknown["less"].times == 1  # its condition is a kernel
    assert host_waits(list(known.values())) == 0 and host_waits(list(unknown.values())) == 1


def test_product_has_two_operations_per_multiply():
    product = by_name(program())["product"].product
    assert product is not None
    assert (product.rows, product.columns, product.depth, product.batch) == (4, 8, 32, 1)
    assert product.flops == 2 * 4 * 8 * 32


def test_fused_gather_reads_what_it_takes():
    rows = by_name(program())["rows"]
    # Four rows of the thousand, their numbers, and the result.
    assert rows.bytes == 4 * 32 * 4 + 4 * 4 + 4 * 32 * 4


def test_fused_update_writes_its_slice_only():
    assert by_name(program())["kept"].bytes == 32 * 4 + 4 + 32 * 4  # reads it and its place, writes it


def test_workspace_of_cublas_is_no_traffic():
    assert by_name(program())["product"].bytes == 4 * (4 * 32 + 32 * 8 + 4 * 8)


def test_cublas_call_in_a_fusion_is_the_same_product():
    found = by_name(program())
    assert found["parts"].product == found["product"].product
    assert found["parts"].bytes == found["product"].bytes  # of one operand it reads the slice


@pytest.mark.parametrize(("precision", "tf32"), [("DEFAULT", True), ("HIGH", True), ("HIGHEST", False)])
def test_cublas_rounds_to_tf32_below_highest(precision: str, tf32: bool):
    product = by_name(program(precision=precision))["product"].product
    assert product is not None and product.tf32 is tf32


@pytest.mark.parametrize(
    ("kind", "dot", "tf32"),
    [
        ("kLoop", "", False),  # written out in plain float32
        (TRITON, "", True),
        (TRITON, ", operand_precision={highest,highest}", False),
        (TRITON, ", algorithm=dot_f32_f32_f32", False),
        (TRITON, ", algorithm=dot_tf32_tf32_f32", True),
    ],
)
def test_fused_product_is_tf32_on_tensor_cores_alone(kind: str, dot: str, tf32: bool):
    product = by_name(program(kind=kind, dot=dot))["small"].product
    assert product is not None and product.flops == 2 * 4 * 8 * 32
    assert product.tf32 is tf32


def test_callbacks_are_found():
    assert [each.name for each in callbacks(list(by_name(program()).values()))] == ["told"]


def test_source_is_the_innermost_line_of_the_project():
    assert by_name(program())["product"].source == "mac/nn/mlp.py:44"
    assert by_name(program())["rows"].source == ""


def test_bytes_of_the_program_are_those_of_its_kernels():
    counted = [each.times * each.bytes for each in by_name(program()).values()]
    assert program_bytes(program()) == sum(counted) + 5 * (4 + 4 + 1)  # and the condition, as on a CPU


def test_dearest_branch_of_a_conditional_counts():
    text = re.sub(
        r"while\(%start\).*",
        "conditional(%zero, %start, %start), branch_computations={%body, %test}",
        program(),
    )
    assert "product" in by_name(text) and "less" not in by_name(text)


def test_text_that_is_no_program_has_no_kernels():
    assert kernels("") == [] and Program("words").entry == ""


def test_shapes_of_all_kinds_have_bytes():
    assert shape_bytes("(pred[8], bf16[2,3]{1,0}, s4[16], c64[2], f32[])") == 8 + 12 + 8 + 16 + 4
