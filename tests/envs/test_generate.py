"""Tests of generated datasets: schema, loading by ogbench, reproducibility, and the expert's success."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest

from envs_mjx.datagen import npz_shards
from envs_mjx.datagen import simulate_episodes as simulate_episodes
from envs_mjx.datagen.data_policy import TabletopDataPolicy
from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.generate import generate, generate_file, val_path
from envs_mjx.datagen.simulate_episodes import EpisodeJob, Simulator
from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.scenes import build_scene
from envs_mjx.registry import make
from mac.errors import UserError
from tests.helpers.fake_expert import instant  # noqa: F401

NAME = "cube-single-play-v0"
ROWS = 1001
LANES = 16  # fewer than usual, to save time
REQUEST = DatasetSpec(NAME, episodes=2, per_shard=2, seed=3, lanes=LANES)
Arrays = dict[str, np.ndarray]


def read(path: Path) -> Arrays:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small dataset: two training episodes and one for validation."""
    folder = tmp_path_factory.mktemp("data")
    calls: list[tuple[int, int]] = []
    summary = generate(REQUEST, folder, progress=lambda *args: calls.append(args))
    path = folder / f"{NAME}.npz"
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
    assert all(a <= b for a, b in itertools.pairwise(done)) and len(set(done)) > 10


@pytest.mark.slow
def test_an_episode_does_not_depend_on_threads_or_dataset_size(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(NAME, "c")
    assert isinstance(env, ManipEnv) and isinstance(env.engine, CEngine)
    monkeypatch.setattr(
        env.engine.host, "threads", 1
    )  # of the engine that `generate_file` uses: compiled already
    generate(REQUEST._replace(episodes=1), tmp_path)
    for path, more in ((tmp_path / f"{NAME}.npz", made.train), (tmp_path / f"{NAME}-val.npz", made.val)):
        for name, array in read(path).items():
            np.testing.assert_array_equal(array, more[name][:ROWS], err_msg=name)


@pytest.fixture(scope="module")
def scenes() -> SimpleNamespace:
    """Three episodes of the noisy expert in the scene with drawer and window, in one batch."""
    scene = build_scene("scene")
    simulator = Simulator(TabletopDataPolicy("noisy", scene, CEngine(scene), ROWS), seed=5, lanes=LANES)
    jobs = [EpisodeJob(0, 0), EpisodeJob(0, 1), EpisodeJob(1, 0), EpisodeJob(0, 0, 1)]
    return SimpleNamespace(simulator=simulator, jobs=jobs, wave=simulator.run(jobs))


@pytest.mark.slow
@pytest.mark.slow
def test_an_episode_does_not_depend_on_its_lane_or_batch(scenes: SimpleNamespace) -> None:
    again = scenes.simulator.run([EpisodeJob(1, 7), *scenes.jobs[::-1]])
    for old, new in zip([*scenes.wave.rows, *scenes.wave.events], [*again.rows, *again.events], strict=True):
        np.testing.assert_array_equal(old, new[1:][::-1])


@pytest.mark.slow
@pytest.mark.slow
def test_splits_indices_and_attempts_give_different_episodes(scenes: SimpleNamespace) -> None:
    starts = scenes.wave.rows.qpos[:, 0]
    for one, other in itertools.combinations(starts, 2):
        assert (one[:4] != other[:4]).all()  # joints of the arm; the fifth points the gripper down


@pytest.mark.slow
def test_buttons_are_recorded_before_the_action(scenes: SimpleNamespace) -> None:
    rows = scenes.wave.rows
    obs = rows.observations.reshape(4, ROWS, -1)
    for button in range(2):  # one-hot states follow the robot (19) and the cube (9)
        np.testing.assert_array_equal(rows.button_states[..., button], obs[..., 28 + 4 * button + 1] > 0.5)
    assert (rows.button_states[:, 1:] != rows.button_states[:, :-1]).any()


@pytest.mark.slow
def test_health_is_judged_in_every_row(scenes: SimpleNamespace) -> None:
    """Checks OGBench's rule: the cube's y below 0.29 m, and above -0.3 m unless it is in the drawer."""
    y, z = scenes.wave.rows.qpos[..., 15], scenes.wave.rows.qpos[..., 16]
    hidden = (y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))
    np.testing.assert_array_equal(scenes.wave.healthy, ~hidden.any(axis=1))


@pytest.mark.slow
def test_an_unhealthy_episode_goes_no_further(scenes: SimpleNamespace) -> None:
    policy = scenes.simulator.policy
    jobs = jnp.zeros((LANES, 3), jnp.int32).at[:, 1].set(jnp.arange(LANES))
    goes_on = [True, False, False, True] + [False] * (LANES - 4)  # the last ones are empty
    with jax.default_device(scenes.simulator.device):  # else all would be compiled again
        lanes = simulate_episodes._begin(policy, jnp.asarray(5), jobs, jnp.arange(LANES) < 4)
        qpos = lanes.state.world.physics.qpos.at[:3, 15].set(jnp.asarray([0.1, 0.3, -0.31]))  # y of the cube
        lanes = eqx.tree_at(lambda lanes: lanes.state.world.physics.qpos, lanes, qpos)
        np.testing.assert_array_equal(simulate_episodes._last_row(policy, lanes)[1], goes_on)
        after, (rows, events) = simulate_episodes._simulate_segment(policy, lanes, jnp.asarray(0))
    np.testing.assert_array_equal(after.active, goes_on)
    moved = (np.asarray(rows.qpos[-1]) != np.asarray(qpos)).any(axis=1)
    np.testing.assert_array_equal(moved, goes_on)
    assert not np.asarray(events.done)[:, ~moved].any()


@pytest.mark.usefixtures("instant")
def test_no_file_appears_unless_both_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, part: npz_shards.ShardFile, final: Path) -> None:
        if "val" not in part.stem:
            raise OSError(28, "No space left on device")
        final.touch()

    monkeypatch.setattr(npz_shards.NpzShardWriter, "assemble", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        generate_file(NAME, ROWS, tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("instant")
def test_there_is_one_validation_episode_per_ten_for_training(tmp_path: Path) -> None:
    for episodes, val in ((1, 1), (10, 1), (19, 1), (20, 2)):
        made = generate_file(NAME, episodes * ROWS, tmp_path / f"{episodes}.npz")
        assert (made.train_rows, made.val_rows) == (episodes * ROWS, val * ROWS)


@pytest.mark.usefixtures("instant")
def test_bad_requests_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken.npz").touch()
    (tmp_path / "file").touch()
    for rows, name, message in (
        (0, "new.npz", "at least one row"),
        (1, "new.hdf5", "must end in .npz"),
        (1, "taken.npz", "exists"),
        (1, "file/new.npz", "choose another folder"),
    ):
        with pytest.raises(UserError, match=message):
            generate_file(NAME, rows, tmp_path / name)
    with pytest.raises(UserError):
        generate_file("cube-dozen-play-v0", 1, tmp_path / "new.npz")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(UserError, match="MB free"):
        generate_file(NAME, 1, tmp_path / "new.npz")
    assert {path.name for path in tmp_path.iterdir()} == {"taken.npz", "file"}


@pytest.mark.slow
def test_expert_reaches_98_percent_of_targets_and_all_tasks(tmp_path: Path) -> None:
    path = tmp_path / "cube.npz"
    made = generate_file(NAME, 91 * ROWS, path, seed=11)
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
    made = generate_file(f"cube-{family}-play-v0", 8 * ROWS, tmp_path / "cubes.npz", seed=1)
    # OGBench's own: 61 of 66 targets hit for two cubes.
    assert made.targets >= 95 and made.hits >= 0.8 * made.targets
