"""Kills a training run at random moments, resumes it, and compares it with a run that was never killed.

    python -m tests.helpers.random_kills --kills 100 --seed 0 --out /tmp/kills

Each repetition has its own folder, data and store. It launches the real `experiments/run.py`, sends SIGKILL
when the process has used a share of an unbroken launch's processor time that is uniform in [0, 1), resumes,
and so on, 0 to 4 times. Processor time stands for wall-clock time, since other work on the machine does not
stretch it. Some kills wait for a file instead (`MOMENTS`): those phases are too short to be hit at random.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mac.run.io.logger import EVAL, METRICS

ROOT = Path(__file__).parents[2]
RUN, DATA = "run", "data/small.npz"
STEPS = 100
ENV = "pointmaze-medium-navigate-singletask-task1-v0"
"""Of all environments its evaluation compiles fastest on the engine `c`, which XLA's cache cannot keep."""
FLAGS = f"""--algo iql --env {ENV} --preset laptop --seeds 2 --hp.hidden 8 8 --hp.batch 8 --eval.episodes 1
    --run.segment 10 --run.eval-every 40 --run.checkpoint-every 20 --steps {STEPS}""".split()
FLAGS += ["--data.path", DATA, "--data.dir", "data"]
KINDS = {
    "single": FLAGS,
    "sweep": [*FLAGS, "--sweep", "hp.expectile=0.7,0.9"],
    "windows": [*FLAGS, "--data.resident", "no", "--data.window", "80", "--data.window-updates", "10"],
}
WANTED = (METRICS, EVAL, "config.json", "normalizer.json", "learning_curve.png")

MOMENTS = {
    "conversion": ("data/stores/.*.part/*", "data/stores/.*.part/*/*.npy"),
    "record": ("run/.config.json*", "run/.run.json*", "run/.normalizer.json*", "run/*/.config.json*"),
    "checkpoint": ("run/checkpoints/.incomplete-*", "run/*/checkpoints/.incomplete-*"),
    "checkpoint arrays": ("run/checkpoints/.incomplete-*/state*", "run/*/checkpoints/.incomplete-*/state*"),
    "deletion": ("run/checkpoints/.incomplete-*-old", "run/*/checkpoints/.incomplete-*-old"),
    "picture": ("run/.learning_curve.png*", "run/*/.learning_curve.png*"),
}
"""Files that exist only for a moment, by phase; a kill aimed at one follows when it is seen."""
GROWTH = {"evaluation and checkpoint": ("run/eval.jsonl", "run/*/eval.jsonl")}
"""Files whose growth ends a phase: rows are there, the checkpoint that covers them is not."""


def write_data(folder: Path, episodes: int = 3, length: int = 40, name: str = DATA, seed: int = 0) -> None:
    """Writes a dataset of random numbers in the shapes of the point in a maze, and a validation split."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for file, count in ((name, episodes), (name.replace(".npz", "-val.npz"), 1)):
        rng, rows = np.random.default_rng(seed + count), count * length
        np.savez(
            folder / file,
            observations=rng.uniform(0, 20, (rows, 2)).astype(np.float32),
            actions=rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
            terminals=np.arange(rows) % length == length - 1,
        )


class Launch:
    """One process of the command line in `folder`, whose output goes to a file `launch-<n>.log`."""

    def __init__(self, folder: Path, flags: Sequence[str], cache: Path, **options: Any):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
        env |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache), "MPLBACKEND": "Agg"}
        self.log = folder.with_name(f"{folder.name}.log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "experiments/run.py"), *flags],
                cwd=folder,
                env=env,
                **({"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL} | options),
            )
        self.folder = folder

    @property
    def seconds(self) -> float:
        """Processor time used so far."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def finish(self, timeout: float = 900) -> float:
        """Waits for the end; returns the processor time.

        Raises:
            AssertionError: the status is not 0.
        """
        used, deadline = 0.0, time.monotonic() + timeout
        while self.process.poll() is None:
            used = max(used, self.seconds)
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"hang: {tail(self.log)}")
            time.sleep(0.02)
        assert self.process.returncode == 0, f"status {self.process.returncode}: {tail(self.log)}"
        return used

    def kill_when(self, reached: Callable[[], bool], pause: float) -> bool:
        """Sends SIGKILL once `reached`; False if the process ended before."""
        while self.process.poll() is None:
            if reached():
                self.process.kill()
                self.process.wait()
                return self.process.returncode == -signal.SIGKILL
            time.sleep(pause)
        return False


def tail(log: Path) -> str:
    """The end of a log, in one line."""
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-6:])[-600:]


def after_seconds(launch: Launch, seconds: float) -> Callable[[], bool]:
    return lambda: launch.seconds >= seconds


def when_seen(folder: Path, patterns: Sequence[str]) -> Callable[[], bool]:
    return lambda: any(True for pattern in patterns for _ in folder.glob(pattern))


def when_grown(folder: Path, patterns: Sequence[str]) -> Callable[[], bool]:
    def size() -> int:
        return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern))

    before = size()
    return lambda: size() > before


def phase(folder: Path) -> str:
    """The phase in which a run was killed, by what it left."""
    run = folder / RUN
    if not (run / "config.json").exists():
        return "start-up" if not (folder / "data/stores").exists() else "conversion"
    if any(run.glob("**/checkpoints/.incomplete-*")):
        return "inside a checkpoint"
    if not any(run.glob("**/checkpoints/0*")):
        return "before the first checkpoint"
    if any(run.glob(f"**/checkpoints/{STEPS:09d}")):
        return "after the last checkpoint"
    return "training and evaluation"


def result(folder: Path) -> dict[str, Any]:
    """Results that must not depend on kills: names of files, bytes of rows and settings, checksums of arrays.

    Orbax names its files at random, and `run.json` tells of each launch, so of those only existence counts.
    """
    found: dict[str, Any] = {"files": []}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "/state/" in name or path.is_dir():
            continue
        found["files"].append(name)
        if path.name in WANTED or path.suffix == ".npy":
            found[name] = path.read_bytes()
        if path.name == "meta.json" and "checkpoints" in path.parts:
            found[name] = json.loads(path.read_text().replace(str(folder), ""))  # names where the data are
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Describes the differences of two results."""
    missing, more = (sorted(set(a["files"]) - set(b["files"])) for a, b in ((wanted, found), (found, wanted)))
    words = [f"missing {name}" for name in missing] + [f"left over {name}" for name in more]
    both = (found.keys() & wanted.keys()) - {"files"}
    return words + [f"differs: {name}" for name in sorted(both) if found[name] != wanted[name]]


@dataclasses.dataclass
class Kills:
    """A series of repetitions; `folder` must be empty."""

    folder: Path
    seed: int
    straight: dict[str, tuple[float, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    phases: Counter[str] = dataclasses.field(default_factory=Counter)
    kills: int = 0
    repetitions: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        (self.folder / "new").mkdir(parents=True)
        write_data(self.folder / "new")

    def unbroken(self, kind: str) -> tuple[float, dict[str, Any]]:
        """Returns processor time and result of an uninterrupted launch; of two, the first fills the cache."""
        if kind not in self.straight:
            for name in (f"{kind}-cold", f"{kind}-straight"):
                folder = self.place(name)
                seconds = self.launch(folder, kind).finish()
                found = result(folder)
                self.straight.setdefault(kind, (seconds, found))
                if words := differences(found, self.straight[kind][1]):
                    self.failures.append(f"{kind}, two unbroken runs: {'; '.join(words)}")
            self.straight[kind] = seconds, found
            print(f"{kind}: an unbroken launch takes {seconds:.1f} s of processor time", flush=True)
        return self.straight[kind]

    def place(self, name: str) -> Path:
        # Times of modification are part of what a store is made from.
        return Path(shutil.copytree(self.folder / "new", self.folder / name))

    def launch(self, folder: Path, kind: str, **options: Any) -> Launch:
        """Begins the run in `folder`, or continues it."""
        again = (folder / RUN / "config.json").exists()
        flags = ["--resume"] if again else KINDS[kind]
        return Launch(folder, [*flags, "--out", RUN], self.folder / "cache", **options)

    def repeat(self, kind: str, moments: Sequence[float | str]) -> None:
        """One repetition, with a kill at each of `moments`: a share of the time, or a name of a phase."""
        seconds, wanted = self.unbroken(kind)
        folder, done = self.place(f"{kind}-{self.repetitions:03d}"), []
        self.repetitions += 1
        try:
            for moment in moments:
                launch = self.launch(folder, kind)
                if isinstance(moment, float):
                    killed = launch.kill_when(after_seconds(launch, moment * seconds), 0.01)
                elif moment in GROWTH:
                    killed = launch.kill_when(when_grown(folder, GROWTH[moment]), 0.0005)
                else:
                    killed = launch.kill_when(when_seen(folder, MOMENTS[moment]), 0.0005)
                if not killed:
                    assert launch.process.returncode == 0, (
                        f"status {launch.process.returncode}: {tail(launch.log)}"
                    )
                    break
                self.kills += 1
                at = phase(folder)
                self.phases[at] += 1
                done.append(f"{moment:.2f} ({at})" if isinstance(moment, float) else f"{moment} ({at})")
            self.launch(folder, kind).finish()
            words = differences(result(folder), wanted)
        except AssertionError as error:
            words = [str(error)]
        said = f"{kind} {self.repetitions}: killed at {', '.join(done) or 'no time'}: "
        print(said + ("; ".join(words) or "the same bits"), flush=True)
        if words:
            self.failures.append(said + "; ".join(words))
        else:
            shutil.rmtree(folder)

    def plan(self, kills: int) -> Iterator[tuple[str, list[float | str]]]:
        """Kinds and moments of repetitions, endless; every third begins with a targeted kill."""
        rng, targets = random.Random(self.seed), [*MOMENTS, *GROWTH]
        count = 0
        while self.kills < kills:
            kind = "single" if count % 2 == 0 else "sweep"
            moments: list[float | str] = [rng.random() for _ in range(rng.randint(0, 4))]
            if count % 3 == 2:
                moments = [targets[(count // 3) % len(targets)], *moments[:3]]
            yield kind, moments
            count += 1

    def summary(self) -> str:
        lines = [f"{self.repetitions} repetitions, {self.kills} kills, {len(self.failures)} not the same"]
        lines += [f"  {count:4d} {name}" for name, count in self.phases.most_common()]
        return "\n".join([*lines, *(f"  FAILED {line}" for line in self.failures)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; made, must not exist")
    parser.add_argument("--minutes", type=float, default=1e9, help="no new repetition after this time")
    asked = parser.parse_args(argv)
    began, series = time.monotonic(), Kills(asked.out.absolute(), asked.seed)
    for kind, moments in series.plan(asked.kills):
        series.repeat(kind, moments)
        if time.monotonic() - began > 60 * asked.minutes:
            break
    print(series.summary())
    return 1 if series.failures else 0


if __name__ == "__main__":
    sys.exit(main())
