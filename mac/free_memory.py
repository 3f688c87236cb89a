"""Free memory of the host and of the device."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import jax

from mac.card_memory import CardMemory, card_memory
from mac.cgroup_limits import group_memory

_MEMINFO = Path("/proc/meminfo")


class Memory(NamedTuple):
    """Free bytes; None where the system does not say.

    On a CPU the device's memory is the host's, and `shared` says so.
    """

    host: int | None
    device: int | None
    shared: bool


def free_memory() -> Memory:
    """Measures the free memory of this host and of the first local device."""
    host = free_host_memory()
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return Memory(host, host, shared=True)
    stats = device.memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    free = None if limit is None else limit - used
    if free is not None and (card := card_memory()):
        # The limit is a share of the card, whatever other programs hold of it.
        free = max(0, min(free, card.free + stats.get("pool_bytes", used) - used))
    return Memory(host, free, shared=False)


def held_by_others() -> CardMemory | None:
    """Returns the card's size with what this process could take of it, if other programs hold much of it.

    None if they hold less than a tenth, or where no card tells. JAX has been started before.
    """
    device = jax.local_devices()[0]
    card = None if device.platform == "cpu" else card_memory()
    if card is None:
        return None
    stats = device.memory_stats() or {}
    available = card.free + stats.get("pool_bytes", stats.get("bytes_in_use", 0))
    return CardMemory(card.total, available) if available < 0.9 * card.total else None


def free_host_memory() -> int | None:
    """Bytes that this process may still take without paging; None where the system does not say."""
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = _MEMINFO.read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    free += group_memory()  # a container may be allowed less than the machine has
    if not free:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=None)
