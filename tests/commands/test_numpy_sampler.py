"""Batches drawn on the host, against the data, goal-sampling distributions and the sampler on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines import REGISTRY
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from experiments.benchmarks import timed_loops
from experiments.benchmarks.numpy_sampler import HostData
from experiments.benchmarks.training import SPEC
from mac.data.sampler import ACTION_LIMIT, sample, steps_to_goal
from mac.data.window import index_episodes, start_counts
from mac.types import GoalSpec, SampleSpec, SubgoalSpec
from tests.data.test_goal_sampling import (
    ANYWHERE,
    CUBE,
    ITSELF,
    MAZE,
    PUZZLE,
    VALUE,
    assert_follows,
    law_by_hand,
)
from tests.data.test_goal_sampling import numbered as places
from tests.data.test_sampler import numbered
from tests.helpers.algorithm_cases import GOALS_ONLY, REWARD_ONLY, make
from tests.helpers.numpy_ablations import MODES
from tests.helpers.toy_env import falling_window

LENGTHS = [20, 5, 3, 33]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def rows_of(states: jax.Array) -> np.ndarray:
    """The rows that states of a numbered window stand in."""
    return np.asarray(states)[:, 0].astype(int)


def test_chunks_start_where_they_fit_and_steps_at_any_action():
    """Also where the table of episodes has room for more."""
    lengths, chunk = np.asarray(LENGTHS), 3
    first = np.cumsum(lengths) - lengths
    window = dataclasses.replace(
        numbered(LENGTHS, chunk), episodes=index_episodes(first, lengths, chunk, room=9)
    )
    host = HostData(window)
    counts = zip(first, start_counts(lengths, chunk), strict=True)
    np.testing.assert_array_equal(host.starts, [f + i for f, n in counts for i in range(n)])
    final = set(first + lengths - 1)
    np.testing.assert_array_equal(host.steps, [row for row in range(lengths.sum()) if row not in final])


def test_random_chunks_stay_in_one_episode():
    starts = HostData(timed_loops.random_window(SPEC, 2 * EPISODE_ROWS, 3)).starts
    assert len(starts) == 2 * (1000 - 1 - 3)
    assert (starts // EPISODE_ROWS == (starts + 3) // EPISODE_ROWS).all()


def test_a_batch_is_rows_of_the_window():
    window = numbered(LENGTHS, 3)
    batch = HostData(window).draw(rng(), SampleSpec(256, 3, reward_scale=0.5))
    start = rows_of(batch.obs)
    rows = start[:, None] + np.arange(3)
    np.testing.assert_array_equal(batch.obs, window.obs[start])
    np.testing.assert_array_equal(batch.next_obs, window.obs[start + 3])
    np.testing.assert_array_equal(batch.actions, window.action[rows])
    assert batch.rewards is not None and batch.masks is not None
    np.testing.assert_array_equal(batch.rewards, 5 * rows)
    np.testing.assert_array_equal(batch.masks, rows % 3)
    assert set(start) == set(HostData(window).starts), "every start is drawn"


@pytest.mark.parametrize("mode", MODES)
def test_states_and_returns_are_the_samplers(mode: str):
    """Of each chunk by the row that it begins at."""
    algo = make("fmpc", mode)
    window = timed_loops.random_window(MODES[mode], 2 * EPISODE_ROWS, algo.sample.chunk)
    obs = np.asarray(window.obs[:])
    mine = HostData(window).draw(rng(), algo.sample)
    row = np.asarray([np.flatnonzero((obs == each).all(-1))[0] for each in np.asarray(mine.obs)])
    assert mine.states is not None and mine.return_to_go is not None
    np.testing.assert_array_equal(mine.states, obs[row[:, None] + 1 + np.arange(3)])
    if mode == "reward":
        reward = np.asarray(window.reward)
        last = 1001 * (row // 1001) + 999
        want = [[reward[r + j : end + 1].sum() for j in range(4)] for r, end in zip(row, last, strict=True)]
        np.testing.assert_array_equal(mine.return_to_go, want)
    else:
        assert set(np.unique(mine.return_to_go)) <= {0, 1}
        assert (np.diff(mine.return_to_go) <= 0).all(), "a goal that is not ahead stays behind"


def test_actions_are_clipped_as_the_sampler_clips_them():
    window = numbered([1100], 1)  # actions from 0 to 1.1
    batch = HostData(window).draw(rng(), SampleSpec(4096, 1))
    assert jnp.max(batch.actions) == jnp.float32(ACTION_LIMIT) == -jnp.min(batch.actions)


def test_next_actions_are_the_next_rows_or_the_episodes_last():
    window = numbered([4, 3], 1)
    batch = HostData(window).draw(rng(), SampleSpec(256, 1, every_row=True, next_action=True))
    assert batch.next_action is not None
    follows = np.asarray([1, 2, 2, -1, 5, 5])  # no action is taken at rows 3 and 6
    assert set(rows_of(batch.obs)) == {0, 1, 2, 4, 5}
    np.testing.assert_array_equal(batch.next_action, window.action[follows[rows_of(batch.obs)]])


@pytest.mark.parametrize("law", [VALUE, CUBE, PUZZLE, MAZE, ANYWHERE, ITSELF])
def test_goals_follow_their_law_at_every_place_of_an_episode(law):
    lengths = [6, 2, 9, 3, 12]
    host, random = HostData(places(lengths, 3)), rng()
    for row, last in [(0, 4), (4, 4), (8, 15), (15, 15), (20, 30), (29, 30)]:
        rows = np.full(40_000, row)
        assert (host.last_of(rows) == last).all()
        drawn = host.goal_rows(random, law, rows, host.last_of(rows))
        assert_follows(drawn, np.trim_zeros(law_by_hand(law, lengths, row, last), "b"))


def test_values_and_policies_have_goals_of_their_own_laws():
    """All chunks of 10 start at row 0, where goals at rows 0 to 9 are reached; a goal is minus its row."""
    spec = SampleSpec(40_000, 10, GoalSpec((1,), VALUE, CUBE))
    batch = HostData(places([13], 10)).draw(rng(), spec)
    assert batch.goals is not None and not np.any(batch.obs)
    value, actor = -rows_of(batch.goals.value), -rows_of(batch.goals.actor)
    both = [law_by_hand(law, [13], 0, 11)[:12] for law in (VALUE, CUBE)]
    assert_follows(value, both[0])
    assert_follows(actor, np.trim_zeros(both[1], "b"))
    np.testing.assert_array_equal(batch.goals.reached, value < 10)
    same = np.mean(value == actor)
    assert same == pytest.approx(both[0] @ both[1], abs=0.01), "the draws are independent"


@pytest.mark.parametrize("ends_count", [True, False])
def test_subgoals_lie_on_the_way_to_the_goal(ends_count: bool):
    ahead = SubgoalSpec(4, ends_count)
    spec = SampleSpec(4096, 1, GoalSpec((0, 1), VALUE, MAZE), every_row=True, subgoals=ahead)
    window = places(LENGTHS, 1)
    host = HostData(window)
    batch = host.draw(rng(), spec)
    goals, sub = batch.goals, batch.subgoals
    assert goals is not None and sub is not None
    row, value, actor = rows_of(batch.obs), rows_of(goals.value), rows_of(goals.actor)
    np.testing.assert_array_equal(goals.reached, row == value)
    last = host.last_of(row)
    steps, reached = (np.asarray(x) for x in steps_to_goal(ahead, *map(jnp.asarray, (row, last, value))))
    np.testing.assert_array_equal(sub.steps, steps)
    np.testing.assert_array_equal(sub.reached, reached)
    np.testing.assert_array_equal(sub.next_obs, window.obs[row + steps])
    np.testing.assert_array_equal(sub.value, window.obs[row + steps])
    towards, _ = steps_to_goal(ahead, *map(jnp.asarray, (row, last, actor)))
    np.testing.assert_array_equal(sub.actor, window.obs[row + np.asarray(towards)])
    np.testing.assert_array_equal(sub.ahead, window.obs[np.minimum(row + 4, last)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REGISTRY)
def test_every_algorithm_gets_what_the_sampler_would_give_it(name: str, mode: str):
    if mode == "reward" and name in GOALS_ONLY:
        pytest.skip("only about goals")
    if mode == "goals" and name in REWARD_ONLY:
        pytest.skip("only about rewards")
    algo = make(name, mode)
    window = timed_loops.random_window(MODES[mode], 2 * EPISODE_ROWS, algo.sample.chunk)
    wanted = jax.eval_shape(lambda: sample(window, algo.sample, jr.key(0)))
    drawn = HostData(window).draw(rng(), algo.sample)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )


def test_terminations_are_refused():
    with pytest.raises(ValueError, match="terminations"):
        HostData(falling_window())
