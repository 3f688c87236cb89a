"""The data that algorithms, samplers and environments exchange.

Axis letters used everywhere: S seeds, K steps per segment, B batch, H actions per chunk,
T imagined chunks, D observation, A action, G goal, N rows, E episodes.
"""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

Number = float | Float[Array, ""]
"""A hyperparameter: a plain number, or one that is traced because configurations differ in it."""

Metrics = dict[str, Float[Array, ""]]
"""Scalars of one update, named `group/name`, for instance `critic/q_mean`."""


class EnvSpec(NamedTuple):
    """Static facts about an environment; hashable, so it may be a static argument.

    `goal_dim` is None for a single-task environment, else the width of the goal representation, and
    `goal_columns` are the entries of an observation that make up the goal which that state reaches.
    `tasks` lists the 1-based ids of the tasks that an evaluation runs.
    `max_steps` is the episode limit in control steps; `control_dt` is seconds per control step.
    `recorded` says that rewards and terminations are recorded in the dataset, as D4RL's gym tasks
    have them, and not computed from observations. `score_range` are the returns that such a task's
    normalised score calls 0 (a random policy) and 100 (an expert).
    """

    name: str
    obs_dim: int
    action_dim: int
    goal_dim: int | None
    tasks: tuple[int, ...]
    max_steps: int
    control_dt: float
    goal_columns: tuple[int, ...] = ()
    recorded: bool = False
    score_range: tuple[float, float] | None = None


def _no() -> Bool[Array, ""]:
    return jnp.zeros((), bool)


def _zero() -> Int[Array, ""]:
    return jnp.zeros((), jnp.int32)


class EnvState(eqx.Module):
    """State of one environment: arrays only, so it may be carried by `lax.scan` and checkpointed.

    Environments add what they need: physics, targets, random keys. The defaults are those of a reset.

    Attributes:
        obs: observation of the current state, in the dataset's units (not normalised).
        goal: goal representation of a goal-conditioned environment, None for a single task.
        reward: reward of the last `step` (0 after a reset).
        success: whether the last `step` reported success (False after a reset).
        done: whether the episode has ended, by success, another termination or the time limit.
        t: control steps taken since the reset.
        dropped: contacts left out in this episode because the engine's contact buffer was full.
    """

    obs: Float[Array, " D"]
    goal: Float[Array, " G"] | None
    reward: Float[Array, ""] = eqx.field(kw_only=True, default_factory=lambda: jnp.zeros(()))
    success: Bool[Array, ""] = eqx.field(kw_only=True, default_factory=_no)
    done: Bool[Array, ""] = eqx.field(kw_only=True, default_factory=_no)
    t: Int[Array, ""] = eqx.field(kw_only=True, default_factory=_zero)
    dropped: Int[Array, ""] = eqx.field(kw_only=True, default_factory=_zero)


StateT = TypeVar("StateT", bound=EnvState)
"""The states of one kind of environment."""


@runtime_checkable
class Env(Protocol[StateT]):
    """An environment, as evaluation reads it: pure functions of one environment, vmapped by the caller.

    `envs_mjx.base.AbstractEnv` satisfies this protocol and says what each method does.
    """

    @property
    def spec(self) -> EnvSpec: ...

    def reset(self, key: Key[Array, ""], task: Int[Array, ""]) -> StateT: ...

    def step(self, state: StateT, action: Float[Array, " A"]) -> StateT: ...


class GoalDistribution(NamedTuple):
    """Goal-sampling distribution for a state of the data: three sources with these probabilities.

    Attributes:
        current: the state itself.
        trajectory: a later state of its episode.
        random: any state of the data.
        geometric: whether a later state is the `Geometric(1 - discount)`-th (1, 2, ...) after it, or the
            episode's last if that is sooner; otherwise it is uniform over those that are left.
        discount: factor per environment step, in (0, 1); read if `geometric`.
    """

    current: float
    trajectory: float
    random: float
    geometric: bool
    discount: float


class GoalSpec(NamedTuple):
    """The goals that go with each chunk: two independent draws, for values and for policies.

    `columns` are the entries of an observation that make up a goal (`EnvSpec.goal_columns`).
    """

    columns: tuple[int, ...]
    value: GoalDistribution
    actor: GoalDistribution


class SubgoalSpec(NamedTuple):
    """States further ahead, for methods that learn from n steps at once or through subgoals.

    Attributes:
        steps: how far ahead, n; less where the goal or the episode's end comes first.
        ends_count: whether to come within n steps of an episode's end counts as reaching the goal, whatever
            the goal is. So do the samplers behind the published numbers.
    """

    steps: int
    ends_count: bool = True


class SampleSpec(NamedTuple):
    """Request to the sampler: `batch` chunks of `chunk` actions each, maybe with goals.

    Attributes:
        every_row: with chunks of one action, whether they start at every row that has a next one. Else at
            those that MAC's authors use, to which an episode's last two transitions do not belong.
        next_action: whether the data's action after the chunk is wanted.
        subgoals: what is wanted of states further ahead; needs `goals`.
        reward_scale: factor of rewards.
    """

    batch: int
    chunk: int
    goals: GoalSpec | None = None
    every_row: bool = False
    next_action: bool = False
    subgoals: SubgoalSpec | None = None
    reward_scale: float = 1.0


class Column(eqx.Module):
    """Rows as they are stored, and the map to what networks read: `(stored - center) / width`.

    `stored` is float32 in the dataset's units or uint16 codes; indexing gives float32 in normalised
    units. Normalised or decoded copies of all rows are never made, so that memory holds the data once.
    """

    stored: Num[Array, "N D"]
    center: Float[Array, " D"]
    width: Float[Array, " D"]

    def __getitem__(self, rows: Any) -> Float[Array, "*B D"]:
        raw = self.stored[rows].astype(jnp.float32)
        return (raw - jnp.broadcast_to(self.center, raw.shape)) / jnp.broadcast_to(self.width, raw.shape)

    def __len__(self) -> int:
        return len(self.stored)

    __iter__ = None  # else Python would ask for rows beyond the last, which JAX answers for ever


class EpisodeIndex(eqx.Module):
    """Index of a window's episodes; tables of E episodes, some of which may be padding.

    An episode of T transitions has T + 1 rows. Padding stands at the end, has `steps` 0, and its counts
    `before` are the totals, so that no row number leads to it.

    Attributes:
        first: row of each episode's first state.
        steps: transitions of each episode, T.
        starts_before: how many rows of earlier episodes a chunk may start at.
        steps_before: transitions of earlier episodes.
        n_starts: rows at which a chunk may start, in all.
        n_steps: transitions in all.
        fell: whether each episode terminated. There chunks begin at every row before it, and
            go on over it. None where data record no such ends (`EnvSpec.recorded`).
    """

    first: Int[Array, " E"]
    steps: Int[Array, " E"]
    starts_before: Int[Array, " E"]
    steps_before: Int[Array, " E"]
    n_starts: Int[Array, ""]
    n_steps: Int[Array, ""]
    fell: Bool[Array, " E"] | None = None


class Window(eqx.Module):
    """Device-resident rows from which chunks are drawn; an argument of the training segment.

    Rows are whole episodes laid end to end; the last row of an episode is its final state and
    its action means nothing. `reward` and `mask` (0 where the task is solved) describe the row's own
    state, before acting. Where data record them (`EnvSpec.recorded`), `reward` is what the row's action
    earned and `mask` is 0 if it was terminal; the terminal state has reward 0 and mask 0. Windows of
    equal shapes share one compiled program.
    """

    obs: Column
    action: Column
    reward: Float[Array, " N"] | None
    mask: Float[Array, " N"] | None
    episodes: EpisodeIndex


class Goals(eqx.Module):
    """Goals of B chunks, normalised as observations are.

    Attributes:
        value: goal for models, values and critics.
        actor: goal for the policy.
        reached: 1 where the row that `value` was taken from is one of the H states that begin the chunk's
            actions, else 0: labels go by row, so an equal state elsewhere does not count.
    """

    value: Float[Array, "B G"]
    actor: Float[Array, "B G"]
    reached: Float[Array, " B"]


class Subgoals(eqx.Module):
    """States up to n steps ahead of B rows (`SubgoalSpec`), and the goals that they reach.

    Attributes:
        steps: how many steps `next_obs` is ahead: n, or less if `Goals.value` or the episode's end is nearer.
        next_obs: that state.
        reached: 1 where it is less than n steps ahead, so that `Goals.value` counts as reached, else 0.
        value: the goal that `next_obs` reaches.
        actor: as `value`, if the goal on the way is `Goals.actor`.
        ahead: the goal that the state n steps ahead reaches, or the episode's end if that is nearer.
    """

    steps: Float[Array, " B"]
    next_obs: Float[Array, "B D"]
    reached: Float[Array, " B"]
    value: Float[Array, "B G"]
    actor: Float[Array, "B G"]
    ahead: Float[Array, "B G"]


class Batch(eqx.Module):
    """`B` chunks of `H` actions; `next_obs` is the state that a chunk ends in.

    `rewards` and `masks` are those of the `H` rows that begin each action. After a
    termination a chunk stays in the terminal state: reward 0, mask 0, and actions from elsewhere in the data.
    `next_action` is what the data do in `next_obs`, or, where their episode ends there, before it.
    """

    obs: Float[Array, "B D"]
    actions: Float[Array, "B H A"]
    next_obs: Float[Array, "B D"]
    rewards: Float[Array, "B H"] | None
    masks: Float[Array, "B H"] | None
    goals: Goals | None = None
    next_action: Float[Array, "B A"] | None = None
    subgoals: Subgoals | None = None


class Episodes(eqx.Module):
    """Results of one evaluation call, axes seeds, tasks, episodes.

    `length` is in control steps; `dropped` counts the contacts that the physics engine left out in the
    whole episode because the contact buffer was full: where it is not 0, the episode is doubtful. `predicted`
    is what the algorithm thought at the start that `realised` would be, the episode's discounted return
    (`mac.run.report.episode_returns.realised_return`); None for an algorithm that predicts nothing.
    `unstable` marks episodes that ended because the simulation gave a state that is no number, or a huge one,
    after finite actions; such an episode has failed, with the return and the length up to the last sound
    state. `bad_action` marks those that ended because the policy gave an action that is not finite. None is
    none of them.
    """

    success: Bool[Array, "S tasks E"]
    episode_return: Float[Array, "S tasks E"]
    length: Int[Array, "S tasks E"]
    dropped: Int[Array, "S tasks E"]
    predicted: Float[Array, "S tasks E"] | None = None
    realised: Float[Array, "S tasks E"] | None = None
    unstable: Bool[Array, "S tasks E"] | None = None
    bad_action: Bool[Array, "S tasks E"] | None = None
