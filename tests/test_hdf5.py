"""Reading hdf5 of D4RL and Minari: both layouts, what such files lack, and one line per kind of damage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mac.data.hdf5 import read, stated_sizes
from mac.data.raw import RawDataset
from mac.errors import UserError
from tests.hdf5_files import EPISODES, FALL, LIMIT, d4rl_arrays, states, write_d4rl, write_minari


def check_rows(data: RawDataset, episodes: tuple[tuple[int, int, bool], ...], arrays: dict[str, Any]) -> None:
    """`episodes` are the number, the transitions and whether it fell, of each that must be there."""
    assert data.reward is not None and data.fell is not None
    np.testing.assert_array_equal(data.length, [steps + 1 for _, steps, _ in episodes])
    np.testing.assert_array_equal(data.first, np.cumsum(data.length) - data.length)
    np.testing.assert_array_equal(data.fell, [fell for _, _, fell in episodes])
    begins = dict(zip(range(len(EPISODES)), np.cumsum([0, *(n for n, _ in EPISODES)]), strict=False))
    for (number, steps, _), first in zip(episodes, data.first, strict=True):
        rows, there = slice(first, first + steps), slice(begins[number], begins[number] + steps)
        np.testing.assert_array_equal(data.obs[first : first + steps + 1], states(number, steps))
        np.testing.assert_array_equal(data.action[rows], arrays["actions"][there])
        np.testing.assert_array_equal(data.reward[rows], arrays["rewards"][there])
        assert not data.action[first + steps].any() and data.reward[first + steps] == 0
    assert {x.dtype.name for x in (data.obs, data.action, data.reward)} == {"float32"}


WHOLE = tuple((i, steps, how == FALL) for i, (steps, how) in enumerate(EPISODES))


def test_d4rl_episodes_end_with_the_state_after_their_last_action(tmp_path: Path):
    arrays = d4rl_arrays()
    data = read(write_d4rl(tmp_path / "a.hdf5", arrays))
    check_rows(data, WHOLE, arrays)
    assert len(data.notes) == 1 and "last 4 rows are kept as a shorter episode" in data.notes[0]


def test_minari_has_the_same_rows(tmp_path: Path):
    arrays = d4rl_arrays()
    data = read(write_minari(tmp_path / "main_data.hdf5", arrays))
    check_rows(data, WHOLE, arrays)
    assert data.notes == ()


def test_minari_episodes_go_by_number_not_by_name(tmp_path: Path):
    episodes = tuple((2 + i % 3, LIMIT) for i in range(12))  # episode_10 sorts before episode_2
    data = read(write_minari(tmp_path / "a.hdf5", d4rl_arrays(episodes), episodes))
    np.testing.assert_array_equal(data.obs[data.first, 0], np.arange(12))


def test_a_transition_marked_both_ways_is_a_fall(tmp_path: Path):
    arrays = d4rl_arrays()
    arrays["timeouts"] = arrays["timeouts"] | arrays["terminals"]
    check_rows(read(write_d4rl(tmp_path / "a.hdf5", arrays)), WHOLE, arrays)


def test_without_timeouts_episodes_end_where_next_observations_lead_elsewhere(tmp_path: Path):
    arrays = d4rl_arrays()
    del arrays["timeouts"]
    data = read(write_d4rl(tmp_path / "a.hdf5", arrays))
    check_rows(data, WHOLE, arrays)
    assert any("no 'timeouts': 2 episodes end unmarked" in note for note in data.notes)


def test_without_next_observations_falls_are_kept_and_other_last_transitions_left_out(tmp_path: Path):
    arrays = d4rl_arrays()
    del arrays["next_observations"]
    data = read(write_d4rl(tmp_path / "a.hdf5", arrays))
    np.testing.assert_array_equal(data.length, [6, 7, 2, 6, 4])
    np.testing.assert_array_equal(data.fell, [True, False, True, False, False])
    np.testing.assert_array_equal(data.obs[5], data.obs[4])  # the unseen state after the first fall
    assert data.reward is not None and data.reward[4] == 5 and data.reward[5] == 0
    final = data.first + data.length - 1
    assert not data.action[final].any() and not data.reward[final].any()
    assert any("the last transition of 3 episodes is left out" in note for note in data.notes)


def test_without_next_observations_a_lone_state_is_left_out(tmp_path: Path):
    arrays = d4rl_arrays(((3, LIMIT), (1, LIMIT), (2, FALL)))
    del arrays["next_observations"]
    data = read(write_d4rl(tmp_path / "a.hdf5", arrays))
    np.testing.assert_array_equal(data.first, [0, 3])
    np.testing.assert_array_equal(data.length, [3, 3])
    np.testing.assert_array_equal(data.obs[:, 0], [0, 0, 0, 2, 2, 2])


def test_without_either_the_time_limit_cuts_episodes(tmp_path: Path):
    arrays = d4rl_arrays(((5, LIMIT), (5, LIMIT), (3, FALL), (5, LIMIT), (2, FALL)))
    del arrays["next_observations"], arrays["timeouts"]
    path = write_d4rl(tmp_path / "a.hdf5", arrays)
    data = read(path, limit=5)
    np.testing.assert_array_equal(data.obs[data.first, 0], np.arange(5))
    np.testing.assert_array_equal(data.length, [5, 5, 4, 5, 3])
    np.testing.assert_array_equal(data.fell, [False, False, True, False, True])
    with pytest.raises(UserError, match="tells where episodes end"):
        read(path)


def test_flags_may_be_numbers_and_values_float64_or_columns(tmp_path: Path):
    arrays = d4rl_arrays()
    changed = arrays | {name: arrays[name].astype(np.float32) for name in ("terminals", "timeouts")}
    changed |= {name: arrays[name].astype(np.float64) for name in ("observations", "next_observations")}
    changed["rewards"] = arrays["rewards"][:, None]
    check_rows(read(write_d4rl(tmp_path / "a.hdf5", changed)), WHOLE, arrays)


def test_rounding_beyond_the_range_of_actions_is_no_error(tmp_path: Path):
    arrays = d4rl_arrays()
    arrays["actions"][3] = 1.0000005, -1.0000005
    assert np.abs(read(write_d4rl(tmp_path / "a.hdf5", arrays)).action).max() > 1


@pytest.mark.parametrize("layout", [write_d4rl, write_minari])
def test_headers_tell_rows_and_bytes(tmp_path: Path, layout: Callable[..., Path]):
    arrays = d4rl_arrays()
    path = layout(tmp_path / "a.hdf5", arrays)
    rows, size = stated_sizes(path)
    with h5py.File(path) as file:
        groups = [file] if "observations" in file else list(file.values())
        read_whole = [group[k][()] for group in groups for k in ("observations", "actions")]
    assert (rows, size) == (sum(map(len, read_whole[::2])), sum(x.nbytes for x in read_whole))


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
        read(write_d4rl(tmp_path / "bad.hdf5", arrays))
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
        read(path)
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
        read(path)
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
        read(path)
