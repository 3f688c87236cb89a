"""Damaged OGBench `.npz` files: every bit of every header, damaged bytes, and rewritten content."""

import io
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mac.data import npz
from mac.data.convert import prepare
from mac.data.raw_dataset import RawDataset
from mac.data.store import Store
from tests.fuzz.judge import Case, Seen, Verdict, judge
from tests.fuzz.mutators import BYTES, PLACES, Trap, damage
from tests.helpers.small_datasets import SPEC

KEYS = ("observations", "actions", "terminals")
FILE, VAL = "toy.npz", "toy-val.npz"
LENGTHS = (1600, 1400, 1900)
"""Rows of the episodes: so many that zipfile does not read a whole member, with its checksum, by chance."""
REWRITTEN = (
    "a header rewritten with a right checksum is another valid file, which numpy reads in the same way"
)
EDITED = "numbers that were edited and saved again are valid numbers"
Arrays = dict[str, Any]


def arrays(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Arrays:
    """A small dataset whose numbers float16 holds exactly."""
    rng, rows = np.random.default_rng(seed), sum(lengths)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(lengths) - 1] = True
    return {
        "observations": (rng.integers(-500, 500, (rows, SPEC.obs_dim)) / 64).astype(np.float32),
        "actions": (rng.integers(-64, 65, (rows, SPEC.action_dim)) / 64).astype(np.float32),
        "terminals": terminals,
    }


def regular() -> Arrays:
    """The same states in the layout with `next_observations`."""
    data = arrays()
    last = data["terminals"]
    ends = np.append(last[1:], False)
    return {
        "observations": data["observations"][~last],
        "actions": data["actions"][~last],
        "terminals": ends[~last],
        "next_observations": np.roll(data["observations"], -1, axis=0)[~last],
    }


def compact() -> Arrays:
    """The same states in the layout with `valids`."""
    data = arrays()
    last = data["terminals"]
    return data | {"terminals": last | np.append(last[1:], False), "valids": (~last).astype(np.float32)}


def write(path: Path, members: Arrays, compress: int = zipfile.ZIP_STORED, version: Any = None) -> None:
    """A zip of `.npy` members; bytes are taken as they are."""
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, value in members.items():
            info = zipfile.ZipInfo(name if "." in name else f"{name}.npy")
            archive.writestr(info, npy(value, version), compress)


def npy(value: Any, version: Any = None) -> bytes:
    if isinstance(value, bytes):
        return value
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(value), version, allow_pickle=True)
    return stream.getvalue()


def header(text: str, content: bytes, version: int = 1, length: int | None = None) -> bytes:
    """A `.npy` whose header is `text`."""
    encoded = text.encode("latin-1", "replace")
    encoded += b" " * (-(len(encoded) + 11) % 64) + b"\n"
    size = len(encoded) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", size)
        + encoded
        + content
    )


def header_bits(content: bytes) -> list[int]:
    """Offsets of all bytes of `content` that belong to a header of the zip or of an npy member."""
    found: list[int] = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
            start = info.header_offset + 30 + name + extra
            length = 10 + struct.unpack("<H", content[start + 8 : start + 10])[0]
            found += range(info.header_offset, start + length)
        found += range(archive.start_dir, len(content))
    return found


def _flip(bit: int, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# What a file may hold.


def _change(key: str, edit: Callable[[np.ndarray], Any]) -> Callable[[Random, Path, Arrays], Arrays]:
    return lambda rng, path, data: data | {key: edit(data[key])}


def _put(rng: Random, array: np.ndarray, value: Any) -> np.ndarray:
    array = array.astype(np.float64) if array.dtype == bool else array.copy()
    array[rng.randrange(len(array))] = value
    return array


TYPES: dict[str, Callable[[np.ndarray], Any]] = {
    "int64": lambda a: a.astype(np.int64),
    "uint8": lambda a: a.astype(np.uint8),
    "complex": lambda a: a.astype(complex),
    "text": lambda a: a.astype("U8"),
    "bytes": lambda a: a.astype("S8"),
    "dates": lambda a: a.astype(np.int64).astype("M8[s]"),
    "a record": lambda a: np.zeros(len(a), [("a", "f4"), ("b", "i4")]),
    "a scalar": lambda a: np.asarray(1.0, np.float32),
    "rank 1": lambda a: a.reshape(-1).astype(np.float32),
    "rank 3": lambda a: a.reshape(len(a), -1, 1),
    "no rows": lambda a: a[:0],
    "no columns": lambda a: np.zeros((len(a), 0), np.float32),
    "one row fewer": lambda a: a[:-1],
    "one row more": lambda a: np.concatenate([a, a[-1:]]),
    "one column more": lambda a: np.concatenate([a.reshape(len(a), -1), np.ones((len(a), 1))], 1).astype(
        "f4"
    ),
    "one column fewer": lambda a: a.reshape(len(a), -1)[:, 1:],
    "transposed": lambda a: a.T,
    "all zero": np.zeros_like,
    "no npy": lambda a: b"hello",
    "an empty member": lambda a: b"",
    "a pickled npy": lambda a: np.asarray([None, {}], object),
}
HEADERS: dict[str, str] = {
    "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000, 3), }",
    "large": "{'descr': '<f4', 'fortran_order': False, 'shape': (30000000, 3), }",
    "beyond int64": "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 3), }",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
    "true": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3), }",
    "float": "{'descr': '<f4', 'fortran_order': False, 'shape': (4900.0, 3), }",
    "fewer rows": "{'descr': '<f4', 'fortran_order': False, 'shape': (20, 3), }",
    "flat": "{'descr': '<f4', 'fortran_order': False, 'shape': (14700,), }",
    "columns": "{'descr': '<f4', 'fortran_order': False, 'shape': (4900, 2), }",
    "fortran": "{'descr': '<f4', 'fortran_order': True, 'shape': (4900, 3), }",
    "big-endian": "{'descr': '>f4', 'fortran_order': False, 'shape': (4900, 3), }",
    "half": "{'descr': '<f2', 'fortran_order': False, 'shape': (4900, 3), }",
    "object": "{'descr': '|O', 'fortran_order': False, 'shape': (4900, 3), }",
    "code": "__import__('os').system('touch trap-was-sprung')",
    "a list": "['descr', 'fortran_order', 'shape']",
    "no shape": "{'descr': '<f4', 'fortran_order': False, }",
    "one key more": "{'descr': '<f4', 'fortran_order': False, 'shape': (4900, 3), 'x': 1, }",
    "unclosed": "{'descr': '<f4', 'fortran_order': False, 'shape': (4900, 3",
    "text": "hello",
    "nothing": "",
    "nested": "(" * 3000,
    "no type": "{'descr': 'nonsense', 'fortran_order': False, 'shape': (4900, 3), }",
    "deep type": "{'descr': [('a', [('b', '<f4')])], 'fortran_order': False, 'shape': (4900, 3), }",
    "null bytes": "{'descr': '<f4',\x00 'fortran_order': False, 'shape': (4900, 3), }",
}
NAMES = (
    "a\nb",
    "x" * 60_000,
    "../../up",
    "/root",
    "",
    "a/b/",
    "\u00e9\u4e2d",
    "observations.npy.npy",
    "con\x1b[31m",
)


def _rewritten(
    rng: Random, path: Path, data: Arrays, name: str, key: str, version: int, length: int | None
) -> Arrays:
    content = np.ascontiguousarray(data[key]).tobytes()
    return data | {key: header(HEADERS[name], content, version, length)}


def _twice(rng: Random, path: Path, data: Arrays) -> None:
    """A key twice, with other numbers."""
    key = rng.choice(KEYS)
    write(path, data)
    with zipfile.ZipFile(path, "a") as archive:
        other = np.zeros_like(data[key]) if key != "terminals" else np.roll(data[key], 1)
        archive.writestr(rng.choice([f"{key}.npy", key]), npy(other))


def _patched(offsets: tuple[int, bytes], central: bool, rng: Random, path: Path, data: Arrays) -> None:
    """A field of one member's header is another; `offsets` are those of the central directory."""
    content, (at, value) = bytearray(path.read_bytes()), offsets
    with zipfile.ZipFile(path) as archive:
        info, place = rng.choice(archive.infolist()), archive.start_dir
    while content[place + 46 : place + 46 + len(info.filename)] != info.filename.encode():
        sizes = struct.unpack("<HHH", content[place + 28 : place + 34])
        place += 46 + sum(sizes)
    start = place + at if central else info.header_offset + at - 2
    content[start : start + len(value)] = value
    path.write_bytes(content)


def _crc_fixed(rng: Random, path: Path, data: Arrays) -> Arrays:
    """One bit of a member, and the checksum that fits it."""
    key = rng.choice(KEYS)
    content = bytearray(npy(data[key]))
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return data | {key: bytes(content)}


def _inside_compressed(method: int, rng: Random, path: Path, data: Arrays) -> None:
    write(path, data, method)
    damage(path, BYTES[rng.choice(["one bit", "one byte", "zero block", "random block", "eight bits"])], rng)


def _traps(rng: Random, path: Path, data: Arrays, key: str) -> None:
    trap = np.asarray([Trap(path.parent)] * rng.choice([1, len(data["actions"])]), object)
    write(path, data | {key: trap})


def _member(rng: Random, path: Path, data: Arrays) -> Arrays:
    """Bytes after or before the array, or some of it gone, with the checksum of what is there."""
    key = rng.choice(KEYS)
    content = npy(data[key])
    extra = rng.randbytes(rng.choice([1, 4, 12, 1000, 10**6]))
    return data | {
        key: rng.choice([content + extra, content[:-4], content[:-1], content[: len(content) // 2]])
    }


def _concatenated(rng: Random, path: Path, data: Arrays) -> None:
    first = path.read_bytes()
    write(path, arrays(seed=3))
    path.write_bytes(path.read_bytes() + first)


Edit = Callable[[Random, Path, Arrays], Arrays | None]
CONTENT: dict[str, tuple[Edit, str]] = {
    "key missing": (lambda rng, path, data: {k: v for k, v in data.items() if k != rng.choice(KEYS)}, ""),
    "key misspelt": (lambda rng, path, data: {k.upper(): v for k, v in data.items()}, ""),
    "odd name beside a missing key": (
        lambda rng, path, data: {rng.choice(NAMES[:5]) + ".npy": data["actions"], "actions": data["actions"]},
        "",
    ),
    "nan": (lambda rng, path, data: (k := rng.choice(KEYS[:2])) and data | {k: _put(rng, data[k], np.nan)}, ""),
    "infinity": (lambda rng, path, data: (k := rng.choice(KEYS[:2])) and data | {k: _put(rng, data[k], -np.inf)}, ""),
    "beyond float32": (
        lambda rng, path, data: (k := rng.choice(KEYS[:2])) and data | {k: _put(rng, data[k].astype("f8"), 1e300)},
        "",
    ),
    "action out of range": (lambda rng, path, data: data | {"actions": _put(rng, data["actions"], 1.5)}, ""),
    "flag of 2": (lambda rng, path, data: data | {"terminals": _put(rng, data["terminals"], 2)}, ""),
    "flag of nan": (lambda rng, path, data: data | {"terminals": _put(rng, data["terminals"], np.nan)}, ""),
    "no ends": (lambda rng, path, data: data | {"terminals": np.zeros_like(data["terminals"])}, ""),
    "all ends": (lambda rng, path, data: data | {"terminals": np.ones_like(data["terminals"])}, ""),
    "ends moved": (lambda rng, path, data: data | {"terminals": np.roll(data["terminals"], 3)}, EDITED),
    "another type": (
        lambda rng, path, data: (k := rng.choice(KEYS)) and data | {k: rng.choice(list(TYPES.values()))(data[k])},
        EDITED,
    ),
    "next of another type": (
        lambda rng, path, data: (d := regular()) | {k: rng.choice(list(TYPES.values()))(d[k]) for k in [rng.choice(list(d))]},
        EDITED,
    ),
    "valids of another type": (
        lambda rng, path, data: (d := compact()) | {k: rng.choice(list(TYPES.values()))(d[k]) for k in [rng.choice(list(d))]},
        EDITED,
    ),
    "next that does not follow": (
        lambda rng, path, data: (d := regular()) | {"next_observations": rng.choice([d["next_observations"][::-1], d["observations"], d["next_observations"] * 0.5])},
        "",
    ),
    "header rewritten": (
        lambda rng, path, data: _rewritten(rng, path, data, rng.choice(list(HEADERS)), rng.choice(KEYS), rng.choice([1, 1, 2, 3, 4, 9]), None),
        REWRITTEN,
    ),
    "header of a wrong length": (
        lambda rng, path, data: _rewritten(rng, path, data, "fortran", rng.choice(KEYS), 1, rng.choice([0, 1, 5, 60, 117, 119, 182, 2000, 65535])),
        "",
    ),
    "key twice": (_twice, ""),
    "encrypted flag": (partial(_patched, (8, b"\x01\x00"), True), ""),
    "unknown method": (partial(_patched, (10, b"\x63\x00"), True), ""),
    "wrong method": (partial(_patched, (10, b"\x08\x00"), True), ""),
    "wrong checksum": (partial(_patched, (16, b"\xde\xad\xbe\xef"), True), ""),
    "wrong size": (partial(_patched, (24, b"\x10\x01\x00\x00"), True), ""),
    "huge size": (partial(_patched, (24, b"\xfe\xff\xff\xff"), True), ""),
    "wrong offset": (partial(_patched, (42, b"\x40\x00\x00\x00"), True), ""),
    "a bit and its checksum": (_crc_fixed, REWRITTEN),
    "member longer or shorter": (_member, ""),
    "damage in deflate": (partial(_inside_compressed, zipfile.ZIP_DEFLATED), ""),
    "damage in bz2": (partial(_inside_compressed, zipfile.ZIP_BZIP2), ""),
    "damage in lzma": (partial(_inside_compressed, zipfile.ZIP_LZMA), ""),
    "pickle in a known key": (lambda rng, path, data: _traps(rng, path, data, rng.choice([*KEYS, "valids", "next_observations"])), ""),
    "pickle in an odd key": (lambda rng, path, data: _traps(rng, path, data, "infos"), ""),
    "a bare pickle": (lambda rng, path, data: path.write_bytes(pickle.dumps(Trap(path.parent))) and None, ""),
    "a bare npy": (lambda rng, path, data: path.write_bytes(npy(data["actions"])) and None, ""),
    "two archives in one": (_concatenated, ""),
}  # fmt: skip
"""Content of a file by kind, and why a silent change is no failure; a function that returns None wrote it."""

VALID: dict[str, Edit] = {
    "float64": lambda rng, path, data: {k: v.astype("f8") for k, v in data.items()},
    "float16": lambda rng, path, data: {k: v.astype("f2") for k, v in data.items()},
    "longdouble": lambda rng, path, data: {k: v.astype(np.longdouble) for k, v in data.items()},
    "big-endian": lambda rng, path, data: {k: v.astype(">f4") for k, v in data.items()},
    "Fortran order": lambda rng, path, data: {k: np.asfortranarray(v) for k, v in data.items()},
    "flags as numbers": lambda rng, path, data: data | {"terminals": data["terminals"].astype(rng.choice(["i8", "u1", "f4"]))},
    "deflate": lambda rng, path, data: write(path, data, zipfile.ZIP_DEFLATED),
    "bz2": lambda rng, path, data: write(path, data, zipfile.ZIP_BZIP2),
    "lzma": lambda rng, path, data: write(path, data, zipfile.ZIP_LZMA),
    "npy version 2": lambda rng, path, data: write(path, data, version=(2, 0)),
    "npy version 3": lambda rng, path, data: write(path, data, version=(3, 0)),
    "extra keys": lambda rng, path, data: data | {"qpos": np.zeros((4, 9)), "rewards": np.zeros(3), "note": b"text"},
    "odd keys": lambda rng, path, data: data | {"a b": np.zeros(1), "\u00e9": np.zeros(1), "readme.txt": b"hello"},
    "other order of keys": lambda rng, path, data: dict(reversed(data.items())),
    "regular": lambda rng, path, data: regular(),
    "compact": lambda rng, path, data: compact(),
    "a link": lambda rng, path, data: path.symlink_to(path.replace(path.with_name("there.bin"))),
}  # fmt: skip


class NpzCases:
    """The cases of a small OGBench file, judged by `npz.read_npz` and by `convert.prepare`."""

    name = "npz"

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.home = folder / "pristine"
        self.home.mkdir(parents=True, exist_ok=True)
        write(self.home / FILE, arrays())
        write(self.home / VAL, arrays((20,), 1))
        self.bits = [8 * at + bit for at in header_bits((self.home / FILE).read_bytes()) for bit in range(8)]
        self.work = folder / "work"
        self.fresh()
        self.read_same, self.stored_same = self.read(FILE), self.prepare()
        self.val_same = self.read(VAL)
        self.regular_same = self._other(regular())

    def case(self, i: int) -> Case:
        """Case `i`: negative numbers are header bits, -1 the first; others are drawn."""
        if i < 0:
            bit = self.bits[-1 - i]
            return Case("header bit", lambda folder: _flip(bit, folder / FILE))
        rng = Random(f"npz-{self.seed}-{i}")
        group = rng.choices(("bytes", "content", "valid", "place"), (40, 45, 9, 6))[0]
        name = rng.choice(list({"bytes": BYTES, "content": CONTENT, "valid": VALID, "place": PLACES}[group]))
        file = FILE if rng.random() < 0.85 or group == "valid" else VAL
        if group == "bytes":
            return Case(f"bytes: {name}", lambda folder: damage(folder / file, BYTES[name], rng))
        if group == "place":
            return Case(f"place: {name}", lambda folder: PLACES[name](folder / file))
        edit, why = (VALID[name], "") if group == "valid" else CONTENT[name]
        return Case(f"{group}: {name}", partial(self._edit, edit, rng, file), why, group == "valid")

    def _edit(self, edit: Edit, rng: Random, file: str, folder: Path) -> None:
        path = folder / file
        data = arrays() if file == FILE else arrays((20,), 1)
        found = edit(rng, path, data)
        if isinstance(found, dict):
            write(path, found)

    def verdicts(self, i: int) -> tuple[Case, dict[str, Verdict]]:
        """Verdict of each reader on case `i`."""
        case = self.case(i)
        self.fresh()
        before = (self.work / VAL).read_bytes()
        case.make(self.work)
        other = not (self.work / VAL).is_file() or (self.work / VAL).read_bytes() != before
        pristine = (
            self.regular_same
            if case.kind in ("valid: regular", "content: next of another type")
            else self.read_same
        )
        found = {} if other else {"read": judge(partial(self.read, FILE), pristine, case, self.work)}
        if case.kind not in ("valid: regular", "content: next of another type"):
            if other:
                found["read"] = judge(partial(self.read, VAL), self.val_same, case, self.work)
            found["prepare"] = judge(self.prepare, self.stored_same, case, self.work)
        return case, found

    def fresh(self) -> None:
        """The undamaged files, and no store."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.home, self.work)

    def read(self, file: str) -> Seen:
        return seen(npz.read_npz(self.work / file))

    def prepare(self) -> Seen:
        return stored(prepare(self.work / FILE, self.work / "store", SPEC))

    def _other(self, data: Arrays) -> Seen:
        write(self.work / FILE, data)
        return self.read(FILE)


def seen(data: RawDataset) -> Seen:
    names = ("obs", "action", "first", "length", "reward", "terminated")
    return Seen({name: getattr(data, name) for name in names}, data.notes)


def stored(store: Store) -> Seen:
    """All rows of a store."""
    values: dict[str, Any] = {"shards": len(store.train), "val": store.val is not None}
    for i, split in enumerate((*store.train, *([store.val] if store.val else []))):
        for name in ("obs", "action", "first", "length", "reward", "terminated"):
            value = getattr(split, name)
            values[f"{i}/{name}"] = None if value is None else np.asarray(value)
    return Seen(values, store.notes)
