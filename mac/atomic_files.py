"""Files that are written whole or not at all, and the errors when the disk refuses."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mac.errors import UserError, one_line, refusal, remedy

_UNFINISHED = ".mac-unfinished"
"""End of the names of files that a process of this project is writing; nobody else's names end so."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While entered, what the system says against writing `path`, a file or a folder, is a `UserError`.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    try:
        yield
    except OSError as error:
        then = remedy(error, "choose another folder")
        raise UserError(f"cannot write {path}: {refusal(error)}; {then}") from error


def require_regular(path: Path, *, device: bool = False) -> None:
    """Checks that a path is no pipe and no device, which may be read, or opened, forever.

    Args:
        device: devices are allowed, for they can be written.
    Raises:
        OSError: it is one, or it cannot be examined.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode) or (device and stat.S_ISCHR(mode)):  # of a folder, `open` says so itself
        return
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, no regular file", str(path))


def visible(folder: Path, pattern: str) -> list[Path]:
    """The paths below `folder` that match a pattern of `Path.glob`, by name, without hidden ones.

    Names that begin with a dot are skipped, and so is all in folders of such names: macOS leaves `._NAME`
    beside every NAME that it copies to a foreign disk.
    """
    found = (path for path in folder.glob(pattern) if not _hidden(path.relative_to(folder)))
    return sorted(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def unfinished_file(path: Path) -> Path:
    """Returns the hidden file of this process that is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")


def replace_file(path: Path, write: Callable[[IO[bytes]], Any], *, part: Path | None = None) -> None:
    """Lets `write` fill a file that takes the place of `path` once it is whole and on the disk.

    `path` holds either its old content or all of the new, at every moment. Missing folders are made.

    Args:
        part: where the file is until then, on the same file system; a killed process leaves it there.
            A hidden file of this process beside `path` if None.
    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    part = part or unfinished_file(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                write(file)
                fsync(file)
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left of `unfinished_file` in a folder, and in the folders within it.

    What belongs to a process that runs stays, and so does what the system does not let us delete.
    """
    for path in folder.rglob(f".*{_UNFINISHED}"):
        number = path.name.removesuffix(_UNFINISHED).rpartition(".")[2]
        if number.isascii() and number.isdecimal() and not _runs(int(number)):
            with contextlib.suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        return True
    return True


def fsync(file: IO[bytes]) -> None:
    """Returns when all that was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, value: Any, *, part: Path | None = None, indent: int | None = 2) -> None:
    """Writes `value` as indented JSON (what JSON lacks as its `str`), as `replace_file` does."""
    text = json.dumps(value, indent=indent, default=str) + "\n"
    replace_file(path, lambda file: file.write(text.encode()), part=part)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read or is not JSON.
    """
    try:
        return load_json(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {refusal(error)}; {remedy(error, 'restore it')}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); restore it or delete it") from error


def load_json(path: Path) -> Any:
    """Does what `read_json` does, but raises `OSError`, or `ValueError` if it is not JSON."""
    require_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_table(path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """The content of a JSON file that must be a table with at least these fields, of these types.

    Raises:
        UserError: it cannot be read, is not JSON, no table, or a field is missing or of another type.
    """
    value = read_json(path)
    if fault := misfit(value, **fields):
        raise UserError(f"{path} is damaged ({fault}); restore it or delete it")
    return value


def misfit(value: Any, **fields: type | tuple[type, ...]) -> str | None:
    """The first reason why `value`, as JSON gave it, is no table with these fields; None if it is one.

    `int` and `float` do not take true and false, which Python counts as whole numbers.
    """
    if not isinstance(value, dict):
        return f"{_kind(value)} where a table was expected"
    for name, kinds in fields.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        found = value.get(name, _NOTHING)
        if found is _NOTHING:
            return f"{name} is missing"
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            return f"{name} is {_kind(found)}"
    return None


_NOTHING = object()


def _kind(value: Any) -> str:
    """The name that JSON has for a value's type; TOML has more types."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return kinds.get(type(value), "a value of another type")


@contextlib.contextmanager
def locked(lock: Path, wait: Callable[[], Any] = lambda: None, *, discard: bool = False) -> Iterator[None]:
    """Holds a lock file while entered, after another process that holds it; freed even by a killed process.

    Args:
        wait: called before waiting.
        discard: the file is deleted afterwards.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: run without the guard
        yield
        return
    while True:
        with writing(lock):
            handle = lock.open("w")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                pass  # some network file systems have no locks; work done twice is better than none
            if discard and not _is_file(handle, lock):
                continue  # whoever held it deleted it, and a later process may hold another
            try:
                yield
            finally:
                if discard:
                    lock.unlink(missing_ok=True)
            return


def _is_file(handle: IO[Any], path: Path) -> bool:
    """Returns whether an open file is the one that is found at `path`."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
