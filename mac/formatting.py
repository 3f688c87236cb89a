"""Wording of messages: counts with their nouns, shares, and names that come out of files."""

from collections.abc import Iterable

_NAMES, _LETTERS = 8, 40  # names listed in a message, and letters of each


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless it is one: "1 episode", "1,200 episodes"."""
    return f"{count:,} {plural(noun, count)}"


def plural(noun: str, count: int) -> str:
    """The noun alone, in the number that goes with `count`."""
    return noun if count == 1 else noun + "s"


def share(part: float | int, whole: float | int) -> str:
    """A part in percent, to three digits; 0% of nothing."""
    return f"{100 * part / whole if whole else 0.0:.3g}%"


def listed(names: Iterable[str]) -> str:
    """The first few of some names, whatever letters they hold, on one line; "nothing" if there are none."""
    plain = ("".join(c if c.isprintable() else "?" for c in name) for name in names)
    short = [name if len(name) <= _LETTERS else name[: _LETTERS - 3] + "..." for name in plain]
    more = f" and {len(short) - _NAMES} more" if len(short) > _NAMES else ""
    return ", ".join(short[:_NAMES]) + more or "nothing"
