"""JAX's CUDA plug-in on a machine without a GPU, where it compiles (extra `aot`) and computes nothing.

At an ordinary start such a plug-in prints a traceback, since it finds no driver, and JAX then takes the CPU.
Imports only Python's own modules, since JAX is not imported yet where it is used first.
"""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu")
"""Device files of NVIDIA's driver: Linux, WSL, Jetson."""
_NOISE = re.compile(rb"cudart_stub\.cc|before absl::InitializeLog\(\) is called")


def plugin_without_gpu() -> bool:
    """True where the CUDA plug-in is installed and this machine has no NVIDIA driver."""
    names = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    installed = any(importlib.util.find_spec(name) is not None for name in names)
    return installed and not any(Path(name).exists() for name in _GPU_FILES)


def take_cpu() -> None:
    """Imports JAX and makes it compute on the CPU, here and in processes that are started.

    A platform that the user asked for (`JAX_PLATFORMS`) is kept. The plug-in prints a line for each library
    when JAX is imported, and a traceback when it starts.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with quiet_plugin(), contextlib.suppress(ImportError):
        import jax

        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


@contextlib.contextmanager
def quiet_where_no_gpu() -> Iterator[None]:
    """`quiet_plugin` where the plug-in has no GPU; else nothing."""
    with quiet_plugin() if plugin_without_gpu() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def quiet_plugin() -> Iterator[None]:
    """Drops the plug-in's lines about a missing driver; all else on standard error is printed at the end."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # standard error is closed
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said = b"".join(line for line in file if not _NOISE.search(line))
            with contextlib.suppress(OSError):
                os.write(2, said)
