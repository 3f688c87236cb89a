"""Findings of `doctor.py`: what a check yields, below the checks and the command that prints them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the project."""

OK, WARNING, BROKEN = "ok", "warning", "BROKEN"


class Finding(NamedTuple):
    """One finding. `remedy` is what to do about it."""

    state: str
    what: str
    found: str
    remedy: str = ""


Check = Callable[[Path], Iterable[Finding]]
"""A check; its argument is the folder of data."""
