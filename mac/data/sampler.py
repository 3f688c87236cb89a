"""Drawing batches of action chunks, and their goals, from a window, on the device."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from mac.types import (
    Batch,
    EpisodeIndex,
    GoalDistribution,
    Goals,
    Number,
    SampleSpec,
    Subgoals,
    SubgoalSpec,
    Window,
)

ACTION_LIMIT = 1 - 1e-5
"""Actions are clipped to ± this, as in the authors' implementation."""


def sample(window: Window, spec: SampleSpec, key: Key[Array, ""]) -> Batch:
    """`spec.batch` chunks, uniform over the window's valid starts, with replacement.

    A chunk never crosses the end of its episode. Where the episode terminated, a chunk may reach beyond its
    terminal state, which is absorbing; there it is padded with actions sampled from elsewhere in the data.
    Zero padding would leak the termination to a model that is to predict it. With `spec.padded` a chunk may
    reach beyond any episode's end, and `Batch.valid` tells the padding.

    Raises:
        ValueError: at trace time, if longer chunks are to start at every row without padding, or if returns
            are asked of a window without them.
    """
    if spec.every_row and spec.chunk != 1 and not spec.padded:
        raise ValueError(f"chunk={spec.chunk}: only chunks of 1 action may start at every row unpadded")
    k_start, k_goals, k_elsewhere = jr.split(key, 3)
    starts = step_starts if spec.starts_anywhere else chunk_starts
    start, last = starts(window.episodes, spec.batch, k_start)
    rows = start[:, None] + jnp.arange(spec.chunk)[None, :]
    end, actions, valid = start + spec.chunk, actions_at(window, rows), None
    if spec.padded:
        inside = rows <= last[:, None]
        actions, valid = jnp.where(inside[..., None], actions, 0.0), inside.astype(actions.dtype)
        rows, end = jnp.minimum(rows, last[:, None] + 1), jnp.minimum(end, last + 1)
    elif window.episodes.terminated is not None:
        actions = _pad_terminated(window, rows, last, actions, k_elsewhere)
        rows, end = jnp.minimum(rows, last[:, None] + 1), jnp.minimum(end, last + 1)
    ends = jnp.concatenate([rows[:, 1:], end[:, None]], axis=1)
    if spec.goals:
        goals, subgoals, value_row = _goals(window, spec, start, last, k_goals)
    else:
        goals, subgoals, value_row = None, None, None
    following = jnp.minimum(start + spec.chunk, last)
    return Batch(
        obs=window.obs[start],
        actions=actions,
        next_obs=window.obs[end],
        rewards=_rewards(window, spec, rows, valid),
        masks=None if window.mask is None else _inside(window.mask[rows], valid),
        goals=goals,
        next_action=actions_at(window, following) if spec.next_action else None,
        subgoals=subgoals,
        states=window.obs[ends] if spec.states else None,
        return_to_go=(
            _return_to_go(window, spec, jnp.concatenate([start[:, None], ends], axis=1), last, value_row)
            if spec.return_to_go
            else None
        ),
        valid=valid,
    )


def _rewards(
    window: Window, spec: SampleSpec, rows: Int[Array, "B H"], valid: Float[Array, "B H"] | None
) -> Float[Array, "B H"] | None:
    return None if window.reward is None else _scaled(_inside(window.reward[rows], valid), spec.reward_scale)


def _inside(x: Float[Array, "B H"], valid: Float[Array, "B H"] | None) -> Float[Array, "B H"]:
    """`x`, and 0 in the padding."""
    return x if valid is None else x * valid


def _return_to_go(
    window: Window,
    spec: SampleSpec,
    rows: Int[Array, "B H1"],
    last: Int[Array, " B"],
    goal: Int[Array, " B"] | None,
) -> Float[Array, "B H1"]:
    """Returns of the data from each of the rows on; `goal` is the row of `Goals.value`, if there are goals.

    Source: the samplers of MAC's authors, for F-MPC.
    """
    if goal is not None:
        ahead = (rows <= goal[:, None]) & (goal < last)[:, None]
        return ahead.astype(jnp.float32)
    if window.return_to_go is None:
        raise ValueError("the window has no returns; make it with make_window(..., return_to_go=True)")
    return _scaled(window.return_to_go[rows], spec.reward_scale)


def _scaled(reward: Float[Array, "B H"], scale: Number) -> Float[Array, "B H"]:
    return reward if isinstance(scale, float) and scale == 1 else scale * reward


def actions_at(window: Window, rows: Int[Array, "*B"]) -> Float[Array, "*B A"]:
    """Actions of rows, as every batch has them: within the open interval from -1 to 1."""
    return jnp.clip(window.action[rows], -ACTION_LIMIT, ACTION_LIMIT)


def _pad_terminated(
    window: Window,
    rows: Int[Array, "B H"],
    last: Int[Array, " B"],
    actions: Float[Array, "B H A"],
    key: Key[Array, ""],
) -> Float[Array, "B H A"]:
    """`actions`, with those after the last action of an episode taken from runs of actions elsewhere."""
    start, end = step_starts(window.episodes, len(rows), key)
    since = jnp.maximum(rows - last[:, None] - 1, 0)  # steps since the termination
    elsewhere = jnp.minimum(start[:, None] + since, end[:, None])
    beyond = jnp.broadcast_to((rows > last[:, None])[..., None], actions.shape)
    return jnp.where(beyond, actions_at(window, elsewhere), actions)


def chunk_starts(
    episodes: EpisodeIndex, batch: int, key: Key[Array, ""]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Rows at which chunks begin, and the last row of each one's episode at which an action is taken."""
    number = jr.randint(key, (batch,), 0, episodes.n_starts)
    return _place(episodes, episodes.starts_before, number)


def step_starts(
    episodes: EpisodeIndex, batch: int, key: Key[Array, ""]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Does what `chunk_starts` does, for all rows at which an action is taken."""
    number = jr.randint(key, (batch,), 0, episodes.n_steps)
    return _place(episodes, episodes.steps_before, number)


def goal_rows(
    episodes: EpisodeIndex,
    law: GoalDistribution,
    row: Int[Array, " B"],
    last: Int[Array, " B"],
    key: Key[Array, ""],
) -> Int[Array, " B"]:
    """Row of a goal for each of the rows `row`, drawn as `law` says.

    Args:
        last: last row of each one's episode at which an action is taken. No goal lies behind it.
    Source: the goal-conditioned samplers of OGBench (Park et al. 2025) and of MAC's authors.
    """
    k_current, k_own, k_step, k_any = jr.split(key, 4)
    u = jr.uniform(k_step, row.shape)
    if law.geometric:
        ahead = 1 + jnp.floor(jnp.log1p(-u) / jnp.log(law.discount))
        later = row + jnp.minimum(ahead, (last - row).astype(u.dtype)).astype(row.dtype)
    else:
        # Rounding counts steps, not row numbers, which float32 cannot tell apart beyond 2**24.
        near = jnp.minimum(row + 1, last)
        later = near + jnp.round(u * (last - near).astype(u.dtype)).astype(row.dtype)
    anywhere, _ = step_starts(episodes, len(row), k_any)
    share = law.trajectory / max(law.trajectory + law.random, 1e-12)
    goal = jnp.where(jr.uniform(k_own, row.shape) < share, later, anywhere)
    return jnp.where(jr.uniform(k_current, row.shape) < law.current, row, goal)


def _goals(
    window: Window, spec: SampleSpec, row: Int[Array, " B"], last: Int[Array, " B"], key: Key[Array, ""]
) -> tuple[Goals, Subgoals | None, Int[Array, " B"]]:
    """Goals and subgoals, and the row of `Goals.value`."""
    assert spec.goals is not None
    k_value, k_actor = jr.split(key)
    value = goal_rows(window.episodes, spec.goals.value, row, last, k_value)
    actor = goal_rows(window.episodes, spec.goals.actor, row, last, k_actor)
    columns = jnp.asarray(spec.goals.columns)

    def states(rows: Int[Array, " B"]) -> Float[Array, "B G"]:
        return window.obs[rows][:, columns]

    reached = (row <= value) & (value < row + spec.chunk)
    goals = Goals(states(value), states(actor), reached.astype(jnp.float32))
    if spec.subgoals is None:
        return goals, None, value
    steps, reached = steps_to_goal(spec.subgoals, row, last, value)
    on_the_way, _ = steps_to_goal(spec.subgoals, row, last, actor)
    subgoals = Subgoals(
        steps=steps.astype(jnp.float32),
        next_obs=window.obs[row + steps],
        reached=reached.astype(jnp.float32),
        value=states(row + steps),
        actor=states(row + on_the_way),
        ahead=states(jnp.minimum(row + spec.subgoals.steps, last)),
    )
    return goals, subgoals, value


def steps_to_goal(
    spec: SubgoalSpec, row: Int[Array, " B"], last: Int[Array, " B"], goal: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"]]:
    """Counts the steps taken from `row` towards the row `goal`; also whether they reach it.

    Source: the sampler of hierarchical goals of Park et al. 2025 (horizon reduction, SHARSA).
    """
    limit, ahead = jnp.minimum(spec.steps, last - row), goal - row
    steps = jnp.where((ahead >= 0) & (ahead < limit), ahead, limit)
    if spec.ends_count:
        return steps, steps < spec.steps
    return steps, (ahead >= 0) & (ahead < spec.steps) & (goal <= last)


def _place(
    episodes: EpisodeIndex, before: Int[Array, " E"], number: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Row of item `number`, and the last row of its episode at which an action is taken."""
    episode = _episode_of(before, number)
    first = episodes.first[episode]
    return first + number - before[episode], first + episodes.steps[episode] - 1


def _episode_of(before: Int[Array, " E"], number: Int[Array, " B"]) -> Int[Array, " B"]:
    """The episode that item `number` belongs to, `before[e]` items belonging to earlier ones."""
    # Unrolled: as a loop, each of its 17 rounds at 100,000 episodes would be a launch on a GPU.
    return jnp.searchsorted(before, number, side="right", method="scan_unrolled") - 1
