"""Programs of the command line, and what they consist of."""

import contextlib

from experiments.cli.cuda_plugin import plugin_without_gpu, quiet_plugin

# JAX loads its CUDA plug-in when it is imported, and a plug-in without a driver says so once per library.
if plugin_without_gpu():
    with quiet_plugin(), contextlib.suppress(ImportError):
        import jax  # noqa: F401
