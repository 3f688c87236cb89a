"""Settings shared by all tests: compile cache, strict numerics, and a source of random keys.

Nothing of ours is imported here: pytest installs the type-checking import hook
(`--jaxtyping-packages`) first, and it only reaches modules that are imported afterwards.
"""

import contextlib
import ctypes
import gc
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read by JAX when it is imported, and inherited by the subprocesses that some tests start.
_cache_home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_home / "mac-jax" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile much and compute little. Without LLVM's optimizations and the newer fusion code a program
# compiles in a fifth of the time. Tests compare runs under the same flags, or with tolerances.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import jax.random as jr
import pytest

# Several seeds train on several devices; a CPU counts as two, however many cores it has.
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True, scope="module")
def strict_numerics(request: pytest.FixtureRequest) -> Iterator[None]:
    """Implicit rank and dtype promotion are errors: they catch `(B,) - (B, 1)` and stray float64.

    MJX itself relies on both, so modules with `pytestmark = pytest.mark.promotion` are exempt. The setting
    is per module and not per test because it is part of the key of JAX's compilation cache: module-wide
    fixtures compile once under it.
    """
    if request.node.get_closest_marker("promotion"):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


MOST_BYTES, MOST_MAPS = 1.2e9, 20_000
"""Of a process, after a file's tests; the next file may add as much again."""


def crowded() -> bool:
    """Compiled programs and models take much memory. Linux gives a process 65,530 pieces of mapped memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # another system, of which this is unknown
        return True
    return pages * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES or maps > MOST_MAPS


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Programs, models and what else is cached stay from file to file until they take too much memory."""
    yield
    if not crowded():
        return
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.startswith(("envs_mjx", "tests")):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is free


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function whose every call returns a new key; the sequence is the same in each test."""
    counter = itertools.count()
    return lambda: jr.key(next(counter))


# The command line's tests share a tiny dataset and a tiny run.


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of the command line that name a small dataset."""
    from tests.helpers.command_line import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 10 updates; not to be changed."""
    from tests.helpers.command_line import finished_run

    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the command line's estimates, which take a second."""
    from experiments import run as program

    monkeypatch.setattr(program, "announce", lambda *_: None)
