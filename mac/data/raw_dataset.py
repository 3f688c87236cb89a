"""Whole episodes as every reader of dataset files returns them, and the checks that all readers share.

A check raises `UserError` with one line that names the file, the array, the row and a remedy. A repair adds a
note that says how much of the data it concerns, and is refused where that is most of them.
"""

import contextlib
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from mac.data.quantize import BLOCK, row_blocks, summarize
from mac.errors import UserError, one_line, refusal, remedy
from mac.formatting import counted, listed, share

ACTION_SLACK = 1e-3
"""Tolerance by which an action may lie outside [-1, 1] (rounding of a float16 file)."""

ROUNDED = 0.01
"""Distance of two states, in standard deviations of each column, that counts as rounding. A reset moves some
column by far more; so does a control step, but for systems that hardly move."""

_FEW = 4096  # rows that are compared at a time where many numbers are computed of each

_ULPS = 2.0**-20
"""Relative error of a float32 that was computed in two ways; decides only in columns that are constant."""

_WHOLE = 2**24
"""Whole numbers up to this are exact in float32."""


class RawDataset(NamedTuple):
    """Whole episodes laid end to end.

    Attributes:
        obs: observation of each row's state, in the environment's units.
        action: action taken there, in [-1, 1]; without meaning on an episode's last row.
        first: row at which each episode begins.
        length: rows of each episode, i.e. its transitions plus one.
        notes: one line for each thing that a user should know about how the file was read.
        reward: what each row's action earned, 0 on an episode's last row; None if the file records none.
        terminated: whether each episode terminated, and was not truncated by a time limit; None as `reward`.
    """

    obs: Float32[np.ndarray, "N D"]
    action: Float32[np.ndarray, "N A"]
    first: Int64[np.ndarray, " E"]
    length: Int64[np.ndarray, " E"]
    notes: tuple[str, ...] = ()
    reward: Float32[np.ndarray, " N"] | None = None
    terminated: Bool[np.ndarray, " E"] | None = None


class Sizes(NamedTuple):
    """Sizes stated in the headers of a file.

    Attributes:
        rows: of the training data; final states that reading adds are not counted.
        stored: bytes of its observations and actions in float32.
        reading: bytes of memory that reading and checking the file takes, about.
    """

    rows: int
    stored: int
    reading: int


def sizes(rows: int, widths: tuple[int, int], copies: float, raw: int = 0) -> Sizes:
    """The sizes of a file.

    Args:
        widths: columns of observations and of actions.
        copies: how often observations and actions are held in float32 while they are read.
        raw: bytes per number in the file where these are held too; 0 where the file has float32.
    """
    stored, widest = 4 * rows * sum(widths), max(widths)
    # Summaries take three copies of a block in float64; rewards, flags and row numbers some bytes a row.
    work = 24 * min(rows, BLOCK) * widest + 32 * rows
    return Sizes(rows, stored, round(copies * stored) + raw * rows * widest + work)


@contextlib.contextmanager
def damage_as_user_error(
    path: Path, where: str, *, broken: tuple[type[Exception], ...], split: str
) -> Iterator[None]:
    """Turns what a library says of a damaged file, while entered, into a `UserError` that names the place.

    Args:
        where: the array or the part of the file that is read.
        broken: what the library raises on a file that is damaged or not its own.
        split: the remedy where memory runs out, as it also does for a header without end.
    """
    try:
        yield
    except UserError:
        raise
    except broken as error:
        then = remedy(error, "copy or make the file again")
        raise UserError(f"{path}: damaged at {listed([where])} ({one_line(error)}); {then}") from error
    except MemoryError as error:
        raise UserError(
            f"{path}: {listed([where])} does not fit into memory; {split}, or copy it again if it is "
            "not that large"
        ) from error


def check_file(path: Path, what: str) -> None:
    """Raises UserError unless there is a file to read; `what` names what is expected, such as `.npz`."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f"{path}: no such dataset file; give the path of {what} file") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}; {remedy(error, 'check the path')}") from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is a folder, where one file ({what}) is expected")
    # Reading a pipe or a device may block forever.
    if not stat.S_ISREG(found.st_mode):
        raise UserError(
            f"{path}: is a pipe or a device, no regular file; copy what it gives into {what} file"
        )
    if found.st_size == 0:
        raise UserError(f"{path}: the file is empty; delete it and make or copy it again")


class FileArrays:
    """The arrays of one file, or of one episode's part of it, by key.

    Each is read when it is taken and forgotten in its original form, so that there is one copy of it.

    Attributes:
        notes: what was converted, one line each, without the file's name; a table for the sake of its order.
        inside: the group's name, with a slash behind; empty if there is no group.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        load: Callable[[str], Any],
        inside: str = "",
        notes: dict[str, None] | None = None,
    ):
        """Args: shape of each array, from headers, and what reads one."""
        self.path, self.inside, self._shapes, self._load = path, inside, shapes, load
        self.notes: dict[str, None] = {} if notes is None else notes

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def name(self, key: str) -> str:
        """The full name of an array, in quotes."""
        return f"'{self.inside}{key}'"

    def check_equal_rows(self, *but: str) -> None:
        """Raises UserError unless all arrays, `but` for some, have as many rows."""
        rows = {key: shape[0] for key, shape in self._shapes.items() if shape and key not in but}
        if len(set(rows.values())) > 1:
            text = ", ".join(f"{self.name(key)} {count}" for key, count in rows.items())
            raise UserError(
                f"{self.path}: the arrays have unequal row counts ({text}); make the dataset again"
            )

    def columns(self, key: str) -> tuple[int, int]:
        """Rows and columns of a matrix, which is not read."""
        shape = self._shapes[key]
        if len(shape) != 2 or shape[1] == 0:
            raise self._misshapen(key, shape, "(rows, columns) is needed")
        return shape[0], shape[1]

    def matrix(self, key: str) -> Float32[np.ndarray, "N C"]:
        """Finite numbers, several per row."""
        value = self._numbers(key)
        self.columns(key)
        return self._float32(key, value)

    def vector(self, key: str) -> Float32[np.ndarray, " N"]:
        """Finite numbers, one per row."""
        value = self._numbers(key)
        return self._float32(key, self._flat(key, value))

    def flags(self, key: str) -> Bool[np.ndarray, " N"]:
        """Zeros and ones, one per row, as booleans."""
        value = self._load(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "bfiu":
            raise self._unfit(key, value, "0/1 or booleans are needed")
        value = self._flat(key, value)
        with np.errstate(invalid="ignore"):
            found = value.astype(bool)
        odd = np.flatnonzero(found != value)
        if odd.size:
            row = odd[0]
            raise UserError(
                f"{self.path}: {self.name(key)} is {value[row]} in row {row}; only 0 and 1 have a meaning"
            )
        return found

    def _numbers(self, key: str) -> np.ndarray:
        value = self._load(key)
        kind = value.dtype if isinstance(value, np.ndarray) else None
        if kind == np.uint8 and "observations" in key:
            raise self._unfit(key, value, "numbers are needed; image observations are not supported")
        if kind is None or kind.kind not in "fbiu":
            raise self._unfit(key, value, "numbers are needed")
        return value

    def _float32(self, key: str, value: np.ndarray) -> Shaped[np.ndarray, "N ..."]:
        if len(value) == 0:
            raise UserError(f"{self.path}: {self.name(key)} has no rows; make the dataset again")
        # A float64 too large for float32 becomes inf here, which the check for finite values reports.
        with np.errstate(over="ignore", invalid="ignore"):
            converted = np.ascontiguousarray(value, dtype=np.float32)
        if value.dtype.kind != "f":
            large = any(bool((np.abs(converted[block]) > _WHOLE).any()) for block in row_blocks(len(value)))
            rounded = ", the largest of them rounded" if large else ""
            self.notes[f"'{key}' are whole numbers ({value.dtype}), read as float32{rounded}"] = None
        check_values(self.path, f"{self.inside}{key}", converted)
        return converted

    def _flat(self, key: str, value: np.ndarray) -> np.ndarray:
        """One value per row, which some files hold as a column."""
        if value.ndim == 2 and value.shape[1] == 1:
            value = value[:, 0]
        if value.ndim != 1:
            raise self._misshapen(key, value.shape, "one value per row is needed")
        return value

    def _misshapen(self, key: str, shape: tuple[int, ...], needed: str) -> UserError:
        return UserError(f"{self.path}: {self.name(key)} has shape {shape}, {needed}")

    def _unfit(self, key: str, value: Any, needed: str) -> UserError:
        kind = listed([str(value.dtype)]) if isinstance(value, np.ndarray) else "no array"
        return UserError(f"{self.path}: {self.name(key)} is {kind}, {needed}")


def check_values(path: Path, key: str, value: Float32[np.ndarray, "N ..."]) -> None:
    """Raises UserError unless all values are finite."""
    bad = _rows_with(lambda part: ~np.isfinite(part), value)
    if bad.any():
        row = int(bad.argmax())
        column = int((~np.isfinite(value[row])).argmax())
        at = f"row {row}, column {column}" if value.ndim > 1 else f"row {row}"
        raise UserError(
            f"{path}: '{key}' is not finite in float32 in {at} "
            f"({counted(int(bad.sum()), 'such row')} in all); remove those episodes or make the dataset again"
        )


def check_range(path: Path, action: Float32[np.ndarray, "N A"], key: str = "actions") -> None:
    """Raises UserError unless all actions are normalised."""
    beyond = _rows_with(lambda part: np.abs(part) > 1 + ACTION_SLACK, action)
    if beyond.any():
        row = int(beyond.argmax())
        column = int((np.abs(action[row]) > 1 + ACTION_SLACK).argmax())
        raise UserError(
            f"{path}: '{key}' is {action[row, column]:.6g} in row {row}, column {column}; "
            "actions must be normalised to [-1, 1]"
        )


def _rows_with(test: Callable[[np.ndarray], np.ndarray], value: np.ndarray) -> Bool[np.ndarray, " N"]:
    """The rows in which some entry passes a test; a block at a time, to save memory."""
    found = [
        test(value[block]).reshape(len(value[block]), -1).any(axis=1) for block in row_blocks(len(value))
    ]
    return np.concatenate(found)


def constant_notes(
    path: Path, but: Int64[np.ndarray, " rows"] | None = None, **arrays: np.ndarray
) -> tuple[str, ...]:
    """A note on each array, by key, whose rows (`but` for some) are all equal: nothing is learnt from it."""
    notes = []
    for key, value in arrays.items():
        other = _rows_with(lambda part, like=value[0]: part != like, value)
        count = len(value) if but is None else len(value) - len(but)
        if but is not None:
            other[but] = False
        if count > 1 and not other.any():
            text = "0" if not value[0].any() else f"equal ({listed([str(value[0])])})"
            notes.append(f"{path}: all {counted(count, 'row')} of '{key}' are {text}; is that meant?")
    return tuple(notes)


def repair(
    path: Path,
    text: str,
    where: Bool[np.ndarray, " N"],
    reward: Float32[np.ndarray, " N"] | None = None,
    *,
    drops: bool = True,
    remedy: str = "make the dataset again",
) -> str:
    """A note on what is done to the rows `where`, with their share of all rows and of the reward's size.

    Args:
        text: what is done.
        reward: of all rows, where the file records it.
        drops: whether these rows are lost, and their rewards with them.
    Raises:
        UserError: these are most rows, or most of the reward is lost.
    """
    shares = [(int(where.sum()), len(where), "rows")]
    lost = 0.0
    if reward is not None:
        size = np.abs(reward).astype(np.float64)
        earned, every = float(size[where].sum()), float(size.sum())
        shares += [(earned, every, "reward")] if every else []
        lost = earned / every if drops and every else 0.0
    said = " and ".join(f"{share(part, whole)} of all {what}" for part, whole, what in shares)
    if max(shares[0][0] / len(where), lost) > 0.5:
        raise UserError(f"{path}: {text}: {said}, too much to go on; {remedy}")
    return f"{path}: {text} ({said})"


class NextObsAgreement(NamedTuple):
    """Agreement of `next_observations` with the observation of the row below.

    Attributes:
        jump: the rows that are not followed by the next one; the last row counts as followed.
        rounded: the rows that are, but for rounding.
        single: the jumps that are in a single column, all others being equal.
    """

    jump: Bool[np.ndarray, " N"]
    rounded: Bool[np.ndarray, " N"]
    single: Bool[np.ndarray, " N"]


def compare_next_obs(
    obs: Float32[np.ndarray, "N D"], next_obs: Float32[np.ndarray, "N D"]
) -> NextObsAgreement:
    """Compares `next_obs` with the observations one row below.

    Two numbers agree if one is the float16 of the other, or if they are closer than `ROUNDED` times the
    standard deviation of their column: files are written whose two arrays went through different types.
    A skipped row that moves no column by as much is not found.
    """
    differ = np.zeros(len(obs), bool)
    for rows in row_blocks(len(obs) - 1):
        differ[rows] = (next_obs[rows] != obs[1:][rows]).any(axis=1)
    jump, single, at = np.zeros(len(obs), bool), np.zeros(len(obs), bool), np.flatnonzero(differ)
    if at.size:
        spread = summarize(obs).std
        for i in range(0, len(at), _FEW):
            rows = at[i : i + _FEW]
            ours, theirs = next_obs[rows], obs[rows + 1]
            away = ~_agree(ours, theirs, spread)
            jump[rows] = away.any(axis=1)
            single[rows] = away.any(axis=1) & ((ours != theirs).sum(axis=1) == 1)
    return NextObsAgreement(jump, differ & ~jump, single)


def _agree(a: np.ndarray, b: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Returns whether numbers are equal but for rounding, given the standard deviation of each column."""
    apart = np.abs(a.astype(np.float64) - b)
    with np.errstate(over="ignore"):
        halves = (a.astype(np.float16) == b) | (b.astype(np.float16) == a)
    return halves | (apart <= ROUNDED * spread + _ULPS * np.abs(b))


def rounding_notes(path: Path, rounded: Bool[np.ndarray, " N"]) -> tuple[str, ...]:
    """A note on the rows whose `next_observations` are the row below but for rounding."""
    if not rounded.any():
        return ()
    count, part = counted(int(rounded.sum()), "row"), share(int(rounded.sum()), len(rounded))
    return (
        f"{path}: 'next_observations' of {count} ({part}) are the observation of the next row but for "
        "rounding; that observation is taken",
    )


def episodes_between(
    path: Path, ends: Int64[np.ndarray, " ends"], rows: int
) -> tuple[Int64[np.ndarray, " E"], Int64[np.ndarray, " E"], tuple[str, ...]]:
    """First row and row count of each episode, given the last row of each; what follows is one more."""
    notes: tuple[str, ...] = ()
    tail = rows - 1 - int(ends[-1]) if ends.size else rows
    if tail > 0:
        ends = np.append(ends, rows - 1)
        kept = f"its last {counted(tail, 'row')} {'is' if tail == 1 else 'are'} kept as a shorter episode"
        notes = (f"{path}: stops within an episode; {kept} ({share(tail, rows)} of all rows)",)
    first = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)
    return first, (ends - first + 1).astype(np.int64), notes


def with_final_states(
    data: RawDataset, final_obs: Float32[np.ndarray, "E D"], where: Bool[np.ndarray, " E"]
) -> RawDataset:
    """Adds a row with the state `final_obs` behind each episode `where` is set; its action and reward are 0.

    Args:
        final_obs: the state after each episode's last action.
    """
    at = (data.first + data.length)[where]
    before = np.cumsum(where) - where
    nothing = np.zeros((1, data.action.shape[1]), np.float32)
    return data._replace(
        obs=np.insert(data.obs, at, final_obs[where], axis=0),
        action=np.insert(data.action, at, nothing, axis=0),
        first=data.first + before.astype(np.int64),
        length=data.length + where.astype(np.int64),
        reward=None if data.reward is None else np.insert(data.reward, at, np.float32(0)),
    )
