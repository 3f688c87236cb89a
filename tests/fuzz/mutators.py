"""Damage to bytes and to JSON, as disks, transfers, editors and people cause it."""

import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.judge import TRAP

Bytes = Callable[[Random, bytearray], bytes | bytearray]


def _span(rng: Random, data: bytearray, most: int = 512) -> slice:
    start = rng.randrange(len(data))
    return slice(start, min(len(data), start + rng.randint(1, most)))


def flip(rng: Random, data: bytearray, count: int = 1) -> bytearray:
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def fill(rng: Random, data: bytearray, with_what: Callable[[], int], most: int = 512) -> bytearray:
    span = _span(rng, data, most)
    data[span] = bytes(with_what() for _ in range(span.stop - span.start))
    return data


def insert(rng: Random, data: bytearray, content: bytes) -> bytearray:
    at = rng.randrange(len(data))
    data[at:at] = content
    return data


def delete(rng: Random, data: bytearray, most: int = 512) -> bytearray:
    del data[_span(rng, data, most)]
    return data


def duplicate(rng: Random, data: bytearray) -> bytearray:
    span = _span(rng, data)
    data[span.stop : span.stop] = data[span]
    return data


def swap(rng: Random, data: bytearray) -> bytearray:
    size = max(1, min(512, len(data) // 4))
    a, b = rng.randrange(len(data) - size + 1), rng.randrange(len(data) - size + 1)
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return data


def integer(rng: Random, data: bytearray) -> bytearray:
    """Four bytes become a number at the edge of its type."""
    at = rng.randrange(max(1, len(data) - 4))
    value = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16, len(data)])
    data[at : at + 4] = value.to_bytes(4, "little")
    return data


BYTES: dict[str, Bytes] = {
    "one bit": flip,
    "eight bits": lambda rng, data: flip(rng, data, 8),
    "one byte": lambda rng, data: fill(rng, data, lambda: rng.randrange(256), 1),
    "zero block": lambda rng, data: fill(rng, data, lambda: 0),
    "block of ones": lambda rng, data: fill(rng, data, lambda: 255),
    "random block": lambda rng, data: fill(rng, data, lambda: rng.randrange(256)),
    "cut short": lambda rng, data: data[: rng.randrange(len(data))],
    "cut a little": lambda rng, data: data[: -rng.randint(1, min(30, len(data)))],
    "front gone": lambda rng, data: data[rng.randint(1, len(data)) :],
    "bytes appended": lambda rng, data: data + rng.randbytes(rng.randint(1, 300)),
    "zeros appended": lambda rng, data: data + bytes(rng.randint(1, 5000)),
    "bytes before": lambda rng, data: rng.randbytes(rng.randint(1, 300)) + data,
    "bytes inserted": lambda rng, data: insert(rng, data, rng.randbytes(rng.randint(1, 20))),
    "bytes deleted": lambda rng, data: delete(rng, data, 20),
    "block deleted": delete,
    "block doubled": duplicate,
    "blocks swapped": swap,
    "halves swapped": lambda rng, data: data[len(data) // 2 :] + data[: len(data) // 2],
    "second half zero": lambda rng, data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "twice": lambda rng, data: data + data,
    "empty": lambda rng, data: b"",
    "all zeros": lambda rng, data: bytes(len(data)),
    "backwards": lambda rng, data: data[::-1],
    "edge integer": integer,
    "line ends": lambda rng, data: data.replace(b"\n", b"\r\n"),
    "seven bits": lambda rng, data: bytes(x & 127 for x in data),
    "gzipped": lambda rng, data: gzip.compress(bytes(data), mtime=0),
    "a web page": lambda rng, data: b"<!DOCTYPE html><html><title>404</title></html>\n",
    "a pickle": lambda rng, data: pickle.dumps({"observations": 1}),
    "as UTF-16": lambda rng, data: bytes(data).decode("latin-1").encode("utf-16"),
}


def damage(path: Path, mutate: Bytes, rng: Random) -> None:
    """Lets `mutate` change the bytes of a file."""
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(mutate(rng, data)) if data else b"\x00")


# Something else than a file where a file is expected.


def _gone(path: Path) -> None:
    path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)


def _link(path: Path, target: str) -> None:
    _gone(path)
    path.symlink_to(target)


PLACES: dict[str, Callable[[Path], object]] = {
    "missing": _gone,
    "a folder": lambda path: (_gone(path), path.mkdir()),
    "a full folder": lambda path: (_gone(path), path.mkdir(), (path / "x").write_text("x")),
    "a FIFO": lambda path: (_gone(path), os.mkfifo(path)),
    "a link to nowhere": lambda path: _link(path, "/nowhere/at/all"),
    "a link to itself": lambda path: _link(path, path.name),
    "a link to zeros": lambda path: _link(path, "/dev/zero"),
    "a link to nothing": lambda path: _link(path, "/dev/null"),
}


# JSON.

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, 10**400, float("nan"), float("inf"), "", "text", "a\nb", "x" * 5000,
    [], [1], {}, {"a": 1}, [[]], "../..", "\ud800",
)  # fmt: skip
"""What a value of a JSON file is replaced by."""


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document is, the document first; of long lists the first entries."""
    yield at
    if isinstance(value, dict):
        for name, each in value.items():
            yield from paths(each, (*at, name))
    if isinstance(value, list):
        for i, each in enumerate(value[:2]):
            yield from paths(each, (*at, i))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def replaced(rng: Random, document: Any) -> tuple[str, Any]:
    """A document in which one value is another; and the name of the value."""
    path, value = rng.choice(list(paths(document))), rng.choice(VALUES)
    if not path:
        return "document", value
    _at(document, path[:-1])[path[-1]] = value
    return str(path[0]), document


def removed(rng: Random, document: Any) -> tuple[str, Any]:
    """A document without one of its values."""
    path = rng.choice([p for p in paths(document) if p] or [()])
    if not path:
        return "document", None
    del _at(document, path[:-1])[path[-1]]
    return str(path[0]), document


def renamed(rng: Random, document: Any) -> tuple[str, Any]:
    """A document with one key misspelt."""
    path = rng.choice([p for p in paths(document) if p and isinstance(p[-1], str)] or [()])
    if not path:
        return "document", {}
    inside = _at(document, path[:-1])
    inside[path[-1] + "_"] = inside.pop(path[-1])
    return str(path[0]), document


JSON: dict[str, Callable[[Random, Any], tuple[str, Any]]] = {
    "value replaced": replaced,
    "key removed": removed,
    "key renamed": renamed,
}

TEXTS: dict[str, Callable[[Random, str], bytes]] = {
    "deep lists": lambda rng, text: b"[" * 100_000,
    "deep objects": lambda rng, text: b'{"a":' * 100_000,
    "key twice": lambda rng, text: text.replace("{", '{"steps": 1, "steps": 2,', 1).encode(),
    "trailing comma": lambda rng, text: (text.rstrip()[:-1] + ",}").encode(),
    "comment": lambda rng, text: ("// edited\n" + text).encode(),
    "single quotes": lambda rng, text: text.replace('"', "'").encode(),
    "byte order mark": lambda rng, text: b"\xef\xbb\xbf" + text.encode(),
    "as UTF-16": lambda rng, text: text.encode("utf-16"),
    "latin-1": lambda rng, text: text.replace("{", '{"\xe9": 1,', 1).encode("latin-1"),
    "conflict markers": lambda rng, text: f"<<<<<<< HEAD\n{text}=======\n{text}>>>>>>> main\n".encode(),
    "huge number": lambda rng, text: text.replace("1", "1" * 5000, 1).encode(),
}


def edit_json(path: Path, edit: Callable[[Random, Any], tuple[str, Any]], rng: Random) -> None:
    """Lets `edit` change a JSON file."""
    _, value = edit(rng, json.loads(path.read_text()))
    path.write_bytes(json.dumps(value, indent=2).encode())


class Trap:
    """An object whose unpickling makes the file `TRAP` in a folder."""

    def __init__(self, folder: Path):
        self.file = str(folder / TRAP)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_spring, (self.file,))


def _spring(file: str) -> int:
    Path(file).touch()
    return 0
