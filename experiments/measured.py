"""Files of measurements: what was measured, by which command, when, and on what."""

import csv
import datetime
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from mac.files import replace_file
from mac.run.record import cores, cpu_model, git_state


def write_csv(path: Path, rows: Sequence[Any], command: Sequence[str], *, data: str = "") -> None:
    """Writes dataclass instances of one kind below comment lines that say when, where and how they
    were measured.

    Args:
        data: where the data come from that were trained on, if any were.
    Raises:
        UserError: the file cannot be written.
    """
    git = git_state(Path(__file__).parent) or {"commit": "unknown", "changed": False}
    text = io.StringIO()
    for name, value in {
        "command": shlex.join(["python", *command]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git["commit"] + (" with changes" if git["changed"] else ""),
        "hardware": f"{cpu_model()}, {cores()} cores; {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        **({"data": data} if data else {}),
    }.items():
        text.write(f"# {name}: {value}\n")
    writer = csv.DictWriter(text, list(vars(rows[0])), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in vars(row).items()})
    replace_file(path, lambda file: file.write(text.getvalue().encode()))
