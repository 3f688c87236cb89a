"""Progress of long work: a live display on a terminal, plain lines elsewhere.

    with open_progress("MAC", total=30_000, unit="updates", seeds=(0, 1)) as progress:
        progress.update(1_000, {"critic/loss": losses})
        with progress.phase("evaluating"):
            ...
        progress.success(1_000, [0.2, 0.35])

Both faces read the same `Meter` and print rarely, whatever the rate of the calls.
"""

import abc
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Protocol, cast, runtime_checkable

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mac.run.report.score import SUCCESS, ScoreKind
from mac.run.report.timing import Meter, duration

MAX_COLUMNS = 8  # seeds shown one by one; more are summed up as min, mean, max
MAX_ROWS = 8  # metrics shown
_EACH, _SPREAD, _MEAN = (), ("min", "mean", "max"), ("mean",)  # columns of the live table


@runtime_checkable
class TextOutput(Protocol):
    """Output file for text."""

    def write(self, text: str, /) -> Any: ...
    def flush(self) -> Any: ...
    def isatty(self) -> bool: ...


class Progress(abc.ABC):
    """One job's display; a context manager. Make it with `open_progress`."""

    def __init__(
        self, title: str, total: int, unit: str, seeds: Sequence[int | str], clock: Callable[[], float]
    ):
        self.title, self.unit, self.seeds = title, unit, tuple(seeds)
        self.meter = Meter(total, clock)
        self.metrics: dict[str, np.ndarray] = {}
        self.scores: tuple[int, np.ndarray] | None = None
        self.tasks: dict[int, float] = {}
        self.doing = ""
        self.measure = SUCCESS
        self.listener: Callable[[], object] = lambda: None
        """Called when rows of metrics or of an evaluation may have been written."""

    def update(self, done: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`done` units of the total are complete; `metrics` are arrays of one value per seed.

        Of the metrics those named `.../*loss` are shown, or the first few if there are none.
        """
        self.meter.update(done)
        if metrics:
            losses = [name for name in metrics if name.endswith("loss")] or list(metrics)
            self.metrics = {name: np.atleast_1d(metrics[name]) for name in losses[:MAX_ROWS]}
        self._changed()
        self.listener()

    def count(self, done: int, total: int) -> None:
        """Does what `update` does, for a job that learns its total on the way and has no metrics."""
        self.meter.total = total
        self.update(done)

    def success(
        self,
        step: int,
        scores: Sequence[float] | np.ndarray,
        tasks: Mapping[int, float] | None = None,
        measure: ScoreKind = SUCCESS,
    ) -> None:
        """The evaluation at `step` gave each seed, and each task, these success rates, or other scores."""
        self.measure, self.scores = measure, (step, np.asarray(scores))
        self.tasks = dict(tasks or {})
        self._changed(important=True)
        self.listener()

    @contextlib.contextmanager
    def phase(self, doing: str) -> Iterator[None]:
        """Shows what goes on instead of the job proper; its time does not count in the rate."""
        self.doing = doing
        self._changed()
        try:
            with self.meter.pause():
                yield
        finally:
            self.doing = ""

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Prints a line that stays."""

    @abc.abstractmethod
    def _changed(self, important: bool = False) -> None: ...

    def __enter__(self) -> "Progress":
        return self

    @abc.abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def by_task(self, form: str) -> str:
        """Score of each task, such as `1 0.50, 2 0.75`."""
        return ", ".join(f"{task} {float(rate):{form}}" for task, rate in self.tasks.items())

    def line(self) -> str:
        """Counts, rate and remaining time in one line."""
        meter = self.meter
        share = meter.done / meter.total if meter.total else 1.0
        parts = [f"{share:4.0%} {meter.done:,}/{meter.total:,} {self.unit}"]
        if rate := meter.rate():
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        if (rest := meter.remaining()) is not None and meter.done < meter.total:
            parts.append(f"{duration(rest)} left")
        else:
            parts.append(f"{duration(meter.elapsed())} elapsed")
        return "  ".join([*parts, self.doing] if self.doing else parts)


class _Plain(Progress):
    """A line at most every `every` seconds, one at each evaluation, and one at the end."""

    def __init__(self, *args: Any, file: TextOutput, every: float):
        super().__init__(*args)
        self._file, self._every = file, every
        self._next = 0.0  # seconds of `meter.elapsed` from which a line is due: the first at once

    def __exit__(self, *_: object) -> None:
        self._file.flush()

    def note(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def _changed(self, important: bool = False) -> None:
        finished = self.meter.done >= self.meter.total
        due = not self.doing and (finished or self.meter.elapsed() >= self._next)
        if not (important or due):
            return
        self._next = self.meter.elapsed() + self._every
        if important and self.scores:
            step, scores = self.scores
            form = self.measure.plain
            each = " ".join(f"{x:{form}}" for x in scores[:MAX_COLUMNS])
            tasks = f"; tasks: {self.by_task(form)}" if len(self.tasks) > 1 else ""
            name = self.measure.name
            line = f"{name} {scores.mean():{form}} at {step:,} {self.unit} (seeds: {each}{tasks})"
            self.note(f"{self.title}: {line}")
            return
        values = "  ".join(f"{name} {value.mean():.3g}" for name, value in self.metrics.items())
        self.note(f"{self.title}: {self.line()}" + (f"  {values}" if values else ""))


class _Live(Progress):
    """A bar and a small table that are redrawn twice a second by a thread of rich."""

    def __init__(self, *args: Any, console: Console):
        super().__init__(*args)
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render)

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def _changed(self, important: bool = False) -> None:
        pass  # the thread reads the state by itself

    def _render(self) -> RenderableType:
        bar = ProgressBar(total=max(self.meter.total, 1), completed=self.meter.done, width=30)
        head = Table.grid(padding=(0, 1))
        head.add_row(Text(self.title, style="bold"), bar)
        parts = [head, Text(self.line())]
        if len(self.tasks) > 1:
            parts.append(Text(f"{self.measure.name} by task: {self.by_task(self.measure.short)}"))
        return Group(*parts, self._table()) if self.scores or self.metrics else Group(*parts)

    def _table(self) -> Table:
        """The widest table that fits the terminal: of every seed, of min, mean and max, or of the mean."""
        console = self._live.console
        unbounded = console.options.update(max_width=10 * console.width)
        tables = [self._columns(_EACH)] if len(self.seeds) <= MAX_COLUMNS else []
        tables += [self._columns(_SPREAD), self._columns(_MEAN)] if len(self.seeds) > 1 else []
        fitting = (t for t in tables if Measurement.get(console, unbounded, t).maximum <= console.width)
        return next(fitting, tables[-1])

    def _columns(self, shown: tuple[str, ...]) -> Table:
        """Scores and metrics: of each seed (`_EACH`) and their mean, or of these summaries of the seeds."""
        names = shown
        if shown is _EACH:
            names = tuple(s if isinstance(s, str) else f"seed {s}" for s in self.seeds)
            names += _MEAN if len(names) > 1 else ()

        def cells(values: np.ndarray, form: str) -> list[str]:
            if shown is not _EACH:
                values = np.array([getattr(values, name)() for name in shown])
            elif len(values) > 1:
                values = np.append(values, values.mean())
            return [format(float(x), form) for x in values]

        table = Table(box=None, pad_edge=False, padding=(0, 1))
        table.add_column("", style="cyan")
        for name in names:
            table.add_column(name, justify="right")
        if self.scores:
            step, scores = self.scores
            table.add_row(
                f"{self.measure.name} at {step:,}", *cells(scores, self.measure.short), style="bold"
            )
        for name, value in self.metrics.items():
            table.add_row(name, *cells(value, ".3g"))
        return table

    def __enter__(self) -> "Progress":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def open_progress(
    title: str,
    total: int,
    unit: str,
    *,
    seeds: Sequence[int | str] = (),
    file: TextOutput | None = None,
    every: float = 15.0,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A display of `total` units of work: live if `file` (standard output) is a terminal, else plain lines.

    Args:
        title: what runs, a few words.
        unit: plural noun of what is counted, for instance `updates` or `rows`.
        seeds: numbers, or names, of the seeds whose metrics and scores will be shown.
        every: seconds between plain lines, at least.
    """
    out: TextOutput = sys.stdout if file is None else file
    args = (title, total, unit, seeds, clock)
    console = Console(file=cast(IO[str], out))
    if out.isatty() and not console.is_dumb_terminal:
        return _Live(*args, console=console)
    return _Plain(*args, file=out, every=every)
