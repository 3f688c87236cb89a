"""The host's loop on a toy problem: when it evaluates, what it writes, and how it stops."""

import dataclasses
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mac.errors import UserError
from mac.run import segment
from mac.run.io import checkpoint
from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.folder_lock import lock_folder
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.io.signals import Interrupt, Terminated, sigterm_raises
from mac.run.train import Diverged, RunConfig, TrainResult
from tests.helpers.toy_algorithm import RUN, Walk, make_job, result, run


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(read_rows(folder / name))


def steps_of(folder: Path, name: str) -> list[int]:
    """Steps of seed 3's rows (of task 1, in evaluations)."""
    return [row["step"] for row in rows(folder, name) if row["seed"] == 3 and row.get("task", 1) == 1]


def checkpoints(folder: Path) -> list[int]:
    with CheckpointStore(folder / CHECKPOINTS) as store:
        return store.steps()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """The folder and the outcome of 12 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(make_job(), folder)


# What a run leaves.


def test_metrics_have_one_row_per_segment_and_seed(straight: tuple[Path, TrainResult]):
    found = [(row["step"], row["seed"]) for row in rows(straight[0], METRICS)]
    assert found == [(step, seed) for step in range(2, 13, 2) for seed in (3, 4)]


def test_metrics_are_means_over_the_segments_updates(straight: tuple[Path, TrainResult], tmp_path: Path):
    run(make_job(2, run=dataclasses.replace(RUN, segment=1)), tmp_path)
    single = [row["walk/loss"] for row in rows(tmp_path, METRICS) if row["seed"] == 3]
    first = next(row for row in rows(straight[0], METRICS) if row["seed"] == 3)
    assert len(single) == 2 and single[0] != single[1]
    assert first["walk/loss"] == pytest.approx(np.mean(single), rel=1e-5)


def test_evaluations_come_at_their_interval_and_at_the_end(straight: tuple[Path, TrainResult]):
    found = [(row["step"], row["seed"], row["task"]) for row in rows(straight[0], EVAL)]
    assert found == [(step, seed, task) for step in (8, 12) for seed in (3, 4) for task in (1, 2)]
    assert {(row["episodes"], row["engine"]) for row in rows(straight[0], EVAL)} == {(2, "toy")}


def test_newest_checkpoints_are_kept_and_cover_all_rows(straight: tuple[Path, TrainResult]):
    with CheckpointStore(straight[0] / CHECKPOINTS) as store:
        assert store.steps() == [8, 12]
        assert [store.meta(step)["evaluated"] for step in (8, 12)] == [8, 12]
        sizes = {name: (straight[0] / name).stat().st_size for name in (METRICS, EVAL)}
        assert store.meta(12)["log"] == sizes


def test_outcome_says_where_the_time_went(straight: tuple[Path, TrainResult]):
    outcome = straight[1]
    assert (outcome.step, outcome.interrupted) == (12, 0)
    assert set(outcome.seconds) == {"compile", "train", "evaluate", "checkpoint"}
    assert all(seconds > 0 for seconds in outcome.seconds.values())


def test_segments_never_jump_over_a_mark(tmp_path: Path):
    """Marks at 3, 6, 9 and an end at 10: segments of 3 and a last one of 1."""
    run(make_job(10, run=RunConfig(segment=99, eval_every=3, checkpoint_every=6, keep=9)), tmp_path)
    assert steps_of(tmp_path, METRICS) == [3, 6, 9, 10]
    assert steps_of(tmp_path, EVAL) == [3, 6, 9, 10]
    assert checkpoints(tmp_path) == [6, 10]


def test_marks_beyond_the_end_do_not_shorten_segments(tmp_path: Path):
    run(make_job(6, run=RunConfig(segment=6, eval_every=7, checkpoint_every=50, keep=1)), tmp_path)
    assert steps_of(tmp_path, METRICS) == [6]


def test_a_segment_is_compiled_once_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths: list[int] = []
    real = segment.segment

    class Counting:
        def lower(self, *args: Any) -> Any:
            lengths.append(len(args[4]))
            return real.lower(*args)

    monkeypatch.setattr(segment, "segment", Counting())
    run(make_job(), tmp_path)
    assert lengths == [2]


def test_second_seed_is_itself_when_alone(straight: tuple[Path, TrainResult], tmp_path: Path):
    run(make_job(seed=4, seeds=1), tmp_path)
    for name in (METRICS, EVAL):
        together = [row for row in rows(straight[0], name) if row["seed"] == 4]
        for alone, wanted in zip(rows(tmp_path, name), together, strict=True):
            assert alone.pop("engine", None) == wanted.pop("engine", None)
            assert alone == pytest.approx(wanted, rel=1e-5)


# Continuing.


def test_extended_run_continues_from_its_end(straight: tuple[Path, TrainResult], tmp_path: Path):
    """5 updates (segments of 2, 2, 1), then on to 12: the next ends at 6, as if 5 had not been an end."""
    run(make_job(5), tmp_path)
    assert run(make_job(), tmp_path, resume=True).step == 12
    assert steps_of(tmp_path, METRICS) == [2, 4, 5, 6, 8, 10, 12]
    assert steps_of(tmp_path, EVAL) == [5, 8, 12]
    assert result(tmp_path)["arrays"] == result(straight[0])["arrays"]


def test_finished_run_is_left_as_it_is(straight: tuple[Path, TrainResult]):
    before = result(straight[0])
    outcome = run(make_job(), straight[0], resume=True)
    assert (outcome.step, outcome.interrupted) == (12, 0)
    assert "compile" not in outcome.seconds and "evaluate" not in outcome.seconds
    assert result(straight[0]) == before


def test_run_without_a_checkpoint_starts_over(tmp_path: Path):
    (tmp_path / METRICS).write_bytes(b'{"step": 2, "seed": 3}\n{"st')
    run(make_job(4), tmp_path, resume=True)
    assert steps_of(tmp_path, METRICS) == [2, 4]


def test_what_does_not_fit_is_refused_and_nothing_is_changed(straight: tuple[Path, TrainResult]):
    folder, before = straight[0], result(straight[0])
    with pytest.raises(UserError, match=r"hp\.batch \(4 there, 9 here\)"):
        run(make_job(config={"hp": {"batch": 9}, "steps": 12}), folder, resume=True)
    with pytest.raises(UserError, match=r"another configuration: .*place"):
        run(make_job(algo=Walk(size=5)), folder, resume=True)
    with pytest.raises(UserError, match="holds a run already"):
        run(make_job(), folder)
    assert result(folder) == before


def test_folder_has_one_writer(tmp_path: Path):
    with (
        lock_folder(tmp_path),
        pytest.raises(UserError, match="written by another process"),
        lock_folder(tmp_path),
    ):
        pass
    with lock_folder(tmp_path):
        pass


# Divergence.


@pytest.mark.parametrize(
    ("poison", "named"),
    [("metric", "walk/loss is nan at update 6"), ("weight", "a weight is not finite after update 8")],
)
def test_divergence_names_step_seed_and_metric(tmp_path: Path, poison: str, named: str):
    run(make_job(4), tmp_path)
    before = result(tmp_path)
    with pytest.raises(Diverged) as caught:
        run(make_job(algo=Walk(poison=poison)), tmp_path, resume=True)
    text = str(caught.value)
    assert named in text and "seed 4" in text and "the checkpoint of update 4 stays" in text
    after = result(tmp_path)
    assert after["arrays"] == before["arrays"]
    run(make_job(), tmp_path, resume=True)  # the checkpoint is good


def test_divergence_before_the_first_checkpoint_says_so(tmp_path: Path):
    config = RunConfig(segment=2, eval_every=100, checkpoint_every=100, keep=1)
    with pytest.raises(Diverged, match="there is no checkpoint before"):
        run(make_job(algo=Walk(poison="metric"), run=config), tmp_path)
    assert checkpoints(tmp_path) == []
    assert steps_of(tmp_path, METRICS) == [2, 4, 6]  # the last one is of updates 4 and 5


# Signals.


def at(what: str, step: int, number: int) -> Callable[[str, int], None]:
    """A hook that sends this process a signal when the display says `what` at `step`."""

    def hook(said: str, done: int) -> None:
        if (said, done) == (what, step):
            os.kill(os.getpid(), number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("what", "step"), [("compiling", 0), ("update", 2), ("update", 6), ("evaluating", 8), ("success", 8)]
)
def test_signal_leaves_a_checkpoint_that_continues_exactly(
    straight: tuple[Path, TrainResult], tmp_path: Path, number: int, what: str, step: int
):
    outcome = run(make_job(), tmp_path, hook=at(what, step, number))
    assert outcome.interrupted == number
    assert outcome.step < 12
    assert checkpoints(tmp_path)[-1] == outcome.step
    assert run(make_job(), tmp_path, resume=True).interrupted == 0
    assert result(tmp_path) == result(straight[0])


def test_signal_before_an_evaluation_postpones_it(straight: tuple[Path, TrainResult], tmp_path: Path):
    """The metrics of update 8 are flushed by the evaluation that is due there; a signal then stops it."""
    stop = at("update", 10, signal.SIGINT)
    outcome = run(make_job(), tmp_path, hook=stop)
    assert outcome.step == 12 and outcome.interrupted == signal.SIGINT
    assert steps_of(tmp_path, EVAL) == [8]
    run(make_job(), tmp_path, resume=True)
    assert result(tmp_path) == result(straight[0])


def test_signal_at_the_very_end_is_no_interruption(straight: tuple[Path, TrainResult], tmp_path: Path):
    outcome = run(make_job(), tmp_path, hook=at("success", 12, signal.SIGTERM))
    assert (outcome.step, outcome.interrupted) == (12, 0)
    assert result(tmp_path) == result(straight[0])


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, as in a terminal; a process that a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_second_signal_acts_as_usual():
    # Set here, because a shell that starts a job in the background lets it ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.asked and interrupt.signal == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second signal was ignored")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_inside_a_checkpoints_write_leaves_it_whole(
    straight: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
):
    """Once: the run stops with a checkpoint. Twice: at once, when what is being written is complete."""
    describe = checkpoint._describe  # called between the arrays and the description
    presses = iter(range(signals))

    def press(arrays: Any) -> Any:
        for _ in presses:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return describe(arrays)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_describe", press)
        if signals == 1:
            assert run(make_job(), tmp_path).interrupted == signal.SIGINT
        else:
            with pytest.raises(KeyboardInterrupt):
                run(make_job(), tmp_path)
    kept = checkpoints(tmp_path)
    assert kept and not list((tmp_path / CHECKPOINTS).glob(".*"))
    run(make_job(), tmp_path, resume=True)
    assert result(tmp_path) == result(straight[0])


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_warning_of_a_scheduler_asks_however_often_it_comes(name: str):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert interrupt.asked and interrupt.signal == number
        os.kill(os.getpid(), signal.SIGTERM)  # the first that insists after a second
        assert interrupt.signal == signal.SIGTERM
    with pytest.raises(Terminated), sigterm_raises():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
    with pytest.raises(Terminated), sigterm_raises():
        os.kill(os.getpid(), signal.SIGTERM)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_outside_the_main_thread_no_signal_is_taken():
    done: list[bool] = []

    def work():
        with sigterm_raises(), Interrupt() as interrupt:
            done.append(interrupt.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert done == [False]


# A full disk.


def test_full_disk_keeps_the_last_checkpoint(straight: tuple[Path, TrainResult], tmp_path: Path):
    """Files may not grow beyond what 4 updates wrote of metrics; a little room, and all goes on."""
    run(make_job(4), tmp_path)
    before = result(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[METRICS]) + 20, hard))
    try:
        with pytest.raises(UserError, match="cannot write"):
            run(make_job(), tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = result(tmp_path)
    assert (after["step"], after["arrays"]) == (4, before["arrays"])
    run(make_job(), tmp_path, resume=True)
    assert result(tmp_path)["arrays"] == result(straight[0])["arrays"]
