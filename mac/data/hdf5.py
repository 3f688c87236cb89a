"""Reading of hdf5 files whose rewards and early ends are recorded: D4RL's layout, and Minari's.

*D4RL* (Fu et al. 2020): all transitions end to end in `observations`, `actions`, `rewards`, `terminals`,
mostly also `next_observations` and `timeouts`. `terminals` marks a transition that ended the episode by
itself (here: a fall), `timeouts` one after which the time limit cut it. Files differ, so

- an episode also ends where `next_observations` does not lead on to the next row, marked or not;
- without `next_observations` the state after an episode's last transition is nowhere. After a time limit
  that transition is left out. A fall is too rare to lose: the state before it stands for the one after;
- without `timeouts` and `next_observations` an episode is cut at the environment's time limit;
- a transition that is marked both ways is a fall.

*Minari* (Farama Foundation): one group per episode, `episode_0`, ..., of T + 1 `observations` and T
`actions`, `rewards`, `terminations`, `truncations`.

Both become the same rows: T + 1 per episode. Other keys (`infos/`, `metadata/`, ...) are ignored.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mac.data.raw import (
    RawDataset,
    check_equal_rows,
    check_file,
    check_range,
    check_values,
    episodes_between,
    flags,
    matrix,
    vector,
    with_final_states,
)
from mac.errors import UserError, one_line

SUFFIXES = (".hdf5", ".h5")
NEEDED = ("observations", "actions", "rewards", "terminals")
WANTED = (*NEEDED, "next_observations", "timeouts")
EPISODE = "episode_"

BROKEN = (OSError, ValueError, KeyError, RuntimeError, TypeError)
"""What h5py raises on a file that is damaged or not its own."""


def read(path: str | Path, limit: int | None = None) -> RawDataset:
    """Reads and checks one file.

    Args:
        limit: the environment's time limit in steps, for files that do not mark it.
    Raises:
        UserError: if the file is missing, damaged, of another layout, or holds values that cannot be
            trained on (wrong dtype, rank or length, NaN, actions outside [-1, 1]).
    """
    path = Path(path)
    with _opened(path) as file:
        if "observations" in file:
            return _from_transitions(path, _load(path, file, NEEDED, WANTED), limit)
        numbers = {name: _number(name) for name in file}
        names = [name for name, number in numbers.items() if number is not None]
        if names:
            return _from_episodes(path, file, sorted(names, key=lambda name: numbers[name] or 0))
        found = ", ".join(list(file)[:8]) or "nothing"
        raise UserError(f"{path}: neither D4RL's key 'observations' nor Minari's episodes (found: {found})")


def stated_sizes(path: str | Path) -> tuple[int, int]:
    """Rows of a file, and bytes of its observations and actions, from its headers alone.

    Rows that reading adds (final states) are not counted.

    Raises:
        OSError, LookupError, AttributeError: it is damaged, which `read` explains.
    """
    with h5py.File(path, "r") as opened:
        file: Any = opened  # h5py's types leave open whether an item is an array or a group
        groups = [file] if "observations" in file else [file[x] for x in file if _number(x) is not None]
        parts = [[group[name] for name in ("observations", "actions")] for group in groups]
        rows = sum(obs.shape[0] for obs, _ in parts)
        return rows, sum(int(x.size) * x.dtype.itemsize for part in parts for x in part)


def _number(name: str) -> int | None:
    """The number of an episode's group, None if it is no such group."""
    tail = name.removeprefix(EPISODE)
    return int(tail) if name.startswith(EPISODE) and tail.isdigit() else None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_file(path, "a D4RL or Minari .hdf5")
    try:
        file = h5py.File(path, "r")
    except BROKEN as error:
        raise UserError(
            f"{path}: not a complete hdf5 file ({one_line(error)}); copy or make it again"
        ) from error
    with file:
        yield file


def _load(path: Path, group: Any, needed: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a group that this module knows, by name; the file's other contents are not read."""
    inside = "" if group.name == "/" else f"{group.name.strip('/')}/"
    arrays = {}
    for name in wanted:
        try:
            item = group.get(name)
            if isinstance(item, h5py.Group):
                raise UserError(f"{path}: '{inside}{name}' is a group; only arrays are supported there")
            if item is not None:
                arrays[name] = item[()]
        except BROKEN as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path}: damaged at {inside}{name} ({one_line(error)}); copy or make the file again"
            ) from error
    for name in needed:
        if name not in arrays:
            found = ", ".join(list(group)[:8])
            raise UserError(f"{path}: key '{inside}{name}' is missing (found: {found})")
    return arrays


# D4RL.


def _from_transitions(path: Path, arrays: Mapping[str, Any], limit: int | None) -> RawDataset:
    obs, action = matrix(path, arrays, "observations"), matrix(path, arrays, "actions")
    reward, terminal = vector(path, arrays, "rewards"), flags(path, arrays, "terminals")
    timeout = flags(path, arrays, "timeouts") if "timeouts" in arrays else None
    next_obs = matrix(path, arrays, "next_observations") if "next_observations" in arrays else None
    check_equal_rows(path, arrays)
    for name, value in (("observations", obs), ("actions", action), ("rewards", reward)):
        check_values(path, name, value)
    check_range(path, action)
    if next_obs is not None:
        check_values(path, "next_observations", next_obs)
        if next_obs.shape != obs.shape:
            raise UserError(
                f"{path}: 'next_observations' has shape {next_obs.shape}, 'observations' {obs.shape}"
            )
    last, notes = _last_rows(path, obs, next_obs, terminal, timeout, limit)
    first, length, tail = episodes_between(path, np.flatnonzero(last).astype(np.int64), len(obs))
    fell = terminal[first + length - 1]
    data = RawDataset(obs, action, first, length, (*notes, *tail), reward, fell)
    if next_obs is not None:
        return with_final_states(data, next_obs[first + length - 1], np.ones(len(first), bool))
    return _without_next(path, data)


def _last_rows(
    path: Path,
    obs: np.ndarray,
    next_obs: np.ndarray | None,
    terminal: np.ndarray,
    timeout: np.ndarray | None,
    limit: int | None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Whether each row is the last of its episode, and what to say about how that was found out."""
    last = terminal if timeout is None else terminal | timeout
    if next_obs is not None:
        leap = np.append((next_obs[:-1] != obs[1:]).any(axis=1), False)
        unmarked = int((leap & ~last).sum())
        if unmarked > len(obs) // 2:
            raise UserError(
                f"{path}: 'next_observations' of {unmarked:,} rows is not the observation of the next row; "
                "rows must be in time order"
            )
        marks = "no 'timeouts': " if timeout is None else ""
        note = f"{path}: {marks}{unmarked:,} episodes end unmarked, where 'next_observations' leads elsewhere"
        return last | leap, (note,) if unmarked else ()
    if timeout is not None:
        return last, ()
    if limit is None:
        raise UserError(
            f"{path}: neither 'timeouts' nor 'next_observations' tells where episodes end; "
            "name the environment, whose time limit does"
        )
    starts = np.concatenate([[0], np.flatnonzero(last) + 1])
    row = np.arange(len(obs))
    age = row - starts[np.searchsorted(starts, row, side="right") - 1] + 1
    note = f"{path}: no 'timeouts': episodes are cut after {limit:,} steps"
    return last | (age % limit == 0), (note,)


def _without_next(path: Path, data: RawDataset) -> RawDataset:
    """Completes episodes whose final state is not in the file; see the module's first lines."""
    fell, reward = data.fell, data.reward
    assert fell is not None and reward is not None
    short = (data.length < 2) & ~fell
    if short.any():  # a lone state, which nothing leads to or from
        keep = np.ones(len(data.obs), bool)
        keep[data.first[short]] = False
        lost = np.cumsum(short)[~short]
        reward, fell = reward[keep], fell[~short]
        first, length = data.first[~short] - lost, data.length[~short]
        data = data._replace(
            obs=data.obs[keep], action=data.action[keep], first=first, length=length, fell=fell
        )
    if not len(data.first):
        raise UserError(f"{path}: holds no transition whose next state is known; make the dataset again")
    final = data.first + data.length - 1
    cut = final[~fell]
    action, reward = data.action.copy(), reward.copy()
    action[cut], reward[cut] = 0, 0
    note = (
        f"{path}: no 'next_observations': the last transition of {len(cut):,} episodes is left out, and the "
        f"state before each of {fell.sum():,} falls stands for the one after"
    )
    data = data._replace(action=action, reward=reward, notes=(*data.notes, note))
    return with_final_states(data, data.obs[final], fell)


# Minari.


def _from_episodes(path: Path, file: Any, names: list[str]) -> RawDataset:
    needed = ("observations", "actions", "rewards", "terminations", "truncations")
    parts, empty = [], 0
    for name in names:
        part = _episode(path, name, _load(path, file[name], needed, needed))
        if len(part[0]) < 2:
            empty += 1
        else:
            parts.append(part)
    if not parts:
        raise UserError(f"{path}: none of its {len(names):,} episodes has a transition")
    widths = {(obs.shape[1], action.shape[1]) for obs, action, *_ in parts}
    if len(widths) > 1:
        raise UserError(f"{path}: episodes differ in their columns (observations, actions): {sorted(widths)}")
    length = np.asarray([len(obs) for obs, *_ in parts], np.int64)
    obs, action, reward = (np.concatenate([part[i] for part in parts]) for i in range(3))
    notes = (f"{path}: {empty:,} episodes without a transition are left out",) if empty else ()
    fell = np.asarray([part[3] for part in parts], bool)
    return RawDataset(obs, action, np.cumsum(length) - length, length, notes, reward, fell)


def _episode(
    path: Path, name: str, arrays: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Observations, actions, rewards, and whether it ended in a fall; T + 1 rows each."""
    arrays = {f"{name}/{key}": value for key, value in arrays.items()}
    obs, count = matrix(path, arrays, f"{name}/observations"), len(arrays[f"{name}/actions"])
    if len(obs) != count + 1:
        raise UserError(
            f"{path}: {name} has {len(obs)} observations for {count} actions; T + 1 and T are needed"
        )
    if not count:
        width = arrays[f"{name}/actions"].shape[-1]
        return obs, np.zeros((1, width), np.float32), np.zeros(1, np.float32), False
    action, reward = matrix(path, arrays, f"{name}/actions"), vector(path, arrays, f"{name}/rewards")
    fell, cut = (flags(path, arrays, f"{name}/{key}") for key in ("terminations", "truncations"))
    steps = {key: value for key, value in arrays.items() if not key.endswith("/observations")}
    check_equal_rows(path, steps)
    for key, value in (("observations", obs), ("actions", action), ("rewards", reward)):
        check_values(path, f"{name}/{key}", value)
    check_range(path, action, f"{name}/actions")
    if (fell | cut)[:-1].any():
        row = int(np.flatnonzero(fell | cut)[0])
        raise UserError(f"{path}: {name} ends in step {row} and goes on; make the dataset again")
    nothing = np.zeros((1, action.shape[1]), np.float32)
    return obs, np.concatenate([action, nothing]), np.append(reward, np.float32(0)), bool(fell[-1])
