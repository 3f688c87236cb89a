"""Damaged hdf5 files in the layouts of D4RL and of Minari: damaged bytes, and rewritten content."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from mac.data import hdf5
from mac.data.convert import prepare
from tests.fuzz.judge import Case, Seen, Verdict, judge
from tests.fuzz.mutators import BYTES, PLACES, damage
from tests.fuzz.npz_cases import EDITED, TYPES, seen, stored
from tests.helpers.hdf5_files import FALL, LIMIT, d4rl_arrays, write_d4rl, write_minari
from tests.helpers.small_datasets import SPEC

RECORDED = SPEC._replace(recorded=True)
EPISODES = ((15, FALL), (17, LIMIT), (11, FALL), (16, LIMIT), (14, LIMIT), (9, FALL))
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
EPISODE_KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
UNCHECKED = "hdf5 keeps no checksum of contiguous arrays, nor of headers of its older format"
UNWRITTEN = "arrays that were never written read as their fill value, which may have been meant"
FLAGS = "flags say alone where episodes end"


def write_checked(path: Path, arrays: dict[str, Any]) -> Path:
    """D4RL's layout with a checksum on everything: the newest format's headers, fletcher32 on all chunks."""
    with h5py.File(path, "w", libver="latest") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, chunks=True, fletcher32=True)
    return path


def write_zipped(path: Path, arrays: dict[str, Any]) -> Path:
    """D4RL's layout as its own files have it: chunks that are compressed."""
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, chunks=value.shape, compression="gzip")
    return path


LAYOUTS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "d4rl": write_d4rl,
    "minari": lambda path, arrays: write_minari(path, arrays, EPISODES),
    "checked": write_checked,
    "zipped": write_zipped,
}


def _keys(layout: str, rng: Random) -> str:
    """The path of some array."""
    if layout != "minari":
        return rng.choice(KEYS)
    return f"episode_{rng.randrange(len(EPISODES))}/{rng.choice(EPISODE_KEYS)}"


def _put(file: h5py.File, key: str, value: Any) -> None:
    del file[key]
    file[key] = value


def _values(file: Any, key: str) -> np.ndarray:
    return file[key][()]


def _entry(value: Any, wanted: str = "f") -> Callable[[Random, Any, str], None]:
    """One entry of a floating-point array is another."""

    def edit(rng: Random, file: Any, key: str) -> None:
        array = _values(file, key).astype(np.float64)
        array[rng.randrange(len(array))] = value
        _put(file, key, array)

    return edit


def _type(rng: Random, file: Any, key: str) -> None:
    name = rng.choice(
        [
            name
            for name in TYPES
            if name not in ("no npy", "an empty member", "a pickled npy", "text", "dates")
        ]
    )
    _put(file, key, TYPES[name](_values(file, key)))


def _group(rng: Random, file: Any, key: str) -> None:
    del file[key]
    file.create_group(key)


def _gone(rng: Random, file: Any, key: str) -> None:
    del file[key]


def _virtual(source: str) -> Callable[[Random, Any, str], None]:
    """A virtual array whose source is missing."""

    def edit(rng: Random, file: Any, key: str) -> None:
        value = _values(file, key)
        layout = h5py.VirtualLayout(value.shape, value.dtype)
        layout[:] = h5py.VirtualSource(source, "x", value.shape, value.dtype)
        del file[key]
        file.create_virtual_dataset(key, layout)

    return edit


def _unwritten(rng: Random, file: Any, key: str) -> None:
    value = _values(file, key)
    del file[key]
    file.create_dataset(key, value.shape, value.dtype, chunks=rng.choice([None, True]))


def _partly(rng: Random, file: Any, key: str) -> None:
    """The first half is written, the second is not."""
    value = _values(file, key)
    del file[key]
    new = file.create_dataset(key, value.shape, value.dtype, chunks=(4, *value.shape[1:]))
    new[: len(value) // 2] = value[: len(value) // 2]


def _huge(rng: Random, file: Any, key: str) -> None:
    value = _values(file, key)
    del file[key]
    file.create_dataset(key, (10**13, *value.shape[1:]), value.dtype, chunks=(1000, *value.shape[1:]))


def _external(rng: Random, file: Any, key: str) -> None:
    value = _values(file, key)
    del file[key]
    file.create_dataset(key, value.shape, value.dtype, external=[("/nowhere/at/all", 0, h5py.h5f.UNLIMITED)])


def _link(link: Any) -> Callable[[Random, Any, str], None]:
    def edit(rng: Random, file: Any, key: str) -> None:
        del file[key]
        file[key] = link(key)

    return edit


def _resized(rng: Random, file: Any, key: str) -> None:
    value = _values(file, key)
    _put(file, key, value[:-1] if rng.random() < 0.5 else np.concatenate([value, value[-1:]]))


def _episode_name(rng: Random, file: Any, key: str) -> None:
    first = key.split("/")[0]
    if "/" in key:
        file.move(
            first, rng.choice(["episode_x", "episode_", "episode_-1", "episode_\u0663", "episode_00000", "e"])
        )
    else:
        file.move(key, key.upper())


def _no_group(rng: Random, file: Any, key: str) -> None:
    first = key.split("/")[0]
    del file[first]
    file[first] = rng.choice([1.0, np.zeros(3), "text"])


def _empty(rng: Random, file: Any, key: str) -> None:
    _put(file, key, h5py.Empty("f4"))


def _text(rng: Random, file: Any, key: str) -> None:
    _put(file, key, rng.choice(["text", b"\xff\xfe", np.asarray([b"a", b"b"])]))


def _reference(rng: Random, file: Any, key: str) -> None:
    count = len(_values(file, key))
    ref = file.ref
    _put(file, key, np.asarray([ref] * count, dtype=h5py.ref_dtype))


def _lengths(rng: Random, file: Any, key: str) -> None:
    """Arrays of variable length in place of rows."""
    value = _values(file, key)
    del file[key]
    file.create_dataset(key, (len(value),), dtype=h5py.vlen_dtype(np.float32))


def _rolled(rng: Random, file: Any, key: str) -> None:
    _put(file, key, np.roll(_values(file, key), rng.randint(1, 5), axis=0))


Edit = Callable[[Random, Any, str], None]
CONTENT: dict[str, tuple[Edit, str]] = {
    "another type": (_type, EDITED),
    "a group": (_group, ""),
    "key missing": (_gone, FLAGS),
    "nan": (_entry(np.nan), ""),
    "infinity": (_entry(np.inf), ""),
    "beyond float32": (_entry(1e300), ""),
    "a value of 0.5": (_entry(0.5), EDITED),
    "virtual, source missing": (_virtual("/nowhere.hdf5"), ""),
    "virtual, source is a folder": (_virtual("/tmp"), ""),
    "never written": (_unwritten, ""),
    "half written": (_partly, UNWRITTEN),
    "huge": (_huge, ""),
    "external storage gone": (_external, ""),
    "soft link to nowhere": (_link(lambda key: h5py.SoftLink("/nowhere")), FLAGS),
    "soft link to itself": (_link(lambda key: h5py.SoftLink("/" + key)), FLAGS),
    "external link to nowhere": (_link(lambda key: h5py.ExternalLink("nowhere.hdf5", "/x")), FLAGS),
    "other length": (_resized, ""),
    "name of a group": (_episode_name, "an episode that goes by another name is another group, which is ignored"),
    "an array for a group": (_no_group, ""),
    "empty data set": (_empty, ""),
    "text": (_text, ""),
    "references": (_reference, ""),
    "variable length": (_lengths, ""),
    "rows rolled": (_rolled, EDITED),
}  # fmt: skip


def _again(path: Path, **options: Any) -> None:
    """The same arrays, stored in another way."""
    with h5py.File(path) as file:
        arrays: dict[str, np.ndarray] = {}
        file.visititems(
            lambda name, item: (
                arrays.update({name: item[()]}) if hasattr(item, "dtype") and item.ndim else None
            )
        )
    with h5py.File(path, "w", libver="latest" if options.pop("latest", False) else None) as file:
        for name, value in arrays.items():
            big = options.get("dtype") and value.dtype.kind == "f"
            more = {k: v for k, v in options.items() if len(value) and k != "dtype"}
            file.create_dataset(name, data=value.astype(options["dtype"]) if big else value, **more)


VALID: dict[str, dict[str, Any]] = {
    "float64": {"dtype": "f8"},
    "big-endian": {"dtype": ">f4"},
    "gzip": {"compression": "gzip"},
    "lzf": {"compression": "lzf"},
    "shuffle": {"shuffle": True},
    "fletcher32": {"fletcher32": True},
    "latest": {"latest": True},
    "chunks": {"chunks": True},
}


class Hdf5Cases:
    """The cases of small hdf5 files, judged by `hdf5.read_hdf5` and by `convert.prepare`."""

    name = "hdf5"

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        arrays = d4rl_arrays(EPISODES)
        self.work = folder / "work"
        self.same: dict[str, tuple[Seen, Seen]] = {}
        for name, write in LAYOUTS.items():
            home = folder / name
            home.mkdir(parents=True, exist_ok=True)
            write(home / "toy.hdf5", arrays)
            self.fresh(name)
            self.same[name] = self.read(), self.prepare()

    def case(self, i: int) -> tuple[str, Case]:
        """The layout and case `i`."""
        rng = Random(f"hdf5-{self.seed}-{i}")
        layout = rng.choice(["d4rl", "minari", "checked", "zipped"])
        group = rng.choices(("bytes", "content", "valid", "place"), (45, 43, 7, 5))[0]
        name = rng.choice(list({"bytes": BYTES, "content": CONTENT, "valid": VALID, "place": PLACES}[group]))
        file = Path("toy.hdf5")
        if group == "bytes":
            why = "" if layout == "checked" else UNCHECKED
            return layout, Case(
                f"bytes: {layout}, {name}", lambda folder: damage(folder / file, BYTES[name], rng), why
            )
        if group == "place":
            return layout, Case(f"place: {name}", lambda folder: PLACES[name](folder / file))
        if group == "valid":
            return layout, Case(
                f"valid: {name}", lambda folder: _again(folder / file, **VALID[name]), "", True
            )
        edit, why = CONTENT[name]
        return layout, Case(f"content: {name}", partial(self._edit, edit, rng, layout), why)

    def _edit(self, edit: Edit, rng: Random, layout: str, folder: Path) -> None:
        with h5py.File(folder / "toy.hdf5", "a") as file:
            edit(rng, file, _keys(layout, rng))

    def verdicts(self, i: int) -> tuple[Case, dict[str, Verdict]]:
        """Verdict of each reader on case `i`."""
        layout, case = self.case(i)
        self.fresh(layout)
        case.make(self.work)
        pristine, store = self.same[layout]
        found = {"read": judge(self.read, pristine, case, self.work)}
        return case, found | {"prepare": judge(self.prepare, store, case, self.work)}

    def fresh(self, layout: str) -> None:
        """The undamaged file of a layout, and no store."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder / layout, self.work)

    def read(self) -> Seen:
        return seen(hdf5.read_hdf5(self.work / "toy.hdf5", RECORDED.max_steps))

    def prepare(self) -> Seen:
        return stored(prepare(self.work / "toy.hdf5", self.work / "store", RECORDED))
