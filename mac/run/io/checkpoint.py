"""Checkpoints: written while training goes on, complete or absent, exact to the bit.

    <folder>/000012000/meta.json     step, configuration, log positions, and each array's shape and checksum
    <folder>/000012000/state/        the arrays, by name, in Orbax's format

A checkpoint is written under a temporary name and renamed when it is complete, so a process that is
killed at any moment leaves the last complete one as it was. What it was writing is deleted by the
next process that opens the folder to write. Only one run may write to a folder. Whatever else has a
checkpoint's name is moved aside, never deleted.

Several processes of one run (`mac.run.hosts`) write a checkpoint together, each the arrays' parts that its
devices hold, and training waits meanwhile. What is on the disk does not tell how many they were.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mac.atomic_files import load_json, misfit, write_json
from mac.errors import UserError, one_line, refusal, remedy
from mac.run import hosts
from mac.run.io.checkpoint_compat import check_config, check_shapes

FORMAT = 1
"""Version of the layout above."""

TEMPORARY = ".incomplete-"
"""Prefix of what is being written or deleted."""

ASIDE = "-aside"
"""Suffix of what had a checkpoint's name and was none."""


class Checkpoint(NamedTuple):
    """A restored checkpoint: `state` has the structure of the template, `meta` is what was saved."""

    step: int
    state: Any
    meta: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run; `with CheckpointStore(...) as store:` waits for the last one at the end.

    Args:
        folder: made when first written to.
        keep: how many of the newest checkpoints stay, at least 1.

    Attributes:
        notes: lines for the user, about what was found in the folder; whoever shows them removes them.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise UserError(f"keep={keep}: at least 1 checkpoint must be kept")
        self.folder = Path(folder).absolute()  # as Orbax wants it
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._cleaned = False
        self._reached: int | None = None  # step of the last checkpoint that was written or read here
        self.notes: list[str] = []

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (p for p in self._entries() if _is_step(p.name) and (p / "meta.json").is_file())
        return sorted(int(p.name) for p in found)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Copies `state` to the host and returns; a thread writes it, then deletes the oldest.

        The caller may donate or delete the arrays of `state` afterwards. A step that is already
        there only gets the new `meta`. Waits for the previous save first, and reports its failure.

        Args:
            step: updates done, so also the step to continue with.
            state: pytree of arrays.
            meta: what JSON can hold, at least the keys that `restore` is to compare under `config`.
        Raises:
            UserError: if the previous checkpoint could not be written.
        """
        self.wait()
        if hosts.count() > 1:
            return self._save_together(step, state, meta)
        if step in self.steps():
            return self._replace_meta(step, meta)
        arrays = _on_host(state)
        text = json.dumps(dict(meta), default=str)  # now, since the caller may change it while we write
        self._pending = self._writer.submit(self._write, step, arrays, text)

    def _save_together(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Does what `save` does, in all processes at once; `meta` is that of the first."""
        fault = None
        try:
            # All decide alike, whatever a network's file system shows each of them.
            if self._reached == step:
                if hosts.is_first():
                    self._replace_meta(step, meta)
            else:
                self._write_together(step, _named(state), json.dumps(dict(meta), default=str))
                self._reached = step
        except (OSError, ValueError, RuntimeError) as error:
            fault = str(error) if isinstance(error, UserError) else str(self._unwritten(error))
        if found := next(filter(None, hosts.gather_json(fault)), None):
            raise hosts.SharedError(found)

    def _write_together(self, step: int, arrays: dict[str, Any], meta: str) -> None:
        said = ["", ""]  # the folder, or why there is none
        if hosts.is_first():
            try:
                said[0] = str(self._new_folder(step))
            except OSError as error:
                said[1] = str(self._unwritten(error))
        name, fault = hosts.from_first(said)
        if fault:
            raise UserError(fault)
        new = Path(name)
        sums = hosts.gather_json({name: _part_checksums(array) for name, array in arrays.items()})
        _write_arrays(new / "state", arrays)
        if hosts.is_first():
            described = {
                name: [array.dtype.name, list(array.shape), _whole_checksum([each[name] for each in sums])]
                for name, array in arrays.items()
            }
            self._complete(new, step, json.loads(meta), described)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk.

        Raises:
            UserError: if it could not be written; earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        # Orbax reports a refusal of the system in any of these ways.
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: BaseException) -> UserError:
        last = self.latest()
        kept = "there is none before it" if last is None else f"the one of step {last} is intact"
        then = remedy(error, "check the disk and the rights to the folder")
        return UserError(
            f"{self.folder}: cannot write a checkpoint ({refusal(error)}); {kept}; {then}; then --resume"
        )

    def close(self) -> None:
        """Waits for the last save and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Reads the `meta` that was passed to `save` (of the newest checkpoint), without the arrays.

        Raises:
            UserError: if there is no such checkpoint, or its description is damaged.
        """
        return self._header(step)["meta"]

    def restore(
        self,
        template: Any,
        step: int | None = None,
        config: Mapping[str, Any] | None = None,
        may_differ: Collection[str] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> Checkpoint:
        """Reads a checkpoint (the newest) onto the default device.

        Args:
            template: pytree with the shapes and dtypes to expect, e.g. of `eqx.filter_eval_shape`.
            config: if given, must equal `config` of the saved `meta`, up to JSON's types.
            may_differ: keys of `config`, dotted if nested, in which the two may differ.
            defaults: values that keys absent from the saved `config` stand for, nested as it is.
        Raises:
            UserError: if there is none, it is damaged, or it belongs to another configuration; the
                line names the path and what differs.
        """
        header = self._header(step)
        path = self._path(header["step"])
        if config is not None:
            saved = header["meta"].get("config")
            if fault := misfit(saved):
                raise self.damaged(header["step"], f"config: {fault}")
            check_config(path, saved, config, may_differ, defaults)
        expected = _named(template)
        check_shapes(path, header["arrays"], expected)
        arrays = self._read_arrays(path, header)
        leaves = [jnp.array(arrays[name]) for name in expected]
        state = jax.tree.unflatten(jax.tree.structure(template), leaves)
        self._reached = header["step"]
        return Checkpoint(header["step"], state, header["meta"])

    def damaged(self, step: int, reason: str) -> UserError:
        """The error of a checkpoint whose content is wrong, with what to do."""
        before = [s for s in self.steps() if s < step]
        then = f"continue from step {before[-1]}" if before else "start again"
        return UserError(f"{self._path(step)}: damaged checkpoint ({reason}); delete this folder to {then}")

    def _entries(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            then = remedy(error, "check the folder")
            raise UserError(f"cannot read {self.folder}: {refusal(error)}; {then}") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:09d}"

    def _write(self, step: int, arrays: dict[str, np.ndarray], meta: str) -> None:
        """Runs on the writing thread."""
        new = self._new_folder(step)
        try:
            _write_arrays(new / "state", arrays)
            self._complete(new, step, json.loads(meta), _describe(arrays))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)  # on a full disk it is in the way
            raise

    def _replace_meta(self, step: int, meta: Mapping[str, Any]) -> None:
        header = self._header(step) | {"meta": json.loads(json.dumps(dict(meta), default=str))}
        write_json(self._path(step) / "meta.json", header, indent=None)

    def _new_folder(self, step: int) -> Path:
        """Makes the folder that a checkpoint is written in."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._cleaned:
            for stale in self.folder.glob(TEMPORARY + "*"):
                _remove(stale)
            self._cleaned = True
        new = _unused(self.folder / f"{TEMPORARY}{step:09d}")
        new.mkdir()
        return new

    def _complete(self, new: Path, step: int, meta: Any, arrays: dict[str, list[Any]]) -> None:
        """Gives a checkpoint whose arrays are written its description and its name."""
        header = {"format": FORMAT, "step": step, "meta": meta, "arrays": arrays}
        (new / "meta.json").write_text(json.dumps(header))
        self._clear(self._path(step))
        os.rename(new, self._path(step))
        self._delete_oldest()

    def _clear(self, path: Path) -> None:
        """Moves aside what has a checkpoint's name and is none, such as one that lost its `meta.json`."""
        if path.exists() or path.is_symlink():
            aside = _unused(path.with_name(path.name + ASIDE))
            os.rename(path, aside)
            self.notes.append(f"note: {path} was no checkpoint; it is called {aside.name} now")

    def _delete_oldest(self) -> None:
        for step in self.steps()[: -self._keep]:
            # Renamed first, so that half a checkpoint never stands under a checkpoint's name.
            gone = _unused(self.folder / f"{TEMPORARY}{step:09d}-old")
            try:
                os.rename(self._path(step), gone)
            except OSError as error:  # one too many is no reason to stop
                self.notes.append(f"note: cannot delete the old checkpoint {step} ({refusal(error)})")
                return
            _remove(gone)

    def _header(self, step: int | None) -> dict[str, Any]:
        steps = self.steps()
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise UserError(
                f"{self.folder}: {which} here; start without resuming, or name another run's folder"
            )
        path = self._path(step)
        try:
            header = load_json(path / "meta.json")
        except FileNotFoundError as error:
            if step in self.steps():
                raise
            raise UserError(f"{path} was deleted while it was read; try again") from error
        except (OSError, ValueError) as error:
            raise self.damaged(step, refusal(error)) from error
        if fault := misfit(header, format=int, step=int, meta=dict, arrays=dict) or _misdescribed(header):
            raise self.damaged(step, fault)
        if header["format"] != FORMAT:
            raise UserError(
                f"{path}: checkpoint of format {header['format']}, this version reads {FORMAT}; "
                "start a new run"
            )
        if header["step"] != step:
            raise self.damaged(step, f"it is the one of step {header['step']}")
        return header

    def _read_arrays(self, path: Path, header: dict[str, Any]) -> dict[str, np.ndarray]:
        import orbax.checkpoint as ocp

        arrays = {
            name: np.zeros(shape, jnp.dtype(dtype)) for name, (dtype, shape, _) in header["arrays"].items()
        }
        filled = {name: array for name, array in arrays.items() if array.size}
        try:
            with _unlogged(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                arrays |= reader.restore(path / "state", args=ocp.args.StandardRestore(filled))  # pyright: ignore[reportCallIssue]
        except Exception as error:  # whatever damage makes of the format: Orbax promises no type
            if header["step"] not in self.steps():
                raise UserError(f"{path} was deleted while it was read; try again") from error
            raise self.damaged(header["step"], one_line(error)) from error
        for name, description in _describe(arrays).items():
            if description != header["arrays"][name]:
                raise self.damaged(header["step"], f"checksum of {name}")
        return arrays


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Orbax logs with a traceback what it then raises; the user gets one line, ours.

    After a failed write, its other writes report to an event loop that is gone, from threads that
    Python can only complain about: those complaints are dropped, now and later.
    """
    logger, complain = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def complain_of_others(args: "sys.UnraisableHookArgs") -> None:
        if str(args.exc_value) != "Event loop is closed":
            complain(args)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = complain_of_others
    try:
        yield
        sys.unraisablehook = complain
    finally:
        logger.setLevel(level)


def _is_step(name: str) -> bool:
    """Returns whether a folder has the name of a checkpoint, `000012000`."""
    return name.isascii() and name.isdecimal() and name == f"{int(name):09d}"


def _misdescribed(header: Mapping[str, Any]) -> str | None:
    """The first of the arrays in a header whose description is not one that `_describe` makes."""
    for name, entry in header["arrays"].items():
        right = isinstance(entry, list) and [type(x) for x in entry] == [str, list, int]
        if not right or not all(type(n) is int and n >= 0 for n in entry[1]):
            return f"arrays: {name} is not described"
    return None


def _unused(path: Path) -> Path:
    """`path`, with a number after its name where something has that name."""
    found, number = path, 1
    while found.exists() or found.is_symlink():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _remove(path: Path) -> None:
    """Deletes a leftover, as far as the system lets us: one that stays is in nobody's way."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path in the tree, e.g. `nets.flow.layers.0.weight`, in the tree's order."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two leaves of the state have the same dotted name")
    return named


def _on_host(state: Any) -> dict[str, np.ndarray]:
    """Copies of all leaves on the host, by name.

    On CPU the host's view of an array is training's own buffer. A view that the writer holds would keep the
    next segment from reusing that buffer. Since jax 0.11 an asynchronous copy (part of `jax.device_get`)
    does so too, until the array is gone: training then needs memory for one more state.
    """
    named = _named(state)
    for leaf in named.values() if jax.default_backend() != "cpu" else ():
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()  # all at once, where there is a bus between device and host
    return {name: np.array(leaf) for name, leaf in named.items()}


def _write_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays with Orbax, of several processes together."""
    import orbax.checkpoint as ocp  # takes seconds, so not at the top, and here beside the training

    filled = {name: array for name, array in arrays.items() if array.size}  # Orbax refuses empty ones
    with _unlogged(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(folder, args=ocp.args.StandardSave(filled))  # pyright: ignore[reportCallIssue]


def _part_checksums(array: jax.Array) -> list[list[int]]:
    """Place, bytes and checksum of the parts of an array that this process is to write.

    Parts are ranges of the first axis, as seeds are spread; a copy on another device is not one.
    """
    found = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            data = np.asarray(shard.data)
            first = shard.index[0].start or 0 if shard.index else 0
            assert data.shape[1:] == array.shape[1:]
            found.append([first, data.nbytes, _checksum(data)])
    return found


def _whole_checksum(parts: Sequence[Sequence[Sequence[int]]]) -> int:
    """Checksum of an array from those of its parts, of each process."""
    ordered = sorted(tuple(part) for process in parts for part in process)
    total = 0
    for _, size, checksum in ordered:
        total = crc32_combine(total, checksum, size)
    return total


def crc32_combine(first: int, second: int, size: int) -> int:
    """CRC-32 of two pieces of data, end to end, from that of each; `size` is the second one's, in bytes.

    A CRC is linear in the data: what follows multiplies the first one's by x to the power of 8 `size`, modulo
    the polynomial. The power is taken by squaring, of polynomials whose bits are reversed as in zlib.
    """

    def times(a: int, b: int) -> int:
        product = 0
        for bit in range(31, -1, -1):
            if a >> bit & 1:
                product ^= b
            b = (b >> 1) ^ (0xEDB88320 if b & 1 else 0)
        return product

    power, factor, left = 0x80000000, 0x40000000, 8 * size  # the polynomials 1 and x
    while left:
        if left & 1:
            power = times(power, factor)
        factor, left = times(factor, factor), left >> 1
    return times(power, first) ^ second


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _describe(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Dtype, shape and checksum of each array, as JSON gives them back."""
    return {name: [array.dtype.name, list(array.shape), _checksum(array)] for name, array in arrays.items()}
