"""Bad data, bad folders, a full disk, an interruption: one line each, and nothing is lost."""

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import run as program
from experiments.run import main
from mac.run.io.signals import Terminated
from mac.run.train import Diverged
from tests.helpers.command_line import SIZES, arrays, content, error_of, params

# Bad data.


def edit(**changes: Any) -> Callable[[Path], None]:
    """Writes the small dataset with arrays replaced, or left out where None."""

    def write(path: Path) -> None:
        kept = {key: value for key, value in (arrays() | changes).items() if value is not None}
        np.savez(path, **kept)

    return write


def cut(path: Path) -> None:
    edit()(path)
    path.write_bytes(path.read_bytes()[:-400])


def flip(path: Path) -> None:
    edit()(path)
    bytes_ = bytearray(path.read_bytes())
    bytes_[3000:3100] = bytes(100)
    path.write_bytes(bytes_)


def with_nan() -> np.ndarray:
    rows = arrays()["observations"]
    rows[7, 3] = np.nan
    return rows


GOOD = arrays()
BAD_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "no such dataset"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("hello"), "not a complete .npz"),
    "truncated": (cut, "not a complete .npz"),
    "corrupt": (flip, "damaged"),
    "folder without files": (lambda path: path.mkdir(), "no training .npz"),
    "missing key": (edit(actions=None), "key 'actions' is missing"),
    "objects": (edit(actions=np.array([None] * 120)), "Python objects"),
    "wrong rank": (edit(observations=GOOD["observations"][..., None]), "shape"),
    "wrong width": (edit(observations=GOOD["observations"][:, :20]), "20 observation"),
    "wrong action width": (edit(actions=GOOD["actions"][:, :4]), "4 action"),
    "unequal rows": (edit(actions=GOOD["actions"][:-1]), "unequal"),
    "NaN": (edit(observations=with_nan()), "row 7, column 3"),
    "large actions": (edit(actions=5 * GOOD["actions"]), "[-1, 1]"),
    "no end": (edit(terminals=np.zeros(120, bool)), "never marks"),
    "short episodes": (edit(terminals=np.arange(120) % 8 == 7), "long enough for chunk=10"),
    "no rows": (edit(**{key: value[:0] for key, value in GOOD.items()}), "no rows"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    make, part = BAD_DATA[case]
    source = tmp_path / "bad.npz"
    make(source)
    before = content(tmp_path)
    argv = [
        *SIZES,
        "--data.path",
        str(source),
        "--data.dir",
        str(tmp_path / "d"),
        "--out",
        str(tmp_path / "o"),
    ]
    said = error_of(capsys, argv)
    assert part in said and str(tmp_path) in said
    left = {name: text for name, text in content(tmp_path).items() if not name.startswith("d/")}
    assert left == before and not (tmp_path / "o").exists()


# Bad folders.


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("flag", ["--out", "--data.dir"])
def test_folder_that_cannot_be_written_is_named(
    flag: str, data: list[str], tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("precious")
    argv = [*SIZES, *data, "--out", str(tmp_path / "run"), flag, str(tmp_path / "file" / "below")]
    said = error_of(capsys, argv)
    assert (str(tmp_path / "file") in said and "folder" in said) or "--out" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_file_in_the_place_of_the_folder_is_named(
    data: list[str], tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("precious")
    said = error_of(capsys, [*SIZES, *data, "--out", str(tmp_path / "file")])
    assert str(tmp_path / "file") in said and "choose another --out" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_full_disk_is_noticed_before_the_work(
    data: list[str], tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    with largest_file(1000):
        said = error_of(capsys, [*SIZES, *data, "--out", str(tmp_path / "run")])
    assert "cannot write to" in said and "--out" in said
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_disk_that_fills_up_keeps_the_last_checkpoint(
    copied: Path, quiet: None, capsys: pytest.CaptureFixture[str]
):
    before = params(copied)
    with largest_file(9000):  # room for the records, not for a checkpoint's arrays
        said = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])
    assert "cannot write" in said
    assert params(copied) == before
    assert main(["--out", str(copied), "--resume", "--steps", "20"]) == 0


# What else may go wrong.


def test_divergence_has_its_own_exit_status_and_is_recorded(
    copied: Path, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def diverge(*_: Any, **__: Any) -> None:
        raise Diverged("training stopped: critic/loss is nan at update 12, seed 1")

    monkeypatch.setattr(program, "train", diverge)
    said = error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"], status=1)
    assert "update 12, seed 1" in said
    assert "seed 1" in json.loads((copied / "run.json").read_text())["launches"][-1]["error"]


def test_memory_that_runs_out_is_one_line(
    copied: Path, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 1 GB")

    monkeypatch.setattr(program, "train", fail)
    assert "fewer --seeds" in error_of(capsys, ["--out", str(copied), "--resume", "--steps", "20"])


def interrupted(
    tmp_path: Path, error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Exit status of a launch without a dataset that is interrupted when it calls `where`."""

    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))  # where ogbench's downloads would be found
    monkeypatch.setattr(where, stop)
    data = ["--data.dir", str(tmp_path / "d"), "--data.rows", "1001"]
    return main([*SIZES, *data, "--out", str(tmp_path / "o")])


def test_interrupted_generation_leaves_no_dataset(
    tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """At the first rows that the expert has made."""
    assert (
        interrupted(tmp_path, KeyboardInterrupt, "mac.run.report.progress.Progress.count", monkeypatch) == 130
    )
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and "interrupted" in printed.err
    assert content(tmp_path) == {} and not (tmp_path / "o").exists()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_interruption_tells_its_signal(
    error: type[BaseException], status: int, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
):
    assert interrupted(tmp_path, error, "experiments.launch.dataset.generate_file", monkeypatch) == status
