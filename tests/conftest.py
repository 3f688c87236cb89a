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

import jax
import jax.random as jr
import pytest

# Several seeds train on several devices; a CPU counts as two, however many cores it has.
jax.config.update("jax_num_cpu_devices", 2)


def pytest_configure(config: pytest.Config) -> None:
    """Makes compilation five times as fast and programs slower, which suits all tests that are not slow.

    They compile much and compute little. Tests compare runs under the same flags or with a tolerance, so no
    number changes its meaning. The variables are for the processes that tests start.
    """
    if "not slow" in config.option.markexpr:
        if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
            os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() in ("1", "true"):
            jax.config.update("jax_disable_most_optimizations", True)


LONG_FILES = (
    "test_resume_after_kill",
    "test_tabletop_mjx",
    "test_walker_mjx",
    "test_evaluate_command",
    "test_mjx",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the longest files, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: not item.path.name.startswith(LONG_FILES))


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
    with strictly():
        yield


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


BETWEEN_FILES, BETWEEN_TESTS = 1.5e9, 2.1e9
"""Bytes that a process may keep; the next test may need 500 MB more."""
MOST_MAPS = 25_000
"""Pieces of mapped memory that it may keep, of 65,530 that Linux gives one."""


def resident_bytes() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # another system, of which this is unknown
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def many_maps() -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPS
    return False


def clear_models() -> None:
    """Empties the caches of our functions, some of which hold MuJoCo's models."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("envs_mjx", "tests")):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def release() -> None:
    clear_models()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is free


_kept = [0.0]
"""Bytes that the last release left, because something is in use."""


@pytest.fixture(autouse=True)
def bounded_models() -> Iterator[None]:
    """Models are kept until they take too much memory; a program that holds one is compiled anew without."""
    yield
    if resident_bytes() > max(BETWEEN_TESTS, _kept[0] + 3e8):
        release()
        _kept[0] = resident_bytes()


@pytest.fixture(autouse=True, scope="module")
def bounded_programs() -> Iterator[None]:
    """Models and compiled programs are kept from file to file until they take too much memory."""
    yield
    if resident_bytes() > BETWEEN_FILES or many_maps():
        jax.clear_caches()
        release()
    _kept[0] = 0.0


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
    """The folder of a run of 10 updates; not to be changed. The first process to ask makes it for all."""
    from mac.run.io.folder_lock import lock
    from tests.helpers.command_line import finished_run

    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as file, strictly():  # as in the tests, which find its programs compiled
        lock(file.fileno(), shared, patience=600.0)
        if not (shared / "made").exists():
            finished_run(shared)
            (shared / "made").touch()
    return shared / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the command line's estimates, which take a second."""
    from experiments import run as program

    monkeypatch.setattr(program, "announce", lambda *_: None)
