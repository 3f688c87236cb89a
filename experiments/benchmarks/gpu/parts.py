"""Parts of the GPU benchmark in order of value: one of each kind first, their variants later."""

import os
from collections.abc import Iterator
from dataclasses import replace

from envs_mjx.engines.warp_setup import available as warp_available
from experiments.benchmarks.gpu.programs import tests_unavailable
from experiments.benchmarks.gpu.schedule import Part
from experiments.benchmarks.gpu.training_rates import VARIANTS

MACHINE = Part("machine", 15, 180)
SIZES = (("reward", 1), ("reward", 4), ("goals", 1), ("goals", 4), ("reward", 8))
ENVS = (75, 300, 1024, 4096)
_ON_CPU = {"JAX_PLATFORMS": "cpu"}
_ONE_GRAPH = "--xla_gpu_enable_command_buffer=+WHILE"  # loops become parts of CUDA graphs
_NO_WARP = "engine warp is not installed: pip install -e '.[warp]'"


def all_parts(tiny: bool) -> list[Part]:
    """Returns the parts after `MACHINE`.

    Seconds are for a GPU with nothing compiled yet, and guesses until one has measured them.
    """
    parts = [
        Part("data", 0, 900, grace=15, background=True, environment=_ON_CPU),
        Part("rate launches", 30, 150),
        Part("rate memory", 10, 60),
        Part("rate matmuls", 35, 150),
        Part("tests", 40, 150, own_process=True, unavailable=tests_unavailable()),
        *_first_round(tiny),
        *_second_round(tiny),
        Part("paper", 60, 0, grace=30, own_process=True, after=("data",), rest=True),
    ]
    return [replace(part, about=part.about / 10) for part in parts] if tiny else parts


def _first_round(tiny: bool) -> Iterator[Part]:
    for mode, seeds in _sizes(tiny):
        yield _segment(mode, seeds, "tf32")
    for engine in _engines(tiny):
        yield _steps(engine, _envs(tiny)[0])
        yield _evaluation(engine)
    yield Part("determinism resumed", 180, 400, own_process=True, after=("data",))


def _second_round(tiny: bool) -> Iterator[Part]:
    variants = [variant for variant in VARIANTS if variant not in ("tf32", "float32")]
    yield from (_segment(mode, seeds, variant) for variant in variants for mode, seeds in _sizes(tiny))
    for engine in _engines(tiny):
        yield Part(f"expert {engine}", 120, 300, unavailable=_missing(engine))
        yield from (_steps(engine, envs) for envs in _envs(tiny)[1:])
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_ONE_GRAPH}".strip()}
    if not tiny:
        yield Part(f"steps mjx {ENVS[0]} one-graph", 60, 200, own_process=True, environment=flags)
    yield Part("determinism recompiled", 180, 400, own_process=True, after=("data",))
    yield from (_segment(mode, seeds, "float32") for mode, seeds in _sizes(tiny)[: 1 if tiny else None])


def _segment(mode: str, seeds: int, variant: str) -> Part:
    name = f"segment {mode} S={seeds} {variant}"
    return Part(name, 45, 200)


def _steps(engine: str, envs: int) -> Part:
    # Kernels of engine warp are compiled for minutes at its first use.
    about, most = (60, 200) if engine != "warp" else (120, 400)
    return Part(f"steps {engine} {envs}", about, most, unavailable=_missing(engine))


def _evaluation(engine: str) -> Part:
    return Part(f"evaluation {engine}", 120, 300, unavailable=_missing(engine))


def _missing(engine: str) -> str:
    return _NO_WARP if engine == "warp" and not warp_available() else ""


def _sizes(tiny: bool) -> tuple[tuple[str, int], ...]:
    return (("reward", 2), ("goals", 1)) if tiny else SIZES


def _envs(tiny: bool) -> tuple[int, ...]:
    return (2, 4) if tiny else ENVS


def _engines(tiny: bool) -> tuple[str, ...]:
    # On a CPU the programs of mjx compile for minutes.
    return ("c", "warp") if tiny else ("mjx", "warp")
