"""Goal-sampling distributions against NumPy tables and closed-form rates, and at 100 million rows."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import chi2

from mac.data.normalize import Normalizer
from mac.data.sampler import chunk_starts, goal_rows, sample
from mac.data.window import index_episodes, make_column
from mac.types import EpisodeIndex, GoalDistribution, GoalSpec, SampleSpec, Window
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import from_rows

VALUE = GoalDistribution(0.2, 0.5, 0.3, geometric=False, discount=0.999)
CUBE = GoalDistribution(0.0, 1.0, 0.0, geometric=True, discount=0.8)
PUZZLE = GoalDistribution(0.0, 0.5, 0.5, geometric=True, discount=0.8)
MAZE = GoalDistribution(0.0, 1.0, 0.0, geometric=False, discount=0.999)
ANYWHERE = GoalDistribution(0.0, 0.0, 1.0, geometric=False, discount=0.999)
ITSELF = GoalDistribution(1.0, 0.0, 0.0, geometric=False, discount=0.999)

draw = jax.jit(sample, static_argnums=1)
draw_goals = jax.jit(goal_rows, static_argnums=1)
draw_starts = jax.jit(chunk_starts, static_argnums=1)


def table(lengths: list[int], chunk: int = 1, first: int = 0) -> EpisodeIndex:
    """Episodes of so many rows, laid end to end from row `first` on."""
    length = np.asarray(lengths)
    return index_episodes(first + np.cumsum(length) - length, length, chunk)


def numbered(lengths: list[int], chunk: int) -> Window:
    """Episodes whose observations are (row, -row)."""
    row = np.arange(sum(lengths), dtype=np.float32)
    obs = np.stack([row, -row], -1)
    return from_rows(obs, np.zeros_like(obs), np.asarray(lengths), chunk)


def draws(
    episodes: EpisodeIndex, law: GoalDistribution, row: int, last: int, count: int = 40_000, seed: int = 0
) -> np.ndarray:
    rows, ends = jnp.full(count, row, jnp.int32), jnp.full(count, last, jnp.int32)
    return np.asarray(draw_goals(episodes, law, rows, ends, jr.key(seed)))


def assert_follows(drawn: np.ndarray, probs: np.ndarray) -> None:
    """Pearson's test at one in a million; events of probability 0 never happen."""
    counts = np.bincount(drawn.ravel(), minlength=len(probs))
    assert len(counts) == len(probs) and not counts[probs == 0].any()
    counts, want = counts[probs > 0], probs[probs > 0] * drawn.size
    assert want.min() > 5 and want.sum() == pytest.approx(drawn.size)
    assert np.sum((counts - want) ** 2 / want) < chi2.isf(1e-6, max(len(want) - 1, 1))


def later(law: GoalDistribution, row: int, last: int, rows: int) -> np.ndarray:
    """Chance of each row to be the later state, one number of steps or one point of a grid at a time."""
    probs = np.zeros(rows)
    if law.geometric:
        for k in range(1, 1000):
            probs[min(row + k, last)] += (1 - law.discount) * law.discount ** (k - 1)
    else:
        for u in (np.arange(10_000) + 0.5) / 10_000:
            probs[round(u * min(row + 1, last) + (1 - u) * last)] += 1e-4
    return probs


def law_by_hand(law: GoalDistribution, lengths: list[int], row: int, last: int) -> np.ndarray:
    """Chance of each row to be the goal of `row`."""
    any_state = np.concatenate([[1.0] * (n - 1) + [0.0] for n in lengths])  # all but final states
    goal = law.trajectory * later(law, row, last, sum(lengths)) + law.random * any_state / any_state.sum()
    goal[row] += law.current
    return goal


# Laws.


def test_geometric_goals_are_so_many_steps_ahead_or_at_the_end():
    """γ = 0.9 from row 0, the last action at row 3: probabilities 0.1, 0.09, and the rest."""
    law = GoalDistribution(0, 1, 0, True, 0.9)
    assert_follows(draws(table([5]), law, 0, 3, 400_000), np.asarray([0, 0.1, 0.09, 0.81]))


def test_uniform_goals_give_the_ends_half_a_share():
    assert_follows(draws(table([5]), MAZE, 0, 3, 400_000), np.asarray([0, 0.25, 0.5, 0.25]))


@pytest.mark.parametrize("law", [VALUE, CUBE, PUZZLE, MAZE, ANYWHERE, ITSELF])
def test_goals_follow_their_law_at_every_place_of_an_episode(law: GoalDistribution):
    """Also from the last state of an episode but one, where no later state is left but itself."""
    lengths = [6, 2, 9, 3, 12]
    episodes = table(lengths, chunk=3)
    for seed, (row, last) in enumerate([(0, 4), (4, 4), (8, 15), (15, 15), (20, 30), (29, 30)]):
        probs = law_by_hand(law, lengths, row, last)
        assert_follows(draws(episodes, law, row, last, seed=seed), np.trim_zeros(probs, "b"))


def test_last_row_is_the_one_before_the_final_state():
    """Compact flags mark the last two rows of an episode; the first marked row from a start on is meant."""
    flags = [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    start, last = (np.asarray(x) for x in draw_starts(table([5, 5]), 64, jr.key(0)))
    assert set(start) == {0, 1, 5, 6} and set(last) == {3, 8}
    for i, end in zip(start, last, strict=True):
        assert end == next(j for j in range(i, 10) if flags[j])


def test_goal_is_reached_from_a_chunks_start_to_before_its_end():
    """Chunk of 10 from row 0: goals at rows 0 and 9 are reached within it, rows 10 and 11 are not."""
    spec = SampleSpec(4000, 10, GoalSpec((0,), VALUE, MAZE))
    batch = draw(numbered([13], 10), spec, jr.key(0))
    assert batch.goals is not None and not np.any(np.asarray(batch.obs)[:, 0])
    goal, reached = np.asarray(batch.goals.value)[:, 0].astype(int), np.asarray(batch.goals.reached)
    by_goal = {int(row): set(reached[goal == row]) for row in np.unique(goal)}
    assert by_goal == {row: {1.0 if row < 10 else 0.0} for row in range(12)}


def test_return_with_goals_tells_if_the_goal_comes_later():
    """From each of a chunk's rows on, in the same episode and before its last action."""
    spec = SampleSpec(4000, 3, GoalSpec((0,), VALUE, VALUE), return_to_go=True)
    batch = draw(numbered([12, 9], 3), spec, jr.key(0))
    assert batch.goals is not None and batch.return_to_go is not None
    row, goal = (np.asarray(x)[:, 0].astype(int) for x in (batch.obs, batch.goals.value))
    last = np.where(row < 12, 10, 19)
    want = [[float(r + j <= g < end) for j in range(4)] for r, g, end in zip(row, goal, last, strict=True)]
    np.testing.assert_array_equal(batch.return_to_go, want)
    assert {0.0, 1.0} == set(np.unique(want)) and (goal == last).any(), "all cases are drawn"


def test_goal_before_the_chunk_or_elsewhere_is_not_reached():
    spec = SampleSpec(20_000, 3, GoalSpec((0,), ANYWHERE, ANYWHERE))
    batch = draw(numbered([9, 7, 12], 3), spec, jr.key(0))
    assert batch.goals is not None
    ahead = np.asarray(batch.goals.value)[:, 0] - np.asarray(batch.obs)[:, 0]
    np.testing.assert_array_equal(batch.goals.reached, (ahead >= 0) & (ahead < 3))
    assert {-1, 0, 2, 3} <= set(ahead.astype(int)), "both edges were tried"


@pytest.mark.parametrize("chunk", slow_except([5], [1, 5, 10, 25]))
def test_share_of_chunks_that_reach_their_goal(chunk: int):
    """Of episodes of 1000 transitions, as OGBench's; 0.2200 at n = 10, random goals aside.

    From row i a uniform later goal lies within the chunk at n - 2 rows of a whole and one of half a share.
    """
    episodes, steps = 5, 1000
    starts = np.arange(steps - 1 - chunk)
    near = np.clip((chunk - 1.5) / (steps - 2 - starts), 0, 1)
    want = 0.2 + 0.5 * near.mean()
    assert chunk != 10 or want == pytest.approx(0.2200, abs=5e-5)
    want += 0.3 * chunk / (episodes * steps)
    spec = SampleSpec(400_000, chunk, GoalSpec((0,), VALUE, CUBE))
    got = draw(numbered([steps + 1] * episodes, chunk), spec, jr.key(chunk))
    assert got.goals is not None
    error = (want * (1 - want) / 400_000) ** 0.5
    assert abs(float(jnp.mean(got.goals.reached)) - want) < 4 * error


def test_goals_of_values_and_of_the_policy_are_independent():
    """Of each other, and of the row before: every pair as often as the product of their probabilities."""
    law = GoalDistribution(0.2, 0.8, 0, True, 0.7)
    batch = draw(numbered([6], 3), SampleSpec(100_000, 3, GoalSpec((0,), law, law)), jr.key(3))
    assert batch.goals is not None
    value, actor = (np.asarray(x)[:, 0].astype(int) for x in (batch.goals.value, batch.goals.actor))
    one = law_by_hand(law, [6], 0, 4)[:5]
    pairs = np.outer(one, one).ravel()
    for first, second in ((value, actor), (value[:-1], value[1:]), (actor[:-1], actor[1:])):
        assert_follows(5 * first + second, pairs)


# What a goal is.


def test_goals_are_entries_of_the_normalised_observation():
    rng = np.random.default_rng(0)
    window, raw = numbered([30, 30], 4), rng.normal(size=(60, 3)).astype(np.float32)
    raw[:, 0] = np.arange(60)  # tells the row
    norm = Normalizer(jnp.asarray([10.0, 0.3, -1.0]), jnp.asarray([30.0, 2.0, 0.0]))
    window = dataclasses.replace(window, obs=make_column(raw, norm))
    batch = draw(window, SampleSpec(64, 4, GoalSpec((2, 0), VALUE, PUZZLE)), jr.key(0))
    assert batch.goals is not None
    for goal in (batch.goals.value, batch.goals.actor):
        rows = np.rint(np.asarray(goal)[:, 1] * 30.001 + 10).astype(int)
        want = norm.apply(jnp.asarray(raw[rows]))[:, jnp.asarray([2, 0])]
        np.testing.assert_allclose(goal, want, rtol=1e-6)
        assert len(set(rows)) > 20


# Many rows.


@pytest.mark.parametrize("law", [CUBE, MAZE, VALUE], ids=["geometric", "uniform", "mixture"])
def test_rows_beyond_what_float32_can_count_are_drawn_exactly(law: GoalDistribution):
    """Float32 knows every fourth number only at 40 million; the same draws there as from row 0."""
    lengths, far, count = [1001, 1001], 40_000_000, 20_000
    near, there = table(lengths, 10), table(lengths, 10, first=far)
    start, last = draw_starts(near, count, jr.key(0))
    start_there, last_there = draw_starts(there, count, jr.key(0))
    np.testing.assert_array_equal(start_there - far, start)
    np.testing.assert_array_equal(last_there - far, last)
    goal = draw_goals(there, law, start_there, last_there, jr.key(1))
    np.testing.assert_array_equal(goal - far, draw_goals(near, law, start, last, jr.key(1)))
    assert set(np.asarray(goal) % 4) == {0, 1, 2, 3}


@pytest.mark.slow
def test_goals_among_a_hundred_million_rows_are_states_that_act():
    """100,000 episodes: each as likely as another, never a final state, and later goals stay at home."""
    episodes, count = table([1001] * 100_000, 10), 200_000
    start, last = draw_starts(episodes, count, jr.key(0))
    assert int(episodes.n_steps) == 100_000_000 and int(start.max()) > 99_000_000
    assert np.asarray(start % 1001).max() <= 988 and not np.any(np.asarray(last) % 1001 != 999)
    anywhere = np.asarray(draw_goals(episodes, ANYWHERE, start, last, jr.key(1)))
    assert (anywhere % 1001).max() == 999
    for rows in (np.asarray(start), anywhere):
        assert_follows(rows // 1001 // 1000, np.full(100, 0.01))
    home = np.asarray(draw_goals(episodes, MAZE, start, last, jr.key(2)))
    np.testing.assert_array_equal(home // 1001, np.asarray(start) // 1001)
    assert_follows(anywhere % 1001, np.full(1000, 1e-3))


@pytest.mark.slow
def test_share_of_chunks_that_reach_their_goal_in_generated_data():
    """Labels go by row, so a state that looks like the goal may be labelled a failure; most are not."""
    from envs_mjx.registry import make
    from tests.helpers.compare_generators import ours

    env, data = make("puzzle-3x3-play-oraclerep-v0"), ours("puzzle-3x3-play-v0", 10, 0)
    obs = data.observations.reshape(-1, env.spec.obs_dim)
    assert data.observations.shape[1] == 1001
    columns, chunk = env.spec.goal_columns, 10
    window = from_rows(obs, data.actions.reshape(len(obs), -1), np.full(10, 1001), chunk)
    spec = SampleSpec(100_000, chunk, GoalSpec(columns, VALUE, PUZZLE))
    batch = draw(window, spec, jr.key(0))
    assert batch.goals is not None
    want = 0.2200 + 0.3 * chunk / 10_000
    assert float(jnp.mean(batch.goals.reached)) == pytest.approx(want, abs=6e-3)
    start, _ = draw_starts(window.episodes, spec.batch, jr.split(jr.key(0))[0])
    states = obs[np.asarray(start)[:, None] + np.arange(chunk)][..., np.asarray(columns)]
    alike = np.all(states == np.asarray(batch.goals.value)[:, None], axis=-1).any(axis=1)
    labelled = np.asarray(batch.goals.reached)[alike].mean()
    print(f"reached {float(jnp.mean(batch.goals.reached)):.4f}; of {alike.mean():.4f} alike, {labelled:.3f}")
    assert 0.5 < labelled < 1 and not np.asarray(batch.goals.reached)[~alike].any()
