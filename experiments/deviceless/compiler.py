"""Compiles programs for a GPU that is not there, with JAX's CUDA plug-in and ptxas alone.

The plug-in compiles from a description of the card and needs no driver. Products are not autotuned, since
nothing can be timed: cuBLAS's calls are compiled, because Triton's tiles are arbitrary without autotuning.
"""

import contextlib
import functools
import importlib.metadata
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.cli.cuda_plugin import quiet_where_no_gpu
from mac.atomic_files import visible
from mac.errors import UserError, one_line

OPTIONS: dict[str, bool] = {"xla_gpu_enable_triton_gemm": False}
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


class DevicelessProgram(NamedTuple):
    """A program that was compiled for a card.

    Attributes:
        text: of the optimised program.
        arguments, scratch, results: bytes.
        in_place: bytes of the results that take their arguments' memory (donation).
        thunks: XLA's listing of what the host launches, with the contents of each CUDA graph; empty unless
            it was asked for.
        seconds: that compiling took.
    """

    text: str
    arguments: int
    scratch: int
    results: int
    in_place: int
    thunks: str
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes of the card that a call takes."""
        return self.arguments + self.results - self.in_place + self.scratch


def plugin_fault() -> str | None:
    """Returns what is missing for compiling, with the command that installs it; None if nothing is."""
    jaxlib = importlib.metadata.version("jaxlib")
    installed = {name: version for name in _PLUGINS if (version := _version(name))}
    name = next(iter(installed), _PLUGINS[0])
    remedy = f"pip install {name}=={jaxlib} nvidia-cuda-nvcc{'-cu12' if '12' in name else ''}"
    if not installed:
        return f"the extra `aot` is not installed: {remedy}"
    for part in (name, name.replace("plugin", "pjrt")):
        if (version := _version(part)) != jaxlib:
            return f"{part} {version or 'is missing; it'} must be of jaxlib's version, {jaxlib}: {remedy}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def card_mesh(target_config: str) -> Mesh:
    """Returns the mesh of one card that can be compiled for, and does nothing else.

    Args:
        target_config: `Card.target_config()`.
    Raises:
        UserError: the plug-in is missing or of another version, or refuses.
    """
    if fault := plugin_fault():
        raise UserError(f"--device: {fault}")
    try:
        with quiet_where_no_gpu():
            topology = topologies.get_topology_desc(
                platform="cuda", target_config=target_config, topology="1x1x1"
            )
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"--device: JAX's CUDA plug-in cannot be used ({one_line(error)})") from error
    return jax.make_mesh((1,), ("seed",), axis_types=(AxisType.Auto,), devices=topology.devices)


def abstract(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Returns the shapes of `tree` as arrays on `mesh`, spread by `spec`; nothing is placed."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_lowered(lowered: jax.stages.Lowered, dump: Path | None = None) -> DevicelessProgram:
    """Compiles a function that was lowered for the devices of `card_mesh`.

    Args:
        dump: an empty folder for XLA's own files; the listing of thunks is read from it.
    Raises:
        UserError: ptxas is missing.
    """
    began = time.perf_counter()
    options: dict[str, bool | str] = {**OPTIONS, **({"xla_dump_to": str(dump)} if dump else {})}
    try:
        with quiet_where_no_gpu(), _without_cache():
            compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "PTX" not in str(error):
            raise
        raise UserError(
            f"--device: ptxas is missing ({one_line(error)}); pip install nvidia-cuda-nvcc-cu12"
        ) from error
    stats = compiled.memory_analysis()
    assert stats is not None, "the CUDA plug-in reports memory"
    return DevicelessProgram(
        text=compiled.as_text() or "",
        arguments=stats.argument_size_in_bytes,
        scratch=stats.temp_size_in_bytes,
        results=stats.output_size_in_bytes,
        in_place=stats.alias_size_in_bytes,
        thunks=_thunks(dump) if dump else "",
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """A kept program could not be loaded, since there is no device to load it on."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    try:
        yield
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_enable_compilation_cache", before)


def _thunks(dump: Path) -> str:
    names = ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt")
    found = next(filter(None, (visible(dump, name) for name in names)), [])
    return max((path.read_text() for path in found), key=len, default="")


def host_launches(thunks: str) -> int:
    """Counts what the host launches in a listing of thunks: CUDA graphs, and kernels outside of them.

    The body of a loop counts once; conditions do not count.
    """
    found, graph, in_condition = 0, None, False
    for line in thunks.splitlines():
        word, indent = line.strip(), len(line) - len(line.lstrip())
        if word in ("condition:", "body:"):
            in_condition = word == "condition:"
        if graph is not None and indent > graph:
            continue
        graph = None
        thunk = re.match(r"\d+: (k\w+)", word)
        if thunk is None or in_condition or thunk[1] == "kWhile":
            continue
        found += 1
        graph = indent if thunk[1] == "kCommandBuffer" else None
    return found
