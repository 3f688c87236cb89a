"""Reading of hdf5 files whose rewards and early ends are recorded: D4RL's layout, and Minari's.

*D4RL* (Fu et al. 2020): all transitions end to end in `observations`, `actions`, `rewards`, `terminals`,
mostly also `next_observations` and `timeouts`. `terminals` marks a transition that ended the episode by
itself (termination; in D4RL's tasks a fall), `timeouts` one after which the time limit cut it. Files differ,
so

- an episode also ends where `next_observations` does not lead on to the next row, marked or not; what is
  but rounding (`raw_dataset.joints`) does not end it;
- without `next_observations` the state after an episode's last transition is nowhere. After a time limit
  that transition is left out. Terminations are too rare to lose: the state before stands for the one after;
- without `timeouts` and `next_observations` an episode is cut at the environment's time limit;
- a transition that is marked both ways is a termination.

*Minari* (Farama Foundation): one group per episode, `episode_0`, ..., of T + 1 `observations` and T
`actions`, `rewards`, `terminations`, `truncations`.

Both become the same rows: T + 1 per episode. Other keys (`infos/`, `metadata/`, ...) are ignored.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mac.data.raw_dataset import (
    FileArrays,
    NextObsAgreement,
    RawDataset,
    Sizes,
    check_file,
    check_range,
    compare_next_obs,
    constant_notes,
    damage_as_user_error,
    episodes_between,
    repair,
    rounding_notes,
    sizes,
    with_final_states,
)
from mac.errors import UserError, one_line, remedy
from mac.formatting import counted, listed, share

SUFFIXES = (".hdf5", ".h5")
NEEDED = ("observations", "actions", "rewards", "terminals")
WANTED = (*NEEDED, "next_observations", "timeouts")
EPISODE = "episode_"
STEPS = ("observations", "actions", "rewards", "terminations", "truncations")
FLAGS = ("terminals", "timeouts", "terminations", "truncations")

COPIES = 2.4
"""Of D4RL's observations and actions, while they are read; Minari's are read episode by episode, into one."""

_BROKEN = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, OverflowError, EOFError)
"""Exceptions that h5py raises on a file that is damaged or not its own."""

_damage = partial(damage_as_user_error, broken=_BROKEN, split="split the file")


def read_hdf5(path: str | Path, limit: int | None = None) -> RawDataset:
    """Reads and checks one file.

    Args:
        limit: the environment's time limit in steps, for files that do not mark it.
    Raises:
        UserError: if the file is missing, damaged, of another layout, or holds values that cannot be
            trained on (wrong dtype, rank or length, NaN, actions outside [-1, 1]).
    """
    path = Path(path)
    with _opened(path) as file:
        names = _names(path, file)
        if "observations" in names:
            data = from_transitions(path, _arrays(path, file, NEEDED, WANTED), limit)
        elif episodes := _episodes(names):
            data = _from_episodes(path, file, episodes)
        else:
            raise UserError(
                f"{path}: neither D4RL's key 'observations' nor Minari's episodes (found: {listed(names)})"
            )
    return data


def stated_widths(path: str | Path) -> tuple[int, int]:
    """Reads the columns of observations and of actions from the headers of a file.

    Raises:
        UserError: it is damaged, or of another layout.
    """
    path = Path(path)
    with _opened(path) as file:
        names = _names(path, file)
        episodes = [] if "observations" in names else _episodes(names)
        group = _group(path, file, episodes[0]) if episodes else file
        arrays = _arrays(path, group, NEEDED[:2], NEEDED[:2])
        return arrays.columns("observations")[1], arrays.columns("actions")[1]


def stated_sizes(path: str | Path) -> Sizes:
    """Reads the headers of a file.

    Raises:
        UserError: it is damaged, as far as headers tell.
    """
    path = Path(path)
    with _opened(path) as file:
        names = _names(path, file)
        flat = "observations" in names
        shapes, raw = [], 0
        for group in [file] if flat else [_group(path, file, name) for name in _episodes(names)]:
            with _damage(path, group.name):
                parts = [group[name] for name in NEEDED[:2]]
                shapes.append([part.shape or () for part in parts])
                raw = max(raw, *(0 if part.dtype == np.float32 else part.dtype.itemsize for part in parts))
    rows = sum((*obs, 0)[0] for obs, _ in shapes)
    obs, action = (max((math.prod(each[i][1:]) for each in shapes), default=0) for i in range(2))
    return sizes(rows, (obs, action), COPIES if flat else 1.6, raw if flat else 0)


def _episodes(names: list[str]) -> list[str]:
    """The groups of Minari's episodes, by their number."""
    return sorted((name for name in names if _number(name) >= 0), key=_number)


def _number(name: str) -> int:
    """The number of an episode's group; -1 if it is no such group."""
    tail = name.removeprefix(EPISODE)
    return int(tail) if name.startswith(EPISODE) and tail.isdecimal() and len(tail) < 18 else -1


# What h5py says of a damaged file is caught where it is called.


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_file(path, "a D4RL or Minari .hdf5")
    try:
        file = h5py.File(path, "r")
    except _BROKEN as error:
        then = remedy(error, "copy or make it again")
        raise UserError(f"{path}: not a complete hdf5 file ({one_line(error)}); {then}") from error
    with file:
        yield file


def _names(path: Path, group: Any) -> list[str]:
    with _damage(path, group.name):
        # A name that is no UTF-8 comes as bytes.
        return [name if isinstance(name, str) else name.decode(errors="replace") for name in group]


def _group(path: Path, file: Any, name: str) -> Any:
    with _damage(path, name):
        group = file[name]
    if not isinstance(group, h5py.Group):
        raise UserError(f"{path}: '{name}' is no group; Minari has one per episode")
    return group


def _arrays(
    path: Path,
    group: Any,
    needed: tuple[str, ...],
    wanted: tuple[str, ...],
    notes: dict[str, None] | None = None,
) -> FileArrays:
    """The arrays of a group that this module knows, none of which is read yet."""
    inside = "" if group.name == "/" else f"{group.name.strip('/')}/"
    items: dict[str, Any] = {}
    for name in wanted:
        with _damage(path, inside + name):
            item = group.get(name)
            if item is not None and not isinstance(item, h5py.Dataset):
                kind = "a group" if isinstance(item, h5py.Group) else "a type"
                raise UserError(f"{path}: '{inside}{name}' is {kind}; only arrays are supported there")
            if item is not None:
                items[name] = item
    for name in needed:
        if name not in items:
            found = listed(_names(path, group))
            raise UserError(f"{path}: key '{inside}{name}' is missing (found: {found})")
    with _damage(path, inside):
        shapes = {name: tuple(item.shape or ()) for name, item in items.items()}

    notes = {} if notes is None else notes

    def load(name: str) -> Any:
        with _damage(path, inside + name):
            if fault := _unwritten(path, items[name]):
                # Flags that were made and never set are what their writer meant.
                if name not in FLAGS or items[name].is_virtual or items[name].id.get_storage_size():
                    raise UserError(f"{path}: '{inside}{name}' {fault}, and reads as zeros; make it again")
                notes[f"'{name}' was never written, so that all of it reads as 0"] = None
            return items[name][()]

    return FileArrays(path, shapes, load, inside, notes)


def _unwritten(path: Path, item: Any, depth: int = 0) -> str | None:
    """Returns the reason why hdf5 makes some numbers of an array up; None if all are in a file."""
    if not item.shape or not item.size:
        return None
    if item.is_virtual:
        return _unmapped(path, item, depth)
    if item.external:
        return "keeps its numbers in other files, which is not supported"
    if item.chunks is None:
        missing = item.id.get_storage_size() < item.size * item.dtype.itemsize
    else:
        needed = math.prod(-(-size // part) for size, part in zip(item.shape, item.chunks, strict=True))
        missing = item.id.get_num_chunks() < needed
    return "was never written, or not all of it" if missing else None


def _unmapped(path: Path, item: Any, depth: int) -> str | None:
    """Returns what `_unwritten` does, for an array assembled from other files."""
    if depth > 8:
        return "is made of arrays that are made of each other"
    mapped = 0
    for part in item.virtual_sources():
        mapped += part.vspace.get_select_npoints()
        source = path if part.file_name == "." else path.parent / part.file_name
        if not source.is_file():
            return f"takes numbers from {listed([part.file_name])}, which is missing"
        with h5py.File(source, "r") as file:
            other = file.get(part.dset_name)
            stated = part.src_space.get_simple_extent_dims()
            if not isinstance(other, h5py.Dataset) or any(
                a < b for a, b in zip(other.shape, stated, strict=True)
            ):
                return f"takes numbers from {listed([part.file_name])}, which has not as many"
            if fault := _unwritten(source, other, depth + 1):
                return f"takes numbers from {listed([part.file_name])}, where {part.dset_name} {fault}"
    return "is not filled by the arrays that it is made of" if mapped < item.size else None


# D4RL.


def from_transitions(path: Path, arrays: FileArrays, limit: int | None) -> RawDataset:
    """Reads and checks arrays with D4RL's keys, whatever kind of file they are in."""
    arrays.check_equal_rows()
    obs, action = arrays.matrix("observations"), arrays.matrix("actions")
    check_range(path, action)
    reward, terminal = arrays.vector("rewards"), arrays.flags("terminals")
    timeout = arrays.flags("timeouts") if "timeouts" in arrays else None
    last, final_obs = terminal if timeout is None else terminal | timeout, None
    notes = constant_notes(path, actions=action, rewards=reward)
    if "next_observations" in arrays:
        next_obs = arrays.matrix("next_observations")
        if next_obs.shape != obs.shape:
            raise UserError(
                f"{path}: 'next_observations' has shape {next_obs.shape}, 'observations' {obs.shape}"
            )
        found = compare_next_obs(obs, next_obs)
        notes += _unmarked(path, found, last, reward, "" if timeout is not None else "no 'timeouts': ")
        last = last | found.jump
        if limit is not None and len(last) > limit and not last.any():
            raise UserError(
                f"{path}: nothing marks the end of an episode in {counted(len(last), 'row')}, and none has "
                f"more than {limit:,}; it needs 'timeouts', set on each episode's last row"
            )
        first, length, tail = episodes_between(path, np.flatnonzero(last).astype(np.int64), len(obs))
        final_obs = next_obs[first + length - 1]
        del next_obs
    else:
        if timeout is None:
            last, cut = _cut(path, last, limit, reward)
            notes += cut
        first, length, tail = episodes_between(path, np.flatnonzero(last).astype(np.int64), len(obs))
    notes = (*(f"{path}: {note}" for note in arrays.notes), *notes, *tail)
    data = RawDataset(obs, action, first, length, notes, reward, terminal[first + length - 1])
    del obs, action, reward
    if final_obs is None:
        return _without_next(path, data)
    return with_final_states(data, final_obs, np.ones(len(first), bool))


def _unmarked(
    path: Path, found: NextObsAgreement, last: np.ndarray, reward: np.ndarray, marks: str
) -> tuple[str, ...]:
    """Returns notes on rows that the next one does not follow, though nothing marks them as `last`."""
    rounded, jump = rounding_notes(path, found.rounded & ~last), found.jump & ~last
    if not jump.any():
        return rounded
    count, alone = int(jump.sum()), int((jump & found.single).sum())
    ends = f"{counted(count, 'episode')} {'ends' if count == 1 else 'end'} unmarked"
    note = repair(
        path,
        f"{marks}{ends}, where 'next_observations' leads elsewhere",
        jump,
        reward,
        drops=False,
        remedy="rows must be in time order: make the dataset again",
    )
    if alone:
        note += (
            f"; {counted(alone, 'time')} in one column alone, all others going on, which is rather a damaged "
            "number: compare the file with its original"
        )
    return (*rounded, note)


def _cut(
    path: Path, last: np.ndarray, limit: int | None, reward: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Cuts episodes at the time limit; returns which rows are `last` then, and what to say of it."""
    if limit is None:
        raise UserError(
            f"{path}: neither 'timeouts' nor 'next_observations' tells where episodes end; "
            "add 'timeouts', set on each episode's last row, or name the environment, whose time limit tells"
        )
    starts = np.concatenate([[0], np.flatnonzero(last) + 1])
    row = np.arange(len(last))
    age = row - starts[np.searchsorted(starts, row, side="right") - 1] + 1
    cut = (age % limit == 0) & ~last
    if not cut.any():
        return last, ()
    text = f"no 'timeouts': {counted(int(cut.sum()), 'episode')} cut after {counted(limit, 'step')}"
    return last | cut, (repair(path, text, cut, reward, drops=False),)


def _without_next(path: Path, data: RawDataset) -> RawDataset:
    """Completes episodes whose final state is not in the file; see the module's first lines."""
    terminated, reward = data.terminated, data.reward
    assert terminated is not None and reward is not None
    final, short = data.first + data.length - 1, (data.length < 2) & ~terminated
    if short.all():
        raise UserError(f"{path}: holds no transition whose next state is known; make the dataset again")
    notes = [*data.notes, *_completed(path, data)]
    if short.any():  # a lone state, which nothing leads to or from
        keep = np.ones(len(data.obs), bool)
        keep[data.first[short]] = False
        lost = np.cumsum(short)[~short]
        reward, terminated = reward[keep], terminated[~short]
        first, length = data.first[~short] - lost, data.length[~short]
        data = data._replace(
            obs=data.obs[keep], action=data.action[keep], first=first, length=length, terminated=terminated
        )
        final = data.first + data.length - 1
    cut = final[~terminated]
    data.action[cut], reward[cut] = 0, 0
    data = data._replace(reward=reward, notes=tuple(notes))
    return with_final_states(data, data.obs[final], terminated)


def _completed(path: Path, data: RawDataset) -> Iterator[str]:
    """Returns notes on episodes without a final state: their last row is dropped or altered."""
    assert data.terminated is not None
    final, remedy = data.first + data.length - 1, "make the dataset again, with 'next_observations'"
    for chosen, text, drops in (
        (~data.terminated, "the last transition of {} is left out", True),
        (data.terminated, "the state before each of {} stands for the one after", False),
    ):
        if chosen.any():
            where = np.zeros(len(data.obs), bool)
            where[final[chosen]] = True
            what = text.format(counted(int(chosen.sum()), "episode" if drops else "termination"))
            what = f"no 'next_observations': {what}"
            yield repair(path, what, where, data.reward, drops=drops, remedy=remedy)


# Minari.


def _from_episodes(path: Path, file: Any, names: list[str]) -> RawDataset:
    converted: dict[str, None] = {}
    every = [_arrays(path, _group(path, file, name), STEPS, STEPS, converted) for name in names]
    steps = [_steps(path, name, arrays) for name, arrays in zip(names, every, strict=True)]
    kept = [arrays for arrays, count in zip(every, steps, strict=True) if count]
    if not kept:
        raise UserError(f"{path}: none of its {counted(len(names), 'episode')} has a transition")
    widths = {tuple(arrays.columns(key)[1] for key in NEEDED[:2]) for arrays in kept}
    if len(widths) > 1:
        raise UserError(f"{path}: episodes differ in their columns (observations, actions): {sorted(widths)}")
    length = np.asarray([count + 1 for count in steps if count], np.int64)
    first, rows = np.cumsum(length) - length, int(length.sum())
    # Actions and rewards of final states stay 0.
    obs, action = (np.zeros((rows, width), np.float32) for width in next(iter(widths)))
    reward, terminated = np.zeros(rows, np.float32), np.zeros(len(kept), bool)
    for i, (arrays, at, count) in enumerate(zip(kept, first, length, strict=True)):
        obs[at : at + count] = arrays.matrix("observations")
        part = slice(at, at + count - 1)
        action[part], reward[part] = arrays.matrix("actions"), arrays.vector("rewards")
        check_range(path, action[part], arrays.name("actions"))
        terminated[i] = _terminates(path, arrays)
    notes = [f"{path}: {note}" for note in converted]
    notes += constant_notes(path, first + length - 1, actions=action, rewards=reward)
    if gaps := _number(names[-1]) + 1 - len(names):
        notes.append(f"{path}: {counted(gaps, 'episode')} missing among those up to {names[-1]}")
    if empty := len(names) - len(kept):
        text = f"{counted(empty, 'episode')} without a transition"
        notes.append(f"{path}: {text} ({share(empty, len(names))} of them all) left out")
    return RawDataset(obs, action, first, length, tuple(notes), reward, terminated)


def _steps(path: Path, name: str, arrays: FileArrays) -> int:
    """Transitions of an episode, from its arrays' shapes."""
    states, count = (arrays.columns(key)[0] for key in NEEDED[:2])
    if states != count + 1:
        raise UserError(
            f"{path}: {name} has {counted(states, 'observation')} for {counted(count, 'action')}; "
            "T + 1 and T are needed"
        )
    if count:
        arrays.check_equal_rows("observations")
    return count


def _terminates(path: Path, arrays: FileArrays) -> bool:
    """Returns whether an episode terminated."""
    terminated, cut = (arrays.flags(key) for key in STEPS[3:])
    if (terminated | cut)[:-1].any():
        row, name = int((terminated | cut).argmax()), arrays.inside.strip("/")
        raise UserError(f"{path}: {name} ends in step {row} and goes on; make the dataset again")
    return bool(terminated[-1])
