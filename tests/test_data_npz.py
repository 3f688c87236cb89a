"""Reading dataset files: three layouts, one result, and one clear line for each kind of bad file."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ogbench.utils import load_dataset

from mac.data.npz import RawDataset, read
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
    ours, theirs = read(path), load_dataset(str(path), compact_dataset=True)
    np.testing.assert_array_equal(ours.obs, theirs["observations"])
    np.testing.assert_array_equal(ours.action, theirs["actions"])
    np.testing.assert_array_equal(ours.first + ours.length - 1, np.flatnonzero(theirs["valids"] == 0))
    assert ours.notes == ()


def test_disk_file_equals_ogbench_regular_load(tmp_path: Path):
    path = write(tmp_path / "x.npz", disk_arrays())
    ours, theirs = read(path), load_dataset(str(path), compact_dataset=False)
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
    want, got = read(path), read(again)
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
    data = read(write(tmp_path / "x.npz", arrays))
    np.testing.assert_array_equal(data.first, [0, 5])
    np.testing.assert_array_equal(data.length, [5, 5])


@pytest.mark.parametrize("layout", ["disk", "compact"])
def test_file_that_stops_within_an_episode_keeps_it_as_a_shorter_one(tmp_path: Path, layout: str):
    arrays = disk_arrays((6, 4, 9))
    path = write(tmp_path / "x.npz", {k: v[:-3] for k, v in arrays.items()})
    if layout == "compact":
        path = write(tmp_path / "y.npz", load_dataset(str(path), compact_dataset=True))
    data = read(path)
    np.testing.assert_array_equal(data.length, [6, 4, 6])
    (note,) = data.notes
    assert "last 6 rows are kept as a shorter episode" in note


def test_float64_and_float16_files_are_read_as_float32(tmp_path: Path):
    arrays = disk_arrays()
    for dtype in (np.float64, np.float16):
        changed = arrays | {k: arrays[k].astype(dtype) for k in ("observations", "actions")}
        data = read(write(tmp_path / "x.npz", changed))
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
    "integers": (lambda a: a | {"actions": a["actions"].astype(int)}, "'actions' is int64"),
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
    "terminals of rank 2": (lambda a: a | {"terminals": a["terminals"][:, None]}, "one value per row"),
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
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
