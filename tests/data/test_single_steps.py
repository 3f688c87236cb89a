"""Single steps, next actions and subgoals drawn on the device, against the rows they were drawn from."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.data.sampler import sample, steps_to_goal
from mac.types import Batch, GoalDistribution, GoalSpec, SampleSpec, SubgoalSpec, Window
from tests.helpers.toy_env import from_rows

VALUE = GoalDistribution(0.2, 0.5, 0.3, geometric=False, discount=0.999)
ACTOR = GoalDistribution(0.0, 0.5, 0.5, geometric=True, discount=0.8)
LENGTHS = [6, 2, 9, 30]
draw = jax.jit(sample, static_argnums=1)


def numbered(lengths: list[int]) -> Window:
    """Episodes whose observations are (row, -row) and whose actions are (row, -row) / 1000."""
    row = np.arange(sum(lengths), dtype=np.float32)
    obs = np.stack([row, -row], -1)
    return from_rows(obs, obs / 1000, np.asarray(lengths), 1)


def rows(x: jax.Array | None, scale: float = 1.0) -> np.ndarray:
    """The rows that states, goals or actions are from."""
    assert x is not None
    return np.rint(np.asarray(x).reshape(len(x), -1)[:, 0] * scale).astype(int)


def finals(lengths: list[int]) -> np.ndarray:
    """For each row, the last one of its episode at which an action is taken."""
    return np.repeat(np.cumsum(lengths) - 2, lengths)


def test_steps_start_at_every_row_that_has_a_next_one():
    batch = draw(numbered(LENGTHS), SampleSpec(43 * 1000, 1, every_row=True), jr.key(0))
    start, counts = np.unique(rows(batch.obs), return_counts=True)
    last = finals(LENGTHS)
    np.testing.assert_array_equal(start, [i for i in range(47) if i <= last[i]])
    # Chi-squared with 42 degrees of freedom: above 76.1 once in a thousand.
    assert len(counts) == 43 and np.sum((counts - 1000) ** 2 / 1000) < 76.1
    np.testing.assert_array_equal(rows(batch.next_obs), rows(batch.obs) + 1)
    np.testing.assert_array_equal(rows(batch.actions, 1000), rows(batch.obs))
    assert batch.next_action is None and batch.subgoals is None and batch.goals is None


def test_next_action_is_that_of_the_next_row_or_an_episodes_last():
    batch = draw(numbered(LENGTHS), SampleSpec(4000, 1, every_row=True, next_action=True), jr.key(0))
    start = rows(batch.obs)
    np.testing.assert_array_equal(
        rows(batch.next_action, 1000), np.minimum(start + 1, finals(LENGTHS)[start])
    )


def test_chunks_of_several_actions_do_not_start_at_every_row():
    with pytest.raises(ValueError, match="chunk=2"):
        sample(numbered(LENGTHS), SampleSpec(4, 2, every_row=True), jr.key(0))


def runs(lengths: list[int], spec: SubgoalSpec, batch: int = 4000) -> Batch:
    goals = GoalSpec((0,), VALUE, ACTOR)
    return draw(numbered(lengths), SampleSpec(batch, 1, goals, every_row=True, subgoals=spec), jr.key(1))


def towards(i: int, goal: int, last: int, n: int) -> int:
    """The row that a run of n steps from row i ends at, one step at a time."""
    at = i
    for _ in range(n):
        if at in (goal, last):
            break
        at += 1
    return at


@pytest.mark.parametrize("ends_count", [True, False])
@pytest.mark.parametrize("n", [1, 4, 25])
def test_runs_end_at_goals_ends_of_episodes_or_after_n_steps(n: int, ends_count: bool):
    batch, last = runs(LENGTHS, SubgoalSpec(n, ends_count)), finals(LENGTHS)
    assert batch.goals is not None and batch.subgoals is not None
    start, goal, actor = rows(batch.obs), rows(batch.goals.value), rows(batch.goals.actor)
    # A goal at or before the start, or n steps ahead, is not on the way.
    end = [i if g == i else towards(i, g, last[i], n) for i, g in zip(start, goal, strict=True)]
    way = [i if g == i else towards(i, g, last[i], n) for i, g in zip(start, actor, strict=True)]
    np.testing.assert_array_equal(rows(batch.subgoals.next_obs), end)
    np.testing.assert_array_equal(batch.subgoals.steps, end - start)
    np.testing.assert_array_equal(rows(batch.subgoals.value), end)
    np.testing.assert_array_equal(rows(batch.subgoals.actor), way)
    np.testing.assert_array_equal(rows(batch.subgoals.ahead), np.minimum(start + n, last[start]))
    reached = (goal == end) & (end - start < n)
    if ends_count:
        reached = end - start < n
    np.testing.assert_array_equal(batch.subgoals.reached, reached)
    np.testing.assert_array_equal(batch.goals.reached, goal == start)


def test_goal_n_steps_ahead_is_not_reached_but_the_one_before_is():
    row, last = jnp.asarray([0, 0, 0, 7]), jnp.asarray([9, 9, 9, 9])
    goal = jnp.asarray([3, 4, 0, 12])
    for ends_count, want in ((True, [True, False, True, True]), (False, [True, False, True, False])):
        steps, reached = steps_to_goal(SubgoalSpec(4, ends_count), row, last, goal)
        assert steps.tolist() == [3, 4, 0, 2] and reached.tolist() == want


def test_share_of_runs_that_reach_their_goal():
    """Of 1000 transitions at n = 25: a quarter, and 0.8% more where ends of episodes count as goals.

    A uniform later goal lies among the 23.5 of 998 - i rows that count; all do near the end.
    """
    later = np.mean(np.clip(23.5 / np.maximum(998 - np.arange(1000), 1), 0, 1))
    true = 0.2 + 0.5 * later + 0.3 * 25 / 20_000
    got = {}
    for ends_count in (True, False):
        subgoals = runs([1001] * 20, SubgoalSpec(25, ends_count), batch=400_000).subgoals
        assert subgoals is not None
        got[ends_count] = float(jnp.mean(subgoals.reached))
    assert got[False] == pytest.approx(true, abs=3e-3)
    assert got[True] == pytest.approx(0.263, abs=3e-3)
