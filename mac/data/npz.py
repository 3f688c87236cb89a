"""Reading of OGBench `.npz` files, in any of the three layouts in which they are found.

An OGBench trajectory of T transitions has T+1 states. The layouts differ in how they say so:

- *disk* (what OGBench hosts): T+1 rows, `terminals` set on the last row only;
- *compact* (`compact_dataset=True` of `ogbench.make_env_and_datasets`): T+1 rows, `valids` is 0 on
  the last row, and `terminals` is set on the last two;
- *regular* (its default): T rows and `next_observations`, `terminals` set on the T-th.

All three become the same rows: T+1 per episode, the action of the last row without meaning.
`terminals` marks the time limit, never success; rewards are not in the file.

Source: OGBench, Park et al. 2025, and `ogbench.utils.load_dataset` (1.2), to whose arrays the
tests compare ours.
"""

import contextlib
import lzma
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mac.data.raw_dataset import (
    FileArrays,
    RawDataset,
    Sizes,
    check_file,
    check_range,
    compare_next_obs,
    constant_notes,
    damage_as_user_error,
    episodes_between,
    repair,
    rounding_notes,
    sizes,
    with_final_states,
)
from mac.errors import UserError
from mac.formatting import counted, listed

NEEDED = ("observations", "actions", "terminals")
WANTED = (*NEEDED, "valids", "next_observations")

COPIES = {False: 1.6, True: 2.4}
"""Of observations and actions, while they are read: without `next_observations`, and with them."""

_BROKEN = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,  # encrypted members, and kinds of compression that zipfile does not have
    OverflowError,
    SyntaxError,
    TypeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""Exceptions of zipfile, its decompressors and numpy's header reader on a damaged or another file."""

_damage = partial(damage_as_user_error, broken=_BROKEN, split="split the file into shards")

_BLOCK = 1 << 20  # bytes read at a time
_END = 22 + (1 << 16)  # bytes that the end of a zip takes at most, its comment included


def read_npz(path: str | Path) -> RawDataset:
    """Reads and checks one file; extra keys (`qpos`, `rewards`, ...) are ignored.

    A file that stops within an episode keeps that part: its last state becomes the end of a
    shorter episode, and `notes` says so. Of states that no action leads to or from, the same.

    Raises:
        UserError: if the file is missing, damaged, not an OGBench archive, or holds values that
            cannot be trained on (wrong dtype, rank or length, NaN, actions outside [-1, 1]).
    """
    path = Path(path)
    with _opened(path) as archive:
        arrays = archive.arrays()
        arrays.check_equal_rows()
        obs, action = arrays.matrix("observations"), arrays.matrix("actions")
        check_range(path, action)
        notes = constant_notes(path, actions=action)
        last, final_obs = arrays.flags("terminals"), None
        if "next_observations" in arrays:
            next_obs = arrays.matrix("next_observations")
            first, length, more = _episodes(path, last)
            final = first + length - 1
            more += _check_order(path, obs, next_obs, final)
            final_obs = next_obs[final]
            del next_obs
        else:
            if "valids" in arrays:
                valid = arrays.flags("valids")
                _check_compact(path, last, valid)
                last = ~valid
            first, length, more = _episodes(path, last)
    notes = (*(f"{path}: {note}" for note in arrays.notes), *notes, *more)
    data = RawDataset(obs, action, first, length, notes)
    del obs, action
    if final_obs is None:
        return _without_lone_rows(path, data)
    return with_final_states(data, final_obs, np.ones(len(first), bool))


@contextlib.contextmanager
def opened_arrays(path: Path, needed: tuple[str, ...], wanted: tuple[str, ...]) -> Iterator[FileArrays]:
    """Yields the arrays of an archive, of which none is read yet.

    Raises:
        UserError: it is damaged, or lacks one of those needed.
    """
    with _opened(path) as archive:
        for key in needed:
            if key not in archive.members:
                raise UserError(f"{path}: key '{key}' is missing (found: {listed(archive.members)})")
        yield archive.arrays(wanted)


def stated_widths(path: str | Path) -> tuple[int, int]:
    """Reads the columns of observations and of actions from the headers of a file.

    Raises:
        UserError: it is damaged, or lacks them.
    """
    with _opened(Path(path)) as archive:
        arrays = archive.arrays()
        return arrays.columns("observations")[1], arrays.columns("actions")[1]


def stated_sizes(path: str | Path) -> Sizes:
    """Reads the headers of a file.

    Raises:
        UserError: it is damaged, as far as headers tell.
    """
    with _opened(Path(path)) as archive:
        heads = {key: archive.header(key) for key in WANTED if key in archive.members}
    obs, action = (heads[key].shape for key in NEEDED[:2])
    widest = max(heads[key].raw for key in heads if len(heads[key].shape) > 1)
    widths = math.prod(obs[1:]), math.prod(action[1:])
    return sizes((*obs, 0)[0], widths, COPIES["next_observations" in heads], widest)


class _Header(NamedTuple):
    """Header of an `.npy`: type and shape of the numbers behind it."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def raw(self) -> int:
        """Bytes of each number that are held while it is converted to float32; 0 if it is float32."""
        return 0 if self.dtype == np.float32 and not self.fortran else self.dtype.itemsize


class _Archive:
    """An open `.npz`, whose arrays are read to their last byte: only there the zip's checksum is compared."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        self.members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")
            if key in self.members:
                raise UserError(f"{path}: holds '{listed([key])}' twice; make the file again")
            self.members[key] = info
        with _damage(path, "its index"):
            self._check_index()

    def _check_index(self) -> None:
        """Finds arrays whose entry or name is damaged: an optional one would be missing without a word."""
        stated, found = _stated_members(self.path), len(self.members)
        if stated not in (None, found):
            raise ValueError(f"{found} arrays where it states {stated}")
        for info in self.members.values():
            # Opening compares the name with the one that stands before the array itself.
            with contextlib.suppress(RuntimeError), self.archive.open(info):
                pass

    def arrays(self, wanted: tuple[str, ...] = WANTED) -> FileArrays:
        """The arrays of these names, none of which is read yet."""
        shapes = {key: self.header(key).shape for key in wanted if key in self.members}
        return FileArrays(self.path, shapes, self.load)

    def header(self, key: str) -> _Header:
        """Reads and checks an array's header: numbers, as many as there are bytes for."""
        with _damage(self.path, key), self.archive.open(self.members[key]) as stream:
            return self._header(stream, key)

    def load(self, key: str) -> np.ndarray:
        """An array, as it is stored."""
        with _damage(self.path, key), self.archive.open(self.members[key]) as stream:
            head = self._header(stream, key)
            data = np.empty(math.prod(head.shape) * head.dtype.itemsize, np.uint8)
            for at in range(0, len(data), _BLOCK):
                part = stream.read(min(_BLOCK, len(data) - at))
                data[at : at + len(part)] = np.frombuffer(part, np.uint8)
                if len(part) < min(_BLOCK, len(data) - at):
                    raise EOFError("cut short")
            if stream.read(1):
                raise ValueError("bytes follow the array")
            value = data.view(head.dtype)
            return value.reshape(head.shape[::-1]).T if head.fortran else value.reshape(head.shape)

    def _header(self, stream: Any, key: str) -> _Header:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"unknown version {version} of the .npy format")
        # Versions 2 and 3 differ in letters that only names of fields have.
        form = np.lib.format
        parse = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on files of Python 2, which are read
            shape, fortran, dtype = parse(stream)
        if dtype.hasobject:
            raise UserError(f"{self.path}: '{key}' holds Python objects; numbers (float32) are needed")
        if dtype.kind not in "biufc":
            kind = listed([str(dtype)])
            raise UserError(f"{self.path}: '{key}' is {kind}, numbers are needed")
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"its shape is {shape}")
        size, behind = math.prod(shape) * dtype.itemsize, self.members[key].file_size - stream.tell()
        if size != behind:
            raise ValueError(f"{dtype} {shape} are {size:,} bytes, not {behind:,}")
        return _Header(shape, fortran, dtype)


def _stated_members(path: Path) -> int | None:
    """Returns the number of members that the end of a zip states; None if that field is too small."""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - _END, 0))
        end = file.read()
    (count,) = struct.unpack_from("<H", end, end.rindex(b"PK\x05\x06") + 10)
    return None if count == 0xFFFF else count


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    check_file(path, "an OGBench .npz")
    with _damage(path, "its index"):
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: not a complete .npz archive (cut short, or another format); copy or make it again"
            )
        archive = zipfile.ZipFile(path)
    with archive:
        opened = _Archive(path, archive)
        for key in NEEDED:
            if key not in opened.members:
                found = listed(opened.members)
                raise UserError(f"{path}: key '{key}' is missing (found: {found}); not an OGBench dataset")
        yield opened


def _episodes(path: Path, last: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """First row and row count of each episode, given which rows are the last of one."""
    ends = np.flatnonzero(last).astype(np.int64)
    if ends.size == 0:
        raise UserError(
            f"{path}: 'terminals' never marks the end of an episode; set it on each episode's last row"
        )
    return episodes_between(path, ends, len(last))


def _check_compact(path: Path, terminal: np.ndarray, valid: np.ndarray) -> None:
    """`terminals` of a compact file are set on every final row, on the row before it, and nowhere else."""
    expected = ~valid
    expected[:-1] |= ~valid[1:]
    # OGBench's loader also marks the last row of a file that stops within an episode.
    expected[-1] |= terminal[-1]
    odd = np.flatnonzero(expected != terminal)
    if odd.size:
        raise UserError(
            f"{path}: 'terminals' and 'valids' contradict each other in row {odd[0]}; make the file again"
        )


def _check_order(path: Path, obs: np.ndarray, next_obs: np.ndarray, final: np.ndarray) -> tuple[str, ...]:
    """Within episodes of the regular layout, which `final` rows end, each row leads to the one below it."""
    if next_obs.shape != obs.shape:
        raise UserError(f"{path}: 'next_observations' has shape {next_obs.shape}, 'observations' {obs.shape}")
    found = compare_next_obs(obs, next_obs)
    found.jump[final] = found.rounded[final] = False
    if found.jump.any():
        row = int(found.jump.argmax())
        raise UserError(
            f"{path}: 'next_observations' of row {row} is not the observation of row {row + 1}; "
            "rows must be in time order, with 'terminals' set at each episode's last transition"
        )
    return rounding_notes(path, found.rounded)


def _without_lone_rows(path: Path, data: RawDataset) -> RawDataset:
    """Leaves out episodes of one row: states that nothing leads to or from."""
    lone = data.length < 2
    if not lone.any():
        return data
    # In a compact file that lost its `valids` there is one such row behind each episode: its last state.
    if 2 * lone.sum() >= len(lone):
        raise UserError(
            f"{path}: row {data.first[lone][0]} is an episode of one row; 'terminals' must be set once per "
            "episode, on its last row (a compact file also needs the key 'valids')"
        )
    keep = np.ones(len(data.obs), bool)
    keep[data.first[lone]] = False
    count = int(lone.sum())
    text = f"{counted(count, 'episode')} of one row {'is' if count == 1 else 'are'} left out"
    return RawDataset(
        obs=data.obs[keep],
        action=data.action[keep],
        first=(data.first - np.cumsum(lone))[~lone],
        length=data.length[~lone],
        notes=(*data.notes, repair(path, text, ~keep)),
    )
