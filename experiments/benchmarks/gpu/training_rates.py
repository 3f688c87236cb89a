"""Speed of the compiled segment by algorithm mode, number of seeds and precision."""

import functools
import gzip
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from envs_mjx.registry import make
from experiments.benchmarks import timed_loops
from experiments.deviceless.cards import Card, all_cards
from experiments.deviceless.time_model import cost_of
from experiments.launch.saved_run import build_algorithm
from experiments.launch.settings import Settings, parse_command_line
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.atomic_files import replace_file
from mac.run.cost.gpu_program import kernels
from mac.run.cost.hlo_bytes import program_bytes
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from mac.types import EnvSpec

ENVS = {
    "reward": "cube-double-play-singletask-task2-v0",
    "goals": "cube-double-play-oraclerep-v0",
}
"""Environments whose shapes and paper settings are used: with rewards of one task, and with goals."""
VARIANTS = {
    "tf32": ("--run.precision", "tf32"),
    "bf16": ("--run.precision", "bf16"),
    "fused": ("--run.precision", "bf16", "--run.kernels", "fused"),
    "float32": ("--run.precision", "float32"),
}
"""Flags of `run.py` for each measured way to compute."""
TINY = ("--hp.hidden", "8", "--hp.batch", "8", "--hp.candidates", "2", "--hp.rollout", "2")
TINY += ("--hp.flow-steps", "2", "--hp.flow-steps-test", "2", "--hp.candidates-test", "2")
UPDATES, CALLS = 100, 3
LARGEST = {"reward": 8, "goals": 4}
"""Most seeds that are measured; smaller groups begin with the states of the first of them."""


class Subject(NamedTuple):
    """An algorithm with the settings that `run.py` would give it."""

    settings: Settings[Any]
    spec: EnvSpec
    algo: AbstractAlgorithm


def subject(mode: str, seeds: int, variant: str, tiny: bool) -> Subject:
    """Returns the paper's MAC for a mode, as `run.py` would train it."""
    env = ENVS[mode]
    flags = ["--env", env, "--preset", "paper", "--seeds", str(seeds), *(TINY if tiny else ())]
    flags += VARIANTS[variant]
    settings, _ = parse_command_line(flags)
    spec = make(env, "c").spec
    return Subject(settings, spec, build_algorithm(settings, spec))


def measure_segment(mode: str, seeds: int, variant: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Measures one compiled segment; figures are of all seeds together, but for `gflop`.

    The compiled program is kept in `folder`, compressed, since its counts can be studied later.
    """
    _, spec, algo = subject(mode, seeds, variant, tiny)
    # Few rows, since the count of bytes takes a fused gather for a reading of the whole table.
    updates, rows = (2 if tiny else UPDATES), 20 * EPISODE_ROWS
    window = timed_loops.random_window(spec, rows, algo.sample.chunk)
    mesh = seed_mesh(seeds)
    keys = place(mesh, seed_keys(0, seeds), SEED)
    steps = place(mesh, np.arange(updates, dtype=np.int32), ALL)
    window = place(mesh, window, ALL)
    state = fresh_state(algo, mode, seeds, tiny)
    state = place(mesh, state, SEED)
    began = time.perf_counter()
    run = segment.lower(algo, mesh, window, keys, steps, state).compile()
    compile_s = time.perf_counter() - began
    seconds = []
    for _ in range(CALLS + 1):
        call = time.perf_counter()
        state, metrics = jax.block_until_ready(run(window, keys, steps, state))
        seconds.append(time.perf_counter() - call)
    ms = 1e3 * statistics.median(seconds[1:]) / updates
    memory, text = run.memory_analysis(), run.as_text() or ""
    kept = folder / f"segment-{mode}-S{seeds}-{variant}.hlo.gz"
    replace_file(kept, lambda file: file.write(gzip.compress(text.encode())))
    return {
        "mode": mode,
        "seeds": seeds,
        "variant": variant,
        "ms_per_update": ms,
        "seed_updates_per_s": 1e3 * seeds / ms,
        "gflop": timed_loops.update_flops(algo, window) / 1e9,
        "compile_s": compile_s,
        "finite": all(bool(np.isfinite(value).all()) for value in jax.device_get(metrics).values()),
        "scratch_gb": getattr(memory, "temp_size_in_bytes", 0) / 1e9,
        **modelled(text, updates),
    }


def fresh_state(algo: AbstractAlgorithm, mode: str, seeds: int, tiny: bool) -> TrainState:
    """Returns new states of the first seeds, which all variants and numbers of seeds share where they can.

    To compile `init` for each of them would take half a minute.
    """
    keys = seed_keys(0, seeds)
    wanted = jax.eval_shape(lambda keys: init(algo, seed_mesh(1), keys), keys)
    leaves = [jnp.array(x[:seeds], copy=True) for x in jax.tree.leaves(_largest_states(mode, tiny))]
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(wanted)]
    if shapes != [(x.shape, x.dtype) for x in leaves]:  # a variant with states of its own
        return init(algo, seed_mesh(1), keys)
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


@functools.cache
def _largest_states(mode: str, tiny: bool) -> TrainState:
    algo = subject(mode, LARGEST[mode], "tf32", tiny).algo
    return init(algo, seed_mesh(1), seed_keys(0, LARGEST[mode]))


def modelled(text: str, updates: int) -> dict[str, float]:
    """Returns figures of one update that follow from the compiled program.

    On a GPU these are launches, bytes, and milliseconds by the model of `run.py --dry-run --device`, whose
    assumptions the measurement can then correct.

    Args:
        text: optimised HLO of a segment.
        updates: how many updates it has.
    """
    if jax.default_backend() != "gpu":
        return {"gb": program_bytes(text) / updates / 1e9}
    cost = cost_of(kernels(text), present_card(jax.devices()[0].device_kind), updates)
    return {"gb": cost.bytes / 1e9, "launches": cost.launches, "estimate_ms": 1e3 * cost.seconds}


def present_card(kind: str) -> Card:
    """Returns the described card that a device is; of an unknown one the first, whose rates are assumed.

    Args:
        kind: as JAX names the device.
    """
    cards = all_cards()
    return next((card for name, card in cards.items() if name in kind.lower()), next(iter(cards.values())))
