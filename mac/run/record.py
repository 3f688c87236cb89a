"""What a result cannot be reproduced without: `config.json` and `run.json` of a run folder."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from mac.files import read_json, write_json
from mac.machine import cores

PACKAGES = (
    "mac-jax", "jax", "jaxlib", "numpy", "equinox", "optax", "orbax-checkpoint", "mujoco", "mujoco-mjx",
    "warp-lang", "ogbench", "gymnasium", "dm-control",
)  # fmt: skip


def versions() -> dict[str, str]:
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
) -> None:
    """Writes `config.json` (the full configuration) and adds this launch to `run.json`.

    `run.json` keeps one entry per launch, so that a run that was resumed on another machine or with
    other versions says so.

    Args:
        data: where the dataset comes from, if it is known, as `mac.data.provenance.Provenance.plain` says it.
        resumed_from: step of the checkpoint, None for a new run.
    Raises:
        UserError: the folder cannot be written, or its `run.json` cannot be read.
    """
    path = folder / "run.json"
    launches = read_json(path)["launches"] if path.exists() else []
    write_json(folder / "config.json", config)
    launches.append({"resumed_from": resumed_from, "data": data or {}} | provenance())
    write_json(path, {"launches": launches})


def provenance() -> dict[str, Any]:
    """What a number cannot be reproduced without: time, command, folder, git, versions, hardware."""
    return {
        "started": _now(),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "git": git_state(Path(__file__).parent),
        "versions": versions(),
        "hardware": hardware(),
    }


def record_end(folder: Path, **facts: Any) -> None:
    """Adds to the newest launch in `run.json` when it ended, the peak memory, and `facts`.

    Raises:
        UserError: the file is gone or damaged, or cannot be written.
    """
    path = folder / "run.json"
    launches = read_json(path)["launches"]
    launches[-1] |= {"ended": _now(), **facts, "peak_memory_mb": peak_memory()}
    write_json(path, {"launches": launches})


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
