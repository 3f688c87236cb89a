"""Bounds on the programs that XLA compiles for an H100, which need not be there: run with `pytest -m aot`.

A change that adds launches or traffic to the update or to the physics fails here. Figures are the compiler's,
of products by cuBLAS.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from baselines import get_algorithm
from envs_mjx.registry import make, parse
from experiments.deviceless.cards import all_cards
from experiments.deviceless.compiler import (
    DevicelessProgram,
    abstract,
    card_mesh,
    compile_lowered,
    host_launches,
    plugin_fault,
)
from experiments.deviceless.time_model import cost_of
from experiments.launch.device_estimate import PROJECT, DeviceEstimate, RunShapes, estimate
from experiments.launch.hparams import HPARAMS, build, load_rows, merge_rows
from mac.run.cost.gpu_program import Kernel, callbacks, host_waits, kernels
from mac.run.mesh import ALL

FAULT = plugin_fault()
pytestmark = [
    pytest.mark.aot,
    pytest.mark.promotion,
    pytest.mark.skipif(FAULT is not None, reason=f"cannot compile for a GPU: {FAULT}"),
]

ROOT = Path(PROJECT)
CARD = all_cards()["h100"]
UPDATES = 1000
BATCH = 64
SLACK = 1.1
"""Share of today's figures above which a test fails."""


class Figures(NamedTuple):
    """Today's figures, at the paper's size.

    Attributes:
        launches, gigabytes: of one update of all seeds.
        host_launches: CUDA graphs, and kernels outside of them, of which a segment consists; the body of a
            loop counts once.
    """

    launches: float
    gigabytes: float
    host_launches: int


UPDATE_OF: dict[tuple[str, int], Figures] = {
    ("cube-double-play-singletask-task2-v0", 1): Figures(876, 2.58, 13),
}
"""By environment and number of seeds."""
STEP_OF = {"hopper-medium-v2": 1717}
"""Launches of one control step; loops of unknown length count once."""


def run_shapes(name: str, seeds: int) -> RunShapes:
    task = parse(name)
    env = make(task, "mjx")
    entry = get_algorithm("mac")
    rows = merge_rows(load_rows(HPARAMS), "mac", task, "paper")
    algo = entry.algorithm(build(entry.config, rows["hp"], "hparams.toml"), env.spec, rows["steps"])
    return RunShapes(algo, env, 1_001_000, "float32", seeds, (), UPDATES)


@pytest.fixture(scope="module", params=UPDATE_OF, ids=lambda key: f"{key[0]}, {key[1]} seeds")
def update(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeviceEstimate, Figures]:
    """A compiled segment, with its bounds."""
    dump = tmp_path_factory.mktemp("xla")
    return estimate("segment", run_shapes(*request.param), "h100", dump), UPDATE_OF[request.param]


@pytest.fixture(scope="module", params=STEP_OF)
def control_step(request: pytest.FixtureRequest) -> tuple[DevicelessProgram, list[Kernel], int]:
    """A compiled `env.step` of a batch on engine `mjx`, with its bound."""
    mesh, env = card_mesh(CARD.target_config()), make(parse(request.param), "mjx")
    keys = jax.eval_shape(lambda: jr.split(jr.key(0), BATCH))
    action = jax.ShapeDtypeStruct((BATCH, env.spec.action_dim), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        task = jax.ShapeDtypeStruct((), jnp.int32)
        state = jax.eval_shape(jax.vmap(env.reset, in_axes=(0, None)), keys, task)
        lowered = jax.jit(jax.vmap(env.step)).lower(abstract(mesh, state, ALL), abstract(mesh, action, ALL))
    program = compile_lowered(lowered)
    return program, kernels(program.text, PROJECT), STEP_OF[request.param]


def test_update_launches_and_moves_no_more_than_today(update: tuple[DeviceEstimate, Figures]):
    found, today = update
    cost = cost_of(found.kernels, CARD, UPDATES)
    assert cost.launches <= SLACK * today.launches
    assert cost.bytes <= SLACK * 1e9 * today.gigabytes


def test_update_runs_in_few_cuda_graphs(update: tuple[DeviceEstimate, Figures]):
    found, today = update
    assert 1 <= host_launches(found.program.thunks) <= SLACK * today.host_launches


def test_update_waits_for_no_host(update: tuple[DeviceEstimate, Figures]):
    found, _ = update
    assert host_waits(found.kernels) == 0 and not callbacks(found.kernels)


def test_state_takes_the_place_of_the_one_before(update: tuple[DeviceEstimate, Figures]):
    """All results but the metrics, a few numbers per update, are written over the donated state."""
    program = update[0].program
    assert program.results - program.in_place < 100 * 4 * UPDATES


def test_control_step_launches_no_more_than_today(
    control_step: tuple[DevicelessProgram, list[Kernel], int],
):
    _, found, today = control_step
    assert sum(each.times for each in found) <= SLACK * today


def test_physics_is_not_rounded_to_tf32(control_step: tuple[DevicelessProgram, list[Kernel], int]):
    program, found, _ = control_step
    assert not [each for each in found if each.product and each.product.tf32]
    assert not callbacks(found) and program.memory < CARD.memory


def test_dump_is_read(update: tuple[DeviceEstimate, Figures]):
    assert "kCommandBuffer" in update[0].program.thunks


def test_ordinary_start_says_nothing_of_the_plugin():
    """With the extra and without a GPU, a command runs on the CPU and writes nothing on standard error."""
    env = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "experiments/run.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
