"""Checks of `doctor.py`; findings are yielded, not raised."""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from experiments.cli.jax_env_vars import PREALLOCATE, ignored
from experiments.doctor_checks.findings import BROKEN, OK, ROOT, WARNING, Finding
from experiments.doctor_checks.probes import JAX, MJX, PHYSICS, PICTURE, Probe, ProbeResult, drawing_remedy
from mac.card_memory import card_memory
from mac.cgroup_limits import cores, group_memory

PROJECT = "mac-jax"
GIB = 2**30
ROOM = 5 * GIB  # free disk space that a dataset of 1M transitions and its store may need
PLATFORMS = ("egl", "osmesa", "glfw")


def _project() -> tuple[str, list[str]]:
    """Returns the bounds of Python's version, and the dependencies with their bounds.

    Both come from a checkout's pyproject.toml, or else from the metadata of the installed project.
    """
    if (file := ROOT / "pyproject.toml").is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    described = importlib.metadata.metadata(PROJECT)
    needed = [line for line in importlib.metadata.requires(PROJECT) or () if "extra ==" not in line]
    return described["Requires-Python"], needed


def install_command() -> str:
    """Returns the command that installs the project again, from the folder of its source."""
    return f"pip install -e {ROOT}" if (ROOT / "pyproject.toml").is_file() else "pip install . in a checkout"


def numbers(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: `0.10.2rc1` is (0, 10, 2)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def version_fits(version: str, pins: str) -> bool:
    """Returns whether a version is within bounds such as `>=0.10.2,<0.13`."""
    have = numbers(version)
    for sign, bound in re.findall(r"(>=|<=|==|<|>|!=)\s*([\w.]+)", pins):
        wanted = numbers(bound)
        width = max(len(have), len(wanted))
        a, b = (x + (0,) * (width - len(x)) for x in (have, wanted))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b, "!=": a != b}[sign]:
            return False
    return True


def installed(package: str) -> str | None:
    """Returns the version of a package, None if it is missing."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def check_python(data: Path) -> Iterator[Finding]:
    """Checks Python's version."""
    pins, _ = _project()
    have = ".".join(map(str, sys.version_info[:3]))
    if version_fits(have, pins):
        yield Finding(OK, "python", f"{have} ({pins})")
    else:
        yield Finding(
            BROKEN, "python", f"{have}, needed is {pins}", "make an environment with Python 3.11 or 3.12"
        )


def check_install(data: Path) -> Iterator[Finding]:
    """Checks that the project itself is installed."""
    if version := installed(PROJECT):
        yield Finding(OK, PROJECT, version)
    else:
        yield Finding(BROKEN, PROJECT, "not installed", install_command())


def check_system(data: Path) -> Iterator[Finding]:
    """Checks the operating system; the project is tested on Linux."""
    name = platform.system() or sys.platform
    if name == "Linux":
        yield Finding(OK, "system", f"{name}, {platform.machine()}")
    elif name == "Windows":
        text = "Windows: untested, and files that another program has open cannot be replaced there"
        yield Finding(WARNING, "system", text, "use Linux, or WSL (Linux within Windows)")
    else:
        yield Finding(WARNING, "system", f"{name}: untested", "use Linux where something does not work")


def check_packages(data: Path) -> Iterator[Finding]:
    """Checks every dependency against its bounds."""
    wrong, count = 0, 0
    for requirement in _project()[1]:
        name, pins = re.match(r"([\w.-]+)([^;]*)", requirement).groups()  # pyright: ignore[reportOptionalMemberAccess]
        have, count = installed(name), count + 1
        if have is None or not version_fits(have, pins):
            wrong += 1
            yield Finding(
                BROKEN, name, f"{have or 'not installed'}, needed is {pins}", f"pip install '{requirement}'"
            )
    if not wrong:
        yield Finding(OK, "packages", f"all {count} that the project asks for, within their bounds")


def check_variables(data: Path) -> Iterator[Finding]:
    """Reports environment variables of JAX that the programs ignore."""
    for name, value in ignored().items():
        yield Finding(WARNING, "variable", f"{name}={value} is ignored by these programs", f"unset {name}")


def check_pairs(data: Path) -> Iterator[Finding]:
    """Checks packages that come in pairs, whose versions must fit each other."""
    for one, other, parts in (("jax", "jaxlib", 2), ("mujoco", "mujoco-mjx", 2)):
        a, b = installed(one), installed(other)
        if a is None or b is None:
            continue  # `check_packages` reports it, or the device fails
        if numbers(a)[:parts] == numbers(b)[:parts]:
            yield Finding(OK, one, f"{a} with {other} {b}")
        else:
            remedy = f"pip install '{other}=={'.'.join(map(str, numbers(a)[:parts]))}.*'"
            yield Finding(BROKEN, one, f"{a} does not fit {other} {b}", remedy)


class Probes:
    """Checks that try something; all run at the same time, from the beginning."""

    def __init__(self):
        # Without preallocation, since a training run may hold most of the GPU's memory.
        self._jax, self._physics = Probe(JAX, {PREALLOCATE: "false"}), Probe(PHYSICS)
        self._mjx = Probe(MJX, {"JAX_PLATFORMS": "cpu"})
        self._pictures = {name: Probe(PICTURE, {"MUJOCO_GL": name}) for name in PLATFORMS}

    def device(self, data: Path) -> Iterator[Finding]:
        """Checks the device that JAX computes on."""
        found, error = self._jax.result()
        gpu = shutil.which("nvidia-smi") is not None
        if found is None:
            wanted = os.environ.get("JAX_PLATFORMS")
            unset = f"unset JAX_PLATFORMS (it is {wanted!r}), or " if wanted else ""
            yield Finding(
                BROKEN, "device", error, f"{unset}pip install --force-reinstall 'jax>=0.10.2,<0.13'"
            )
            return
        memory = f", {found['memory'] / GIB:.0f} GiB" if found["memory"] else ""
        kind = (
            found["backend"]
            if found["device"] == found["backend"]
            else f"{found['device']} ({found['backend']})"
        )
        text = f"{found['count']} x {kind}{memory}"
        if found["backend"] == "cpu" and gpu:
            remedy = "pip install -e '.[cuda12]' (or cuda13, as nvidia-smi shows the driver's version)"
            yield Finding(WARNING, "device", f"{text}, though this machine has an NVIDIA GPU", remedy)
        else:
            yield Finding(OK, "device", text)
        card = card_memory() if found["backend"] == "gpu" else None
        if card is not None and card.free < 0.9 * card.total:
            held = f"other programs hold {(card.total - card.free) / GIB:.0f} of {card.total / GIB:.0f} GiB"
            yield Finding(WARNING, "device", held, "nvidia-smi names them; programs share what is left")

    def physics(self, data: Path) -> Iterator[Finding]:
        """Checks MuJoCo C, in a scene of OGBench."""
        yield self._line(
            "engine c",
            self._physics.result(),
            lambda found: f"cube-single, {found['rate']:,} steps of 2 ms per second on one core",
            BROKEN,
            "pip install --force-reinstall 'mujoco>=3.17,<3.18' 'ogbench>=1.2.2,<1.3'",
        )

    def mjx(self, data: Path) -> Iterator[Finding]:
        """Checks MJX, and MuJoCo Warp, which only NVIDIA GPUs need."""
        outcome = self._mjx.result()
        remedy = "pip install --force-reinstall 'mujoco-mjx>=3.17,<3.18'"
        yield self._line("engine mjx", outcome, lambda found: "takes a model", BROKEN, remedy)
        gpu = shutil.which("nvidia-smi") is not None
        extra = "pip install -e '.[warp]'"
        if installed("warp-lang") is None:
            text = "not installed; it is optional, and for NVIDIA GPUs"
            yield Finding(WARNING if gpu else OK, "engine warp", text, extra if gpu else "")
        elif outcome.found and outcome.found["warp"]:
            yield Finding(
                OK, "engine warp", "loads" + ("" if outcome.found["cuda"] else ", without CUDA: slow")
            )
        elif outcome.found:
            remedy = f"{extra}, or leave it: engines c and mjx do without"
            yield Finding(WARNING, "engine warp", outcome.found["why"], remedy)

    def renderer(self, data: Path) -> Iterator[Finding]:
        """Checks MuJoCo's renderer: each platform draws one small picture."""
        outcomes = {name: probe.result() for name, probe in self._pictures.items()}
        works = [name for name, outcome in outcomes.items() if outcome.found is not None]
        if set(works) & {"egl", "osmesa"}:
            yield Finding(OK, "renderer", f"{', '.join(works)} (a picture was drawn)")
            return
        why = "; ".join(f"{name}: {outcome.error}" for name, outcome in outcomes.items() if outcome.error)
        yield Finding(
            WARNING,
            "renderer",
            f"no offscreen platform works ({why[:400]})",
            drawing_remedy(why),
        )

    @staticmethod
    def _line(what: str, outcome: ProbeResult, describe, state: str, remedy: str) -> Finding:
        if outcome.found is None:
            return Finding(state, what, outcome.error, remedy)
        return Finding(OK, what, describe(outcome.found))


def check_memory(data: Path) -> Iterator[Finding]:
    """Checks the memory of the host."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    if not pages:
        return
    total = pages * os.sysconf("SC_PAGE_SIZE")
    text, left = f"{cores()} cores, {total / GIB:.0f} GiB of memory", min(group_memory(), default=total)
    if left < total:
        text += f", of which the limits of this container leave {left / GIB:.1f} GiB"
    small = min(left, total) < 4 * GIB
    remedy = "take fewer --seeds and --data.dtype uint16" if small else ""
    yield Finding(WARNING if small else OK, "host", text, remedy)


def cache_folder() -> Path:
    """Returns the folder of compiled programs, as `arguments.start_jax` chooses it."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else home / "mac-jax" / "xla"


def check_cache(data: Path) -> Iterator[Finding]:
    """Checks the cache of compiled programs."""
    folder = cache_folder()
    if refusal := cannot_write(folder):
        remedy = "set JAX_COMPILATION_CACHE_DIR to a folder of yours; without it every start compiles again"
        yield Finding(WARNING, "cache", f"{folder}: {refusal}", remedy)
        return
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    yield Finding(OK, "cache", f"{folder}: {len(files):,} files, {size / 1e6:,.0f} MB of compiled programs")


def check_disk(data: Path) -> Iterator[Finding]:
    """Checks the free disk space for data and runs."""
    for what, folder in (("data", data), ("runs", Path("runs"))):
        free = shutil.disk_usage(existing(folder)).free
        text = f"{free / GIB:,.1f} GiB free for {folder}/"
        if free < ROOM:
            flag = "--data.dir" if what == "data" else "--out"
            yield Finding(
                WARNING, "disk", text, f"1M transitions take up to 1 GiB, twice while converting; see {flag}"
            )
        else:
            yield Finding(OK, "disk", text)


def check_folders(data: Path) -> Iterator[Finding]:
    """Checks that results and data can be written."""
    for folder, flag in ((Path("runs"), "--out"), (data, "--data.dir")):
        refusal = cannot_write(folder)
        if refusal:
            yield Finding(
                BROKEN, "folder", f"{folder}/: {refusal}", f"set its rights, or choose another {flag}"
            )
        else:
            yield Finding(
                OK, "folder", f"{folder}/ can be written" + ("" if folder.exists() else " (to be made)")
            )


def existing(folder: Path) -> Path:
    """Returns the folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def cannot_write(folder: Path) -> str | None:
    """Returns why a folder, or its nearest existing parent, is not writable; None if it is."""
    place = existing(folder)
    if not place.is_dir():
        return f"{place} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        return error.strerror or str(error)
    return None
