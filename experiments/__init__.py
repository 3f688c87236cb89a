"""Programs of the command line, and what they consist of."""

from experiments.cli.cuda_plugin import plugin_without_gpu, take_cpu

if plugin_without_gpu():
    take_cpu()
