"""Process that measures parts of the GPU benchmark, one after the other, as its parent asks.

It reads a part's name from each line of its standard input, and answers with a line of JSON. When the input
ends, it ends too, in order: so nothing is left on the card when the parent is killed.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from experiments.benchmarks.gpu import device_rates, evaluation_rates, programs, training_rates
from experiments.benchmarks.gpu.programs import Work
from mac.errors import UserError

LAST_SECONDS = 40.0
"""Time that a part gets to end once its parent is gone; a checkpoint takes seconds, compiling may go on."""
_OWN_FOLDER = Path(__file__).parent


def measure(name: str, work: Work) -> dict[str, Any]:
    """Measures the part with this name: its kind, then what distinguishes it from others of the kind."""
    kind, *words = name.split()
    return _KINDS[kind](words, work)


def _rate(words: list[str], work: Work) -> dict[str, Any]:
    function = {
        "launches": device_rates.measure_launches,
        "memory": device_rates.measure_bandwidth,
        "matmuls": device_rates.measure_matmuls,
    }[words[0]]
    return function(work.tiny)


def _segment(words: list[str], work: Work) -> dict[str, Any]:
    mode, seeds, variant = words
    programs_of_segments = work.folder / "programs"
    count = int(seeds.removeprefix("S="))
    return training_rates.measure_segment(mode, count, variant, work.tiny, programs_of_segments)


_KINDS: dict[str, Callable[[list[str], Work], dict[str, Any]]] = {
    "machine": lambda words, work: device_rates.describe_machine(_OWN_FOLDER),
    "rate": _rate,
    "tests": lambda words, work: programs.run_gpu_tests(work),
    "segment": _segment,
    "steps": lambda words, work: evaluation_rates.measure_steps(words[0], int(words[1]), work.tiny),
    "evaluation": lambda words, work: evaluation_rates.measure_evaluation(words[0], work.tiny),
    "expert": lambda words, work: evaluation_rates.measure_expert(words[0], work.tiny),
    "determinism": lambda words, work: programs.compare_runs(work, compiled_again=words == ["recompiled"]),
    "data": lambda words, work: programs.make_data(work),
    "paper": lambda words, work: programs.train_paper(work),
}


def serve(work: Work) -> int:
    """Answers until the input ends; what parts print goes to standard error."""
    # A benchmark that a script starts in the background ignores Ctrl-C; its workers are ended by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_read, args=(names, busy, sys.stdin), daemon=True).start()
    while (name := names.get()) is not None:
        busy.set()
        print(f"--- {name}", file=sys.stderr, flush=True)
        try:
            answer = {"result": measure(name, work)}
        except UserError as error:
            answer = {"error": str(error)}
        busy.clear()  # before the parent may close the input
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _read(names: "queue.SimpleQueue[str | None]", busy: threading.Event, lines: TextIO) -> None:
    for line in lines:
        names.put(line.strip())
    names.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(LAST_SECONDS)
        os.killpg(os.getpid(), signal.SIGKILL)  # the parent started a session for it
