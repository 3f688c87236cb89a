"""Errors at walls: contacts in closed form, the split of the trajectories, and what is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest

from envs_mjx.locomotion.mazes import UNIT
from envs_mjx.locomotion.walkers import TORSO, build_walker
from experiments import generate_data, run
from experiments.model_error import main
from experiments.model_error_study.wall_contacts import PLACES, touching
from tests.helpers.command_line import SIZES

ENV = "pointmaze-medium-navigate-singletask-task1-v0"


def test_a_point_touches_a_wall_within_its_radius_of_a_box():
    walker = build_walker("pointmaze-medium")
    maze, model = walker.maze, walker.model
    assert maze is not None
    (geom,) = np.flatnonzero(model.geom_bodyid == TORSO)
    reach = float(model.geom_size[geom, 0] + model.geom_margin[geom])
    rng = np.random.default_rng(0)
    xy = maze.xy(rng.uniform(0.5, np.asarray(maze.walls.shape) - 1.5, (400, 2)))
    boxes = maze.xy(np.argwhere(maze.walls))
    outside = np.maximum(np.abs(xy[:, None] - boxes) - UNIT / 2, 0)
    wanted = np.linalg.norm(outside, axis=-1).min(axis=1) <= reach
    assert 50 < wanted.sum() < 350
    np.testing.assert_array_equal(touching(walker, xy), wanted)


def test_an_ant_touches_walls_and_the_floor_does_not_count():
    walker = build_walker("antmaze-medium")
    maze = walker.maze
    assert maze is not None
    cell = np.argwhere(~maze.walls & np.roll(maze.walls, -1, axis=1))[0]  # a wall at greater x
    qpos = np.tile(walker.model.qpos0, (3, 1))
    qpos[:, :2] = maze.xy(cell) + np.asarray([[-0.4, 0], [1.0, 0], [UNIT / 2 - 0.3, 0]])
    qpos[:, 2] = 0.2  # its feet are in the floor
    assert touching(walker, qpos[:, None]).tolist() == [[False], [False], [True]]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if line[0] != "#"))


def test_errors_of_both_places_make_up_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = ["--env", ENV, "--rows", "2002", "--mix", "navigate=0.2,random=0.8", "--out", "made"]
    assert generate_data.main(made) == 0
    words = [
        *SIZES,
        "--env",
        ENV,
        "--data.path",
        "made",
        "--out",
        "mac",
        "--steps",
        "5",
        "--eval.engine",
        "c",
    ]
    assert run.main(words) == 0
    argv = ["--steps", "0", "--policy", "mac", "--walls", "--horizon", "50", "--trajectories", "64"]
    assert main([*argv, "--out", "study"]) == 0
    whole = {row["seed"]: float(row["error"]) for row in rows_of(Path("study/success.csv"))}
    rows = [row for row in rows_of(Path("study/walls.csv")) if row["horizon"] == "50"]
    assert {row["place"] for row in rows} == set(PLACES) and len(rows) == 2 * len(whole)
    for seed, error in whole.items():
        own = [row for row in rows if row["seed"] == seed]
        counts = np.asarray([int(row["trajectories"]) for row in own])
        errors = np.asarray([float(row["error"]) for row in own])
        assert counts.sum() == 64 and counts.min() > 0
        assert counts @ errors / 64 == pytest.approx(error, rel=1e-4)


def test_runs_elsewhere_are_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--steps", "0", "--walls", "--horizon", "10", "--out", str(tmp_path)]
    assert main([*argv, "--policy", str(finished)]) == 2
    assert "plays in cube-single-play-singletask" in capsys.readouterr().err
    assert main(["--walls", "--out", str(tmp_path)]) == 2
    assert "--walls: name runs in mazes with --policy" in capsys.readouterr().err
    assert main([*argv, "--policy", str(finished), str(finished / ".." / finished.name)]) == 2
    assert "--policy: name each run once" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
