"""Tests of maze datasets: loading by ogbench, and statistics compared with OGBench's own generator."""

import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest

from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.generate import generate, val_path
from envs_mjx.datagen.simulate_episodes import EpisodeJob, Simulator
from envs_mjx.experts.maze_experts import DirectionActor, MazeDataPolicy
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.maze_paths import build_maze_paths
from envs_mjx.registry import make
from mac.errors import UserError

NAME = "pointmaze-medium-stitch-v0"
ROWS = 201
REQUEST = DatasetSpec(NAME, episodes=3, per_shard=3, seed=3, lanes=4)


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small dataset: three training episodes and one for validation."""
    folder = tmp_path_factory.mktemp("data")
    summary, path = generate(REQUEST, folder), folder / f"{NAME}.npz"
    return SimpleNamespace(path=path, summary=summary, train=read(path), val=read(val_path(path)))


def test_files_have_ogbenchs_keys_types_and_shapes(made: SimpleNamespace) -> None:
    for arrays, episodes in ((made.train, 3), (made.val, 1)):
        assert {name: (x.dtype, x.shape) for name, x in arrays.items()} == {
            "terminals": (bool, (episodes * ROWS,)),
            **{n: (np.float32, (episodes * ROWS, 2)) for n in ("observations", "actions", "qpos", "qvel")},
        }
        np.testing.assert_array_equal(np.flatnonzero(arrays["terminals"]) % ROWS, ROWS - 1)
        assert np.abs(arrays["actions"]).max() == 1
    assert made.summary.train_rows == 3 * ROWS and made.summary.val_rows == ROWS


@pytest.mark.parametrize("compact", [False, True])
def test_ogbench_loads_the_files(made: SimpleNamespace, compact: bool) -> None:
    for name in (NAME, NAME.replace("-v0", "-oraclerep-v0")):
        env, train, _ = ogbench.make_env_and_datasets(
            name, dataset_path=str(made.path), compact_dataset=compact
        )
        env.close()
        assert len(train["observations"]) == 3 * (ROWS if compact else ROWS - 1)
    if not compact:
        np.testing.assert_array_equal(train["next_observations"][: ROWS - 1], made.train["qpos"][1:ROWS])


@pytest.mark.parametrize("task", range(1, 6))
def test_ogbench_and_relabel_give_the_same_rewards(made: SimpleNamespace, task: int) -> None:
    name = f"pointmaze-medium-stitch-singletask-task{task}-v0"
    env, train, _ = ogbench.make_env_and_datasets(name, dataset_path=str(made.path), compact_dataset=True)
    env.close()
    reward, mask = make(name, "c").relabel(made.train["observations"], task)
    np.testing.assert_array_equal(train["rewards"], reward)
    np.testing.assert_array_equal(train["masks"], mask)


def test_rows_hold_the_state_before_the_action(made: SimpleNamespace) -> None:
    env = gymnasium.make("pointmaze-medium-v0")
    env.reset(seed=0)
    raw = env.unwrapped
    raw.set_state(made.train["qpos"][0].astype(float), made.train["qvel"][0].astype(float))
    for row in range(ROWS - 1):
        np.testing.assert_allclose(raw.data.qpos, made.train["qpos"][row], atol=1e-4)
        env.step(made.train["actions"][row].astype(float))
    env.close()


def test_an_episode_depends_on_nothing_but_its_number(made: SimpleNamespace, tmp_path: Path) -> None:
    generate(REQUEST._replace(episodes=1), tmp_path, threads=1)
    for name, array in read(tmp_path / f"{NAME}.npz").items():
        np.testing.assert_array_equal(array, made.train[name][:ROWS], err_msg=name)


def test_ants_need_a_trained_expert_and_points_do_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a trained expert: run .* --task ant"):
        generate(DatasetSpec("antmaze-medium-navigate-v0", 1, 1), tmp_path)
    with pytest.raises(UserError, match="is made by a script; leave out --expert"):
        generate(REQUEST._replace(expert_checksum="0"), tmp_path)
    with pytest.raises(UserError, match="cannot be generated"):
        generate(DatasetSpec("hopper-medium-v2", 1, 1), tmp_path)
    assert not list(tmp_path.iterdir())


class Lazy(DirectionActor):
    """An ant's expert that does nothing."""

    def __call__(self, obs, direction):
        del obs, direction
        return jnp.zeros(8)


def test_data_of_a_trained_expert_are_marked_as_ours(tmp_path: Path) -> None:
    request = DatasetSpec("antmaze-medium-stitch-v0", 1, 1, lanes=1, expert_checksum="abc")
    for _ in range(2):  # the second time there is nothing to do
        made = generate(request, tmp_path, actor=Lazy())
        assert made.train_rows == ROWS
    text = (tmp_path / "antmaze-medium-stitch-v0.json").read_text()
    assert '"expert": "ours"' in text and '"expert_checksum": "abc"' in text and "not comparable" in text
    actions = read(tmp_path / "antmaze-medium-stitch-v0.npz")["actions"]
    assert actions.shape == (ROWS, 8) and abs(actions.std() - 0.2) < 0.02


def theirs(size: str, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Runs OGBench's expert in its environment, style navigate. Returns positions, actions, goals reached,
    and control steps per second of processor time."""
    env = gymnasium.make(f"pointmaze-{size}-v0", terminate_at_goal=False, max_episode_steps=1001)
    raw, paths = env.unwrapped, build_maze_paths(size)
    np.random.seed(seed)
    columns = paths.maze.walls.shape[1]

    def draw(cells: np.ndarray) -> tuple[int, int]:
        return divmod(int(np.random.choice(cells)), columns)

    places, actions, hits = [], [], np.zeros(episodes)
    began = time.process_time()
    for episode in range(episodes):
        task = {"init_ij": draw(paths.free), "goal_ij": draw(paths.vertices)}
        obs, _ = env.reset(options={"task_info": task})
        for t in range(1001):
            ahead = raw.get_oracle_subgoal(raw.get_xy(), raw.cur_goal_xy)[0] - raw.get_xy()
            action = ahead / (np.linalg.norm(ahead) + 1e-6) + np.random.normal(0, 0.5, 2)
            action = np.clip(action, -1, 1)
            places.append(obs)
            actions.append(action)
            obs, _, _, _, info = env.step(action)
            if info["success"]:
                hits[episode] += t < 1000
                raw.set_goal(draw(paths.vertices))
    rate = episodes * 1001 / (time.process_time() - began)
    env.close()
    shape = episodes, 1001, 2
    return np.reshape(places, shape), np.reshape(actions, shape), hits, rate


def ours(size: str, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Runs our expert in the same way; the first batch compiles and is not timed."""
    env = make(f"pointmaze-{size}-navigate-v0", "c")
    assert isinstance(env, MazeEnv)
    simulator = Simulator(MazeDataPolicy("navigate", env, 1001, None), seed=seed, lanes=episodes)
    simulator.run([EpisodeJob(1, 0)])
    began = time.process_time()
    wave = simulator.run([EpisodeJob(0, i) for i in range(episodes)])
    rate = episodes * 1000 / (time.process_time() - began)
    return wave.rows.observations, wave.rows.actions, wave.events.hit.sum(axis=1), rate


def measures(size: str, places: np.ndarray, actions: np.ndarray, hits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns statistics of each episode, by name."""
    env, flat = make(f"pointmaze-{size}-navigate-v0", "c"), places.reshape(-1, 2).astype(np.float32)
    solved = {
        f"task{k}": (env.relabel(flat, k)[0] == 0).reshape(hits.size, -1).mean(axis=1) for k in range(1, 6)
    }
    cells = np.round(places / 4).astype(int)
    visited = np.asarray([len(np.unique(path, axis=0)) for path in cells])
    saturated = (np.abs(actions) >= 1).mean(axis=1)
    return {
        "goals": hits,
        "cells": visited,
        "saturated_x": saturated[:, 0],
        "saturated_y": saturated[:, 1],
        **solved,
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", ["medium", "large"])
def test_points_do_the_same_as_ogbenchs_and_as_fast(size: str) -> None:
    """Compares nine statistics of 100 episodes each; 4 standard errors are exceeded with probability
    0.001."""
    mine, other = ours(size, 100, 11), theirs(size, 100, 11)
    a, b = (measures(size, *found[:3]) for found in (mine, other))
    for name in a:
        error = np.hypot(*(x[name].std(ddof=1) / np.sqrt(len(x[name])) for x in (a, b)))
        z = abs(a[name].mean() - b[name].mean()) / max(error, 1e-9)
        print(f"{size},{name},{a[name].mean():.4f},{b[name].mean():.4f},{z:.2f}")
        assert z < 4, name
    print(f"{size},steps per CPU second,{mine[3]:.0f},{other[3]:.0f}")
    assert mine[3] > other[3]
