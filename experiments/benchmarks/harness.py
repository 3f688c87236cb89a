"""Shared parts of the benchmarks: a process for each configuration, and CSV files with their provenance."""

import csv
import dataclasses
import datetime
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mac.atomic_files import replace_file
from mac.cgroup_limits import cores
from mac.errors import UserError
from mac.run.io.run_metadata import cpu_model, git_state

BENCH = Path(__file__).parents[1] / "benchmark.py"


def measure_in_process(what: str, first: Sequence[str], args: Any) -> Any:
    """Runs `benchmark.py` in a process of its own; returns the JSON of the last line that it prints.

    A process of its own has its own peak memory, and may divide the CPU into another number of devices. Its
    messages go to stderr.

    Args:
        what: the configuration, for messages.
        first: first words of the command line; the flags of `args`, except `out`, follow.
    Raises:
        UserError: the process failed.
    """
    print(f"measuring {what}", file=sys.stderr, flush=True)
    command = [sys.executable, str(BENCH), *first, *as_flags(args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{what}: status {done.returncode}; see the lines above")
    return json.loads(done.stdout.splitlines()[-1])


def as_flags(args: Any) -> list[str]:
    """Returns the flags of a dataclass's fields, except `out` and fields that are None, False or ()."""
    words = []
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if field.name == "out" or value is None or value is False or value == ():
            continue
        words += (
            [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
        )
    return words


def compile_for_real() -> None:
    """Disables the compilation cache, because compile times are measured."""
    jax.config.update("jax_enable_compilation_cache", False)


def provenance(command: Sequence[str]) -> dict[str, str]:
    """Where a measurement comes from: command, date, commit, hardware and version of JAX."""
    git = git_state(Path(__file__).parent) or {"commit": "unknown", "changed": False}
    return {
        "command": shlex.join(["python", *command]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git["commit"] + (" with changes" if git["changed"] else ""),
        "hardware": f"{cpu_model()}, {cores()} cores; {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def write_csv(path: Path, rows: Sequence[Any], command: Sequence[str], *, data: str = "") -> None:
    """Writes rows, dataclass instances of one class, below comment lines with their provenance.

    Args:
        data: origin of the training data, if any.
    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    for name, value in (provenance(command) | ({"data": data} if data else {})).items():
        text.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(text, list(vars(rows[0])), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in vars(row).items()})
    replace_file(path, lambda file: file.write(text.getvalue().encode()))
