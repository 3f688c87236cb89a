"""The data that algorithms, samplers and environments exchange.

Axis letters used everywhere: S seeds, K steps per segment, B batch, H actions per chunk,
T imagined chunks, D observation, A action, G goal, N rows, E episodes.
"""

from typing import NamedTuple

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

Metrics = dict[str, Float[Array, ""]]
"""Scalars of one update, named `group/name`, for instance `critic/q_mean`."""


class EnvSpec(NamedTuple):
    """Static facts about an environment; hashable, so it may be a static argument.

    `goal_dim` is None for a single-task environment, else the width of the goal representation.
    `tasks` lists the 1-based ids of the tasks that an evaluation runs.
    `max_steps` is the episode limit in control steps; `control_dt` is seconds per control step.
    """

    name: str
    obs_dim: int
    action_dim: int
    goal_dim: int | None
    tasks: tuple[int, ...]
    max_steps: int
    control_dt: float


class SampleSpec(NamedTuple):
    """What an algorithm asks of the sampler: `batch` chunks of `chunk` actions each."""

    batch: int
    chunk: int


class Window(eqx.Module):
    """Device-resident rows from which chunks are drawn; an argument of the training segment.

    Rows are whole episodes laid end to end; the last row of an episode is its final state and
    its action means nothing. `starts[:n_starts]` are the rows at which a chunk may begin, padded
    so that windows of equal row counts share one compiled program. `obs` is already normalised;
    `reward` and `mask` (0 where the task is solved) describe the row's own state, before acting.
    """

    obs: Float[Array, "N D"]
    action: Float[Array, "N A"]
    reward: Float[Array, " N"] | None
    mask: Float[Array, " N"] | None
    starts: Int[Array, " M"]
    n_starts: Int[Array, ""]


class Batch(eqx.Module):
    """`B` chunks of `H` actions; `next_obs` is the state that a chunk ends in.

    `rewards` and `masks` are those of the `H` states that begin each action.
    """

    obs: Float[Array, "B D"]
    actions: Float[Array, "B H A"]
    next_obs: Float[Array, "B D"]
    rewards: Float[Array, "B H"] | None
    masks: Float[Array, "B H"] | None


class Episodes(eqx.Module):
    """Results of one evaluation call, axes seeds, tasks, episodes.

    `length` is in control steps; `dropped` counts the contacts that the physics engine left out in the
    whole episode for want of a slot: where it is not 0, the episode is doubtful.
    """

    success: Bool[Array, "S tasks E"]
    episode_return: Float[Array, "S tasks E"]
    length: Int[Array, "S tasks E"]
    dropped: Int[Array, "S tasks E"]
