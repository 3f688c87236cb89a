"""Tests of path tables of mazes, and of walkers that follow them, compared with OGBench's."""

import itertools

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
import pytest

from envs_mjx.datagen.dataset_spec import episode_rows
from envs_mjx.experts.maze_experts import DirectionActor, MazeDataPolicy, MazeEpisode
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.maze_paths import NEAR, build_maze_paths
from envs_mjx.locomotion.mazes import SIZES
from envs_mjx.registry import make


@pytest.fixture(scope="module", params=SIZES)
def peers(request: pytest.FixtureRequest):
    """A maze's path tables, and OGBench's environment of it."""
    env = gymnasium.make(f"pointmaze-{request.param}-v0")
    yield build_maze_paths(request.param), env.unwrapped
    env.close()


def test_the_cell_ahead_is_ogbenchs_subgoal(peers) -> None:
    paths, raw = peers
    cells = [divmod(int(cell), paths.maze.walls.shape[1]) for cell in paths.free]
    rng = np.random.default_rng(0)
    pairs = list(itertools.product(range(len(cells)), repeat=2))
    for goal, here in rng.permutation(pairs)[:400]:
        theirs, _ = raw.get_oracle_subgoal(raw.ij_to_xy(cells[here]), raw.ij_to_xy(cells[goal]))
        ours = paths.next[paths.free[goal], paths.free[here]]
        np.testing.assert_array_equal(np.asarray(paths.centre(jnp.asarray(ours))), theirs)


def test_a_walker_on_a_wall_stays_there(peers) -> None:
    paths, raw = peers
    wall = divmod(int(np.flatnonzero(paths.maze.walls)[20]), paths.maze.walls.shape[1])
    goal = divmod(int(paths.free[0]), paths.maze.walls.shape[1])
    xy = np.asarray(raw.ij_to_xy(wall), np.float32)
    theirs, _ = raw.get_oracle_subgoal(xy, raw.ij_to_xy(goal))
    np.testing.assert_array_equal(theirs, xy)
    ahead = paths.toward(jnp.asarray(xy), jnp.asarray(raw.ij_to_xy(goal), jnp.float32))
    np.testing.assert_array_equal(ahead, 0)


def test_goals_are_in_no_straight_corridor(peers) -> None:
    paths, raw = peers
    free = np.asarray(raw.maze_map) == 0

    def is_vertex(i: int, j: int) -> bool:
        up, down, left, right = free[i - 1, j], free[i + 1, j], free[i, j - 1], free[i, j + 1]
        corridor = (up and down and not left and not right) or (left and right and not up and not down)
        return not corridor

    expected = [i * free.shape[1] + j for i, j in np.argwhere(free) if is_vertex(i, j)]
    np.testing.assert_array_equal(paths.vertices, expected)
    assert len(expected) < free.sum()


def test_near_goals_are_four_cells_away(peers) -> None:
    paths, raw = peers
    columns = paths.maze.walls.shape[1]
    for start in paths.free[::3]:
        _, steps = raw.get_oracle_subgoal((0, 0), raw.ij_to_xy(divmod(int(start), columns)))
        expected = np.flatnonzero(np.asarray(steps) == NEAR)
        found = paths.near[start, : paths.n_near[start]]
        np.testing.assert_array_equal(found, expected if len(expected) else [start])


@pytest.mark.parametrize(
    ("dataset", "rows"),
    [
        ("scene-play-v0", 1001),
        ("pointmaze-medium-navigate-v0", 1001),
        ("antmaze-teleport-navigate-v0", 1001),
        ("pointmaze-giant-navigate-v0", 2001),
        ("antmaze-giant-stitch-v0", 201),
        ("antmaze-medium-explore-v0", 501),
        ("humanoidmaze-large-navigate-v0", 2001),
        ("humanoidmaze-giant-navigate-v0", 4001),
        ("humanoidmaze-giant-stitch-v0", 401),
    ],
)
def test_episodes_are_as_long_as_ogbenchs(dataset: str, rows: int) -> None:
    assert episode_rows(dataset) == rows


class Straight(DirectionActor):
    """An actor that records its inputs."""

    width: int

    def __call__(self, obs: jax.Array, direction: jax.Array) -> jax.Array:
        return jnp.concatenate([direction, obs])[: self.width]


def policy_of(
    style: str, name: str = "pointmaze-medium", actor: DirectionActor | None = None
) -> MazeDataPolicy:
    env = make(f"{name}-navigate-v0", "c")
    assert isinstance(env, MazeEnv)
    return MazeDataPolicy(style, env, 201, actor)


def at(policy: MazeDataPolicy, xy: tuple[float, float], goal: tuple[float, float]) -> MazeEpisode:
    motion = policy.env.engine.load(jnp.asarray(xy), jnp.zeros(2))
    zero = jnp.zeros((), jnp.int32)
    return MazeEpisode(motion, motion.qpos, jnp.asarray(goal), jnp.zeros(2), zero, jnp.asarray(False))


def steps(
    policy: MazeDataPolicy, state: MazeEpisode, count: int
) -> tuple[MazeEpisode, np.ndarray, np.ndarray, np.ndarray]:
    """Returns observations, goals and hits of `count` control steps."""

    def body(state: MazeEpisode, key: jax.Array):
        act, after = jr.split(key)
        decision = policy.decide(state, act)
        action = jnp.asarray(decision.row.actions)
        new, events = policy.advance(decision.state, action, decision.done, jnp.asarray(True), after)
        return new, (decision.row.observations, state.goal, events.hit)

    state, seen = jax.lax.scan(body, state, jr.split(jr.key(0), count))
    return state, *(np.asarray(x) for x in seen)


def test_a_goal_that_is_reached_is_replaced_at_once() -> None:
    policy = policy_of("navigate")
    _, obs, goals, hits = steps(policy, at(policy, (0.0, 0.0), (0.5, 0.5)), 400)
    assert hits[0] and hits.sum() >= 2  # within 1 m from the first step on
    changed = (np.diff(goals, axis=0) != 0).any(axis=1)
    np.testing.assert_array_equal(changed, hits[:-1])
    # A goal is hit by the state after the step.
    near = np.linalg.norm(obs[1:] - goals[:-1], axis=1) <= 1.0
    np.testing.assert_array_equal(near, hits[:-1])


def test_in_stitch_there_is_one_goal_and_it_counts_once() -> None:
    policy = policy_of("stitch")
    _, _, goals, hits = steps(policy, at(policy, (0.0, 0.0), (0.5, 0.5)), 60)
    assert (goals == goals[0]).all() and hits[0] and hits.sum() == 1


def test_starts_and_goals_are_within_a_metre_of_their_cells() -> None:
    policy = policy_of("stitch")
    walks = jax.vmap(lambda key: policy.begin(*jr.split(key)))(jr.split(jr.key(0), 64))
    for place in (np.asarray(walks.motion.qpos), np.asarray(walks.goal)):
        off = place - 4 * np.round(place / 4)
        assert np.abs(off).max() <= 1.0 and np.abs(off).max() > 0.9 and abs(off.mean()) < 0.15
    paths = policy.paths
    starts, goals = (jax.vmap(paths.cell)(x) for x in (walks.motion.qpos, walks.goal))
    for start, goal in zip(np.asarray(starts), np.asarray(goals), strict=True):
        assert goal in paths.near[start, : paths.n_near[start]]
    assert len(np.unique(np.asarray(starts))) > 15


def test_exploring_keeps_a_direction_for_ten_steps() -> None:
    policy = policy_of("explore")
    state, directions = at(policy, (0.0, 0.0), (0.0, 0.0)), []
    decide = jax.jit(policy.decide)
    for t in range(25):
        state = decide(state, jr.key(t)).state
        directions.append(np.asarray(state.direction))
        state = MazeEpisode(state.motion, state.obs, state.goal, state.direction, state.t + 1, state.arrived)
    directions = np.asarray(directions)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-4)
    changed = (np.diff(directions, axis=0) != 0).any(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(changed), [9, 19])
    assert policy.noise == 1.0


def test_an_actor_sees_the_direction_and_no_position() -> None:
    policy = policy_of("navigate", "antmaze-medium", Straight(8))
    state = policy.begin(jr.key(0), jr.key(1))
    draws = jax.vmap(lambda key: jnp.asarray(policy.decide(state, key).row.actions))(jr.split(jr.key(2), 400))
    to = np.asarray(policy.paths.toward(state.motion.qpos[:2], state.goal))
    mean = np.concatenate([to, np.asarray(state.obs)[2:8]])
    inner = np.abs(mean) < 0.4  # where clipping to [-1, 1] hardly matters
    assert inner.sum() >= 4 and policy.noise == 0.2
    np.testing.assert_allclose(np.asarray(draws).mean(axis=0)[inner], mean[inner], atol=0.04)
    np.testing.assert_allclose(np.asarray(draws).std(axis=0)[inner], 0.2, atol=0.03)


def test_before_a_teleporter_the_old_place_is_seen() -> None:
    """Checks the convention of OGBench's datasets: the next row has the entrance as observation, the exit as
    position."""
    policy = policy_of("navigate", "pointmaze-teleport")
    maze = policy.env.maze
    state = at(policy, tuple(maze.entrances[0].tolist()), tuple(maze.exits[0].tolist()))
    new, _ = policy.advance(state, jnp.zeros(2), jnp.asarray(False), jnp.asarray(True), jr.key(0))
    np.testing.assert_allclose(np.asarray(new.obs), maze.entrances[0], atol=0.01)
    assert np.abs(np.asarray(new.motion.qpos) - maze.exits).sum(axis=1).min() < 1e-6
