"""Training hours and acting milliseconds: measured on a device, scaled, and set beside published ones."""

import hashlib
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from baselines import algorithms
from experiments.benchmarks.harness import BENCH
from experiments.reproduction.cells import Cell, Plan
from experiments.reproduction.jobs import Job
from experiments.reproduction.render import Sheet, number, source_note
from experiments.reproduction.suites import TIMES, Entry, Suite
from mac.atomic_files import misfit, read_json
from mac.errors import UserError
from mac.formatting import counted

FOLDER = "times"
REFERENCE = "mac"
_HOURS = TIMES[0]


@dataclass(frozen=True)
class TimeRow:
    """One time: ours, the paper's, and both relative to MAC's on the same device.

    Hours are those of one seed's whole run: seconds of an update times its updates, without compiling and
    evaluations. Milliseconds are those of a decision for one episode. `skipped` says why there is none.
    """

    suite: str
    env: str
    shapes: str
    algo: str
    method: str
    preset: str
    device: str
    paper: float
    paper_text: str
    paper_relative: float
    value: float
    relative: float
    update_s: float
    timed: int
    updates: int
    rollout_share: float
    actions: int
    peak_mb: float
    cores: float
    skipped: str
    flags: str
    commit: str
    hardware: str
    date: str


class Measured(NamedTuple):
    """A file of measurements."""

    path: Path
    values: dict[str, Any]


def time_cells(entries: Sequence[Entry], plan: Plan) -> list[Cell]:
    """What is measured for entries, one seed each, without repeats."""
    cells = (plan.cells(entry)[0] for entry in entries)
    return list(dict.fromkeys(cell._replace(preset=plan.time_preset, seeds=1) for cell in cells))


def time_jobs(cells: Sequence[Cell], plan: Plan, device: str) -> list[Job]:
    """A job for each measurement on a device; algorithms that this version lacks have none."""
    return [_job(cell, plan, device) for cell in cells if cell.algo in algorithms()]


def _job(cell: Cell, plan: Plan, device: str) -> Job:
    words = ["benchmark.py", "times", "--algo", cell.algo, "--env", cell.env, "--preset", cell.preset]
    done = plan.out / FOLDER / device_folder(device) / f"{cell.name}.json"
    flags = ["--", *cell.flags] if cell.flags else []
    name = f"times_{device_folder(device)}_{cell.name}"
    return Job(name, f"time of {cell.title}", (*words, "--out", str(done), *flags), done)


def device_folder(device: str) -> str:
    """Name of the folder of a device's measurements; different devices have different ones."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return f"{plain}_{hashlib.sha256(device.encode()).hexdigest()[:6]}"


def this_device() -> str:
    """The device that a program of this project computes on here, asked of a process of its own.

    Raises:
        UserError: JAX does not start.
    """
    words = [sys.executable, str(BENCH), "times", "--machine"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        lines = done.stderr.strip().splitlines()
        raise UserError(f"the device cannot be named: {lines[-1] if lines else 'nothing was said'}")
    return done.stdout.strip().splitlines()[-1]


def measured(cell: Cell, plan: Plan) -> list[Measured]:
    """The measurements of a cell, one for each device on which there is one.

    Raises:
        UserError: a file is damaged.
    """
    folder = plan.out / FOLDER
    paths = sorted(folder.glob(f"*/{cell.name}.json")) if folder.is_dir() else []
    return [Measured(path, _read(path)) for path in paths]


_TEXTS = ("device", "env", "preset", "skipped", "flags", "commit", "hardware", "date")
_NUMBERS = (
    "steps", "timed", "update_s", "rollout_share", "hours", "decision_ms", "actions", "peak_mb", "cores",
)  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    texts, numbers = dict.fromkeys(_TEXTS, str), dict.fromkeys(_NUMBERS, (int, float))
    if fault := misfit(found, **texts) or misfit(found, **numbers):
        raise UserError(f"{path}: {fault}; delete it, and it is measured again")
    return found


def time_rows(suite: Suite, entries: Sequence[Entry], plan: Plan) -> tuple[list[TimeRow], list[Entry]]:
    """The rows of a suite, those of one device together, and the entries without any.

    Raises:
        UserError: a file is damaged.
    """
    by_entry = {entry: measured(time_cells([entry], plan)[0], plan) for entry in entries}
    references = {
        (entry.env, each.values["device"]): each.values
        for entry in suite.entries
        if entry.algo == REFERENCE
        for each in measured(time_cells([entry], plan)[0], plan)
    }
    published = {entry.env: entry.published.mean for entry in suite.entries if entry.algo == REFERENCE}
    rows = []
    for entry, found in by_entry.items():
        for each in found:
            other = references.get((entry.env, each.values["device"]))
            rows.append(_row(suite, entry, each.values, published.get(entry.env, math.nan), other))
    rows.sort(key=lambda row: row.device)
    return rows, [entry for entry, found in by_entry.items() if not found]


def _row(
    suite: Suite, entry: Entry, values: dict[str, Any], reference: float, other: dict[str, Any] | None
) -> TimeRow:
    """A row.

    Args:
        reference: the published time of MAC.
        other: our measurements of MAC on the same device.
    """
    ours = _time(suite, values)
    return TimeRow(
        suite=suite.name,
        env=entry.env,
        shapes=values["env"],
        algo=entry.algo,
        method=entry.method,
        preset=values["preset"],
        device=values["device"],
        paper=entry.published.mean,
        paper_text=entry.published.text,
        paper_relative=entry.published.mean / reference,
        value=ours,
        relative=math.nan if other is None else ours / _time(suite, other),
        update_s=math.nan if values["skipped"] else values["update_s"],
        updates=values["steps"],
        **{name: values[name] for name in ("timed", "rollout_share", "actions", "peak_mb", "cores")},
        **{name: values[name] for name in ("skipped", "flags", "commit", "hardware", "date")},
    )


def _time(suite: Suite, values: dict[str, Any]) -> float:
    if values["skipped"]:
        return math.nan
    return values["hours" if suite.measure == _HOURS else "decision_ms"]


def time_columns(suite: Suite, rows: Sequence[TimeRow]) -> dict[str, list[str]]:
    """The cells of each column of a table."""
    hours = suite.measure == _HOURS
    unit = "h" if hours else "ms"
    columns: dict[str, list[str]] = {}
    for row in rows:
        cells = {
            "scope": row.env,
            "algorithm": row.method,
            f"paper, {unit}": row.paper_text,
            "paper / MAC": number(row.paper_relative, 2),
            f"ours, {unit}": (row.skipped and "skipped") or _figures(row.value),
            "ours / MAC": number(row.relative, 2),
            "measured": row.skipped or _measured(row, hours),
            "cores": number(row.cores, 2),
            "shapes": row.shapes,
            "preset": row.preset + (f" {row.flags}" if row.flags else ""),
            "device": row.device,
            "commit": row.commit.replace(" with changes", "*")[:10],
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    return columns


def _figures(value: float) -> str:
    """A time to three digits, those of large ones followed by zeros."""
    short = f"{value:.3g}"
    return "-" if math.isnan(value) else f"{float(short):,.0f}" if value >= 100 else short


def _measured(row: TimeRow, hours: bool) -> str:
    if not hours:
        return f"1 decision, {row.actions} of its actions executed"
    return f"{counted(row.timed, 'update')}, {_figures(1000 * row.update_s)} ms each, x {row.updates:,}"


def time_sheet(suite: Suite, rows: Sequence[TimeRow], missing: int, plan: Plan) -> Sheet:
    """The table of a suite of times."""
    columns, lines = time_columns(suite, rows), time_notes(suite, rows, missing, plan)
    plain = ("scope", "algorithm", "measured", "shapes", "preset", "device", "commit")
    numeric = [name for name in columns if name not in plain]
    wide = ("measured", "shapes", "preset", "commit", "cores")
    told_in_latex = [name for name in columns if name not in wide]
    shared = ("preset", "device", "commit")
    return Sheet(f"{suite.name}: {suite.title}", columns, lines, numeric, shared, told_in_latex, group=1)


def time_notes(suite: Suite, rows: Sequence[TimeRow], missing: int, plan: Plan) -> list[str]:
    """Lines below a table."""
    what = (
        "hours: time of an update of one seed, as training computes it, rollouts into a replay included, by "
        "the number of updates of a run; compiling, evaluations and reading of data are left out"
        if suite.measure == _HOURS
        else "milliseconds: one decision for one episode, networks untrained, until its actions are there"
    )
    found = [
        what,
        "/ MAC: relative to MAC on the same device, which is what may be compared across devices",
        "cores: processor time over wall time while updates were timed; far below those of the device, the "
        "machine was busy and the times are too long",
        source_note(suite),
    ]
    if plan.flags or any(row.preset != "paper" for row in rows):  # flags of the suite are the paper's
        found.append("rows of other sizes than the preset `paper`'s are no estimates of the paper's times")
    found += [f"not in this table, because not measured: {missing}"] if missing else []
    return found
