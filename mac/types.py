"""Data that algorithms, samplers and environments exchange.

Axis letters of this module: S seeds, K steps per segment, B batch, H actions per chunk, T imagined chunks,
D observation, A action, G goal, N rows, E episodes. Other modules say theirs where they differ.
"""

from collections.abc import Callable
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

    Attributes:
        goal_dim: width of the goal representation; None for a single-task environment.
        tasks: 1-based ids of the tasks that an evaluation runs.
        max_steps: time limit of an episode, control steps.
        control_dt: seconds per control step.
        goal_columns: entries of an observation that make up the goal which that state reaches.
        recorded: whether rewards and terminations are recorded in the dataset, as for D4RL's gym tasks, and
            not computed from observations.
        score_range: returns of normalised scores 0 (a random policy) and 100 (an expert).
        terminal: predicate of terminal states, given observations `[*B, D]` in the dataset's units; None
            where there is none that observations tell. A function of a module, so that specs compare equal.
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
    terminal: Callable[[Float[Array, "*B D"]], Bool[Array, "*B"]] | None = None


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
        geometric: whether the later state is the `Geometric(1 - discount)`-th (1, 2, ...) after the state, at
            most the episode's last. If False, it is uniform over the rest of the episode.
        discount: factor per environment step, in (0, 1); read if `geometric`.
    """

    current: float
    trajectory: float
    random: float
    geometric: bool
    discount: float


class GoalSpec(NamedTuple):
    """Goals of each chunk: two independent draws, for values and for policies.

    `columns` are the entries of an observation that make up a goal (`EnvSpec.goal_columns`).
    """

    columns: tuple[int, ...]
    value: GoalDistribution
    actor: GoalDistribution


class SubgoalSpec(NamedTuple):
    """States further ahead, for methods that learn from n steps at once or through subgoals.

    Attributes:
        steps: number of steps ahead, n; fewer where the goal or the episode's end comes first.
        ends_count: whether an episode's end within n steps counts as reaching any goal, as in the samplers
            behind the published numbers.
    """

    steps: int
    ends_count: bool = True


class SampleSpec(NamedTuple):
    """Request to the sampler: `batch` chunks of `chunk` actions each, maybe with goals.

    Attributes:
        every_row: whether chunks of one action start at every transition. If False, an episode's last two
            transitions are excluded, as in the code of MAC's authors.
        next_action: whether the batch contains the data's action after the chunk.
        subgoals: request for states further ahead; needs `goals`.
        reward_scale: factor of rewards.
        states: whether the batch contains the state after each action of the chunk.
        return_to_go: whether the batch contains the data's own returns.
        return_discount: discount factor per step of these returns.
        terminal_reward: reward of actions that lead to termination, in place of the data's; None keeps it.
        padded: whether chunks start at every transition and reach beyond the end of their episode
            (`Batch.valid`). If False, a chunk stays in its episode.
    """

    batch: int
    chunk: int
    goals: GoalSpec | None = None
    every_row: bool = False
    next_action: bool = False
    subgoals: SubgoalSpec | None = None
    reward_scale: float = 1.0
    states: bool = False
    return_to_go: bool = False
    return_discount: float = 1.0
    terminal_reward: float | None = None
    padded: bool = False

    @property
    def starts_anywhere(self) -> bool:
        """Whether chunks start at every transition of every episode."""
        return self.every_row or self.padded


class Column(eqx.Module):
    """Stored rows, and their map to inputs of networks: `(stored - center) / width`.

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

    __iter__ = None  # else Python would index past the last row, which JAX allows without end


class EpisodeIndex(eqx.Module):
    """Index of a window's episodes; tables of E episodes, some of which may be padding.

    An episode of T transitions has T + 1 rows. Padding stands at the end, has `steps` 0, and its counts
    `before` are the totals, so that no row number leads to it.

    Attributes:
        first: row of each episode's first state.
        steps: transitions of each episode, T.
        starts_before: number of rows in earlier episodes at which a chunk may start.
        steps_before: number of transitions in earlier episodes.
        n_starts: number of rows at which a chunk may start.
        n_steps: number of transitions.
        terminated: whether each episode terminated. In such an episode chunks start at every row before the
            terminal state, and continue over it. None where data record no terminations (`EnvSpec.recorded`).
    """

    first: Int[Array, " E"]
    steps: Int[Array, " E"]
    starts_before: Int[Array, " E"]
    steps_before: Int[Array, " E"]
    n_starts: Int[Array, ""]
    n_steps: Int[Array, ""]
    terminated: Bool[Array, " E"] | None = None


class Window(eqx.Module):
    """Device-resident rows from which chunks are drawn; an argument of the training segment.

    Rows are whole episodes laid end to end. The last row of an episode is its final state, whose action has
    no meaning. `reward` and `mask` (0 where the task is solved) belong to the row's own state, before the
    action. Where data record them (`EnvSpec.recorded`), `reward` is the reward of the row's action, and
    `mask` is 0 if the action led to termination; the terminal state has reward 0 and mask 0. Windows of equal
    shapes share one compiled program.

    `return_to_go` is the discounted sum of a row's reward and of those after it in its episode, 0 in the last
    row. None where no batch is to contain it (`SampleSpec.return_to_go`), or where there are no rewards.
    """

    obs: Column
    action: Column
    reward: Float[Array, " N"] | None
    mask: Float[Array, " N"] | None
    episodes: EpisodeIndex
    return_to_go: Float[Array, " N"] | None = None


class Goals(eqx.Module):
    """Goals of B chunks, normalised as observations are.

    Attributes:
        value: goal for models, values and critics.
        actor: goal for the policy.
        reached: 1 where the row of `value` is one of the H states in which the chunk's actions are taken,
            else 0. Labels go by row, so an equal state elsewhere does not count.
    """

    value: Float[Array, "B G"]
    actor: Float[Array, "B G"]
    reached: Float[Array, " B"]


class Subgoals(eqx.Module):
    """States up to n steps ahead of B rows (`SubgoalSpec`), and the goals that they reach.

    Attributes:
        steps: number of steps to `next_obs`: n, or fewer if `Goals.value` or the episode's end is nearer.
        next_obs: the state so many steps ahead.
        reached: 1 where `steps` is less than n, so that `Goals.value` counts as reached, else 0.
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

    `rewards` and `masks` are those of the H rows in which the actions are taken. After a termination the
    chunk is padded with the terminal state: reward 0, mask 0, and actions sampled from elsewhere in the data.
    `next_action` is the data's action in `next_obs`, or the one before it where the episode ends there.
    `states` are those after each action; the last of them is `next_obs`. `return_to_go` is the return of the
    data from each of the H rows and from the row after them to the episode's end, discounted by
    `SampleSpec.return_discount`. With goals it is 1 where the goal `Goals.value` is a row of the same episode
    from there on, before the last action's, else 0. `imagined` are transitions that a model predicted
    (`AbstractAlgorithm.replay`).

    With `SampleSpec.padded` a chunk may end after its episode: `valid` is 1 for actions of the episode, and 0
    for the padding, which has the episode's final state, actions, rewards and masks of 0.
    """

    obs: Float[Array, "B D"]
    actions: Float[Array, "B H A"]
    next_obs: Float[Array, "B D"]
    rewards: Float[Array, "B H"] | None
    masks: Float[Array, "B H"] | None
    goals: Goals | None = None
    next_action: Float[Array, "B A"] | None = None
    subgoals: Subgoals | None = None
    states: Float[Array, "B H D"] | None = None
    return_to_go: Float[Array, "B H1"] | None = None
    imagined: Any = None
    valid: Float[Array, "B H"] | None = None

    @property
    def chunk_obs(self) -> Float[Array, "B H D"]:
        """States in which the chunk's actions are taken; needs `states`."""
        assert self.states is not None
        return jnp.concatenate([self.obs[:, None], self.states[:, :-1]], axis=1)


class Past(eqx.Module):
    """The last C steps of E episodes, as acting sees them (`AbstractAlgorithm.history`), the newest last.

    Attributes:
        obs: normalised states in which the actions were taken.
        actions: as they were executed.
        rewards: in the environment's units.
        valid: False for steps before an episode's start, whose values have no meaning.
    """

    obs: Float[Array, "*E C D"]
    actions: Float[Array, "*E C A"]
    rewards: Float[Array, "*E C"]
    valid: Bool[Array, "*E C"]


class Episodes(eqx.Module):
    """Results of one evaluation call, axes seeds, tasks, episodes.

    Attributes:
        length: control steps.
        dropped: contacts dropped in the whole episode because the contact buffer was full; where it is not 0,
            the episode is doubtful.
        predicted: the algorithm's estimate of `realised` at the initial state; None without predictions.
        realised: discounted return (`mac.run.report.realized_return.realised_return`).
        unstable: episodes that ended because the simulation became unstable after finite actions
            (`mac.run.evaluate.UNSTABLE`). They are failures, with return and length up to the last sound
            state. None means no episode.
        bad_action: episodes that ended because the policy gave an action that is not finite. None means no
            episode.
    """

    success: Bool[Array, "S tasks E"]
    episode_return: Float[Array, "S tasks E"]
    length: Int[Array, "S tasks E"]
    dropped: Int[Array, "S tasks E"]
    predicted: Float[Array, "S tasks E"] | None = None
    realised: Float[Array, "S tasks E"] | None = None
    unstable: Bool[Array, "S tasks E"] | None = None
    bad_action: Bool[Array, "S tasks E"] | None = None
