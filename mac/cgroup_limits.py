"""Cores and memory that this process may use, within the limits of its control groups.

A container with a quota sees all cores and all memory of its host. The limits stand in the files of its
control group and of the groups around it, in version 2 or 1 of Linux's interface. Imports only Python's own
modules.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_UNREADABLE = (OSError, ValueError, ZeroDivisionError)  # missing, or `max`: no limit


def cores() -> int:
    """Processor cores that this process may use, at least 1; a quota of 1.5 cores counts as 2."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([count, *_quotas()])))


def group_memory() -> list[int]:
    """Bytes that each limited group around this process may still take; the cache counts as free."""
    free = []
    for folder in _folders("memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(*_UNREADABLE):
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                left = int(*_lines(folder / limit)) - int(*_lines(folder / used))
                free.append(left + int(stat.get(cache, 0)))
    return free


def _quotas() -> Iterator[float]:
    """The number of cores that each limited group around this process may keep busy."""
    for folder in _folders("cpu"):
        with contextlib.suppress(*_UNREADABLE):
            quota, period = map(int, _lines(folder / "cpu.max")[0].split())
            if quota > 0:
                yield quota / period
        with contextlib.suppress(*_UNREADABLE):
            quota, period = (int(*_lines(folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
            if quota > 0:  # -1: no limit
                yield quota / period


def _folders(controller: str) -> Iterator[Path]:
    """Lists the folders that may hold limits of a controller, innermost first; not all of them exist.

    Args:
        controller: `cpu` or `memory`.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, names, own = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            # Version 1 has a tree for each set of controllers; version 2 has one, with no name.
            root = _GROUPS / names
            within = PurePosixPath(own).parts[1:]
            # A group outside the container's view is shown as `/../name`.
            for depth in range(len(within), 0, -1) if ".." not in within else ():
                yield root.joinpath(*within[:depth])
            yield root
    yield from (_GROUPS, _GROUPS / controller)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
