"""Damaged folders of a tiny run, judged by `run.py --resume`, `evaluate.py` and `report.py`.

The programs run in this process. No physics is simulated and nothing is drawn: an evaluation returns numbers
that depend on all that it was given, so that a changed weight, normaliser or step still shows.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import equinox as eqx
import jax
import numpy as np

from experiments import evaluate, report
from experiments import run as program
from mac.atomic_files import unfinished_file
from mac.errors import UserError
from mac.run import train
from mac.run.io import run_metadata
from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.logger import EVAL, METRICS
from mac.types import Episodes
from tests.fuzz.judge import Case, Seen, Verdict, judge
from tests.fuzz.mutators import BYTES, JSON, PLACES, TEXTS, damage, edit_json
from tests.helpers.random_kills import DATA, ENV, RUN, write_data

STEPS, END = 10, 15
FLAGS = f"""--algo iql --env {ENV} --preset laptop --seeds 1 --hp.hidden 8 8 --hp.batch 8 --eval.episodes 1
    --hp.cooldown 0 --run.segment 5 --run.eval-every 5 --run.checkpoint-every 5 --data.path {DATA} --data.dir data""".split()
RESUME = ["--resume", "--out", RUN, "--steps", str(END)]
OLDER = "an older checkpoint is one too; its step is printed"
SETTINGS = "settings that were edited to other valid settings are settings"
LABEL = "the line about where the data come from is for people"
ROWS = "rows that were edited to other valid rows are rows, where no checkpoint is read beside them"

Damage = Callable[[Random, Path], object]


class _Compiled:
    """Stands for `mac.run.segment.segment`: each program is compiled once in this process."""

    def __init__(self, segment: Any):
        self.segment, self.known = segment, {}

    def lower(self, algo: Any, mesh: Any, *args: Any) -> Any:
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)
        key = (algo, mesh, str(shapes))
        if key not in self.known:
            self.known[key] = self.segment.lower(algo, mesh, *args).compile()
        return _Lowered(self.known[key])


class _Lowered:
    def __init__(self, program: Any):
        self.program = program

    def compile(self) -> Any:
        return self.program


def checksum(*trees: Any) -> int:
    """Of all arrays in some trees."""
    leaves = [
        np.asarray(x) for x in jax.tree.leaves(eqx.filter(trees, eqx.is_array)) if x.dtype != jax.numpy.bool_
    ]
    data = b"".join(x.tobytes() for x in leaves if x.dtype.kind in "fiu")
    return zlib.crc32(data)


def played(seeds: int, tasks: int, episodes: int, number: int) -> Episodes:
    """An evaluation's result that tells `number`."""
    shape = (seeds, tasks, episodes)
    value = np.full(shape, number % 9973, np.float32)
    length, dropped = np.full(shape, 5, np.int32), np.zeros(shape, np.int32)
    columns = np.full(shape, number % 2 == 0), -value, length, dropped, value, value
    return Episodes(*map(jax.numpy.asarray, columns))


def _evaluate(policies: Any, env: Any, episodes: int, keys: Any, **_: Any) -> Episodes:
    number = checksum(policies.normalizer, policies.state.nets, jax.random.key_data(keys))
    return played(len(keys), len(env.spec.tasks), episodes, number)


def _play(run: Any, name: str, tasks: Any, engine: str, episodes: int, ask: Any, noise: float) -> Episodes:
    return played(len(run.numbers), len(tasks), episodes, checksum(run.normalizer, run.state.nets) + run.step)


def _drawn(rows: Any, path: Path, **_: Any) -> None:
    program.learning_curve(list(rows))
    Path(path).touch()


@contextlib.contextmanager
def shortened() -> Iterator[None]:
    """Leaves out physics, pictures, estimates and questions to git; see the module's first lines."""
    changes: list[tuple[Any, str, Any]] = [
        (program, "announce", lambda *_: None),
        (program, "plot_learning_curve", _drawn),
        (train, "evaluate", _evaluate),
        (evaluate, "play_episodes", _play),
        (run_metadata, "git_state", lambda folder: None),
        (run_metadata, "package_versions", functools.cache(run_metadata.package_versions)),
        (train.segment, "segment", _Compiled(train.segment.segment)),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


def called(main: Callable[[list[str]], int], argv: list[str]) -> tuple[str, ...]:
    """Lines on standard output that a program left.

    Raises:
        UserError: the program refused, with what it said.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    if status:
        said = err.getvalue().removeprefix("error: ")
        lines = [line for line in said[:-1].split("\n") if not line.startswith(("note", "warning"))]
        if status != 2:
            raise RuntimeError(f"status {status}: {said}")
        raise UserError("\n".join(lines))
    notes = [
        line for line in (out.getvalue() + err.getvalue()).splitlines() if "note" in line or "warning" in line
    ]
    return tuple(notes)


# Damage.


def files_of(run: Path) -> dict[str, tuple[Path, ...]]:
    """Files of a run, by what they are."""
    newest = run / "checkpoints" / f"{STEPS:09d}"
    state = sorted(p for p in (newest / "state").rglob("*") if p.is_file())
    return {
        "config.json": (run / "config.json",),
        "run.json": (run / "run.json",),
        "normalizer.json": (run / "normalizer.json",),
        "metrics.jsonl": (run / METRICS,),
        "eval.jsonl": (run / EVAL,),
        "evaluations.jsonl": (run / "evaluations.jsonl",),
        "checkpoint meta.json": (newest / "meta.json",),
        "checkpoint state": tuple(state),
    }


FOLDERS = (
    "checkpoints",
    f"checkpoints/{STEPS:09d}",
    f"checkpoints/{STEPS:09d}/state",
    f"checkpoints/{5:09d}",
    ".",
)


def _row(rng: Random, path: Path, edit: Callable[[list[bytes], int], object]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    edit(lines, rng.randrange(len(lines)))
    path.write_bytes(b"".join(lines))


def _row_value(rng: Random, path: Path, edit: Any) -> None:
    def change(lines: list[bytes], i: int) -> None:
        lines[i] = json.dumps(edit(rng, json.loads(lines[i]))[1]).encode() + b"\n"

    _row(rng, path, change)


def _digit(rng: Random, path: Path) -> None:
    """A digit becomes another, so that length and syntax stay."""
    data = bytearray(path.read_bytes())
    places = [i for i, x in enumerate(data) if 49 <= x <= 57]
    if places:
        at = rng.choice(places)
        data[at] = 49 + (data[at] - 48) % 9
    path.write_bytes(data)


LINES: dict[str, Damage] = {
    "row removed": lambda rng, path: _row(rng, path, lambda lines, i: lines.pop(i)),
    "row doubled": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(i, lines[i])),
    "rows swapped": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(0, lines.pop(i))),
    "row torn": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(i, lines[i][: len(lines[i]) // 2])),
    "row is no object": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(i, rng.choice([b"[1]\n", b"3\n", b"\n", b"null\n", b"{}\n"]))),
    "deep row": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(i, b"[" * 100_000 + b"\n")),
    "row of huge number": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(i, b'{"step": ' + b"9" * 6000 + b"}\n")),
    "row in UTF-16": lambda rng, path: _row(rng, path, lambda lines, i: lines.insert(i, '{"step": 1}\n'.encode("utf-16"))),
    "value replaced": lambda rng, path: _row_value(rng, path, JSON["value replaced"]),
    "key removed": lambda rng, path: _row_value(rng, path, JSON["key removed"]),
    "key renamed": lambda rng, path: _row_value(rng, path, JSON["key renamed"]),
    "rows appended": lambda rng, path: path.write_bytes(path.read_bytes() * 2),
    "torn end": lambda rng, path: path.write_bytes(path.read_bytes() + b'{"step": 1'),
    "no last newline": lambda rng, path: path.write_bytes(path.read_bytes()[:-1]),
    "all gone": lambda rng, path: path.write_bytes(b""),
}  # fmt: skip


def _folder(make: Callable[[Path], object]) -> Damage:
    return lambda rng, run: make(run)


def _copy(a: str, b: str) -> Damage:
    return lambda rng, run: shutil.copytree(run / a, run / b)


def _move(a: str, b: str) -> Damage:
    return lambda rng, run: (run / a).rename(run / b)


def _file(name: str, content: bytes = b"x") -> Damage:
    return lambda rng, run: (run / name).write_bytes(content)


NEW, OLD = f"checkpoints/{STEPS:09d}", f"checkpoints/{5:09d}"
SHAPES: dict[str, tuple[Damage, bool]] = {
    "checkpoint copied to a later step": (_copy(NEW, "checkpoints/000000012"), False),
    "checkpoint renamed to a later step": (_move(NEW, "checkpoints/000000012"), False),
    "older checkpoint under the newest's name": (
        lambda rng, run: (shutil.rmtree(run / NEW), shutil.copytree(run / OLD, run / NEW)),
        False,
    ),
    "states exchanged": (
        lambda rng, run: (
            (run / NEW / "state").rename(run / "x"),
            (run / OLD / "state").rename(run / NEW / "state"),
            (run / "x").rename(run / OLD / "state"),
        ),
        False,
    ),
    "newest checkpoint removed": (lambda rng, run: shutil.rmtree(run / NEW), True),
    "older checkpoint removed": (lambda rng, run: shutil.rmtree(run / OLD), True),
    "all checkpoints removed": (lambda rng, run: shutil.rmtree(run / "checkpoints"), True),
    "meta.json removed": (lambda rng, run: (run / NEW / "meta.json").unlink(), True),
    "empty checkpoint of the next step": (lambda rng, run: (run / f"checkpoints/{END:09d}").mkdir(), True),
    "checkpoint of the next step without meta.json": (
        lambda rng, run: (shutil.copytree(run / NEW, run / f"checkpoints/{END:09d}"), (run / f"checkpoints/{END:09d}/meta.json").unlink()),
        True,
    ),
    "file named as the next checkpoint": (_file(f"checkpoints/{END:09d}"), True),
    "file named as a checkpoint": (_file("checkpoints/000000012"), True),
    "checkpoint with another number of digits": (_copy(NEW, "checkpoints/10"), False),
    "checkpoint of a foreign digit": (_copy(NEW, "checkpoints/\u0661\u0662"), False),
    "backup of a checkpoint": (_copy(NEW, NEW + ".bak"), True),
    "checkpoint deeper": (lambda rng, run: ((run / NEW).rename(run / "x"), (run / NEW).mkdir(), (run / "x").rename(run / NEW / "x")), True),
    "leftover of a checkpoint": (lambda rng, run: shutil.copytree(run / NEW, run / f"checkpoints/.incomplete-{END:09d}"), True),
    "leftover file of a checkpoint": (_file(f"checkpoints/.incomplete-{END:09d}"), True),
    "leftover link of a checkpoint": (lambda rng, run: (run / f"checkpoints/.incomplete-{END:09d}").symlink_to("/nowhere"), True),
    "leftover of a deletion": (lambda rng, run: shutil.copytree(run / OLD, run / "checkpoints/.incomplete-000000005-old"), True),
    "leftover of a file": (_file(".config.json.4194000", b"{"), True),
    "leftover folder of a file": (lambda rng, run: unfinished_file(run / "run.json").mkdir(), True),
    "leftover of a picture": (_file(".learning_curve.png.4194000"), True),
    "picture is a folder": (lambda rng, run: ((run / "learning_curve.png").unlink(missing_ok=True), (run / "learning_curve.png").mkdir()), True),
    "AppleDouble files": (lambda rng, run: [(p.parent / f"._{p.name}").write_bytes(b"\0\5\26\7") for p in list(run.rglob("*")) if p.is_file()], True),
    "AppleDouble folder": (lambda rng, run: shutil.copytree(run / NEW, run / "checkpoints/._000000010"), True),
    "Thumbs.db and .DS_Store": (lambda rng, run: [(p / n).write_bytes(b"x") for p in (run, run / "checkpoints", run / NEW) for n in (".DS_Store", "Thumbs.db")], True),
    "folder within": (lambda rng, run: shutil.copytree(run / "checkpoints", run / "sub/checkpoints"), True),
    "run within": (lambda rng, run: shutil.copytree(run.with_name("pristine-run"), run / "sub"), True),
    "a sweep's folder emptied": (lambda rng, run: [p.unlink() for p in run.glob("*.jsonl")], False),
    "only config.json": (lambda rng, run: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in list(run.iterdir()) if p.name != "config.json"], False),
    "another run's checkpoints": (lambda rng, run: (shutil.rmtree(run / "checkpoints"), shutil.copytree(run.with_name("other-run") / "checkpoints", run / "checkpoints")), False),
    "another run's normaliser": (lambda rng, run: shutil.copy(run.with_name("other-run") / "normalizer.json", run), False),
    "another run's rows": (lambda rng, run: shutil.copy(run.with_name("other-run") / METRICS, run), False),
    "another run's settings": (lambda rng, run: shutil.copy(run.with_name("other-run") / "config.json", run), False),
    "all read-only": (lambda rng, run: [p.chmod(0o444) for p in run.rglob("*") if p.is_file()], True),
}  # fmt: skip
"""Damage to the folder; whether a run may go on from it as if nothing was (its rows are all there)."""


def reasons(part: str, kind: str) -> dict[str, str]:
    """Why a change may be silent, by program."""
    if part == "config.json":
        return {name: SETTINGS for name in ("resume", "evaluate", "report")}
    if part == "run.json":
        return {"resume": LABEL, "evaluate": LABEL}
    if part in ("eval.jsonl", "evaluations.jsonl"):
        return {"report": ROWS, "evaluate": ROWS}
    if "checkpoint" in part or "checkpoint" in kind:
        return {"evaluate": OLDER}
    return {}


class RunCases:
    """The cases of the folder of a run of 10 updates, which is continued to 15."""

    name = "run"

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.home, self.work = folder / "home", folder / "work"
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(shortened())
        self.home.mkdir(parents=True, exist_ok=True)
        write_data(self.home)
        os.chdir(self.home)
        called(program.main, [*FLAGS, "--steps", str(STEPS), "--out", RUN])
        other = ["--seed", "7", "--hp.expectile", "0.6"]
        called(program.main, [*FLAGS, *other, "--steps", str(STEPS), "--out", "other-run"])
        called(evaluate.main, [RUN])
        shutil.copytree(RUN, "pristine-run")
        self.asked: dict[str, Callable[[], Seen]] = {
            "report": self.report,
            "evaluate": self.evaluate,
            "resume": self.resume,
        }
        self.same: dict[str, Seen] = {}
        for name, act in self.asked.items():
            self.fresh()
            self.same[name] = act()

    def case(self, i: int) -> Case:
        """Case `i`, whose damage is the same however often it is asked for."""
        rng = Random(f"run-{self.seed}-{i}")
        group = rng.choices(("bytes", "json", "text", "lines", "place", "shape"), (22, 24, 10, 14, 14, 16))[0]
        if group == "shape":
            name = rng.choice(list(SHAPES))
            make, harmless = SHAPES[name]
            why = (
                {"evaluate": OLDER}
                if "checkpoint" in name or harmless
                else reasons("config.json", "")
                if "settings" in name
                else {}
            )
            return Case(f"shape: {name}", lambda folder: make(rng, folder / RUN), why)
        if group == "place" and rng.random() < 0.3:
            part, name = rng.choice(FOLDERS), rng.choice(list(PLACES))
            return Case(
                f"place: {part}, {name}",
                lambda folder: PLACES[name](folder / RUN / part),
                {"evaluate": OLDER},
            )
        jsons = ("config.json", "run.json", "normalizer.json", "checkpoint meta.json")
        rows = ("metrics.jsonl", "eval.jsonl", "evaluations.jsonl")
        part = rng.choice(
            {"json": jsons, "text": jsons, "lines": rows}.get(group, (*jsons, *rows, "checkpoint state"))
        )
        kinds = {
            "bytes": {**BYTES, "digit": None},
            "json": JSON,
            "text": TEXTS,
            "lines": LINES,
            "place": PLACES,
        }[group]
        name = rng.choice(list(kinds))

        def make(folder: Path) -> None:
            path = rng.choice(files_of(folder / RUN)[part])
            if name == "digit":
                _digit(rng, path)
            elif group == "bytes":
                damage(path, BYTES[name], rng)
            elif group == "json":
                edit_json(path, JSON[name], rng)
            elif group == "text":
                path.write_bytes(TEXTS[name](rng, path.read_text()))
            elif group == "lines":
                LINES[name](rng, path)
            else:
                PLACES[name](path)

        return Case(f"{group}: {part}, {name}", make, reasons(part, name))

    def verdicts(self, i: int) -> tuple[Case, dict[str, Verdict]]:
        """Verdict of each program on case `i`."""
        found = {}
        for name, act in self.asked.items():
            case = self.case(i)
            self.fresh()
            case.make(self.work)
            found[name] = judge(act, self.same[name], case, self.work, name, 200)
        return self.case(i), found

    def fresh(self) -> None:
        """The undamaged folder, and here."""
        os.chdir(self.folder)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.home, self.work)
        os.chdir(self.work)

    def resume(self) -> Seen:
        notes = called(program.main, RESUME)
        with CheckpointStore(Path(RUN) / "checkpoints") as store:
            header = store._header(END)
        names = (METRICS, EVAL, "normalizer.json")
        values = {name: (Path(RUN) / name).read_bytes() for name in names}
        return Seen(values | {"arrays": header["arrays"]}, notes)

    def evaluate(self) -> Seen:
        notes = called(evaluate.main, [RUN])
        line = json.loads((Path(RUN) / "evaluations.jsonl").read_bytes().splitlines()[-1])
        return Seen({name: line[name] for name in ("rows", "step", "episodes", "env")}, notes)

    def report(self) -> Seen:
        notes = called(report.main, [RUN, "--out", "table.csv"])
        lines = [line for line in Path("table.csv").read_text().splitlines() if not line.startswith("#")]
        return Seen({"table": tuple(lines)}, notes)
