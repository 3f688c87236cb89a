"""Summary of the GPU benchmark for people, in Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.benchmarks.gpu.device_rates import PRECISIONS
from experiments.benchmarks.gpu.records import Records
from experiments.benchmarks.gpu.schedule import Part

_MATMULS = {"tf32": "tf32", "bf16": "bf16", "fused": "bf16", "float32": "float32"}
"""Precision of the matmuls that bound each variant of training."""


def summary(records: Records, parts: Sequence[Part]) -> str:
    """Returns the tables of all results so far, and what is missing with the reason."""
    sections = [
        _origin(records),
        _rates(records),
        _tests(records),
        _segments(records),
        _steps(records),
        _evaluations(records),
        _experts(records),
        _determinism(records),
        _paper(records),
        _missing(records, parts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table; numbers have three digits, and None is a dash."""
    lines = [heads, ["---"] * len(heads), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _origin(records: Records) -> str:
    machine = records.results("machine")["machine"]
    commits = dict.fromkeys(row["commit"] for row in records.rows if row["status"] == "done")
    dates = [row["time"][:10] for row in records.rows]
    facts = {
        "card": f"{records.origin['card']} {machine['card_memory']}, driver {machine['driver'] or 'unknown'}",
        "host": machine["host"],
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "variables": " ".join(f"{name}={value}" for name, value in machine["variables"].items()) or "none",
        "command": records.origin["command"],
        "dates": " to ".join(dict.fromkeys((min(dates), max(dates)))),
        "commits": ", ".join(commits),
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"# GPU benchmark: {records.origin['card']}\n\n{lines}"


def _rates(records: Records) -> str:
    found = records.results("rate")
    rows: list[tuple[Any, ...]] = []
    names = {
        "launch_us": "µs per kernel of a program",
        "launch_without_graph_us": "µs per kernel, without CUDA graphs",
        "call_us": "µs per call of the smallest program",
        "scan_us": "µs per iteration of a loop of known length",
        "loop_us": "µs per iteration of a loop of unknown length",
    }
    launches = found.get("rate launches", {})
    rows += [(names[name], launches[name]) for name in names if name in launches]
    if memory := found.get("rate memory"):
        rows.append(("GB/s of device memory, read and written", memory["gb_per_s"]))
    matmuls = found.get("rate matmuls", {})
    for shape in ("large", "reward", "goals"):
        for precision in PRECISIONS:
            if (name := f"{shape}_{precision}") in matmuls:
                rows.append((f"TFLOP/s of matmuls, {shape}, {precision}", matmuls[name]))
    return _section("Device", ("measurement", "figure"), rows)


def _tests(records: Records) -> str:
    found = records.results("tests").get("tests")
    if found is None:
        return ""
    lines = [f"## Tests marked `gpu`\n\n{found['passed']} passed"]
    lines += [f"- {name}: {reason}" for name, reason in found["not_passed"].items()]
    return "\n".join(lines)


def roofline_ms(records: Records, found: Mapping[str, Any]) -> float | None:
    """Returns the least milliseconds of one update by the measured rates; None without them.

    Either the matmuls bound it, at the rate of large ones, or the bytes that the program moves.
    """
    rates = records.results("rate")
    matmuls, memory = rates.get("rate matmuls"), rates.get("rate memory")
    if matmuls is None or memory is None:
        return None
    speed = matmuls[f"large_{_MATMULS[found['variant']]}"]  # TFLOP/s are GFLOP per ms
    return max(found["seeds"] * found["gflop"] / speed, 1e3 * found["gb"] / memory["gb_per_s"])


def _segments(records: Records) -> str:
    rows = []
    for found in records.results("segment").values():
        least, ms = roofline_ms(records, found), found["ms_per_update"]
        estimate = found.get("estimate_ms")
        rows.append(
            (
                found["mode"],
                found["seeds"],
                found["variant"],
                ms,
                found["seed_updates_per_s"],
                None if least is None else f"{least / ms:.0%}",
                estimate,
                None if estimate is None else f"{estimate / ms - 1:+.0%}",
                found.get("launches"),
                found["gb"],
                found["compile_s"],
                found["scratch_gb"],
                found["finite"],
            )
        )
    heads = ("mode", "seeds", "variant", "ms per update", "seed-updates/s", "share of roofline")
    heads += ("estimate, ms", "its error", "launches", "GB per update", "compile s", "scratch GB", "finite")
    return _section("Training segments", heads, rows)


def _steps(records: Records) -> str:
    heads = ("engine", "environments", "physics, ms per control step", "policy, ms per decision")
    heads += ("control steps/s", "compile s")
    rows = []
    for name, found in records.results("steps").items():
        engine = " ".join((found["engine"], *name.split()[3:]))
        figures = (found["physics_ms"], found["policy_ms"], found["steps_per_s"], found["compile_s"])
        rows.append((engine, found["envs"], *figures))
    return _section("Control steps", heads, rows)


def _evaluations(records: Records) -> str:
    heads = ("engine", "episodes", "seconds", "control steps/s", "compile s", "contacts dropped", "unstable")
    rows = [
        tuple(
            found[name]
            for name in ("engine", "episodes", "seconds", "steps_per_s", "compile_s", "dropped", "unstable")
        )
        for found in records.results("evaluation").values()
    ]
    return _section("Evaluations", heads, rows)


def _experts(records: Records) -> str:
    rows = [
        (
            found["engine"],
            found["envs"],
            found["targets"],
            f"{found['hits'] / max(found['targets'], 1):.1%}",
            f"{found['healthy'] / found['envs']:.1%}",
            found["steps_per_s"],
        )
        for found in records.results("expert").values()
    ]
    heads = ("engine", "episodes", "targets", "reached", "healthy episodes", "control steps/s")
    return _section("Scripted expert", heads, rows)


def _determinism(records: Records) -> str:
    rows = [
        (name.split()[1], found["updates"], found["same_bits"], found["changed_arrays"], found["arrays"])
        for name, found in records.results("determinism").items()
    ]
    heads = ("second run", "updates", "same bits", "changed arrays", "of")
    return _section("The same run twice", heads, rows)


def _paper(records: Records) -> str:
    found = records.results("paper").get("paper")
    if found is None:
        return ""
    rows = [
        ("updates of each seed", found["updates"]),
        ("updates per second", found.get("updates_per_s")),
        ("minutes for 1M updates, by that rate", found.get("minutes_for_1m")),
        *((f"success after {int(step):,} updates", value) for step, value in found["success"].items()),
    ]
    return _section(f"Paper run, {found['seeds']} seeds", ("measurement", "figure"), rows)


def _missing(records: Records, parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        lines = [row for row in records.rows if row["part"] == part.name]
        if not records.done(part.name):
            last = lines[-1] if lines else {"status": "not tried"}
            rows.append((part.name, last["status"], last.get("reason", "")))
    return _section("Not measured to the end", ("part", "status", "reason"), rows)


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return f"## {title}\n\n{markdown_table(heads, rows)}" if rows else ""
