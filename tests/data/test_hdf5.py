"""Reading hdf5 of D4RL and Minari: both layouts, what such files lack, and one line per kind of damage."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mac.data.hdf5 import read_hdf5, stated_sizes
from mac.data.raw_dataset import RawDataset
from mac.data.shards import sizes_of
from mac.errors import UserError
from tests.helpers.hdf5_files import EPISODES, FALL, LIMIT, d4rl_arrays, states, write_d4rl, write_minari


def check_rows(data: RawDataset, episodes: tuple[tuple[int, int, bool], ...], arrays: dict[str, Any]) -> None:
    """`episodes` are the number, the transitions and whether it terminated, of each that must be there."""
    assert data.reward is not None and data.terminated is not None
    np.testing.assert_array_equal(data.length, [steps + 1 for _, steps, _ in episodes])
    np.testing.assert_array_equal(data.first, np.cumsum(data.length) - data.length)
    np.testing.assert_array_equal(data.terminated, [terminated for _, _, terminated in episodes])
    begins = dict(zip(range(len(EPISODES)), np.cumsum([0, *(n for n, _ in EPISODES)]), strict=False))
    for (number, steps, _), first in zip(episodes, data.first, strict=True):
        rows, there = slice(first, first + steps), slice(begins[number], begins[number] + steps)
        np.testing.assert_array_equal(data.obs[first : first + steps + 1], states(number, steps))
        np.testing.assert_array_equal(data.action[rows], arrays["actions"][there])
        np.testing.assert_array_equal(data.reward[rows], arrays["rewards"][there])
        assert not data.action[first + steps].any() and data.reward[first + steps] == 0
    assert {x.dtype.name for x in (data.obs, data.action, data.reward)} == {"float32"}


WHOLE = tuple((i, steps, how == FALL) for i, (steps, how) in enumerate(EPISODES))


def test_d4rl_episodes_end_with_the_state_after_all_actions(tmp_path: Path):
    arrays = d4rl_arrays()
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    check_rows(data, WHOLE, arrays)
    assert len(data.notes) == 1 and "last 4 rows are kept as a shorter episode" in data.notes[0]


def test_minari_has_the_same_rows(tmp_path: Path):
    arrays = d4rl_arrays()
    data = read_hdf5(write_minari(tmp_path / "main_data.hdf5", arrays))
    check_rows(data, WHOLE, arrays)
    assert data.notes == ()


def test_minari_episodes_go_by_number_not_by_name(tmp_path: Path):
    episodes = tuple((2 + i % 3, LIMIT) for i in range(12))  # episode_10 sorts before episode_2
    data = read_hdf5(write_minari(tmp_path / "a.hdf5", d4rl_arrays(episodes), episodes))
    np.testing.assert_array_equal(data.obs[data.first, 0], np.arange(12))


def test_a_transition_marked_both_ways_is_a_termination(tmp_path: Path):
    arrays = d4rl_arrays()
    arrays["timeouts"] = arrays["timeouts"] | arrays["terminals"]
    check_rows(read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays)), WHOLE, arrays)


def test_without_timeouts_next_observations_tell_the_ends(tmp_path: Path):
    arrays = d4rl_arrays()
    del arrays["timeouts"]
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    check_rows(data, WHOLE, arrays)
    assert any("no 'timeouts': 2 episodes end unmarked" in note for note in data.notes)


def test_without_next_observations_only_terminations_are_kept(tmp_path: Path):
    arrays = d4rl_arrays()
    del arrays["next_observations"]
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    np.testing.assert_array_equal(data.length, [6, 7, 2, 6, 4])
    np.testing.assert_array_equal(data.terminated, [True, False, True, False, False])
    np.testing.assert_array_equal(data.obs[5], data.obs[4])  # the unseen state after the first termination
    assert data.reward is not None and data.reward[4] == 5 and data.reward[5] == 0
    final = data.first + data.length - 1
    assert not data.action[final].any() and not data.reward[final].any()
    # 3 of 23 rows, and 17 + 36 + 44 of all rewards' 505; the terminations have 5 + 21 of them.
    lost, altered = (note.split("'next_observations': ")[1] for note in data.notes[1:])
    assert lost == "the last transition of 3 episodes is left out (13% of all rows and 19.2% of all reward)"
    before = "the state before each of 2 terminations stands for the one after"
    assert altered.startswith(f"{before} (8.7% of all rows")


def test_without_next_observations_a_lone_state_is_left_out(tmp_path: Path):
    arrays = d4rl_arrays(((3, LIMIT), (1, LIMIT), (2, FALL)))
    del arrays["next_observations"]
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    np.testing.assert_array_equal(data.first, [0, 3])
    np.testing.assert_array_equal(data.length, [3, 3])
    np.testing.assert_array_equal(data.obs[:, 0], [0, 0, 0, 2, 2, 2])


def test_without_either_the_time_limit_cuts_episodes(tmp_path: Path):
    arrays = d4rl_arrays(((5, LIMIT), (5, LIMIT), (3, FALL), (5, LIMIT), (2, FALL)))
    del arrays["next_observations"], arrays["timeouts"]
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    data = read_hdf5(path, limit=5)
    np.testing.assert_array_equal(data.obs[data.first, 0], np.arange(5))
    np.testing.assert_array_equal(data.length, [5, 5, 4, 5, 3])
    np.testing.assert_array_equal(data.terminated, [False, False, True, False, True])
    with pytest.raises(UserError, match="tells where episodes end"):
        read_hdf5(path)


def test_flags_may_be_numbers_and_values_float64_or_columns(tmp_path: Path):
    arrays = d4rl_arrays()
    changed = arrays | {name: arrays[name].astype(np.float32) for name in ("terminals", "timeouts")}
    changed |= {name: arrays[name].astype(np.float64) for name in ("observations", "next_observations")}
    changed["rewards"] = arrays["rewards"][:, None]
    check_rows(read_hdf5(write_d4rl(tmp_path / "a.hdf5", changed)), WHOLE, arrays)


def test_rounding_beyond_the_range_of_actions_is_no_error(tmp_path: Path):
    arrays = d4rl_arrays()
    arrays["actions"][3] = 1.0000005, -1.0000005
    assert np.abs(read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays)).action).max() > 1


@pytest.mark.parametrize("layout", [write_d4rl, write_minari])
def test_headers_tell_rows_and_bytes(tmp_path: Path, layout: Callable[..., Path]):
    arrays = d4rl_arrays()
    path = layout(tmp_path / "a.hdf5", arrays)
    rows, size, _ = stated_sizes(path)
    with h5py.File(path) as opened:
        file: Any = opened
        groups = [file] if "observations" in file else list(file.values())
        read_whole = [group[k][()] for group in groups for k in ("observations", "actions")]
    assert rows == sum(map(len, read_whole[::2]))
    assert size == 4 * rows * (3 + 2)  # in float32, with an action for final states too


# What is wrong is said in one line.

Damage = Callable[[dict[str, Any]], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no rewards": (lambda a: a.pop("rewards"), "key 'rewards' is missing"),
    "no terminals": (lambda a: a.pop("terminals"), "key 'terminals' is missing"),
    "no observations": (lambda a: a.pop("observations"), "neither D4RL's key 'observations' nor Minari's"),
    "images": (lambda a: a.update(observations=np.zeros((23, 3), np.uint8)), "image observations"),
    "rank": (lambda a: a.update(actions=a["actions"][:, 0]), "'actions' has shape"),
    "reward columns": (lambda a: a.update(rewards=np.zeros((23, 2))), "'rewards' has shape"),
    "flags": (lambda a: a.update(terminals=np.full(23, 2)), "'terminals' is 2 in row 0"),
    "lengths": (lambda a: a.update(rewards=a["rewards"][:-1]), "unequal row counts"),
    "nan": (lambda a: a["observations"].__setitem__((4, 1), np.nan), "'observations' is not finite"),
    "nan reward": (lambda a: a["rewards"].__setitem__(4, np.nan), "not finite in float32 in row 4"),
    "nan next": (lambda a: a["next_observations"].__setitem__((4, 1), np.inf), "observations' is not finite"),
    "range": (lambda a: a["actions"].__setitem__((2, 1), 1.5), "actions must be normalised"),
    "next width": (lambda a: a.update(next_observations=np.zeros((23, 4), np.float32)), "has shape"),
    "order": (lambda a: a["next_observations"].__imul__(0.5), "rows must be in time order"),
    "texts": (lambda a: a.update(rewards="none"), "'rewards' is no array"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_bad_d4rl_files_are_refused_in_one_line(tmp_path: Path, kind: str):
    damage, message = DAMAGES[kind]
    arrays = d4rl_arrays()
    damage(arrays)
    with pytest.raises(UserError) as error:
        read_hdf5(write_d4rl(tmp_path / "bad.hdf5", arrays))
    assert message in str(error.value)
    assert str(tmp_path / "bad.hdf5") in str(error.value) and "\n" not in str(error.value)


def edit_first(path: Path, key: str, value: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[f"episode_0/{key}"]
        if value is not None:
            file[f"episode_0/{key}"] = value


MINARI_DAMAGES = {
    "dict observations": ("observations/x", np.zeros(3), "'episode_0/observations' is a group"),
    "no rewards": ("rewards", None, "key 'episode_0/rewards' is missing"),
    "one state short": ("observations", np.zeros((5, 3)), "5 observations for 5 actions"),
    "goes on": ("terminations", np.asarray([1, 0, 0, 0, 0]), "ends in step 0 and goes on"),
    "nan": ("rewards", np.full(5, np.nan), "'episode_0/rewards' is not finite"),
    "width": ("actions", np.zeros((5, 3), np.float32), "episodes differ in their columns"),
}


@pytest.mark.parametrize("kind", MINARI_DAMAGES)
def test_bad_minari_files_are_refused_in_one_line(tmp_path: Path, kind: str):
    key, value, message = MINARI_DAMAGES[kind]
    path = write_minari(tmp_path / "main_data.hdf5", d4rl_arrays())
    edit_first(path, key.split("/")[0], None)
    if value is not None:
        with h5py.File(path, "a") as file:
            file[f"episode_0/{key}"] = value
    with pytest.raises(UserError) as error:
        read_hdf5(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


BROKEN_FILES = {
    "missing": (lambda p: p.unlink(), "no such dataset file"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("<html>404</html>"), "not a complete hdf5 file"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "not a complete hdf5 file"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, kind: str):
    damage, message = BROKEN_FILES[kind]
    path = write_d4rl(tmp_path / "bad.hdf5", d4rl_arrays())
    damage(path)
    with pytest.raises(UserError) as error:
        read_hdf5(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_content_is_named(tmp_path: Path):
    """A compressed block that does not unpack: h5py finds out only while reading."""
    arrays = d4rl_arrays()
    path = tmp_path / "bad.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, compression="gzip", chunks=value.shape)
        offset = file["rewards"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged at rewards"):
        read_hdf5(path)


# Repairs: what they concern is said, and most of the data is too much.


def long_arrays(rows: int = 1500, every: int = 50) -> dict[str, Any]:
    """30 episodes whose states are random numbers, and rewards in their last steps alone."""
    rng = np.random.default_rng(0)
    obs = rng.normal(1, [1, 0.001, 3], size=(rows + 1, 3)).astype(np.float32)
    cut = np.arange(rows) % every == every - 1
    return {
        "observations": obs[:-1],
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "next_observations": obs[1:].copy(),
        "rewards": cut.astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": cut,
    }


@pytest.mark.parametrize("key", ["observations", "next_observations"])
def test_rounded_observations_split_no_episode(tmp_path: Path, key: str):
    arrays = long_arrays()
    some = np.random.default_rng(1).random(1500) < 0.4
    arrays[key][some] = arrays[key][some].astype(np.float16)
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    np.testing.assert_array_equal(data.length, np.full(30, 51))
    (note,) = data.notes
    assert "rows (39." in note and "are the observation of the next row but for rounding" in note


@pytest.mark.parametrize(("by", "episodes"), [(0.005, 30), (0.05, 31)])
def test_what_counts_as_rounding_goes_by_the_spread_of_a_column(tmp_path: Path, by: float, episodes: int):
    """Columns 1 and 2 have standard deviations of 0.001 and 3."""
    arrays = long_arrays()
    arrays["next_observations"][70] += np.asarray([0, 0.001, 3]) * by
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    assert len(data.first) == episodes and len(data.notes) == 1


def test_a_state_off_in_one_column_is_called_a_damaged_number(tmp_path: Path):
    arrays = long_arrays()
    arrays["observations"][71, 2] = 1e4
    (note,) = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays)).notes
    assert "1 episode ends unmarked, where 'next_observations' leads elsewhere (0.0667% of all rows" in note
    assert "1 time in one column alone" in note


def test_most_of_the_reward_is_not_left_out(tmp_path: Path):
    arrays = long_arrays()
    del arrays["next_observations"]
    with pytest.raises(
        UserError, match=r"2% of all rows and 100% of all reward, too much.*'next_observations'"
    ):
        read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    arrays["rewards"] = np.where(np.arange(1500) % 2, -1, 1).astype(np.float32)
    (note,) = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays)).notes
    assert "the last transition of 30 episodes is left out (2% of all rows and 2% of all reward)" in note


def test_most_rows_are_not_left_out(tmp_path: Path):
    arrays = long_arrays() | {"rewards": np.ones(1500), "timeouts": np.arange(1500) % 3 != 0}
    del arrays["next_observations"]
    with pytest.raises(UserError, match=r"66\.7% of all rows"):
        read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))


def test_a_file_that_marks_no_end_at_all_is_refused(tmp_path: Path):
    arrays = long_arrays()
    arrays["timeouts"][:] = False
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    with pytest.raises(UserError, match="nothing marks the end of an episode in 1,500 rows"):
        read_hdf5(path, limit=1000)
    assert "(100% of all rows)" in read_hdf5(path).notes[0]


def test_columns_of_flags_and_whole_numbers_are_read(tmp_path: Path):
    arrays = long_arrays()
    want = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    arrays |= {key: arrays[key][:, None] for key in ("terminals", "timeouts")}
    arrays["rewards"] = arrays["rewards"].astype(np.uint8)
    data = read_hdf5(write_d4rl(tmp_path / "a.hdf5", arrays))
    for one, other in zip(
        (data.obs, data.reward, data.length), (want.obs, want.reward, want.length), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    (note,) = data.notes
    assert note.endswith("'rewards' are whole numbers (uint8), read as float32")


@pytest.mark.parametrize("layout", [write_d4rl, write_minari])
def test_rewards_or_actions_that_are_all_equal_have_a_note(tmp_path: Path, layout: Callable[..., Path]):
    arrays = d4rl_arrays()
    arrays["rewards"][:] = 0
    arrays["actions"][:] = 0.5
    notes = read_hdf5(layout(tmp_path / "a.hdf5", arrays)).notes
    assert any("all 23 rows of 'rewards' are 0" in note for note in notes)
    assert any("all 23 rows of 'actions' are equal ([0.5 0.5])" in note for note in notes)


def test_minari_says_which_episodes_are_missing_or_empty(tmp_path: Path):
    arrays = d4rl_arrays()
    path = write_minari(tmp_path / "a.hdf5", arrays)
    with h5py.File(path, "a") as opened:
        file: Any = opened
        del file["episode_1"]
        group = file["episode_2"]
        for key in ("actions", "rewards", "terminations", "truncations", "observations"):
            edit_group(group, key, group[key][()][: 1 if key == "observations" else 0])
    data = read_hdf5(path)
    np.testing.assert_array_equal(data.length, [6, 7, 5])
    assert [note.split(": ")[1] for note in data.notes] == [
        "1 episode missing among those up to episode_4",
        "1 episode without a transition (25% of them all) left out",
    ]


def edit_group(group: Any, key: str, value: Any) -> None:
    del group[key]
    group[key] = value


# Numbers that are in no file.


def write_virtual(path: Path, arrays: dict[str, Any], key: str, source: Path, rows: int) -> Path:
    """A D4RL file one of whose arrays takes its first `rows` rows from another file."""
    write_d4rl(path, arrays)
    layout = h5py.VirtualLayout(shape=arrays[key].shape, dtype=arrays[key].dtype)
    layout[:rows] = h5py.VirtualSource(source.name, key, shape=arrays[key].shape)[:rows]
    with h5py.File(path, "a") as file:
        del file[key]
        file.create_virtual_dataset(key, layout)
    return path


@pytest.mark.parametrize("key", ["rewards", "actions", "observations"])
def test_a_virtual_array_needs_its_sources(tmp_path: Path, key: str):
    arrays = d4rl_arrays()
    source = write_d4rl(tmp_path / "source.hdf5", arrays)
    path = write_virtual(tmp_path / "a.hdf5", arrays, key, source, 23)
    check_rows(read_hdf5(path), WHOLE, arrays)
    short = write_virtual(tmp_path / "short.hdf5", arrays, key, source, 20)
    with pytest.raises(UserError, match=f"'{key}' is not filled by the arrays that it is made of"):
        read_hdf5(short)
    source.unlink()
    with pytest.raises(UserError, match=f"'{key}' takes numbers from source.hdf5, which is missing"):
        read_hdf5(path)


@pytest.mark.parametrize("how", [{}, {"chunks": (10,)}, {"chunks": (10,), "compression": "gzip"}])
def test_an_array_that_was_never_written_is_refused(tmp_path: Path, how: dict[str, Any]):
    path = write_d4rl(tmp_path / "a.hdf5", d4rl_arrays())
    with h5py.File(path, "a") as file:
        del file["rewards"]
        rewards = file.create_dataset("rewards", (23,), np.float32, **how)
        if how:
            rewards[:10] = 1
    with pytest.raises(UserError, match="'rewards' was never written, or not all of it, and reads as zeros"):
        read_hdf5(path)


def test_flags_that_were_never_set_may_be_unwritten(tmp_path: Path):
    arrays = long_arrays()
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    with h5py.File(path, "a") as file:
        del file["terminals"]
        file.create_dataset("terminals", (1500,), bool)
    data = read_hdf5(path)
    assert len(data.first) == 30 and data.terminated is not None and not data.terminated.any()
    assert data.notes[0].endswith("'terminals' was never written, so that all of it reads as 0")


# Damage that h5py reports in many ways.


def insert_bytes(path: Path, at: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"\xff" * 9 + content[at:])


@pytest.mark.parametrize("at", range(96, 1200, 48))
@pytest.mark.parametrize("layout", [write_d4rl, write_minari])
def test_bytes_put_in_near_the_front_are_one_line(tmp_path: Path, layout: Callable[..., Path], at: int):
    path = layout(tmp_path / "a.hdf5", d4rl_arrays())
    insert_bytes(path, at)
    sizes_of(path)
    try:
        read_hdf5(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


MINARI_ODD = {
    "scalar actions": ("episode_0/actions", 1.0, r"'episode_0/actions' has shape \(\)"),
    "actions of one column less": ("episode_0/actions", np.zeros(5), r"'episode_0/actions' has shape \(5,\)"),
    "an array as an episode": ("episode_0", np.zeros(5), "'episode_0' is no group"),
    "more rewards": ("episode_0/rewards", np.zeros(6), "unequal row counts"),
    "no numbers": ("episode_0/rewards", h5py.Empty("f4"), "'episode_0/rewards' is no array"),
}


@pytest.mark.parametrize("kind", MINARI_ODD)
def test_odd_minari_groups_are_refused_in_one_line(tmp_path: Path, kind: str):
    name, value, message = MINARI_ODD[kind]
    path = write_minari(tmp_path / "a.hdf5", d4rl_arrays())
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = value
    assert sizes_of(path).rows >= 0
    with pytest.raises(UserError, match=message):
        read_hdf5(path)


def test_names_in_a_message_are_short_and_on_one_line(tmp_path: Path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["a\nb"], file["c" * 5000] = 1, 1
        file[b"\xff\xfe"] = 1
    with pytest.raises(UserError, match="neither D4RL's key") as caught:
        read_hdf5(tmp_path / "a.hdf5")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.hdf5")
    assert sizes_of(tmp_path / "a.hdf5").rows == 0
    with pytest.raises(UserError, match="is a pipe or a device"):
        read_hdf5(tmp_path / "a.hdf5")


@pytest.mark.parametrize("without", [(), ("next_observations",)])
def test_reading_takes_no_more_memory_than_is_said(tmp_path: Path, without: tuple[str, ...]):
    arrays = long_arrays(100_000)
    arrays["rewards"] += 1
    for key in without:
        del arrays[key]
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    check_memory(path)


def test_minari_takes_no_more_memory_than_is_said(tmp_path: Path):
    episodes = ((500, LIMIT),) * 100
    check_memory(write_minari(tmp_path / "a.hdf5", d4rl_arrays(episodes), episodes))


def check_memory(path: Path) -> None:
    stated = stated_sizes(path)
    tracemalloc.start()
    read_hdf5(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 * stated.reading < peak < stated.reading
