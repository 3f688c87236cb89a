"""Checks this machine for all that the project needs: `python experiments/doctor.py`.

Each line is `ok`, a `warning` (optional, or worth knowing) or `BROKEN`, with its remedy below. The exit
status is 1 if something is broken, else 0. Nothing is imported here but Python's own modules and ours without
dependencies: a missing package is reported and does not crash the report.
"""

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("experiments") is None:  # not installed: `check_install` says so
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.doctor_checks.findings import BROKEN, WARNING, Check, Finding
from mac.formatting import counted


def main(argv: Sequence[str], checks: Sequence[tuple[str, Check]] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 all that is needed works, 1 something is broken."""
    from experiments.cli.standard_streams import standard_streams

    with standard_streams() as streams:
        return streams.verdict(report_findings(argv, checks))


def report_findings(argv: Sequence[str], checks: Sequence[tuple[str, Check]] | None) -> int:
    """Runs the checks and prints their findings; returns the exit status."""
    about = "Checks this machine for all that the project needs."
    parser = argparse.ArgumentParser(prog="python experiments/doctor.py", description=about)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="folder of datasets")
    parser.add_argument("--json", action="store_true", help="print a list of findings for programs")
    given = parser.parse_args(list(argv))
    if not given.json:
        print(f"{platform.node()}: {platform.platform()}")
    lines: list[Finding] = []
    for what, check in all_checks() if checks is None else checks:
        for line in examine(what, check, given.data):
            lines.append(line)
            if not given.json:
                print_finding(line)
    if given.json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        counts = {state: sum(line.state == state for line in lines) for state in (BROKEN, WARNING)}
        warnings, checked = counted(counts[WARNING], "warning"), counted(len(lines), "check")
        print(f"{counts[BROKEN]} broken, {warnings}, {checked}")
    return int(any(line.state == BROKEN for line in lines))


def examine(what: str, check: Check, data: Path) -> list[Finding]:
    """Returns the findings of one check; if the check itself fails, that is the finding."""
    try:
        return list(check(data))
    except Exception as error:  # a broken installation may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return [Finding(BROKEN, what, text[:200], "pip install -e . in the project's folder")]


def print_finding(line: Finding) -> None:
    """Prints a finding, its remedy below it."""
    print(f"{line.state:8} {line.what:12} {line.found}", flush=True)
    if line.remedy:
        print(f"{'':21} -> {line.remedy}", flush=True)


def all_checks() -> list[tuple[str, Check]]:
    """Returns every check, in the order of the report; probes start at once."""
    from experiments.doctor_checks import checks, datasets

    probes = checks.Probes()
    return [
        ("system", checks.check_system),
        ("python", checks.check_python),
        ("install", checks.check_install),
        ("packages", checks.check_packages),
        ("mujoco", checks.check_pairs),
        ("variable", checks.check_variables),
        ("device", probes.device),
        ("physics", probes.physics),
        ("mjx", probes.mjx),
        ("renderer", probes.renderer),
        ("memory", checks.check_memory),
        ("cache", checks.check_cache),
        ("disk", checks.check_disk),
        ("folders", checks.check_folders),
        ("data", datasets.check_datasets),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
