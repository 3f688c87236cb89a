"""Files that are written whole or not at all."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from mac.atomic_files import (
    misfit,
    read_json,
    read_table,
    remove_leftovers,
    replace_file,
    unfinished_file,
    visible,
    write_json,
    writing,
)
from mac.errors import UserError, refusal, remedy


def half(file: IO[bytes]) -> None:
    file.write(b"half")
    file.flush()
    raise KeyboardInterrupt


@pytest.mark.parametrize("aside", [None, "elsewhere.part"])
def test_a_file_is_replaced_whole_or_not_at_all(aside: str | None, tmp_path: Path):
    path, part = tmp_path / "new folder" / "a", tmp_path / aside if aside else None
    replace_file(path, lambda file: file.write(b"old"), part=part)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, half, part=part)
    assert path.read_bytes() == b"old"
    replace_file(path, lambda file: file.write(b"new"), part=part)
    assert [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()] == [b"new"]


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, part, synced = tmp_path / "a", tmp_path / "a.part", []

    def fsync(descriptor: int) -> None:
        synced.append((part.read_bytes(), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(path, lambda file: file.write(b"new"), part=part)
    assert synced == [(b"new", False)] and path.read_bytes() == b"new"


def test_what_the_disk_refuses_is_one_line_that_names_the_file(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.json"
    with pytest.raises(UserError, match=f"^cannot write {re.escape(str(path))}: [^\n]+ another folder$"):
        write_json(path, {})


def test_json_is_read_as_it_was_written_or_refused_by_name(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, "é"], "path": Path("b")})
    assert read_json(path) == {"a": [1, None, "é"], "path": "b"}
    for content in (b"{", b"\xff", b"[" * 100_000, b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path} is not JSON [^\n]*; restore it or delete it$"):
            read_json(path)
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "nothing")


def test_a_table_with_a_wrong_field_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"step": 3, "log": {}})
    assert read_table(path, step=int, log=dict) == {"step": 3, "log": {}}
    for value, fault in (
        ([], "a list where a table was expected"),
        (None, "null where a table was expected"),
        ({"log": {}}, "step is missing"),
        ({"step": True, "log": {}}, "step is true"),
        ({"step": 1.5, "log": {}}, "step is a number"),
        ({"step": 3, "log": "x"}, "log is a text"),
    ):
        write_json(path, value)
        with pytest.raises(UserError, match=rf"^{path} is damaged \({fault}\); restore it or delete it$"):
            read_table(path, step=int, log=dict)
    assert misfit({"x": 1}, x=(int, float)) is None and misfit({"x": True}, x=bool) is None


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space, or choose another folder"),
        (errno.EACCES, "set rights, or choose another folder"),
        (errno.EROFS, "it can only be read there: choose another folder"),
        (errno.EMFILE, "too many files are open: raise the limit (`ulimit -n`)"),
        (errno.EFBIG, "raise the limit of a file's size (`ulimit -f`), or choose another file system"),
        (errno.ENOTDIR, "something else has this name: move it away, or choose another folder"),
        (errno.EPIPE, "choose another folder"),
    ],
)
def test_what_the_system_refuses_has_the_remedy_that_fits(number: int, advice: str, tmp_path: Path):
    error = OSError(number, os.strerror(number))
    with pytest.raises(UserError) as caught, writing(tmp_path):
        raise error
    assert str(caught.value) == f"cannot write {tmp_path}: {os.strerror(number)}; {advice}"


def test_remedies_are_found_in_what_libraries_say():
    full, wrapped = "free some space, or choose another folder", "Error: OS error No space left on device"
    assert remedy(ValueError(wrapped), "?") == full
    assert remedy(OSError(f"Unable to open file (errno = {errno.ENOSPC}, error message)"), "?") == full
    assert remedy(RuntimeError("no such thing"), "look at the file") == "look at the file"
    assert refusal(ValueError(wrapped)) == os.strerror(errno.ENOSPC)
    assert refusal(OSError(errno.ENOSPC, "No space", "a")) == "No space"
    assert refusal(ValueError("a\nb")) == "a b"


def test_hidden_files_and_folders_are_not_listed(tmp_path: Path):
    for name in ("b.npz", "a.npz", "._a.npz", ".hidden.npz", "c/d.npz", "c/._d.npz", ".e/f.npz", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert visible(tmp_path, "*.npz") == [tmp_path / "a.npz", tmp_path / "b.npz"]
    assert [p.name for p in visible(tmp_path, "**/*.npz")] == ["a.npz", "b.npz", "d.npz"]
    inside = tmp_path / ".e"  # who names a hidden folder means it
    assert visible(inside, "*.npz") == [inside / "f.npz"] and visible(tmp_path / "none", "*") == []


LISTS = re.compile(r"\.(r?glob|iterdir)\(|listdir\(|scandir\(|os\.walk\(")
OWN_FOLDERS = {
    "mac/atomic_files.py",
    "mac/data/convert.py",
    "envs_mjx/datagen/dataset_parts.py",  # hidden folders of generate_data.py
    "mac/run/io/checkpoint.py",
    "envs_mjx/engines/warp_setup.py",
    "mac/data/store.py",  # descriptors of this process
    "experiments/launch/loggers.py",  # files of the trackers
    "experiments/reproduction/cost.py",  # the project's source
    "experiments/reproduction/times.py",
    "experiments/doctor_checks/checks.py",  # runs where nothing is installed; only counts compiled programs
}
"""Where `visible` is, and modules that look through folders of their own making only."""


def test_folders_of_users_are_listed_by_one_function():
    root = Path(__file__).parents[2]
    packages = ("mac", "envs_mjx", "baselines", "experiments")
    files = [path for package in packages for path in (root / package).rglob("*.py")]
    found = {str(p.relative_to(root)) for p in files if LISTS.search(p.read_text())}
    assert found <= OWN_FOLDERS


def test_only_leftovers_of_dead_processes_are_removed(tmp_path: Path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    number = int(dead.stdout)
    inner = tmp_path / "checkpoints" / "000000010"
    inner.mkdir(parents=True)
    gone = [
        tmp_path / f".learning_curve.png.{number}.mac-unfinished",
        inner / f".meta.json.{number}.mac-unfinished",
        tmp_path / ".probe.99999999.mac-unfinished",
    ]
    kept = [
        unfinished_file(tmp_path / "run.json"),
        tmp_path / f".screenrc.{number}",  # someone else's
        tmp_path / ".backup.20240101",
        tmp_path / ".notes",
        tmp_path / ".5",
        tmp_path / f"a.{number}",
    ]
    for path in gone + kept:
        path.touch()
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
