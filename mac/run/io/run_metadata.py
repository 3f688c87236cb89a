"""Metadata that reproduce a result: `config.json` and `run.json` of a run folder.

`run.json` is a record for people. Nothing is trained otherwise because of it, so a damaged one is set aside.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mac.atomic_files import misfit, read_table, write_json, writing
from mac.cgroup_limits import cores
from mac.errors import UserError

RECORD = "run.json"

PACKAGES = (
    "mac-jax", "jax", "jaxlib", "numpy", "equinox", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx",
    "warp-lang", "ogbench", "gymnasium", "dm-control",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of Python and of each package that may change a number; "missing" if not installed."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


@functools.cache
def cpu_model() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """CPU, cores, memory (GiB, of the machine) and the devices that JAX computes on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = jax.devices()
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": round(memory, 1),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout around `folder` and whether tracked files differ from it; None outside git."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def record_launch(
    folder: Path,
    config: dict[str, Any],
    *,
    data: dict[str, Any] | None = None,
    resumed_from: int | None = None,
    numerics: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes `config.json` (the full configuration) and adds this launch to `run.json`.

    `run.json` keeps one entry per launch, so that a run that was resumed on another machine or with
    other versions says so. Returns lines for the user: a record that was damaged, and, of a run that is
    resumed, in what this launch differs from the last one.

    Args:
        data: where the dataset comes from, if it is known, as `mac.data.provenance.Provenance.plain` says it.
        resumed_from: step of the checkpoint, None for a new run.
        numerics: arithmetic of the networks on this device (`mac.nn.frozen.Numerics`).
    Raises:
        UserError: the folder cannot be written.
    """
    before, notes = _kept(folder)
    write_json(folder / "config.json", config)
    launch = {"resumed_from": resumed_from, "data": data or {}} | run_provenance()
    launch |= {"numerics": dict(numerics)} if numerics else {}
    write_json(folder / RECORD, {"launches": [*before, launch]})
    if before and resumed_from is not None and (note := differences(before[-1], launch)):
        notes.append(note)
    return notes


def launches(folder: Path) -> list[dict[str, Any]]:
    """Reads the launches of the run in `folder` from `run.json`, the newest last; none without the file.

    Entries that older versions did not write are missing; those that there are have the types of today.

    Raises:
        UserError: it cannot be read, or is no such record.
    """
    path = folder / RECORD
    if not path.exists():
        return []
    found = read_table(path, launches=list)["launches"]
    kinds: dict[str, type | tuple[type, ...]] = {"folder": str, "git": (dict, type(None))}
    kinds |= dict.fromkeys(("data", "versions", "hardware", "environment", "numerics"), dict)
    for launch in found:
        there = {name: kind for name, kind in kinds.items() if isinstance(launch, dict) and name in launch}
        if fault := misfit(launch, **there):
            raise UserError(f"{path} is damaged (a launch: {fault}); restore it or delete it")
    return found


def _kept(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The launches on record, and a note if the record is damaged: then it is renamed, and there are none."""
    try:
        return launches(folder), []
    except UserError as error:
        path, number = folder / f"{RECORD}.damaged", 1
        while path.exists():
            number += 1
            path = folder / f"{RECORD}.damaged-{number}"
        with writing(path):
            os.rename(folder / RECORD, path)
        return [], [f"note: {error}. It is called {path.name} now, and a new one is begun"]


_NO_MATTER = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_PLATFORMS")
"""Prefixes of variables that change no number, or whose effect the device's kind tells."""


def environment() -> dict[str, str]:
    """Variables that decide how JAX computes."""
    chosen = {name for name in os.environ if name == "XLA_FLAGS" or name.startswith("JAX_")}
    return {name: os.environ[name] for name in sorted(chosen)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """One line if two launches differ in what decides the last bits of numbers, else None.

    What either of them does not tell, as older versions did not tell of variables, is not compared.
    """
    pairs = []
    for group, names in (("hardware", ("cpu", "device")), ("versions", ("jax", "jaxlib", "numpy"))):
        there, here = before.get(group, {}), now.get(group, {})
        pairs += [(name, there[name], here[name]) for name in names if name in there and name in here]
    if "environment" in before and "environment" in now:
        there, here = before["environment"], now["environment"]
        names = sorted(name for name in {*there, *here} if not name.startswith(_NO_MATTER))
        pairs += [(name, there.get(name, "unset"), here.get(name, "unset")) for name in names]
    there, here = before.get("numerics", {}), now.get("numerics", {})
    pairs += [(name, there[name], here[name]) for name in here if name in there]
    differing = {name: f"{name} ({old} then, {new} now)" for name, old, new in pairs if old != new}
    if not differing:
        return None
    how_much = "" if differing.keys() & here.keys() else " in their last bits"
    return (
        f"note: this launch differs from the last one in {', '.join(differing.values())}: numbers may differ"
        f"{how_much} from those of a run that was never stopped"
    )


def run_provenance() -> dict[str, Any]:
    """Returns what reproduces a number: time, command, folder, git, versions, hardware, ..."""
    return {
        "started": _now(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "git": git_state(Path(__file__).parent),
        "versions": package_versions(),
        "hardware": hardware(),
        "environment": environment(),
    }


def record_end(folder: Path, **facts: Any) -> None:
    """Adds to the newest launch in `run.json` when it ended, the peak memory, and `facts`.

    Raises:
        UserError: it cannot be written.
    """
    found, _ = _kept(folder)
    found = found or [{}]  # somebody deleted it meanwhile
    found[-1] |= {"ended": _now(), **facts, "peak_memory_mb": peak_memory()}
    write_json(folder / RECORD, {"launches": found})


def peak_memory() -> dict[str, int]:
    """Most memory that this process ever held, in MB: on the host, and on the first accelerator."""
    peak = {}
    with contextlib.suppress(ImportError):  # not a POSIX system
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        peak["device"] = device["peak_bytes_in_use"] // 10**6
    return peak


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
