"""The one exception that stands for a mistake in the user's input, and how to word it."""

import difflib
import errno
import os
from collections.abc import Collection


class UserError(ValueError):
    """Bad input: a file, flag, shape or value that the user can correct.

    The message is one line that names what is wrong, where, and the remedy. The command line
    prints it without a traceback and exits with status 2; library callers may catch it as a
    `ValueError`.
    """


def one_line(error: BaseException) -> str:
    """Text of another library's error for use within a `UserError`: one line of at most 200 characters.

    Both ends of a longer text are kept, since the last words often are the system's own reason.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:75]} ... {text[-120:]}"


_FULL = "free some space, or choose another folder"
_RIGHTS = "set rights, or choose another folder"
_OPEN = "too many files are open: raise the limit (`ulimit -n`)"
_IN_THE_WAY = "something else has this name: move it away, or choose another folder"
_SLOW = "the file system does not answer: try again when it does"
_REMEDIES = {
    "ENOSPC": _FULL,
    "EDQUOT": _FULL,
    "EFBIG": "raise the limit of a file's size (`ulimit -f`), or choose another file system",
    "EACCES": _RIGHTS,
    "EPERM": _RIGHTS,
    "EROFS": "it can only be read there: choose another folder",
    "EMFILE": _OPEN,
    "ENFILE": _OPEN,
    "ENOENT": "check the path",
    "ENOTDIR": _IN_THE_WAY,
    "EISDIR": _IN_THE_WAY,
    "EEXIST": _IN_THE_WAY,
    "ENOTEMPTY": _IN_THE_WAY,
    "ENAMETOOLONG": "choose a shorter name",
    "ELOOP": "its links lead in a circle: check them",
    "EBUSY": "another program uses it: try again when that has ended",
    "ENOMEM": "free some memory",
    "EIO": "the disk itself failed: check it, or choose another one",
    "ESTALE": _SLOW,
    "ETIMEDOUT": _SLOW,
}
"""By the name of `errno`, since systems differ in which they have."""


def remedy(error: BaseException, otherwise: str) -> str:
    """The remedy for a refusal of the system, by the error's number; `otherwise` for any other error.

    Libraries that wrap the system's error keep its number, or its words, in their text; both are looked for.
    """
    number = _number(error)
    return next(
        (advice for name, advice in _REMEDIES.items() if getattr(errno, name, 0) == number), otherwise
    )


def refusal(error: BaseException) -> str:
    """Returns the message of the system or of a library, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = _number(error)
    return one_line(error) if number is None else os.strerror(number)


def _number(error: BaseException) -> int | None:
    """The `errno` of the system's refusal that an error is, or tells of; None if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    for known in (getattr(errno, name) for name in _REMEDIES if hasattr(errno, name)):
        if f"errno = {known}," in text or f"[Errno {known}]" in text or os.strerror(known) in text:
            return known
    return None


def unknown_name(what: str, name: str, known: Collection[str]) -> UserError:
    """The error for a name that is none of `known`: with the closest one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(known))}"
    return UserError(f"{what} {name!r} is not known; {hint}")


def no_rewards(method: str = "this method", *, or_goals: bool) -> TypeError:
    """An error of code that gives a method data without rewards, and maybe without goals."""
    other = " or goals" if or_goals else ""
    return TypeError(f"{method} needs a window with rewards (pass `relabel` to `make_window`){other}")
