"""Rates of the device itself: time per kernel launch, memory bandwidth, matmuls by precision."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from mac.run.io.run_metadata import cpu_model, environment, git_state, package_versions
from mac.run.io.run_metadata import hardware as hardware_facts

KERNELS = 500  # dependent kernels of one program
REPEATS = 7
MATMULS = 10  # in one program
PRECISIONS = ("float32", "tf32", "bf16")
_NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


def describe_machine(folder: Any) -> dict[str, Any]:
    """Returns the card, its driver, the host and all versions; the commit is that of `folder`."""
    facts = hardware_facts()
    return {
        "backend": facts["backend"],
        "card": facts["device"],
        "cards": facts["devices"],
        "driver": _nvidia_smi("driver_version"),
        "card_memory": _nvidia_smi("memory.total"),
        "host": f"{cpu_model()}, {facts['cores']} cores, {facts['memory_gib']} GiB",
        "versions": package_versions(),
        "variables": environment(),
        "git": git_state(folder),
    }


def _nvidia_smi(field: str) -> str:
    """Returns a field of the first card as nvidia-smi prints it; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


def median_seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Returns the median time of a call, to the end of its work, after one that is not timed."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def chained_kernels(count: int) -> Callable[[Float[Array, " n"]], Float[Array, " n"]]:
    """Returns a function of `count` dependent kernels, which XLA may not fuse."""

    def chain(x: Float[Array, " n"]) -> Float[Array, " n"]:
        for _ in range(count):
            x = jax.lax.optimization_barrier(x * 1.0001 + 1.0)
        return x

    return chain


def measure_launches(tiny: bool) -> dict[str, Any]:
    """Measures microseconds: of a kernel in a CUDA graph and without graphs, of a call, of waiting loops.

    `loop_us` is an iteration of a loop whose length the host does not know, which it must wait for unless
    the loop is part of a graph; `scan_us` is one of a loop of known length.
    """
    count, x = (20 if tiny else KERNELS), jnp.arange(1024.0)

    def per_kernel(options: Mapping[str, str]) -> float:
        one, many = (
            jax.jit(chained_kernels(n)).lower(x).compile(compiler_options=dict(options))
            for n in (1, count + 1)
        )
        return 1e6 * (median_seconds(lambda: many(x)) - median_seconds(lambda: one(x))) / count

    def loop(x: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.lax.while_loop(lambda x: x[0] < count, lambda x: x + 1.0, x)

    def scan(x: Float[Array, " n"]) -> Float[Array, " n"]:
        return jax.lax.scan(lambda x, _: (x * 1.0001 + 1.0, None), x, length=count)[0]

    found = {"launch_us": per_kernel({}), "call_us": 1e6 * median_seconds(lambda: add_one(x))}
    if jax.default_backend() == "gpu":
        found["launch_without_graph_us"] = per_kernel(_NO_GRAPHS)
    for name, function in (("loop_us", loop), ("scan_us", scan)):
        compiled = jax.jit(function)
        found[name] = 1e6 * median_seconds(lambda compiled=compiled: compiled(x)) / count
    return found


@jax.jit
def add_one(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """Adds 1: the smallest program."""
    return x + 1.0


def measure_bandwidth(tiny: bool) -> dict[str, Any]:
    """Measures GB/s of device memory, bytes read and written, by scaling random numbers."""
    numbers = 2**16 if tiny else 2**28  # 1 GiB, many times the cache
    x = jr.normal(jr.key(0), (numbers,))
    seconds = median_seconds(lambda: _scale(x))
    return {"gb_per_s": 2 * x.nbytes / seconds / 1e9}


@jax.jit
def _scale(x: Float[Array, " n"]) -> Float[Array, " n"]:
    return x * 1.0001


def measure_matmuls(tiny: bool) -> dict[str, Any]:
    """Measures TFLOP/s of random matmuls by precision: large ones, and of the shapes of training.

    `float32` asks for full precision, `tf32` for JAX's default, which is TF32 on NVIDIA cards since Ampere,
    and `bf16` has inputs in bfloat16 with sums in float32.
    """
    shapes = {"large": (1, 8192, 8192), "reward": (4, 2048, 512), "goals": (4, 8192, 1024)}
    if tiny:
        shapes = {name: (1, 64, 32) for name in shapes}
    found = {}
    for name, (seeds, rows, width) in shapes.items():
        for precision in PRECISIONS:
            found[f"{name}_{precision}"] = _matmul_rate(seeds, rows, width, precision) / 1e12
    return found


def _matmul_rate(seeds: int, rows: int, width: int, precision: str) -> float:
    """Returns operations per second of batched [rows, width] times [width, width]."""
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    wanted = jax.lax.Precision.HIGHEST if precision == "float32" else jax.lax.Precision.DEFAULT
    x = jr.normal(jr.key(0), (seeds, rows, width), dtype)
    w = jr.normal(jr.key(1), (seeds, width, width), dtype) / width**0.5

    @jax.jit
    def chain(x: Array, w: Array) -> Array:
        def step(x: Array, _: None) -> tuple[Array, None]:
            return jnp.matmul(x, w, precision=wanted, preferred_element_type=jnp.float32).astype(dtype), None

        return jax.lax.scan(step, x, length=MATMULS)[0]

    return MATMULS * 2 * seeds * rows * width**2 / median_seconds(lambda: chain(x, w))
