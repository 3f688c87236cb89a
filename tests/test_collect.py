"""Generated datasets: schema, loading through ogbench, reproducibility, and the expert's success."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import ogbench
import pytest

from envs_mjx import collect as module
from envs_mjx.collect import Collected, collect, val_path
from envs_mjx.registry import make
from mac.errors import UserError

NAME = "cube-single-play-v0"
ROWS = 1001
Arrays = dict[str, np.ndarray]


def read(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small dataset: two training episodes (1500 rows, rounded up) and one for validation."""
    path = tmp_path_factory.mktemp("data") / "cube.npz"
    calls: list[tuple[int, int]] = []
    summary = collect(NAME, 1500, path, seed=3, progress=lambda *args: calls.append(args))
    return SimpleNamespace(
        path=path, calls=calls, summary=summary, train=read(path), val=read(val_path(path))
    )


def test_files_have_ogbenchs_keys_types_and_shapes(made: SimpleNamespace) -> None:
    widths = {"observations": 28, "actions": 5, "qpos": 21, "qvel": 20}
    for arrays, episodes in ((made.train, 2), (made.val, 1)):
        assert set(arrays) == {*widths, "terminals"}
        for name, width in widths.items():
            assert arrays[name].dtype == np.float32 and arrays[name].shape == (episodes * ROWS, width)
            assert np.isfinite(arrays[name]).all()
        assert arrays["terminals"].dtype == bool
        np.testing.assert_array_equal(np.flatnonzero(arrays["terminals"]) % ROWS, ROWS - 1)
        assert arrays["terminals"].sum() == episodes
        assert np.abs(arrays["actions"]).max() <= 1
    assert made.summary[:2] == (2 * ROWS, ROWS)


def test_ogbench_loads_the_files(made: SimpleNamespace) -> None:
    env, train, val = ogbench.make_env_and_datasets(NAME, dataset_path=str(made.path))
    env.close()
    assert len(train["observations"]) == 2 * (ROWS - 1) and len(val["observations"]) == ROWS - 1
    first = made.train["observations"][1:ROWS]
    np.testing.assert_array_equal(train["next_observations"][: ROWS - 1], first)
    env, train, _ = ogbench.make_env_and_datasets(NAME, dataset_path=str(made.path), compact_dataset=True)
    env.close()
    assert len(train["observations"]) == 2 * ROWS and train["valids"].sum() == 2 * (ROWS - 1)


@pytest.mark.parametrize("task", [1, 2, 5])
def test_ogbench_and_relabel_give_the_same_rewards(made: SimpleNamespace, task: int) -> None:
    name = f"cube-single-play-singletask-task{task}-v0"
    env, train, _ = ogbench.make_env_and_datasets(name, dataset_path=str(made.path), compact_dataset=True)
    env.close()
    reward, mask = make(name, "c").relabel(made.train["observations"], task)
    np.testing.assert_array_equal(train["rewards"], reward)
    np.testing.assert_array_equal(train["masks"], mask)


def test_rows_hold_the_state_before_the_action(made: SimpleNamespace) -> None:
    env = gymnasium.make("cube-single-v0", terminate_at_goal=False, mode="data_collection")
    env.reset(seed=0)
    raw = env.unwrapped
    for start in (0, ROWS):  # an episode begins with fresh kinematics, as after `set_state`
        raw.set_state(made.train["qpos"][start].astype(float), made.train["qvel"][start].astype(float))
        for row in range(start, start + 10):
            np.testing.assert_allclose(raw._data.qpos, made.train["qpos"][row], atol=2e-4)
            obs, *_ = env.step(made.train["actions"][row])
            np.testing.assert_allclose(obs[:6], made.train["observations"][row + 1][:6], atol=2e-4)
    env.close()


def test_episodes_differ_and_each_is_one_unbroken_motion(made: SimpleNamespace) -> None:
    qpos = np.concatenate([made.train["qpos"], made.val["qpos"]]).reshape(3, ROWS, -1)
    assert np.abs(qpos[0] - qpos[1]).max(0).min() > 0 and np.abs(qpos[1] - qpos[2]).max(0).min() > 0
    # A control step moves the cube's centre by 0.1 m at most (thrown), an episode boundary by more.
    assert np.abs(np.diff(qpos[..., 14:17], axis=1)).max() < 0.1


def test_expert_places_the_cube(made: SimpleNamespace) -> None:
    # 1000 control steps and plans of 87 to 90 give 11 finished targets in each of 3 episodes.
    assert made.summary.targets == 33
    assert made.summary.hits >= 32


def test_progress_counts_every_row_once(made: SimpleNamespace) -> None:
    done, totals = zip(*made.calls, strict=True)
    assert set(totals) == {3 * ROWS} and done[-1] == 3 * ROWS
    assert all(a < b for a, b in itertools.pairwise(done)) and len(done) > 10


def test_an_episode_depends_on_neither_the_threads_nor_the_number_of_episodes(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    collect(NAME, 1, tmp_path / "less.npz", seed=3, threads=1)
    less, less_val = read(tmp_path / "less.npz"), read(tmp_path / "less-val.npz")
    for name, array in made.train.items():
        np.testing.assert_array_equal(np.concatenate([less[name], less_val[name]]), array, err_msg=name)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Replaces the simulation: `collect` then only checks and writes."""

    def fake(env: object, family: str, seed: int, record: object) -> tuple[int, int]:
        for x in record.data.values():
            x[:] = seed
        return 0, 0

    monkeypatch.setattr(module, "_simulate", fake)


def test_no_file_appears_unless_both_are_complete(
    instant: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = np.savez, []

    def interrupted(file: object, **arrays: np.ndarray) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(real(file, **arrays))

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(NAME, 1, tmp_path / "cube.npz")
    assert written and list(tmp_path.iterdir()) == []


def test_full_disk_while_writing_is_one_clear_error(
    instant: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="No space left on device"):
        collect(NAME, 1, tmp_path / "cube.npz")
    assert list(tmp_path.iterdir()) == []


def test_missing_folders_are_created(instant: None, tmp_path: Path) -> None:
    made = collect(NAME, 1, tmp_path / "a" / "b" / "cube.npz", seed=7)
    assert made == Collected(ROWS, ROWS, 0, 0)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["cube-val.npz", "cube.npz"]


def test_ten_training_episodes_make_one_for_validation_and_twenty_make_two(
    instant: None, tmp_path: Path
) -> None:
    for episodes, val in ((1, 1), (10, 1), (19, 1), (20, 2)):
        made = collect(NAME, episodes * ROWS, tmp_path / f"{episodes}.npz")
        assert (made.train_rows, made.val_rows) == (episodes * ROWS, val * ROWS)


def test_bad_requests_are_refused_before_any_work(
    instant: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.npz").touch()
    (tmp_path / "file").touch()
    for rows, name, message in (
        (0, "new.npz", "at least one row"),
        (1, "new.hdf5", "must end in .npz"),
        (1, "taken.npz", "exists"),
        (1, "file/new.npz", "choose another folder"),
    ):
        with pytest.raises(UserError, match=message):
            collect(NAME, rows, tmp_path / name)
    with pytest.raises(UserError):
        collect("cube-dozen-play-v0", 1, tmp_path / "new.npz")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(UserError, match="MB free"):
        collect(NAME, 1, tmp_path / "new.npz")
    assert not (tmp_path / "new.npz").exists()


@pytest.mark.slow
def test_expert_hits_98_percent_of_a_thousand_targets_and_covers_every_task(tmp_path: Path) -> None:
    path = tmp_path / "cube.npz"
    made = collect(NAME, 91 * ROWS, path, seed=11)
    assert made.targets >= 1000 and made.hits >= 0.98 * made.targets
    obs = read(path)["observations"]
    for task in range(1, 6):
        reward, _ = make(f"cube-single-play-singletask-task{task}-v0", "c").relabel(obs, task)
        solved = (reward == 0).reshape(-1, ROWS).mean(1)
        # OGBench's own expert: 2.06 to 2.54 % on 200 episodes, with a standard error of 0.2 %.
        error = np.hypot(solved.std(ddof=1) / np.sqrt(len(solved)), 0.0023)
        assert abs(solved.mean() - 0.0221) < 3.5 * error


@pytest.mark.slow
@pytest.mark.parametrize("family", ["double", "quadruple"])
def test_expert_moves_and_stacks_several_cubes(family: str, tmp_path: Path) -> None:
    made = collect(f"cube-{family}-play-v0", 8 * ROWS, tmp_path / "cubes.npz", seed=1)
    # OGBench's own: 61 of 66 targets hit for two cubes.
    assert made.targets >= 95 and made.hits >= 0.8 * made.targets
