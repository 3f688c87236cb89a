"""The command line of the fuzzers: `python -m tests.fuzz npz --cases 3000 --seed 0 --out npz.jsonl`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import work
from tests.fuzz.judge import FAILURES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=work.__doc__)
    parser.add_argument("what", choices=[*work.SUBJECTS], help="what is damaged")
    parser.add_argument("--cases", type=int, default=1000, help="drawn cases")
    parser.add_argument("--bits", type=int, default=-1, help="npz: header bits, evenly taken; -1 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="one case, in this process, with its output")
    parser.add_argument("--out", type=Path, help="file for one JSON line per verdict")
    asked = parser.parse_args(argv)
    if asked.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            for line in work.lines_of(work.subject(asked.what, Path(folder), asked.seed), asked.only):
                print(line)
        return 0
    began = time.monotonic()
    numbers = [*header_bits(asked.what, asked.bits, asked.seed), *range(asked.cases)]
    lines = work.run(asked.what, numbers, asked.seed, asked.workers)
    if asked.out:
        work.write(asked.out, lines)
    print(f"{asked.what}, seed {asked.seed}, {time.monotonic() - began:.0f} s: {work.summary(lines)}")
    return 1 if any(line.word in FAILURES for line in lines) else 0


def header_bits(what: str, count: int, seed: int) -> list[int]:
    """Numbers of the cases that are header bits: all, or `count` of them, evenly taken."""
    if what != "npz" or not count:
        return []
    with tempfile.TemporaryDirectory() as folder:
        total = len(work.subject(what, Path(folder), seed).bits)
    step = 1 if count < 0 else max(1, total // count)
    return [-1 - i for i in range(0, total, step)]


if __name__ == "__main__":
    sys.exit(main())
