"""Drawing batches of action chunks, and their goals, from a window, on the device."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.types import Batch, EpisodeIndex, GoalLaw, Goals, GoalSpec, SampleSpec, Window

ACTION_LIMIT = 1 - 1e-5
"""Actions are clipped to ± this, as in the authors' implementation."""


def sample(window: Window, spec: SampleSpec, key: Key[Array, ""]) -> Batch:
    """`spec.batch` chunks, uniform over the window's valid starts, with replacement.

    A start leaves room for the whole chunk in its episode, so chunks never cross an episode.
    """
    k_start, k_goals = jr.split(key)
    start, last = chunk_starts(window.episodes, spec.batch, k_start)
    rows = start[:, None] + jnp.arange(spec.chunk)[None, :]
    return Batch(
        obs=window.obs[start],
        actions=jnp.clip(window.action[rows], -ACTION_LIMIT, ACTION_LIMIT),
        next_obs=window.obs[start + spec.chunk],
        rewards=None if window.reward is None else window.reward[rows],
        masks=None if window.mask is None else window.mask[rows],
        goals=spec.goals and _goals(window, spec.goals, start, last, spec.chunk, k_goals),
    )


def chunk_starts(
    episodes: EpisodeIndex, batch: int, key: Key[Array, ""]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Rows at which chunks begin, and the last row of each one's episode at which an action is taken."""
    number = jr.randint(key, (batch,), 0, episodes.n_starts)
    episode = _episode_of(episodes.starts_before, number)
    first = episodes.first[episode]
    return first + number - episodes.starts_before[episode], first + episodes.steps[episode] - 1


def goal_rows(
    episodes: EpisodeIndex,
    law: GoalLaw,
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
    number = jr.randint(k_any, row.shape, 0, episodes.n_steps)
    episode = _episode_of(episodes.steps_before, number)
    anywhere = episodes.first[episode] + number - episodes.steps_before[episode]
    share = law.trajectory / max(law.trajectory + law.random, 1e-12)
    goal = jnp.where(jr.uniform(k_own, row.shape) < share, later, anywhere)
    return jnp.where(jr.uniform(k_current, row.shape) < law.current, row, goal)


def _goals(
    window: Window,
    spec: GoalSpec,
    row: Int[Array, " B"],
    last: Int[Array, " B"],
    chunk: int,
    key: Key[Array, ""],
) -> Goals:
    k_value, k_actor = jr.split(key)
    value = goal_rows(window.episodes, spec.value, row, last, k_value)
    actor = goal_rows(window.episodes, spec.actor, row, last, k_actor)
    columns = jnp.asarray(spec.columns)

    def states(rows: Int[Array, " B"]) -> Float[Array, "B G"]:
        return window.obs[rows][:, columns]

    reached = (row <= value) & (value < row + chunk)
    return Goals(states(value), states(actor), reached.astype(jnp.float32))


def _episode_of(before: Int[Array, " E"], number: Int[Array, " B"]) -> Int[Array, " B"]:
    """The episode that item `number` belongs to, `before[e]` items belonging to earlier ones."""
    # Unrolled: as a loop, each of its 17 rounds at 100,000 episodes would be a launch on a GPU.
    return jnp.searchsorted(before, number, side="right", method="scan_unrolled") - 1
