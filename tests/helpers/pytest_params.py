"""Parameters of tests of which the default suite runs a few and `pytest -m slow` the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(quick: Iterable[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters `every`, all marked `slow` but those in `quick`; a tuple is several arguments."""
    chosen, found = list(quick), list(every)
    assert all(one in found for one in chosen), "a quick one is not among the parameters"
    marks = [() if one in chosen else (pytest.mark.slow,) for one in found]
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=mark)
        for one, mark in zip(found, marks, strict=True)
    ]
