"""Reading dataset files: three layouts, one result, and one clear line for each kind of bad file."""

import io
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ogbench.utils import load_dataset

from mac.data.npz import RawDataset, read_npz, stated_sizes
from mac.data.shards import sizes_of
from mac.errors import UserError


def disk_arrays(lengths: tuple[int, ...] = (6, 4, 9), seed: int = 0) -> dict[str, np.ndarray]:
    """A small dataset as OGBench stores it; `lengths` counts rows."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(lengths) - 1] = True
    return {
        "observations": rng.normal(size=(rows, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        "terminals": terminals,
        "qpos": rng.normal(size=(rows, 4)).astype(np.float32),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def rows_of(data: RawDataset, offset: int, count: np.ndarray) -> np.ndarray:
    """Rows `first + offset ... first + offset + count - 1` of every episode, the obvious way."""
    parts = [np.arange(f + offset, f + offset + n) for f, n in zip(data.first, count, strict=True)]
    return np.concatenate(parts)


@pytest.mark.parametrize("lengths", [(6, 4, 9), (2, 2), (11,)])
def test_disk_file_equals_ogbench_compact_load(tmp_path: Path, lengths: tuple[int, ...]):
    path = write(tmp_path / "x.npz", disk_arrays(lengths))
    ours, theirs = read_npz(path), load_dataset(str(path), compact_dataset=True)
    np.testing.assert_array_equal(ours.obs, theirs["observations"])
    np.testing.assert_array_equal(ours.action, theirs["actions"])
    np.testing.assert_array_equal(ours.first + ours.length - 1, np.flatnonzero(theirs["valids"] == 0))
    assert ours.notes == ()


def test_disk_file_equals_ogbench_regular_load(tmp_path: Path):
    path = write(tmp_path / "x.npz", disk_arrays())
    ours, theirs = read_npz(path), load_dataset(str(path), compact_dataset=False)
    here, there = rows_of(ours, 0, ours.length - 1), rows_of(ours, 1, ours.length - 1)
    np.testing.assert_array_equal(ours.obs[here], theirs["observations"])
    np.testing.assert_array_equal(ours.obs[there], theirs["next_observations"])
    np.testing.assert_array_equal(ours.action[here], theirs["actions"])


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("lengths", [(6, 4, 9), (2, 2), (11,)])
def test_saved_ogbench_loads_read_back_as_the_disk_file(
    tmp_path: Path, compact: bool, lengths: tuple[int, ...]
):
    path = write(tmp_path / "x.npz", disk_arrays(lengths))
    again = write(tmp_path / "y.npz", load_dataset(str(path), compact_dataset=compact))
    want, got = read_npz(path), read_npz(again)
    np.testing.assert_array_equal(got.obs, want.obs)
    np.testing.assert_array_equal(got.first, want.first)
    np.testing.assert_array_equal(got.length, want.length)
    meaningful = rows_of(want, 0, want.length - 1)
    np.testing.assert_array_equal(got.action[meaningful], want.action[meaningful])
    if not compact:  # the regular layout does not hold the last action
        assert (got.action[want.first + want.length - 1] == 0).all()


def test_compact_flags_of_two_trajectories_of_five_states(tmp_path: Path):
    arrays = disk_arrays((5, 5)) | {
        "terminals": np.array([0, 0, 0, 1, 1] * 2, np.float32),
        "valids": np.array([1, 1, 1, 1, 0] * 2, np.float32),
    }
    data = read_npz(write(tmp_path / "x.npz", arrays))
    np.testing.assert_array_equal(data.first, [0, 5])
    np.testing.assert_array_equal(data.length, [5, 5])


@pytest.mark.parametrize("layout", ["disk", "compact"])
def test_file_that_stops_within_an_episode_keeps_it(tmp_path: Path, layout: str):
    arrays = disk_arrays((6, 4, 9))
    path = write(tmp_path / "x.npz", {k: v[:-3] for k, v in arrays.items()})
    if layout == "compact":
        path = write(tmp_path / "y.npz", load_dataset(str(path), compact_dataset=True))
    data = read_npz(path)
    np.testing.assert_array_equal(data.length, [6, 4, 6])
    (note,) = data.notes
    assert "last 6 rows are kept as a shorter episode (37.5% of all rows)" in note


def test_float64_and_float16_files_are_read_as_float32(tmp_path: Path):
    arrays = disk_arrays()
    for dtype in (np.float64, np.float16):
        changed = arrays | {k: arrays[k].astype(dtype) for k in ("observations", "actions")}
        data = read_npz(write(tmp_path / "x.npz", changed))
        assert data.obs.dtype == data.action.dtype == np.float32
        np.testing.assert_array_equal(data.obs, changed["observations"].astype(np.float32))


def set_at(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    out = array.copy()
    out[index] = value
    return out


Change = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

BAD_ARRAYS: dict[str, tuple[Change, str]] = {
    "missing key": (lambda a: {k: v for k, v in a.items() if k != "actions"}, "key 'actions' is missing"),
    "object array": (
        lambda a: a | {"actions": a["actions"].astype(object)},
        "'actions' holds Python objects",
    ),
    "complex": (
        lambda a: a | {"observations": a["observations"].astype(complex)},
        "'observations' is complex",
    ),
    "strings": (lambda a: a | {"actions": a["actions"].astype("U8")}, "'actions' is <U8"),
    "images": (
        lambda a: a | {"observations": np.zeros((19, 8, 8, 3), np.uint8)},
        "image observations are not supported",
    ),
    "rank 1": (lambda a: a | {"actions": a["actions"][:, 0]}, r"'actions' has shape \(19,\)"),
    "no columns": (lambda a: a | {"observations": a["observations"][:, :0]}, r"has shape \(19, 0\)"),
    "no rows": (lambda a: {k: v[:0] for k, v in a.items()}, "'observations' has no rows"),
    "unequal rows": (lambda a: a | {"actions": a["actions"][:-1]}, r"unequal row counts .*'actions' 18"),
    "nan": (
        lambda a: a | {"observations": set_at(a["observations"], (7, 2), np.nan)},
        "'observations' is not finite in float32 in row 7, column 2",
    ),
    "inf": (lambda a: a | {"actions": set_at(a["actions"], (3, 1), -np.inf)}, "row 3, column 1"),
    "float64 beyond float32": (
        lambda a: a | {"observations": set_at(a["observations"].astype(float), (4, 0), 1e300)},
        "not finite in float32 in row 4, column 0",
    ),
    "physical actions": (
        lambda a: a | {"actions": set_at(a["actions"], (5, 0), 1.5)},
        "'actions' is 1.5 in row 5, column 0; actions must be normalised",
    ),
    "no terminal": (lambda a: a | {"terminals": np.zeros(19, bool)}, "never marks the end of an episode"),
    "fractional terminal": (
        lambda a: a | {"terminals": set_at(a["terminals"].astype(float), (2,), 0.5)},
        "'terminals' is 0.5 in row 2",
    ),
    "nan terminal": (
        lambda a: a | {"terminals": set_at(a["terminals"].astype(float), (2,), np.nan)},
        "'terminals' is nan in row 2",
    ),
    "terminals of two columns": (
        lambda a: a | {"terminals": np.stack([a["terminals"]] * 2, 1)},
        "one value per row",
    ),
    "image columns": (
        lambda a: a | {"observations": np.zeros((19, 3), np.uint8)},
        "image observations are not supported",
    ),
    "physical whole numbers": (
        lambda a: a | {"actions": np.full((19, 2), 3)},
        "'actions' is 3 in row 0, column 0; actions must be normalised",
    ),
    "string terminals": (lambda a: a | {"terminals": a["terminals"].astype("U5")}, "'terminals' is <U5"),
    "compact without valids": (
        lambda a: a | {"terminals": a["terminals"] | np.append(a["terminals"][1:], False)},
        "row 5 is an episode of one row.*'valids'",
    ),
    "valids contradict": (
        lambda a: a | {"valids": ~a["terminals"]},  # terminals of the disk layout, set once
        "'terminals' and 'valids' contradict each other in row 4",
    ),
    "next_observations of another width": (
        lambda a: a | {"next_observations": a["observations"][:, :2]},
        r"'next_observations' has shape \(19, 2\)",
    ),
    "shuffled regular rows": (
        lambda a: a | {"next_observations": a["observations"][::-1]},
        "'next_observations' of row 0 is not the observation of row 1",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_give_one_line_that_names_file_and_fault(tmp_path: Path, case: str):
    change, message = BAD_ARRAYS[case]
    path = write(tmp_path / "x.npz", change(disk_arrays()))
    expect_one_line(path, message)


def corrupt_middle(path: Path) -> None:
    """Flips bytes inside the first member's compressed data, leaving the archive's index intact."""
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[0].header_offset + 150
    data = bytearray(path.read_bytes())
    data[at : at + 20] = bytes(255 - b for b in data[at : at + 20])
    path.write_bytes(bytes(data))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such dataset file"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "truncated": (
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        "not a complete .npz archive",
    ),
    "text": (lambda p: p.write_text("404: not found"), "not a complete .npz archive"),
    "bytes flipped": (corrupt_middle, "damaged at observations"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
    "a zip of something else": (
        lambda p: zipfile.ZipFile(p, "w").writestr("readme.txt", "hello"),
        "key 'observations' is missing",
    ),
    "members that are not arrays": (
        lambda p: [zipfile.ZipFile(p, "w").writestr(f"{k}.npy", "junk") for k in ("a",)],
        "key 'observations' is missing",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_line_that_names_file_and_fault(tmp_path: Path, case: str):
    harm, message = BAD_FILES[case]
    path = write(tmp_path / "x.npz", disk_arrays((60, 60)))
    harm(path)
    expect_one_line(path, message)


def test_member_that_is_not_an_array_is_named(tmp_path: Path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key in ("observations", "actions", "terminals"):
            archive.writestr(f"{key}.npy", "junk")
    expect_one_line(path, "x.npz: .*observations")


def expect_one_line(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_npz(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text


# What is unusual, and unambiguous.


def npy(array: Any) -> bytes:
    """An array as `np.save` writes it."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def pack(path: Path, members: dict[str, Any], kind: int = zipfile.ZIP_STORED) -> Path:
    """A zip of arrays and of bytes, by file name."""
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, value in members.items():
            archive.writestr(name, value if isinstance(value, bytes) else npy(value))
    return path


def members(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {f"{key}.npy": value for key, value in arrays.items()}


UNUSUAL: dict[str, Change] = {
    "float64": lambda a: {k: v.astype(float) for k, v in a.items()},
    "long doubles": lambda a: a | {"observations": a["observations"].astype(np.longdouble)},
    "big-endian": lambda a: a | {"observations": a["observations"].astype(">f4")},
    "Fortran order": lambda a: a | {"actions": np.asfortranarray(a["actions"])},
    "flags as a column": lambda a: a | {"terminals": a["terminals"][:, None].astype(np.int8)},
    "odd keys": lambda a: a | {"a b/c\n": np.asarray("x"), "empty": np.zeros((0, 3))},
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_but_valid_arrays_are_read(tmp_path: Path, case: str):
    arrays = disk_arrays()
    want, got = (read_npz(write(tmp_path / "x.npz", a)) for a in (arrays, UNUSUAL[case](arrays)))
    for one, other in zip(got[:5], want[:5], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_every_kind_of_zip_is_read(tmp_path: Path, kind: int):
    pack(tmp_path / "x.npz", members(disk_arrays()), kind)
    (tmp_path / "link.npz").symlink_to("x.npz")
    np.testing.assert_array_equal(read_npz(tmp_path / "link.npz").obs, disk_arrays()["observations"])


def test_whole_numbers_are_read_with_a_note(tmp_path: Path):
    arrays = disk_arrays()
    arrays |= {"actions": np.sign(arrays["actions"]).astype(np.int8)}
    arrays |= {"observations": np.arange(57, dtype=np.int64).reshape(19, 3)}
    data = read_npz(write(tmp_path / "x.npz", arrays))
    np.testing.assert_array_equal(data.action, arrays["actions"])
    assert [note.split(": ")[1] for note in data.notes] == [
        "'observations' are whole numbers (int64), read as float32",
        "'actions' are whole numbers (int8), read as float32",
    ]
    arrays["observations"] += 2**24
    assert "the largest of them rounded" in read_npz(write(tmp_path / "x.npz", arrays)).notes[0]


def test_one_lone_row_is_left_out_with_its_share(tmp_path: Path):
    arrays = disk_arrays((6, 4, 1, 9))
    data = read_npz(write(tmp_path / "x.npz", arrays))
    np.testing.assert_array_equal(data.length, [6, 4, 9])
    np.testing.assert_array_equal(data.first, [0, 6, 10])
    np.testing.assert_array_equal(data.obs, np.delete(arrays["observations"], 10, axis=0))
    (note,) = data.notes
    assert note.endswith("1 episode of one row is left out (5% of all rows)")
    with pytest.raises(UserError, match="row 6 is an episode of one row"):
        read_npz(write(tmp_path / "x.npz", disk_arrays((6, 1, 1, 9))))


def test_actions_that_are_all_equal_have_a_note(tmp_path: Path):
    arrays = disk_arrays() | {"actions": np.zeros((19, 2), np.float32)}
    assert "all 19 rows of 'actions' are 0" in read_npz(write(tmp_path / "x.npz", arrays)).notes[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounded_next_observations_are_in_order(tmp_path: Path, dtype: type):
    path = write(tmp_path / "x.npz", disk_arrays((60, 40, 90)))
    arrays = load_dataset(str(path), compact_dataset=False)
    want = read_npz(write(tmp_path / "y.npz", arrays))
    shift = 0 if dtype == np.float16 else 1e-3
    arrays["next_observations"] = (arrays["next_observations"] + np.float32(shift)).astype(dtype)
    data = read_npz(write(tmp_path / "y.npz", arrays))
    np.testing.assert_array_equal(data.length, want.length)
    inside = rows_of(data, 0, data.length - 1)  # final states are in `next_observations` alone
    np.testing.assert_array_equal(data.obs[inside], want.obs[inside])
    assert "the observation of the next row but for rounding" in data.notes[0]
    arrays["next_observations"][70] += 1
    expect_one_line(write(tmp_path / "y.npz", arrays), "'next_observations' of row 70 is not the observation")


# What is damaged. Every member has a checksum, which only counts for who reads to the end.

HEAD = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


def with_head(array: np.ndarray, text: str) -> bytes:
    """The bytes of an array behind another head."""
    head = text.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + array.tobytes()


@pytest.mark.parametrize("key", ["observations", "actions"])
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_the_length_of_a_head_is_refused(tmp_path: Path, key: str, bit: int):
    path = pack(tmp_path / "x.npz", members(disk_arrays()))
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY", content.index(f"{key}.npy".encode())) + 8] ^= 1 << bit
    path.write_bytes(content)
    expect_one_line(path, f"damaged at {key}")


DAMAGED: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, Any]], str]] = {
    "fewer columns": (
        lambda a: {"observations.npy": with_head(a["observations"], HEAD % "(19, 2)")},
        r"damaged at observations \(float32 \(19, 2\) are 152 bytes, not 228\)",
    ),
    "bytes behind": (lambda a: {"actions.npy": npy(a["actions"]) + b"x" * 10**6}, "damaged at actions"),
    "absurd shape": (
        lambda a: {"observations.npy": with_head(a["observations"], HEAD % "(100000000000000, 3)")},
        "damaged at observations",
    ),
    "true as a length": (
        lambda a: {"observations.npy": with_head(a["observations"], HEAD % "(True, 3)")},
        r"its shape is \(True, 3\)",
    ),
    "too many sides": (
        lambda a: {"observations.npy": with_head(a["observations"], HEAD % str((19, 3) + (1,) * 70))},
        "damaged at observations",
    ),
    "head that ends too soon": (lambda a: {"actions.npy": with_head(a["actions"], "{'descr'")}, "damaged"),
    "head without end": (lambda a: {"actions.npy": with_head(a["actions"], "-" * 9000 + "1")}, "actions"),
    "head that is code": (
        lambda a: {"actions.npy": with_head(a["actions"], "__import__('os').abort()")},
        "damaged at actions",
    ),
    "structured": (
        lambda a: {"actions.npy": np.zeros(19, [("a", "f4"), ("b", "f4")])},
        "'actions' is .*, numbers are needed",
    ),
    "valids no array": (lambda a: {"valids.npy": b"hello"}, "damaged at valids"),
    "next_observations no array": (lambda a: {"next_observations.npy": b"hello"}, "damaged at next_obs"),
    "scalar": (lambda a: {"actions.npy": np.float32(1)}, r"'actions' has shape \(\)"),
    "a key twice": (lambda a: {"actions": npy(a["actions"])}, "holds 'actions' twice"),
    "a broken line as a key": (
        lambda a: {"actions.npy": b"", "a\nb" + "c" * 60_000: b""},
        "damaged at actions",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_members_whose_checksum_is_right_are_checked_too(tmp_path: Path, case: str):
    change, message = DAMAGED[case]
    path = pack(tmp_path / "x.npz", members(disk_arrays()) | change(disk_arrays()))
    expect_one_line(path, message)


def test_names_in_a_message_are_short_and_on_one_line(tmp_path: Path):
    path = pack(tmp_path / "x.npz", {"a\nb.npy": b"", "c" * 60_000: b""})
    with pytest.raises(UserError, match=r"key 'observations' is missing \(found: a\?b, ccc") as caught:
        read_npz(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def flipped(path: Path, at: Callable[[bytes], int], bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at(bytes(content))] ^= bit
    path.write_bytes(content)


FLIPS: dict[str, tuple[int, Callable[[bytes], int], int]] = {
    "encrypted": (0, lambda c: c.index(b"PK\x01\x02") + 8, 1),
    "unknown compression": (0, lambda c: c.index(b"PK\x01\x02") + 10, 64),
    "lzma": (zipfile.ZIP_LZMA, lambda c: c.index(b"actions.npy") + 40, 255),
    "checksum": (0, lambda c: c.index(b"PK\x01\x02") + 16, 1),
    "name of an optional array": (0, lambda c: c.rindex(b"next_obs"), 1),
    "an entry that swallows the next": (
        0,
        lambda c: c.rindex(b"PK\x01\x02", 0, c.rindex(b"next_obs") - 50) + 30,
        64,
    ),
}


@pytest.mark.parametrize("case", FLIPS)
def test_a_flipped_bit_in_the_index_is_refused(tmp_path: Path, case: str):
    kind, at, bit = FLIPS[case]
    arrays = disk_arrays()
    path = pack(tmp_path / "x.npz", members(arrays | {"next_observations": arrays["observations"]}), kind)
    flipped(path, at, bit)
    expect_one_line(path, "damaged at|not a complete")


def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path: Path):
    path = tmp_path / "x.npz"
    os.mkfifo(path)
    (tmp_path / "y.npz").symlink_to("/dev/zero")
    for each in (path, tmp_path / "y.npz"):
        assert sizes_of(each).rows == 0
        expect_one_line(each, "is a pipe or a device")


# Memory.

KINDS = {
    "disk": ("observations", "actions", "terminals"),
    "regular": ("observations", "actions", "terminals", "next_observations"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_reading_takes_no_more_memory_than_is_said(tmp_path: Path, kind: str, dtype: type):
    rows = 100_000
    obs = np.random.default_rng(0).normal(size=(rows + 1, 4)).astype(dtype)
    arrays = {"observations": obs[:-1], "actions": np.tanh(obs[:-1, :2]), "next_observations": obs[1:]}
    arrays["terminals"] = np.arange(rows) % 100 == 99
    path = tmp_path / "x.npz"
    np.savez(path, **{key: arrays[key] for key in KINDS[kind]})  # pyright: ignore[reportArgumentType]
    stated = stated_sizes(path)
    assert (stated.rows, stated.stored) == (rows, 4 * rows * 6)
    tracemalloc.start()
    read_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 * stated.reading < peak < stated.reading
