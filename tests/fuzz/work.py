"""Runs cases in processes of their own, which may hang, crash or take all memory without harm."""

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.judge import FAILURES, HANG, MEMORY, TRACEBACK

SUBJECTS = {
    "npz": "tests.fuzz.npz_cases:NpzCases",
    "hdf5": "tests.fuzz.hdf5_cases:Hdf5Cases",
    "run": "tests.fuzz.run_cases:RunCases",
    "store": "tests.fuzz.store_cases:StoreCases",
}
SPARE = 3 * 2**29
"""Bytes of address space that a worker may take beyond what it has when the cases begin."""
PATIENCE = 300  # seconds without an answer after which a worker is killed; the machine may be busy


class Line(NamedTuple):
    """A verdict: number and kind of the case, who was asked, the word, and the detail."""

    number: int
    kind: str
    asked: str
    word: str
    detail: str
    why: str


def subject(name: str, folder: Path, seed: int) -> Any:
    """The cases called `name`, at work in `folder`."""
    module, cls = SUBJECTS[name].split(":")
    return getattr(importlib.import_module(module), cls)(folder, seed)


def lines_of(cases: Any, number: int) -> list[Line]:
    """The verdicts on one case."""
    case, found = cases.verdicts(number)
    return [Line(number, case.kind, asked, v.word, v.detail, case.why(asked)) for asked, v in found.items()]


def most() -> int:
    """Bytes of address space that cases may take in this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPARE


def _worker(name: str, folder: str, seed: int, numbers: Sequence[int], pipe: Any) -> None:
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115
    cases = subject(name, Path(folder), seed)
    resource.setrlimit(resource.RLIMIT_AS, (most(), most()))
    for number in numbers:
        pipe.send(number)
        try:
            pipe.send(lines_of(cases, number))
        except Exception:  # a mistake of the fuzzer, which must not pass for a verdict
            pipe.send([Line(number, "fuzzer", "fuzzer", TRACEBACK, traceback.format_exc()[-800:], "")])
    pipe.send(None)


class _Hand:
    """One worker, and what is left for it to do."""

    def __init__(self, name: str, folder: Path, seed: int, numbers: Sequence[int]):
        self.name, self.folder, self.seed, self.left = name, folder, seed, list(numbers)
        self.lines: list[Line] = []
        self.begin()

    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe(False)
        args = (self.name, str(self.folder), self.seed, self.left, theirs)
        self.process = context.Process(target=_worker, args=args, daemon=True)
        self.process.start()
        theirs.close()
        self.at: int | None = None
        self.heard = time.monotonic() + 600  # to import and to prepare

    def step(self) -> bool:
        """Takes what there is; False when all is done."""
        try:
            while self.pipe.poll(0.05):
                self.heard, said = time.monotonic(), self.pipe.recv()
                if said is None:
                    self.process.join()
                    return False
                if isinstance(said, int):
                    self.at = said
                else:
                    self.lines += said
                    self.left.remove(said[0].number if said else self.at)
        except EOFError:
            self._lost(TRACEBACK, f"the process died, status {self.process.exitcode}")
        if time.monotonic() - self.heard > PATIENCE:
            self._lost(HANG, "no answer")
        return bool(self.left) or self.process.is_alive()

    def _lost(self, word: str, detail: str) -> None:
        self.process.kill()
        self.process.join()
        if self.at is None:
            raise RuntimeError(f"{self.name}: a worker ended before its first case ({detail})")
        self.lines.append(Line(self.at, "?", "process", word, detail, ""))
        if self.at in self.left:
            self.left.remove(self.at)
        if self.left:
            self.begin()


def memory() -> Path | None:
    """A folder in memory, where forcing files to the disk costs nothing; None if there is none."""
    place = Path("/dev/shm")
    return place if place.is_dir() and os.access(place, os.W_OK) else None


def run(
    name: str, numbers: Iterable[int], seed: int, workers: int = 2, tmp: Path | None = None
) -> list[Line]:
    """The verdicts on cases `numbers`, in up to `workers` processes."""
    numbers = list(numbers)
    home = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=tmp or memory()))
    try:
        shares = [numbers[i::workers] for i in range(workers)]
        hands = [_Hand(name, home / str(i), seed, share) for i, share in enumerate(shares) if share]
        active = list(hands)
        while active:
            active = [hand for hand in active if hand.step()]
        return sorted(line for hand in hands for line in hand.lines)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def summary(lines: Sequence[Line]) -> str:
    """Counts by who was asked and by word; failures by place, each with the first case that shows it."""
    out = [f"{len({line.number for line in lines}):,} cases of {len({line.kind for line in lines})} kinds"]
    for asked in sorted({line.asked for line in lines}):
        counts = Counter(line.word for line in lines if line.asked == asked)
        out.append(f"  {asked}: " + ", ".join(f"{word} {n:,}" for word, n in counts.most_common()))
    allowed = Counter(
        (line.asked, line.kind, line.why) for line in lines if line.word == "silent, unknowable"
    )
    out += [f"  allowed {n}x {asked}, {kind}: {why}" for (asked, kind, why), n in allowed.most_common()]
    failed: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if line.word in FAILURES:
            # Errors are told apart by where they were raised, all else by kind.
            errors = {TRACEBACK, HANG, MEMORY}
            at = ":".join(line.detail.split(":")[:3]) if line.word in errors else line.kind
            failed.setdefault((line.word, line.asked, at), []).append(line)
    for (word, asked, at), found in sorted(failed.items(), key=lambda item: -len(item[1])):
        first = found[0]
        out.append(
            f"  FAILED {len(found)}x {word}, {asked}, {at}; case {first.number} ({first.kind}): {first.detail[:160]}"
        )
    return "\n".join(out)


def write(path: Path, lines: Sequence[Line]) -> None:
    path.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines))
