"""Helpers of the tests of `doctor.py`."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from experiments import doctor
from experiments.doctor_checks.findings import Finding


def report(check: Any, data: Path = Path("data")) -> list[Finding]:
    """Returns the findings of a check."""
    return doctor.examine("it", check, data)


def only(check: Any, data: Path = Path("data")) -> Finding:
    """Returns the only finding of a check."""
    (line,) = report(check, data)
    return line


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Changes the versions of packages; None means not installed."""
    real = importlib.metadata.version

    def version(package: str) -> str:
        key = package.replace("-", "_")
        if key not in changed:
            return real(package)
        value = changed[key]
        if value is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return value

    monkeypatch.setattr(importlib.metadata, "version", version)
