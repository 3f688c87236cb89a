"""Damaged stores of converted datasets, judged by what a run would train on."""

import contextlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run as program
from experiments.launch import dataset
from experiments.launch.settings import parse_command_line
from mac.data.window_feed import open_feed
from tests.fuzz.judge import Case, Seen, Verdict, judge
from tests.fuzz.mutators import BYTES, JSON, PLACES, TEXTS, Trap, damage, edit_json
from tests.helpers.random_kills import ENV, write_data

FLAGS = f"""--algo iql --env {ENV} --preset laptop --seeds 1 --hp.hidden 8 8 --hp.batch 8 --steps 10 --out run
    --data.path data/small.npz --data.dir data""".split()
WAYS = {
    "whole": [],
    "windows": ["--data.resident", "no", "--data.window", "80", "--data.window-updates", "1"],
    "codes": ["--data.dtype", "uint16"],
}
"""How the rows are held; each has a store of its own."""
ARRAYS = ("obs.npy", "action.npy", "episodes.npy")
PARTS = ("train-000", "val")

Edit = Callable[[Random, np.ndarray], np.ndarray]


def _entry(value: float) -> Edit:
    def edit(rng: Random, array: np.ndarray) -> np.ndarray:
        array = array.copy()
        place = rng.randrange(len(array)), rng.randrange(array.shape[1])
        array[place] = np.asarray(value).astype(array.dtype)
        return array

    return edit


def _moved(rng: Random, array: np.ndarray) -> np.ndarray:
    """A row of the first episode given to the second, if these are episodes."""
    array = array.copy()
    if array.dtype == np.int64 and len(array) > 1:
        array[0, 1] += 1
        array[1, 1] -= 1
    return array


CONTENT: dict[str, Edit] = {
    "a number": _entry(1.0),
    "a zero": _entry(0.0),
    "a negative number": _entry(-1.0),
    "a large number": _entry(50_000.0),
    "length moved": _moved,
    "rows rolled": lambda rng, array: np.roll(array, 1, axis=0),
    "rows backwards": lambda rng, array: array[::-1],
    "one row fewer": lambda rng, array: array[:-1],
    "one row more": lambda rng, array: np.concatenate([array, array[-1:]]),
    "one column fewer": lambda rng, array: array[:, :-1],
    "one column more": lambda rng, array: np.concatenate([array, array[:, :1]], axis=1),
    "float64": lambda rng, array: array.astype(np.float64),
    "int32": lambda rng, array: array.astype(np.int32),
    "big-endian": lambda rng, array: array.astype(array.dtype.newbyteorder(">")),
    "Fortran order": lambda rng, array: np.asfortranarray(array),
    "flat": lambda rng, array: array.reshape(-1),
    "no rows": lambda rng, array: array[:0],
}


def _rewrite(rng: Random, path: Path, edit: Edit) -> None:
    array = np.load(path)
    np.save(path, edit(rng, array))


def _exchange(rng: Random, store: Path) -> None:
    name = rng.choice(ARRAYS)
    a, b = store / "train-000" / name, store / "val" / name
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def _others(rng: Random, store: Path) -> None:
    """A file of a store that was made from other data of the same sizes."""
    part, name = rng.choice(PARTS), rng.choice(ARRAYS)
    other = next((store.parents[2] / "other/stores").glob(f"*/{part}/{name}"))
    shutil.copy(other, store / part / name)


def _trap(rng: Random, store: Path) -> None:
    path = store / rng.choice(PARTS) / rng.choice(ARRAYS)
    np.save(path, np.asarray([Trap(store.parents[2])], object), allow_pickle=True)


def _beside(name: str, content: bytes | None = None) -> Callable[[Random, Path], object]:
    """A leftover beside the store, a folder unless it has content."""

    def make(rng: Random, store: Path) -> None:
        path = store.with_name(name.replace("*", store.name))
        if content is not None:
            path.unlink(missing_ok=True)
            path.write_bytes(content)
        else:
            path.mkdir(exist_ok=True)

    return make


def _part(rng: Random, store: Path) -> None:
    """The store is back in the state of a conversion that was killed, and damaged there."""
    work = store.with_name(f".{store.name}.part")
    store.rename(work)
    if rng.random() < 0.5:
        (work / "meta.json").unlink()
    files = sorted(p for p in work.rglob("*") if p.is_file())
    if rng.random() < 0.8:
        damage(rng.choice(files), BYTES[rng.choice(list(BYTES))], rng)


SHAPES: dict[str, Callable[[Random, Path], object]] = {
    "train and validation exchanged": _exchange,
    "files of another store": _others,
    "a pickle": _trap,
    "killed conversion": _part,
    "lock is a folder": lambda rng, store: (store.with_name(f".{store.name}.lock").unlink(missing_ok=True), _beside(".*.lock")(rng, store)),
    "lock with content": _beside(".*.lock", b"x" * 100),
    "part is a file": lambda rng, store: (_beside(".*.part", b"x")(rng, store), (store / "meta.json").unlink()),
    "part is empty": lambda rng, store: (_beside(".*.part")(rng, store), (store / "meta.json").unlink()),
    "old is left over": _beside(".*.part.old"),
    "validation removed": lambda rng, store: shutil.rmtree(store / "val"),
    "training removed": lambda rng, store: shutil.rmtree(store / "train-000"),
    "a shard more": lambda rng, store: shutil.copytree(store / "train-000", store / "train-001"),
    "AppleDouble files": lambda rng, store: [(p.parent / f"._{p.name}").write_bytes(b"\0\5\26\7") for p in list(store.rglob("*")) if p.is_file()],
    "a source more": lambda rng, store: shutil.copy(store.parents[1] / "small.npz", store.parents[1] / "._small.npz"),
}  # fmt: skip


class StoreCases:
    """The cases of the stores of one dataset."""

    name = "store"

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.work, self.same = folder / "work", {}
        for way in WAYS:
            home = folder / way
            home.mkdir(parents=True)
            write_data(home)
            write_data(home, name="other/small.npz", seed=9)
            os.chdir(home)
            for name in ("other", "data"):
                self.trained(way, name)
            self.same[way] = self.trained(way)

    def case(self, i: int) -> tuple[str, Case]:
        """How rows are held, and case `i`."""
        rng = Random(f"store-{self.seed}-{i}")
        way = rng.choice(list(WAYS))
        group = rng.choices(("bytes", "content", "json", "text", "place", "shape"), (28, 24, 14, 8, 12, 14))[
            0
        ]
        names = {
            "bytes": BYTES,
            "content": CONTENT,
            "json": JSON,
            "text": TEXTS,
            "place": PLACES,
            "shape": SHAPES,
        }
        name = rng.choice(list(names[group]))
        arrays = [f"{part}/{file}" for part in PARTS for file in ARRAYS]
        jsons = ["meta.json", "train-000/shard.json", "val/shard.json"]
        folders = [*PARTS, "."]
        part = rng.choice(
            {
                "content": arrays,
                "json": jsons,
                "text": jsons,
                "bytes": arrays + jsons,
                "place": arrays + jsons + folders,
            }.get(group, ["."])
        )

        def make(folder: Path) -> None:
            store = next(p for p in (folder / "data/stores").iterdir() if not p.name.startswith("."))
            path = store / part
            if group == "bytes":
                damage(path, BYTES[name], rng)
            elif group == "content":
                _rewrite(rng, path, CONTENT[name])
            elif group == "json":
                edit_json(path, JSON[name], rng)
            elif group == "text":
                path.write_bytes(TEXTS[name](rng, path.read_text()))
            elif group == "place":
                PLACES[name](path)
            else:
                SHAPES[name](rng, store)

        return way, Case(f"{group}: {part}, {name}" if group != "shape" else f"shape: {name}", make)

    def verdicts(self, i: int) -> tuple[Case, dict[str, Verdict]]:
        """Verdict of a run on case `i`."""
        way, case = self.case(i)
        os.chdir(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder / way, self.work)
        os.chdir(self.work)
        case.make(self.work)
        return case, {way: judge(lambda: self.trained(way), self.same[way], case, self.work, way, 30)}

    def trained(self, way: str, data: str = "data") -> Seen:
        """All that a run trains on, validates with and is normalised by."""
        flags = [flag.replace("data/", f"{data}/") if flag != "data" else data for flag in FLAGS]
        settings, _ = parse_command_line([*flags, *WAYS[way]])
        launch = program.prepare_launch(settings)
        store = dataset.open_store(launch.settings.data, launch.choice.path, launch.env.spec)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            job = program.make_job(launch, store)
        feed = open_feed(job.window, partial(jax.tree.map, jnp.asarray), 4)
        with contextlib.closing(feed):
            windows: list[Any] = [feed.at(step) for step in (range(3) if way == "windows" else (0,))]
        leaves = jax.tree.leaves((windows, job.normalizer, job.held_out))
        return Seen({f"array {i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}, store.notes)
