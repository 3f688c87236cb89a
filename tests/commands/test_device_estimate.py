"""`run.py --dry-run --device`: flags, messages, the model of time and the lines of the report."""

import importlib.metadata
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest

from experiments.cli import cuda_plugin
from experiments.deviceless import compiler, report
from experiments.deviceless.cards import CardName, all_cards
from experiments.deviceless.compiler import DevicelessProgram, host_launches, plugin_fault
from experiments.deviceless.time_model import LAUNCH, cost_of, kernel_seconds, product_seconds
from experiments.launch import device_estimate
from experiments.launch.device_estimate import RunShapes, segment_updates
from experiments.launch.settings import Settings
from mac.run.cost.gpu_program import Kernel, Loop, Product
from tests.helpers.command_line import SIZES, error_of
from tests.helpers.platforms import mesh_of
from tests.helpers.toy_env import PointEnv, mac

ROOT = Path(__file__).parents[2]
H100 = all_cards()["h100"]
GB = 10**9
DRY = ["--dry-run", "--device", "h100"]


def kernel(**facts: object) -> Kernel:
    empty = Kernel("k", "loop fusion", 1, 0, None, (), "mac/mac.py:1")
    return empty._replace(**facts)  # pyright: ignore[reportArgumentType]


def product(rows: int, columns: int, depth: int, dtype: str = "f32", tf32: bool = True) -> Product:
    return Product(rows, columns, depth, 1, dtype, tf32)


def compiled(**sizes: int) -> DevicelessProgram:
    parts = {"arguments": 0, "scratch": 0, "results": 0, "in_place": 0} | sizes
    return DevicelessProgram("", **parts, thunks="", seconds=1.0)


# The command.


def test_device_without_dry_run_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "needs --dry-run" in error_of(capsys, [*SIZES, "--device", "h100"])


def test_unknown_card_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "'h900' is none of 'h100'" in error_of(capsys, ["--dry-run", "--device", "h900"])


def test_missing_extra_is_one_line_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, data: list[str]
):
    monkeypatch.setattr(compiler, "_version", lambda name: None)
    said = error_of(capsys, [*SIZES, *data, *DRY])
    jaxlib = importlib.metadata.version("jaxlib")
    assert f"pip install jax-cuda12-plugin=={jaxlib} nvidia-cuda-nvcc-cu12" in said


def test_evaluation_is_compiled_on_engine_mjx_alone(capsys: pytest.CaptureFixture[str], data: list[str]):
    wrong = ["--eval.engine", "c", "--device-programs", "segment", "evaluate"]
    assert "engine c is not compiled by XLA; take --eval.engine mjx" in error_of(
        capsys, [*SIZES, *data, *DRY, *wrong]
    )


@pytest.mark.parametrize("wrong", ["jax-cuda12-plugin", "jax-cuda12-pjrt"])
def test_plugin_of_another_version_is_named(wrong: str, monkeypatch: pytest.MonkeyPatch):
    jaxlib = importlib.metadata.version("jaxlib")
    installed = {"jax-cuda12-plugin": jaxlib, "jax-cuda12-pjrt": jaxlib} | {wrong: "0.1.2"}
    monkeypatch.setattr(compiler, "_version", installed.get)
    fault = plugin_fault()
    assert fault is not None and f"{wrong} 0.1.2 must be of jaxlib's version, {jaxlib}" in fault
    monkeypatch.setattr(compiler, "_version", {name: jaxlib for name in installed}.get)
    assert plugin_fault() is None


def test_device_is_no_setting_of_the_run():
    values = Settings.__dataclass_fields__
    assert "device" in values and "device_programs" in values
    from experiments.launch.settings import _OF_THE_LAUNCH

    assert {"device", "device_programs"} <= set(_OF_THE_LAUNCH)


def test_cards_are_those_of_the_flag():
    assert set(all_cards()) == set(typing.get_args(CardName))
    for card in all_cards().values():
        text = card.target_config()
        assert text.count("{") == text.count("}") and f"core_count: {card.cores}" in text
        assert card.rates.f32 < card.rates.tf32 < card.rates.bf16 and card.rates.memory < card.rates.cache


# The plug-in.


def test_plugin_lines_are_dropped_and_others_kept(capfd: pytest.CaptureFixture[str]):
    with cuda_plugin.quiet_plugin():
        os.write(2, b"I0000 cudart_stub.cc:31] Could not find cuda drivers\nsomething else\n")
        print("from Python", file=sys.stderr)
    assert set(capfd.readouterr().err.splitlines()) == {"something else", "from Python"}


def test_cpu_is_taken_where_the_plugin_has_no_gpu(tmp_path: Path):
    """In a process of its own, with a module of the plug-in's name; it starts processes of the same kind."""
    (tmp_path / "jax_cuda12_plugin").mkdir()
    (tmp_path / "jax_cuda12_plugin" / "__init__.py").write_text("")
    code = "import experiments, jax, os; print(jax.config.jax_platforms, os.environ.get('JAX_PLATFORMS'))"
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    if any(Path(name).exists() for name in cuda_plugin._GPU_FILES):
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "cpu cpu\n", done.stderr


def test_machine_with_a_driver_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cuda_plugin.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda_plugin, "_GPU_FILES", (str(tmp_path),))
    assert not cuda_plugin.plugin_without_gpu()
    monkeypatch.setattr(cuda_plugin, "_GPU_FILES", (str(tmp_path / "missing"),))
    assert cuda_plugin.plugin_without_gpu()


# The programs.


def test_evaluation_for_a_gpu_calls_no_python():
    """Traced as for a card, without the plug-in; what a policy and the loop add to the environment."""
    env, algo = PointEnv(), mac()
    run = RunShapes(algo, env, 100, "float32", 2, (), 5, episodes=1)
    mesh = mesh_of("gpu")
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = device_estimate.trace_evaluate(run).lower(lowering_platforms=("cuda",))
    assert "callback" not in lowered.as_text() and "stablehlo.while" in lowered.as_text()


def test_segments_are_as_long_as_the_loop_makes_them():
    assert segment_updates(1000, 100_000, 50_000, 1_000_000) == 1000
    assert segment_updates(1000, 1500, 50_000, 1_000_000) == 500
    assert segment_updates(1000, 100_000, 50_000, 40) == 40


# The model of time.


def test_traffic_is_from_the_cache_if_small():
    assert kernel_seconds(kernel(bytes=10**6), H100) == pytest.approx(1e6 / H100.rates.cache)
    assert kernel_seconds(kernel(bytes=10**9), H100) == pytest.approx(1e9 / H100.rates.memory)


def test_large_product_approaches_the_rate_of_the_card():
    size = 8 * 132 * 128
    full = product_seconds(product(size, 256 * 8, 8192), 330e12, 132)
    assert full == pytest.approx(2 * size * 2048 * 8192 / 330e12, rel=0.1)


def test_small_product_does_not_fill_the_card():
    seconds = product_seconds(product(256, 512, 512), 330e12, 132)
    assert seconds > 3 * 2 * 256 * 512 * 512 / 330e12


def test_lower_precision_is_faster_when_arithmetic_prevails():
    single, low = (product(8192, 4096, 4096, dtype) for dtype in ("f32", "bf16"))
    assert kernel_seconds(kernel(product=low), H100) < 0.6 * kernel_seconds(kernel(product=single), H100)
    exact = single._replace(tf32=False)
    assert kernel_seconds(kernel(product=exact), H100) > 5 * kernel_seconds(kernel(product=single), H100)


def test_cost_is_per_update():
    some = [kernel(times=20, bytes=100), kernel(times=10, product=product(2, 3, 4))]
    cost = cost_of(some, H100, per=10)
    assert (cost.launches, cost.bytes, cost.flops) == pytest.approx((3, 200, 2 * 2 * 3 * 4))
    assert cost.seconds == pytest.approx(cost.busy + 3 * LAUNCH)
    assert cost.roofline == pytest.approx(max(200 / H100.rates.memory, 48 / H100.rates.tf32))


# The report.


def test_report_says_whether_memory_suffices():
    def line(arguments: int, more: int = 0) -> str:
        return report.memory_line(compiled(arguments=arguments, results=GB, in_place=GB), H100, more)

    assert ": enough (" in line(10 * GB)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in line(70 * GB)
    assert "NOT ENOUGH" in line(85 * GB) and "NOT ENOUGH" in line(70 * GB, 20 * GB)


def test_report_has_a_line_for_each_question():
    loops = (Loop("while.1", 10, "body"), Loop("while.2", None, "body"))
    some = [
        kernel(
            name="a", times=10, bytes=4 * 10**6, product=product(128, 128, 128), kind="__cublas$lt$matmul"
        ),
        kernel(name="b", times=10, bytes=10**6, loops=loops, source="mac/nn/mlp.py:5"),
        kernel(name="c", kind="xla_ffi_python_gpu_callback", times=10, source="envs_mjx/a.py:7"),
    ]
    unit = report.Unit("update of all 2 seeds", times=10, in_run=1_000_000)
    text = "\n".join(report.program_lines(compiled(arguments=GB), some, H100, unit))
    assert "launches     3 per update of all 2 seeds (1 of products); 3 different kernels" in text
    assert "traffic      5.0 MB read and written (products 4.0 MB, the rest 1.0 MB)" in text
    assert "callbacks    1 call of Python (envs_mjx/a.py:7)" in text
    assert "1 loop of unknown length" in text and "waits for the host" in text
    assert "by line: mac/mac.py:1 (1)" in text and "modelled, not measured" in text
    assert "1,000,000 updates: about" in text


def test_graphs_and_bare_kernels_are_what_the_host_launches():
    thunks = """000: kCommandBuffer [source]
    001: kCopy [source]
    002: kCustomKernel [prev]
010: kWhile [prev=000]
condition:
    011: kCustomKernel [source]
  body:
    000: kCommandBuffer [source]
        012: kCustomKernel [source]
    013: kCublasLtMatmul [prev]
014: kCopy [prev=010]
"""
    assert host_launches(thunks) == 4  # two graphs, a product and a copy
    assert host_launches("") == 0
