"""Tests that models of walkers, mazes and tasks are those of the installed packages."""

import numpy as np
import pytest

from envs_mjx.locomotion.mazes import SIZES, TELEPORT_RADIUS, Maze, build_maze
from envs_mjx.locomotion.walkers import FAMILIES, GYM, MAZES, build_walker
from envs_mjx.registry import make, maze_styles, names, parse
from mac.errors import UserError
from tests.helpers.real_walkers import real

_NAMES = {family: f"{family}-navigate-v0" for family in MAZES} | {
    "hopper": "hopper-medium-v2",
    "walker2d": "walker2d-random-v2",
    "walker2d-v5": "mujoco/walker2d/simple-v0",
    "halfcheetah": "halfcheetah-expert-v2",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_models_equal_the_packages_array_by_array(family: str):
    """Compares all walls and markers, and the control step."""
    env = make(_NAMES[family])
    theirs, ours = real(env), build_walker(family)
    for part in ("", "opt"):
        a, b = (getattr(m, part) if part else m for m in (theirs.model, ours.model))
        for name in dir(a):
            value = getattr(a, name)
            if not name.startswith("_") and isinstance(value, np.ndarray | int | float):
                np.testing.assert_array_equal(getattr(b, name), value, err_msg=name)
    assert env.spec.control_dt == pytest.approx(theirs.dt)
    np.testing.assert_array_equal(ours.model.actuator_ctrlrange, np.tile([-1.0, 1.0], (ours.model.nu, 1)))


@pytest.mark.parametrize("size", SIZES)
def test_maps_tasks_and_teleporters_equal_ogbenchs(size: str):
    env = make(f"pointmaze-{size}-navigate-v0")
    theirs, ours = real(env), build_maze(size)
    np.testing.assert_array_equal(ours.walls, theirs.maze_map == 1)
    np.testing.assert_array_equal(ours.starts, [task["init_ij"] for task in theirs.task_infos])
    np.testing.assert_array_equal(ours.goals, [task["goal_ij"] for task in theirs.task_infos])
    np.testing.assert_array_equal(ours.xy(ours.goals), [task["goal_xy"] for task in theirs.task_infos])
    if theirs._teleport_info is None:
        assert not len(ours.entrances) and not len(ours.exits)
        return
    np.testing.assert_array_equal(ours.entrances, theirs._teleport_info["teleport_in_xys"])
    np.testing.assert_array_equal(ours.exits, theirs._teleport_info["teleport_out_xys"])
    assert theirs._teleport_info["teleport_radius"] * 1.5 == TELEPORT_RADIUS


def test_cells_are_squares_around_their_centres():
    theirs, rng = real(make("pointmaze-large-navigate-v0")), np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(9), np.arange(12), indexing="ij"), axis=-1)
    np.testing.assert_array_equal(Maze.cells(Maze.xy(cells)), cells)
    points = rng.uniform(-5.9, 40, (50, 2))
    np.testing.assert_array_equal(Maze.cells(points), [theirs.xy_to_ij(point) for point in points])


@pytest.mark.parametrize(
    ("name", "obs", "action", "goal", "tasks", "limit"),
    [
        ("pointmaze-giant-stitch-v0", 2, 2, 2, (1, 2, 3, 4, 5), 1000),
        ("antmaze-large-explore-oraclerep-v0", 29, 8, 2, (1, 2, 3, 4, 5), 1000),
        ("antmaze-giant-navigate-v0", 29, 8, 29, (1, 2, 3, 4, 5), 1000),
        ("humanoidmaze-medium-stitch-singletask-v0", 69, 21, None, (1,), 2000),
        ("humanoidmaze-giant-navigate-singletask-task3-v0", 69, 21, None, (3,), 4000),
        ("hopper-full-replay-v2", 11, 3, None, (1,), 1000),
        ("walker2d-medium-expert-v2", 17, 6, None, (1,), 1000),
        ("mujoco/halfcheetah/simple-v0", 17, 6, None, (1,), 1000),
    ],
)
def test_specs_are_the_published_ones(name: str, obs, action, goal, tasks, limit):
    spec = make(name).spec
    assert (spec.name, spec.obs_dim, spec.action_dim, spec.goal_dim) == (name, obs, action, goal)
    assert (spec.tasks, spec.max_steps) == (tasks, limit)
    assert spec.goal_columns == tuple(range(goal or 0))
    assert spec.recorded == ("maze" not in name)
    assert (spec.score_range is not None) == name.endswith("-v2")


@pytest.mark.parametrize("name", ["humanoidmaze-medium-navigate-v0", "antmaze-giant-navigate-v0"])
def test_ogbenchs_time_limits(name: str):
    import ogbench

    env = ogbench.make_env_and_datasets(name, env_only=True)
    assert env.spec is not None and env.spec.max_episode_steps == make(name).spec.max_steps


def test_walkers_are_those_of_d4rl_minari_and_ogbench():
    known = set(names())
    assert {"hopper-random-v2", "walker2d-medium-replay-v2", "mujoco/hopper/expert-v0"} <= known
    assert not known & {"antmaze-giant-explore-v0", "pointmaze-medium-explore-v0", "hopper-medium-v0"}
    assert maze_styles("antmaze-teleport") == ("navigate", "stitch", "explore")
    assert parse("mujoco/walker2d/medium-v0").family == "walker2d-v5"
    assert {parse(name).family for name in known} >= {*MAZES, *GYM}


def test_unknown_walkers_and_mazes_are_mistakes():
    with pytest.raises(UserError, match="unknown walker 'antmaze-huge'"):
        build_walker("antmaze-huge")
    with pytest.raises(UserError, match="unknown maze 'huge'; choose medium"):
        build_maze("huge")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    build_walker.cache_clear()
    try:
        with pytest.raises(UserError, match=r"gymnasium package, but it is not installed; pip install"):
            build_walker("hopper")
    finally:
        build_walker.cache_clear()
