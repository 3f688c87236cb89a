"""The command line as processes of its own: start-up, devices, signals, kills."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.run import main
from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.logger import EVAL, METRICS
from mac.run.io.run_outputs import CHECKPOINTS
from tests.helpers.command_line import SIZES, content, params

ROOT = Path(__file__).parents[2]


# Other processes.


def launch(*argv: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "experiments/run.py", *argv]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def processor_seconds(*argv: str) -> tuple[str, float]:
    """What a Python process prints, and the processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick():
    """Beside the import of JAX alone, since a busy machine is slower by that too; the better of two."""
    ratios = []
    for _ in range(2):
        _, jax = processor_seconds("-c", "import jax")
        out, ours = processor_seconds("experiments/run.py", "--help")
        assert "--hp.batch" in out and "--resume" in out
        ratios.append(ours / jax)
    assert min(ratios) < 4.5, ratios


def test_help_imports_nothing_heavy():
    """What only work needs: the simulator's bindings for JAX, signal processing, checkpoints, pictures."""
    program = "import sys, runpy; sys.argv = ['run.py', '--help']\n"
    program += "try: runpy.run_path('experiments/run.py', run_name='__main__')\n"
    program += "except SystemExit: print(*sys.modules, sep='\\n')"
    out, _ = processor_seconds("-c", program)
    modules = set(out.split())
    assert "experiments.launch.settings" in modules
    heavy = {"mujoco.mjx", "scipy.signal", "scipy.stats", "orbax.checkpoint", "matplotlib.pyplot"}
    assert not modules & heavy


def test_missing_gpu_is_one_line():
    process = launch("--dry-run", JAX_PLATFORMS="cuda")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "JAX_PLATFORMS" in line and "cuda12" in line
    if find_spec("jax_plugins") is None:  # whose own start prints one, without a driver
        assert "Traceback" not in err


@pytest.mark.slow
def test_training_outlives_its_log(copied: Path):
    """The log's disk is full, and the terminal knows ASCII only."""
    command = [sys.executable, "experiments/run.py", "--out", str(copied), "--resume", "--steps", "20"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: standard output cannot be written (No space left on device)")
    with CheckpointStore(copied / CHECKPOINTS) as store:
        assert store.latest() == 20


@pytest.mark.slow
def test_variables_of_jax_change_no_number(finished: Path, data: list[str], tmp_path: Path):
    """Each of them would end the run with a traceback, or change its random numbers."""
    variables = {
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_JIT": "true",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_RANDOM_SEED_OFFSET": "3",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }
    process = launch(*SIZES, *data, "--steps", "10", "--out", str(tmp_path / "run"), **variables)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert params(tmp_path / "run") == params(finished)
    assert [line.split("=")[0] for line in err.splitlines()] == [f"note: {name}" for name in variables]


def wait_for_update(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Returns when the log has reached `step`."""
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            if json.loads((folder / METRICS).read_bytes().rsplit(b"\n", 2)[-2])["step"] >= step:
                return
        time.sleep(0.01)
    pytest.fail("".join(process.communicate()))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_with_a_checkpoint_of_what_was_done(data: list[str], tmp_path: Path, number: int):
    """The checkpoint equals the end of a run that was asked for no more updates than it reached."""
    flags = [*SIZES, *data, "--run.segment", "50"]
    process = launch(*flags, "--out", str(tmp_path / "cut"), "--steps", "1000000")
    wait_for_update(tmp_path / "cut", 100, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number and err == ""
    with CheckpointStore(tmp_path / "cut" / CHECKPOINTS) as store:
        reached = store.latest()
    assert reached and f"stopped at update {reached:,}" in out
    assert f"--out {tmp_path / 'cut'} --resume" in out
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["launches"][0]["signal"] == number
    steps = ["--steps", str(reached)]
    assert main([*flags, "--out", str(tmp_path / "straight"), *steps]) == 0
    assert params(tmp_path / "cut") == params(tmp_path / "straight")
    assert main(["--out", str(tmp_path / "cut"), "--resume", *steps]) == 0
    for name in (METRICS, EVAL):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


@pytest.mark.slow
def test_signal_while_data_is_made_leaves_none(tmp_path: Path):
    flags = ["--data.dir", str(tmp_path / "d"), "--data.rows", "2000000", "--out", str(tmp_path / "o")]
    process = launch(*SIZES, *flags, HOME=str(tmp_path))
    assert process.stdout
    for line in process.stdout:
        if line.startswith("generating"):
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "Traceback" not in err
    assert content(tmp_path / "d") == {} and not (tmp_path / "o").exists()


@pytest.mark.slow
def test_command_killed_five_times_ends_as_if_never_killed(data: list[str], tmp_path: Path):
    steps, killed = 3000, tmp_path / "killed"
    flags = ["--run.checkpoint-every", "100", "--run.eval-every", "1500", "--steps", str(steps)]
    for attempt in range(5):
        resume = ["--resume"] if attempt else [*SIZES, *data, *flags]
        process = launch(*resume, "--out", str(killed))
        wait_for_update(killed, 500 * attempt + 217, process)
        process.kill()
        process.wait()
    assert main(["--resume", "--out", str(killed)]) == 0
    assert main([*SIZES, *data, *flags, "--out", str(tmp_path / "straight")]) == 0
    assert params(killed) == params(tmp_path / "straight")
    for name in (METRICS, EVAL):
        assert (killed / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
