"""Memory of an NVIDIA card, whatever program holds it. Imports only Python's own modules."""

import contextlib
import os
import shutil
import subprocess
from typing import NamedTuple


class CardMemory(NamedTuple):
    """Bytes of an NVIDIA card: in all, and those that no program holds."""

    total: int
    free: int


def card_memory() -> CardMemory | None:
    """Asks nvidia-smi for the memory of the first visible card; None where there is none."""
    program = shutil.which("nvidia-smi")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    if program is None:
        return None
    command = [program, "-i", first, "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        total, free = (int(word) * 2**20 for word in done.stdout.split(","))
        return CardMemory(total, free)
    return None
