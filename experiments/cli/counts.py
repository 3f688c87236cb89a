"""Whole numbers as people write them: the one syntax of all flags that count something."""

import re
from decimal import Decimal

SYNTAX = "200000, 200_000, 200k, 1.5M or 1e6"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_DIGITS = r"\d+(?:_\d+)*"
_NUMBER = re.compile(rf"([+-]?{_DIGITS}(?:\.\d*)?(?:e[+-]?\d{{1,3}})?)([kmbg]?)", re.ASCII | re.IGNORECASE)


def read_count(text: str) -> tuple[int, bool]:
    """A whole number such as 200_000, 200k, 1.5M, 1B or 1e6, and whether it has a unit.

    Raises:
        ValueError: it is no number, or no whole one.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a whole number; write it as {SYNTAX}")
    value = Decimal(match[1].replace("_", "")) * _UNITS[match[2].lower()]
    if value != value.to_integral_value():
        raise ValueError(f"{text!r} is not a whole number")
    return int(value), bool(match[2])


def whole_number(text: str) -> int:
    """The value of `read_count`.

    Raises:
        ValueError: it is no number, or no whole one.
    """
    return read_count(text)[0]
