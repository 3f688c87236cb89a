"""The verdict on one case: what was seen of a damaged input, compared with what the undamaged one gives."""

import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mac.errors import UserError

SAME, NOTED, SILENT, REFUSED = "same", "noted", "silent", "refused"
UNKNOWABLE = "silent, unknowable"
TRACEBACK, ODD, MEMORY, HANG = "traceback", "odd message", "out of memory", "hang"
PICKLE, WRONGLY = "pickle loaded", "refused wrongly"
FAILURES = (SILENT, TRACEBACK, ODD, MEMORY, HANG, PICKLE, WRONGLY)
LONGEST = 2000  # characters of a line that refuses
TRAP = "trap-was-sprung"
"""Name of the file that unpickling a trap makes in the folder of the cases."""


class Seen(NamedTuple):
    """What a reader returned: values by name, and the notes for the user."""

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Case(NamedTuple):
    """One damaged input.

    Attributes:
        kind: of damage; verdicts are counted by it.
        make: damages the undamaged copy in the folder that it is given.
        unknowable: why a silent change is no failure of a reader; empty where it is one. A mapping if that
            depends on who is asked.
        valid: whether the input is unusual but right, so that it must be accepted with the same values.
    """

    kind: str
    make: Callable[[Path], object]
    unknowable: str | Mapping[str, str] = ""
    valid: bool = False

    def why(self, asked: str) -> str:
        """Why a change of what `asked` returns may be silent."""
        return self.unknowable if isinstance(self.unknowable, str) else self.unknowable.get(asked, "")


class Verdict(NamedTuple):
    """`word` is one of the constants above; `detail` is the message, or where the error was raised."""

    word: str
    detail: str = ""


class Hang(BaseException):
    """The time of a case is over. No `Exception`, so that nothing suppresses it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the main thread after some time."""

    def over(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(
    act: Callable[[], Seen], pristine: Seen, case: Case, folder: Path, asked: str = "", seconds: float = 4
) -> Verdict:
    """Calls `act`, which goes by the name of `asked`, and says how that ended."""
    trap = folder / TRAP
    try:
        with limited(seconds):
            seen = act()
        verdict = _compare(seen, pristine, case, asked)
    except UserError as error:
        verdict = _refusal(str(error), case)
    except MemoryError as error:
        verdict = Verdict(MEMORY, where(error))
    except Hang as error:
        verdict = Verdict(HANG, where(error))
    except (Exception, SystemExit) as error:
        verdict = Verdict(TRACEBACK, where(error))
    if trap.exists():
        trap.unlink()
        return Verdict(PICKLE, verdict.detail)
    return verdict


def _refusal(line: str, case: Case) -> Verdict:
    if case.valid:
        return Verdict(WRONGLY, line[:300])
    if "\n" in line or "\r" in line or len(line) >= LONGEST or not line.strip():
        return Verdict(ODD, repr(line[:300]))
    return Verdict(REFUSED, line[:300])


def _compare(seen: Seen, pristine: Seen, case: Case, asked: str) -> Verdict:
    differ = [name for name in {*seen.values, *pristine.values} if not _equal(seen, pristine, name)]
    if not differ:
        return Verdict(SAME)
    words = ", ".join(sorted(differ))
    if case.valid:
        return Verdict(SILENT, f"a valid file gives other {words}")
    if new := [note for note in seen.notes if note not in pristine.notes]:
        return Verdict(NOTED, f"{words}: {new[0][:200]}")
    return Verdict(UNKNOWABLE if case.why(asked) else SILENT, words)


def _equal(seen: Seen, pristine: Seen, name: str) -> bool:
    missing = object()
    a, b = seen.values.get(name, missing), pristine.values.get(name, missing)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)


def where(error: BaseException) -> str:
    """Type and text of an error, and the innermost of our own lines that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/mac/" in f.filename or "/experiments/" in f.filename]
    at = ours[-1] if ours else frames[-1]
    text = " ".join(str(error).split())[:120]
    return f"{Path(at.filename).name}:{at.name}: {type(error).__name__}: {text}"
