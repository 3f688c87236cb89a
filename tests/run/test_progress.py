"""Rates and remaining times follow a clock; lines are few; terminals get the live display."""

import io
import re

import numpy as np
import pytest

from mac.run.report.progress import open_progress
from mac.run.report.timing import Meter, duration


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_rate_leaves_out_compiling_and_pauses():
    clock = Clock()
    meter = Meter(1000, clock)
    clock.now += 60  # compiling
    for done in (100, 200, 300):
        clock.now += 10
        meter.update(done)
    assert meter.rate() == pytest.approx(10.0)
    with meter.pause():
        clock.now += 500
    clock.now += 10
    meter.update(400)
    assert meter.rate() == pytest.approx(10.0)


def test_remaining_counts_pauses_and_runs_down():
    clock = Clock()
    meter = Meter(1000, clock)
    assert meter.remaining() is None
    meter.update(100)
    with meter.pause():
        clock.now += 20
    clock.now += 10
    meter.update(400)  # 300 units took 30 s with the pause
    assert meter.remaining() == pytest.approx(60.0)
    clock.now += 15
    assert meter.remaining() == pytest.approx(45.0)
    clock.now += 1000
    assert meter.remaining() == 0.0


def test_resumed_job_does_not_count_earlier_work_as_speed():
    clock = Clock()
    meter = Meter(10_000, clock)
    for done in (9_000, 9_010):
        clock.now += 1
        meter.update(done)
    assert meter.rate() == pytest.approx(10.0) and meter.remaining() == pytest.approx(99.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0:00"), (61.4, "1:01"), (3599.7, "1:00:00"), (3723.0, "1:02:03")],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


def run_plain(updates: int, seconds: float, **options) -> list[str]:
    out, clock = io.StringIO(), Clock()
    with open_progress("MAC", updates, "updates", seeds=(0, 1), file=out, clock=clock, **options) as progress:
        for done in range(1, updates + 1):
            clock.now += seconds
            progress.update(done, {"critic/loss": np.array([1.0, 3.0]), "q_mean": np.zeros(2)})
    return out.getvalue().splitlines()


def test_plain_lines_come_at_most_every_so_often():
    lines = run_plain(updates=1000, seconds=0.1, every=20.0)  # 100 s
    assert len(lines) == 6  # at once, after 20, 40, 60, 80 s, and at the end
    assert lines[-1].startswith("MAC: 100% 1,000/1,000 updates  10 updates/s  1:40 elapsed")


def test_plain_lines_show_losses_as_means_over_seeds():
    line = run_plain(updates=2, seconds=1.0)[-1]
    assert line.endswith("critic/loss 2") and "q_mean" not in line


def test_plain_output_has_no_control_characters(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not any(re.search(r"[\x00-\x1f]", line) for line in run_plain(updates=20, seconds=30.0))


def test_evaluations_are_always_printed():
    out = io.StringIO()
    with open_progress("MAC", 100, "updates", seeds=(0, 1), file=out, clock=Clock()) as progress:
        progress.update(10)
        progress.success(10, [0.25, 0.75])
        progress.success(20, [1.0, 1.0], {2: 1.0})
        progress.success(30, [0.25, 0.75], {1: 0.125, 5: 0.875})
        progress.note("saved")
    assert out.getvalue().splitlines()[1:] == [
        "MAC: success 0.50 at 10 updates (seeds: 0.25 0.75)",
        "MAC: success 1.00 at 20 updates (seeds: 1.00 1.00)",
        "MAC: success 0.50 at 30 updates (seeds: 0.25 0.75; tasks: 1 0.12, 5 0.88)",
        "saved",
    ]


@pytest.mark.parametrize("seeds", [1, 4, 16])
def test_terminal_shows_metrics_and_success_of_the_seeds(monkeypatch: pytest.MonkeyPatch, seeds: int):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    with open_progress("MAC", 200, "updates", seeds=range(seeds), file=out) as progress:
        progress.update(100, {"critic/loss": np.linspace(0.5, 1.5, seeds)})
        progress.success(100, np.full(seeds, 0.5), {1: 0.4, 2: 0.6})
        with progress.phase("evaluating"):
            progress.note("a line that stays")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for part in (
        "MAC",
        "100/200 updates",
        "success at 100",
        "50%",
        "success by task: 1 40%, 2 60%",
        "critic/loss",
        "a line that stays",
    ):
        assert part in text
    assert ("seed 0" in text) == (seeds <= 8) and ("max" in text) == (seeds > 8)


@pytest.mark.parametrize(("columns", "shown"), [(40, "mean"), (60, "max"), (120, "seed 7")])
def test_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch, columns: int, shown: str):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with open_progress("MAC", 200, "updates", seeds=range(8), file=out) as progress:
        progress.update(100, {"critic/long_loss": np.linspace(1234.5, 99999.5, 8)})
        progress.success(100, np.full(8, 0.5))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert shown in text and "5.06e+04" in text and "…" not in text


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with open_progress("data", 10, "rows", file=out) as progress:
        progress.count(5, 20)
    assert out.getvalue().startswith("data:  25% 5/20 rows") and "\x1b" not in out.getvalue()
