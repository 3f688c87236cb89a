"""Cost of a run on a GPU that is not there: `run.py --dry-run --device h100`.

The run's own functions are lowered for the card from shapes alone, and compiled; nothing is computed.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import mac
from envs_mjx.base import AbstractEnv
from experiments.deviceless.cards import CardName, all_cards
from experiments.deviceless.compiler import DevicelessProgram, abstract, card_mesh, compile_lowered
from experiments.deviceless.report import Unit, program_lines
from experiments.launch.cost_estimate import make_plan
from experiments.launch.settings import ProgramName
from mac.algorithm import AbstractAlgorithm
from mac.data.normalize import Normalizer
from mac.errors import UserError
from mac.formatting import counted
from mac.free_memory import Memory
from mac.run.cost.gpu_program import Kernel, kernels
from mac.run.evaluate import Policies, evaluate
from mac.run.mesh import ALL, SEED, seed_keys
from mac.run.seed_diagnostics import diagnose
from mac.run.segment import init_function, segment

PROJECT = str(Path(mac.__file__).parents[1])
"""Folder whose source lines are named."""


class RunShapes(NamedTuple):
    """All that decides the shapes of a run's programs.

    Attributes:
        rows: of a window of data, stored as `dtype`.
        lanes: seeds, times the configurations of a sweep.
        swept: names of the hyperparameters that a sweep varies.
        updates: of one call of `segment`.
        episodes, batch: of an evaluation, as in `EvalConfig`.
    """

    algo: AbstractAlgorithm
    env: AbstractEnv
    rows: int
    dtype: str
    lanes: int
    swept: tuple[str, ...]
    updates: int
    episodes: int = 15
    batch: int = 0


class DeviceEstimate(NamedTuple):
    """A program as compiled for a card, and its kernels."""

    program: DevicelessProgram
    kernels: list[Kernel]
    lowering_seconds: float


def card_memory(name: CardName) -> Memory:
    """Returns the memory of a card as if it were free, on a host of unknown memory."""
    return Memory(host=None, device=all_cards()[name].memory, shared=False)


def segment_updates(segment: int, eval_every: int, checkpoint_every: int, steps: int) -> int:
    """Returns the updates of one call of `segment`, as the training loop chooses them."""
    return min(gcd(segment, eval_every, checkpoint_every), steps)


def lower(name: ProgramName, run: RunShapes, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers one of a run's programs for the devices of `mesh`.

    Raises:
        UserError: the program calls Python on the host.
    """
    window, _, key = make_plan(run.algo, run.env.spec, run.rows, run.lanes, run.dtype).args
    data = abstract(mesh, window, ALL)
    keys = abstract(mesh, jax.ShapeDtypeStruct((run.lanes,), key.dtype), SEED)
    values = jax.ShapeDtypeStruct((run.lanes,), jnp.float32)
    swept = abstract(mesh, dict.fromkeys(run.swept, values), SEED)
    # Not `set_mesh`: what is computed while a function is traced, such as a table, belongs on this machine.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        first = init_function(run.algo, mesh)
        state = abstract(mesh, jax.eval_shape(first, keys, swept), SEED)
        lowerings: dict[str, Callable[[], jax.stages.Lowered]] = {
            "segment": partial(_lower_segment, run, mesh, data, keys, state),
            "evaluate": partial(_lower_evaluate, run, mesh, keys, state.for_acting()),
            "diagnose": partial(diagnose.lower, run.algo, mesh, data, keys, state.without_memory()),
            "init": partial(first.lower, keys, swept),
        }
        return lowerings[name]()


def _lower_segment(run: RunShapes, mesh: Mesh, data: Any, keys: Any, state: Any) -> jax.stages.Lowered:
    steps = abstract(mesh, jax.ShapeDtypeStruct((run.updates,), jnp.int32), ALL)
    return segment.lower(run.algo, mesh, data, keys, steps, state)


def _lower_evaluate(run: RunShapes, mesh: Mesh, keys: Any, state: Any) -> jax.stages.Lowered:
    normalizer = abstract(mesh, _normalizer(run), ALL)
    try:
        return _evaluation(run).lower(normalizer, state, keys)
    except RuntimeError as error:
        if "Unknown backend" not in str(error):
            raise
        raise UserError(
            f"--device-programs evaluate: {run.env.spec.name} calls Python on the host here, which cannot be "
            "compiled for a card that is not there; take --eval.engine mjx, or leave it out"
        ) from error


def trace_evaluate(run: RunShapes) -> jax.stages.Traced:
    """Traces the evaluation for the platform of the mesh that is set; needs no plug-in."""
    keys = jax.eval_shape(lambda: seed_keys(0, run.lanes))
    state = jax.eval_shape(jax.vmap(run.algo.init), keys).for_acting()
    return _evaluation(run).trace(_normalizer(run), state, keys)


def _evaluation(run: RunShapes) -> Any:
    def play(normalizer: Normalizer, state: Any, keys: Any) -> Any:
        return evaluate(Policies(run.algo, normalizer, state), run.env, run.episodes, keys, batch=run.batch)

    return jax.jit(play)


def _normalizer(run: RunShapes) -> Any:
    entry = jax.ShapeDtypeStruct((run.env.spec.obs_dim,), jnp.float32)
    return jax.eval_shape(Normalizer, entry, entry)


def estimate(name: ProgramName, run: RunShapes, card: CardName, dump: Path | None = None) -> DeviceEstimate:
    """Compiles one of a run's programs for a card that is not there.

    Args:
        dump: an empty folder for XLA's own files, see `compile_lowered`.
    Raises:
        UserError: the extra `aot` is missing, or the program calls Python on the host.
    """
    began = time.perf_counter()
    lowered = lower(name, run, card_mesh(all_cards()[card].target_config()))
    seconds = time.perf_counter() - began
    program = compile_lowered(lowered, dump)
    return DeviceEstimate(program, kernels(program.text, PROJECT), seconds)


def device_lines(
    run: RunShapes, card: CardName, programs: tuple[ProgramName, ...], steps: int, held: int = 1
) -> Iterator[str]:
    """Yields the description of a run's programs on a card, as each is compiled.

    Args:
        steps: updates of the whole run.
        held: windows of data that are on the device at a time.
    """
    window, *_ = make_plan(run.algo, run.env.spec, run.rows, run.lanes, run.dtype).args
    more = (held - 1) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(window))
    lanes = counted(run.lanes, "seed")
    units = {
        "segment": Unit(f"update of all {lanes}" if run.lanes > 1 else "update", run.updates, steps),
        "evaluate": Unit("call, with one iteration of each loop of unknown length"),
    }
    for name in programs:
        found = estimate(name, run, card)
        size = f"{counted(run.updates, 'update')} of {lanes}" if name == "segment" else f"of {lanes}"
        yield (
            f"{name:<12} {size}, lowered in {found.lowering_seconds:.0f} s, compiled in "
            f"{found.program.seconds:.0f} s"
        )
        yield from program_lines(
            found.program, found.kernels, all_cards()[card], units.get(name, Unit("call")), more
        )
