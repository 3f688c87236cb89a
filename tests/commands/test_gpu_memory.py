"""A GPU's memory is taken as needed and shared with other programs, and its lack has the right remedy."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments.cli import arguments, exit_status, jax_env_vars
from experiments.cli.exit_status import is_out_of_memory
from mac import free_memory as memory
from mac.card_memory import CardMemory
from mac.errors import UserError
from mac.free_memory import Memory

GB = 10**9


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch):
    for name in jax_env_vars._MEMORY:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts an nvidia-smi on the path which reports MiB of a card, or fails."""

    def install(total: int = 80_000, free: int = 79_000, status: int = 0) -> Path:
        program, called = tmp_path / "nvidia-smi", tmp_path / "called"
        program.write_text(f'#!/bin/sh\necho "$@" > {called}\necho "{total}, {free}"\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return called

    return install


def gpu(monkeypatch: pytest.MonkeyPatch, **stats: int) -> None:
    """Makes JAX's first device a GPU with these statistics."""
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [device])


# Preallocation.

OPTIONS = """
from jax._src.lib import xla_client
from experiments.cli.exit_status import exit_status
def work():
    print(xla_client.generate_pjrt_gpu_plugin_options())
    return 0
exit_status(work, short_of_memory="", interrupted="")
"""


def options_of_a_gpu() -> str:
    """Returns the options with which JAX would start a GPU in one of our commands."""
    environment = {name: value for name, value in os.environ.items() if name not in jax_env_vars._MEMORY}
    done = subprocess.run(
        [sys.executable, "-c", OPTIONS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_commands_take_memory_of_a_gpu_as_they_need_it():
    assert "'preallocate': False" in options_of_a_gpu()


def test_variables_of_the_user_decide_how_memory_is_taken(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    jax_env_vars.take_memory_as_needed()
    assert jax_env_vars.PREALLOCATE not in os.environ
    monkeypatch.setenv(jax_env_vars.PREALLOCATE, "true")
    jax_env_vars.take_memory_as_needed()
    assert os.environ[jax_env_vars.PREALLOCATE] == "true"


HOLDS = """
from experiments.cli import jax_env_vars
jax_env_vars.take_memory_as_needed()
import jax.numpy as jnp
held = jnp.ones(2**20).block_until_ready()
print("ready", flush=True)
input()
"""


@pytest.mark.gpu
def test_two_programs_find_room_on_one_card():
    environment = {name: value for name, value in os.environ.items() if name not in jax_env_vars._MEMORY}
    command, before = [sys.executable, "-c", HOLDS], memory.card_memory()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "ready\n"
        if before is not None and (now := memory.card_memory()):
            assert before.free - now.free < 0.1 * before.total  # JAX's own default is three quarters
        second = subprocess.run(command, env=environment, input="\n", capture_output=True, text=True)
        assert second.returncode == 0, second.stderr
        first.communicate("\n")


# Free memory.


def test_what_other_programs_hold_of_a_gpu_is_not_free(card, monkeypatch: pytest.MonkeyPatch):
    # JAX may take 60 GB and has taken 4, of which it uses 3.
    gpu(monkeypatch, bytes_limit=60 * GB, bytes_in_use=3 * GB, pool_bytes=4 * GB)
    assert memory.free_memory().device == 57 * GB
    card(free=10_000)
    assert memory.free_memory().device == 10_000 * 2**20 + 1 * GB
    card(free=79_000)
    assert memory.free_memory().device == 57 * GB
    card(status=9)
    assert memory.free_memory().device == 57 * GB


def test_the_card_is_the_first_that_cuda_may_see(card, monkeypatch: pytest.MonkeyPatch):
    called = card(80_000, 70_000)
    assert memory.card_memory() == CardMemory(80_000 * 2**20, 70_000 * 2**20)
    assert "-i 0 " in called.read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    memory.card_memory()
    assert "-i 3 " in called.read_text()


def test_no_card_is_asked_on_a_cpu(card):
    called = card()
    assert isinstance(memory.free_memory(), Memory) and memory.held_by_others() is None
    assert not called.exists()


# Out of memory.

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes."
TOO_LITTLE = [
    XLA,
    "RESOURCE_EXHAUSTED: Failed to allocate request for 20.00GiB (21474836480B) on device ordinal 0",
    "INTERNAL: CUDA error: Failed to instantiate CUDA graph: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "INTERNAL: cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED",
    "INTERNAL: cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
    "INTERNAL: Failed to allocate 1048576 bytes on device 'cuda:0'",
]


def status_of(error: Exception) -> int:
    def fail() -> int:
        raise error

    return exit_status.exit_status(fail, short_of_memory="take fewer --seeds", interrupted="")


@pytest.mark.parametrize("text", TOO_LITTLE)
def test_too_little_memory_of_a_gpu_is_one_line(text: str, capsys: pytest.CaptureFixture[str]):
    assert status_of(jax.errors.JaxRuntimeError(text)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (") and error.endswith("; take fewer --seeds\n")
    assert error.count("\n") == 1


def test_warp_without_memory_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert status_of(RuntimeError("Failed to allocate 1048576 bytes on device 'cuda:0'")) == 2
    assert "take fewer --seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 294912, available: 232448",
        "INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
    ],
)
def test_other_faults_of_a_gpu_keep_their_traceback(text: str):
    with pytest.raises(jax.errors.JaxRuntimeError):
        status_of(jax.errors.JaxRuntimeError(text))


def test_memory_that_other_programs_hold_is_named(
    card, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    gpu(monkeypatch, bytes_limit=60 * GB, bytes_in_use=1 * GB, pool_bytes=2 * GB)
    card(total=80_000, free=20_000)  # MiB: 62.9 GB are taken, 2 of them by this process
    assert status_of(jax.errors.JaxRuntimeError(XLA)) == 2
    assert "; other programs hold 61 of this GPU's 84 GB (nvidia-smi names them)\n" in capsys.readouterr().err
    card(total=80_000, free=77_000)
    assert status_of(jax.errors.JaxRuntimeError(XLA)) == 2
    assert "other programs" not in capsys.readouterr().err
    assert status_of(MemoryError()) == 2  # of the host
    assert "other programs" not in capsys.readouterr().err


def test_a_gpu_without_room_to_start_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail() -> str:
        raise RuntimeError("Unable to initialize backend 'cuda': INTERNAL: CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(arguments.jax, "default_backend", fail)
    with pytest.raises(UserError, match=r"memory other programs hold \(nvidia-smi .*CUDA_VISIBLE_DEVICES"):
        arguments.start_jax(1)


def test_only_errors_of_the_machine_are_out_of_memory():
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError("out of memory"))
